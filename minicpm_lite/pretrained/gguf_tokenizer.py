"""Tokenizers as llama.cpp stores them in GGUF files: byte-level ones ("gpt2") and sentencepiece's ("llama").

Both are BPE. A byte-level vocabulary comes with its merges; that of sentencepiece, as MiniCPM's, with a score
for each piece: of all neighbours that are a piece together, those of the highest score are joined first. So
every way to cut a piece into two pieces is a merge, and the score of the piece is its rank. Of equal scores
the leftmost pair is joined, whichever it is; merges have an order and cannot say that, so a vocabulary in
which such a tie may matter is refused.

Sources: llama.cpp's src/llama-vocab.cpp; the conversion of sentencepiece models in transformers 5.23.

Choices, and the traps behind them:

- Sentencepiece writes a space as "▁" and puts one before each text; llama.cpp does so after each control
  token, too, and so it is done here. Where a text begins with a space there are two.
- What no piece covers is written in bytes: the pieces <0x00> to <0xFF>. What they do not cover is unknown.
- Some tokens are found in a text before it is cut: control and user-defined ones, and sentencepiece's unknown
  one. Not so what is spelt with a "▁", as runs of spaces are in files of before July 2024: no text holds it
  as it stands, and it is joined like any piece. These runs share a score, at times with a piece that was
  learned; there an order of merges does what llama.cpp does.
- A sentencepiece tokenizer begins texts with its start token unless the file says otherwise; a byte-level one
  does not unless the file says so. A sentencepiece file may leave out which tokens are the unknown one, start
  and end: then they are 0, 1 and 2.
"""

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from pathlib import Path
from reprlib import repr as shown

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .gguf import GGUFFile, read_gguf

__all__ = ["gguf_tokenizer", "special_id"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of tokens
_SPACE = "▁"
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # where a file does not say; those of Llama 2


def gguf_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that a GGUF file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the tokenizer is of another kind, splits text by rules that are not known here, or is
            damaged; the key is named.
    """
    file = read_gguf(path)
    kind = file.value("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"The tokenizer in {file.path} is of the kind {shown(kind)}; byte-level ones ('gpt2') and "
            "sentencepiece's ('llama') are rebuilt. Take tokenizer.json from the model's folder."
        )
    tokens = _list(file, "tokens", str)
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        raise ValueError(f"{file.path} holds the token {shown(twice[0])} twice in tokenizer.ggml.tokens.")
    types = [_NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in file.metadata:
        types = _list(file, "token_type", int, len(tokens))
    sentencepiece = kind == "llama"
    if sentencepiece:
        types = [
            _NORMAL if kind == _USER_DEFINED and _SPACE in token else kind
            for token, kind in zip(tokens, types, strict=True)
        ]
    tokenizer = (_sentencepiece if sentencepiece else _byte_level)(file, tokens, types)
    special = (_CONTROL, _UNKNOWN) if sentencepiece else (_CONTROL,)
    for token, kind in zip(tokens, types, strict=True):
        if kind in special:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    around = {
        name: _id(file, name, tokens)
        for name in ("bos", "eos")
        if _flag(file, f"add_{name}_token", sentencepiece and name == "bos")
    }
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(["bos"] if "bos" in around else []), "$A", *(["eos"] if "eos" in around else [])],
            special_tokens=[
                {"id": name, "ids": [index], "tokens": [tokens[index]]} for name, index in around.items()
            ],
        )
    return tokenizer


def special_id(file: GGUFFile, name: str) -> object:
    """What a file gives as the id of its "bos", "eos", "eot" or other special token; None if it has none."""
    sentencepiece = file.metadata.get("tokenizer.ggml.model") == "llama"
    default = _SENTENCEPIECE_IDS.get(name) if sentencepiece else None
    return file.metadata.get(f"tokenizer.ggml.{name}_token_id", default)


def _byte_level(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    rules = file.metadata.get("tokenizer.ggml.pre")
    if rules is None:
        raise ValueError(
            f"{file.path} does not say by which rules its model splits text (tokenizer.ggml.pre), and with "
            "other rules the same text gets other tokens. Take tokenizer.json from the model's folder, or a "
            "newer file."
        )
    if rules not in ("gpt-2", "gpt2", "smollm"):
        raise ValueError(
            f"{file.path} splits text by the rules {shown(rules)}; known are gpt-2 and smollm. With other "
            "rules the same text gets other tokens. Take tokenizer.json from the model's folder."
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in _list(file, "merges", str)]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise ValueError(
                f"{file.path} joins {' and '.join(map(shown, pair[:3]))}; expected two tokens of its "
                "vocabulary that together are a third. The file is damaged."
            )
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=_flag(file, "add_space_prefix", False))]
    if rules == "smollm":  # each digit is a token
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    scores = _list(file, "scores", float, len(tokens))
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"{file.path} gives in tokenizer.ggml.scores a number that is not finite.")
    unknown = tokens[_id(file, "unknown", tokens)]
    pieces = {
        token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL
    }
    lengths = sorted({len(piece) for piece in pieces if piece})  # a piece may be long, and few are as long
    cuts = (
        (piece[:at], piece[at:]) for piece in pieces for at in lengths[: bisect_left(lengths, len(piece))]
    )
    merges = []
    for left, right in cuts:
        if left in pieces and right in pieces:
            merges.append((left, right))
        elif all(len(part) == 1 or part in pieces for part in (left, right)):
            alone = next(part for part in (left, right) if part not in pieces)
            raise ValueError(
                f"{file.path} has the token {shown(left + right)} and none for {shown(alone)} alone. "
                "Sentencepiece joins the first of the second, which no list of merges can. Take "
                "tokenizer.json from the model's folder."
            )
    _refuse_ties(file, pieces, merges)
    # Of the ways to one piece, the longest beginning first, as transformers has it. Of pieces that share the
    # score of runs of spaces, what ends with a run stands left of it and is first, what begins with one last.
    merges.sort(
        key=lambda pair: (
            -pieces["".join(pair)],
            _is_run(pair[0]) - _is_run(pair[1]),
            -len(pair[0]),
            -len(pair[1]),
        )
    )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    first = [normalizers.Prepend(_SPACE)] if _flag(file, "add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if first else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer


def _refuse_ties(file: GGUFFile, pieces: dict[str, float], merges: list[tuple[str, str]]) -> None:
    """Refuse pieces of one score where the order in which they are joined may matter.

    What no merges make, such as single letters, is never joined. Runs of spaces may share a score with each
    other and with one piece more, as long as nothing that is made of these, and no other run, comes before.
    """
    made = set()
    for left, right in sorted(merges, key=lambda pair: len(pair[0]) + len(pair[1])):
        if all(len(part) == 1 or part in made for part in (left, right)):
            made.add(left + right)
    tied = defaultdict(list)
    for piece in pieces:
        if piece in made:
            tied[pieces[piece]].append(piece)
    for score, group in tied.items():
        others = [piece for piece in group if not _is_run(piece)]
        holds = [_SPACE * 2, *others]
        if len(group) > 1 and (
            len(others) > 1
            or any(pieces[piece] > score and any(part in piece for part in holds) for piece in made)
        ):
            one, other = (others + [piece for piece in group if _is_run(piece)])[:2]
            raise ValueError(
                f"{file.path} gives the tokens {shown(one)} and {shown(other)} one score, {score}, in "
                "tokenizer.ggml.scores; expected a score of its own for each token that is joined of others, "
                "since of equal ones the leftmost is joined first, which no list of merges says. Take "
                "tokenizer.json from the model's folder."
            )


def _is_run(piece: str) -> bool:
    """Whether a piece is nothing but spaces."""
    return not piece.strip(_SPACE)


def _flag(file: GGUFFile, key: str, default: bool) -> bool:
    flag = file.metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(flag, bool):
        raise ValueError(f"{file.path} gives tokenizer.ggml.{key} as {shown(flag)}; expected true or false.")
    return flag


def _id(file: GGUFFile, name: str, tokens: list[str]) -> int:
    index = special_id(file, name)
    if index is None:
        raise ValueError(f"{file.path} lacks the key tokenizer.ggml.{name}_token_id.")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ValueError(
            f"{file.path} gives tokenizer.ggml.{name}_token_id as {shown(index)}; expected an id of its "
            f"vocabulary, which has {len(tokens)} tokens."
        )
    return index


def _list(file: GGUFFile, key: str, kind: type, length: int | None = None) -> list:
    values = file.value(f"tokenizer.ggml.{key}")
    names = {str: "texts", int: "whole numbers", float: "numbers"}
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise ValueError(
            f"{file.path} gives tokenizer.ggml.{key} as {shown(values)}; expected a list of {names[kind]}."
        )
    if length is not None and len(values) != length:
        raise ValueError(
            f"{file.path} gives {len(values)} {names[kind]} in tokenizer.ggml.{key}; expected one for each "
            f"of its {length} tokens."
        )
    return values
