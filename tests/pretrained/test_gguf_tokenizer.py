"""Tokenizers in GGUF files: the ids of transformers and of llama.cpp, and every damaged key named."""

import json
import math
import random
import tracemalloc
from pathlib import Path

import gguf
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, trainers

from minicpm_lite import ModelConfig
from minicpm_lite.data.corpora import load_austen
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.pretrained import gguf_tokenizer as module
from minicpm_lite.pretrained import llama_cpp
from minicpm_lite.pretrained.checkpoints import load_special_tokens, load_tokenizer, save_pretrained
from minicpm_lite.pretrained.gguf import GGUFFile, read_gguf
from minicpm_lite.pretrained.gguf_tokenizer import gguf_tokenizer

# Tokenizers made by hand.


def write_tokenizer(path: Path, tokens: object = ("a", "b", "ab", "<s>"), merges: object = ("a b",), **keys: object) -> Path:  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    given = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": merges,
        "token_type": [1, 1, 1, 3],
    } | keys
    for name, value in given.items():
        if value is None:
            continue
        name = f"tokenizer.ggml.{name}"
        if isinstance(value, list | tuple):
            writer.add_array(name, list(value))
        else:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            kinds[type(value)](name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_token_at_the_beginning_is_added_where_the_file_says_so(tmp_path):
    for keys, expected in (
        ({}, [2]),
        ({"bos_token_id": 3}, [2]),
        ({"bos_token_id": 3, "add_bos_token": False}, [2]),
        ({"bos_token_id": 3, "add_bos_token": True}, [3, 2]),
    ):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "a.GGUF", **keys))
        assert tokenizer.encode("ab").ids == expected
        assert tokenizer.encode("ab", add_special_tokens=False).ids == [2]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"merges": ["a b c"]}, "joins 'a' and 'b' and 'c'; expected two tokens"),
        ({"merges": ["a"]}, "joins 'a'; expected two tokens"),
        ({"merges": ["a z"]}, "joins 'a' and 'z'; expected two tokens"),
        ({"tokens": ["a", "b"], "token_type": [1, 1]}, "joins 'a' and 'b'; expected two tokens"),
        ({"tokens": 1}, "gives tokenizer.ggml.tokens as 1; expected a list of texts"),
        ({"tokens": [1, 2]}, r"gives tokenizer.ggml.tokens as \[1, 2\]; expected a list of texts"),
        ({"merges": "a b"}, "gives tokenizer.ggml.merges as 'a b'; expected a list of texts"),
        (
            {"add_space_prefix": "yes"},
            "gives tokenizer.ggml.add_space_prefix as 'yes'; expected true or false",
        ),
        ({"add_bos_token": 1}, "gives tokenizer.ggml.add_bos_token as 1; expected true or false"),
        ({"add_bos_token": True}, "lacks the key tokenizer.ggml.bos_token_id"),
        (
            {"add_bos_token": True, "bos_token_id": 4},
            "gives tokenizer.ggml.bos_token_id as 4; expected an id of its vocabulary, which has 4 tokens",
        ),
        ({"add_bos_token": True, "bos_token_id": "a"}, "gives tokenizer.ggml.bos_token_id as 'a'"),
        ({"add_eos_token": True, "eos_token_id": True}, "gives tokenizer.ggml.eos_token_id as True"),
        ({"tokens": ["a", "b", "ab", "b"]}, "holds the token 'b' twice in tokenizer.ggml.tokens"),
        ({"token_type": 7}, "gives tokenizer.ggml.token_type as 7; expected a list of whole numbers"),
        ({"token_type": "text"}, "gives tokenizer.ggml.token_type as 'text'; expected a list"),
        ({"token_type": [1.0] * 4}, "gives tokenizer.ggml.token_type as .1.0, 1.0, .*; expected a list"),
        (
            {"token_type": [1, 1]},
            "gives 2 whole numbers in tokenizer.ggml.token_type; expected one for each of",
        ),
        ({"model": 1}, "is of the kind 1; byte-level"),
        ({"pre": ["gpt-2"]}, r"splits text by the rules \['gpt-2'\]"),
    ],
)
def test_a_damaged_tokenizer_is_named(keys, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"a.gguf {sentence}"):
        gguf_tokenizer(write_tokenizer(tmp_path / "a.gguf", **keys))


def test_byte_level_texts_may_end_with_a_token(tmp_path):
    keys = {"bos_token_id": 3, "eos_token_id": 0, "add_bos_token": True, "add_eos_token": True}
    assert gguf_tokenizer(write_tokenizer(tmp_path / "a.gguf", **keys)).encode("ab").ids == [3, 2, 0]
    keys |= {"tokens": ["a", "b", "ab", "$x: y"]}  # its text means nothing to the template
    assert gguf_tokenizer(write_tokenizer(tmp_path / "a.gguf", **keys)).encode("ab").ids == [3, 2, 0]


# Sentencepiece.

SPECIAL = ["<unk>", "<s>", "</s>", "<用户>", "<AI>"]
SPECIAL_TYPES = [2, 3, 3, 4, 4]


def sentencepiece_keys(**changes: object) -> dict[str, object]:
    """A vocabulary as sentencepiece learns it by BPE: special tokens, bytes, pieces by rank, characters."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.train_from_iterator(
        [" " + line for line in load_austen()[:200_000].splitlines() if line],
        trainers.BpeTrainer(vocab_size=500, show_progress=False, max_token_length=9),
    )
    by_id = sorted(learned.get_vocab(), key=learned.get_vocab().get)
    pieces = [piece for piece in by_id if len(piece) > 1] + [piece for piece in by_id if len(piece) == 1]
    tokens = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    scores = [0.0] * (len(SPECIAL) + 256) + [-float(rank) for rank in range(len(pieces))]
    types = SPECIAL_TYPES + [6] * 256 + [1] * len(pieces)
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 1,
    } | changes


@pytest.fixture(scope="module")
def keys() -> dict[str, object]:
    return sentencepiece_keys()


def as_llama_cpp_does(text: str, keys: dict[str, object], first: str = "▁") -> list[int]:
    """The loop of llm_tokenizer_spm: join the neighbours of the highest score, the leftmost first."""
    ids = {token: index for index, token in enumerate(keys["tokens"])}
    symbols = list(first + text.replace(" ", "▁"))
    while True:
        pairs = [
            (-keys["scores"][ids[left + right]], place)
            for place, (left, right) in enumerate(zip(symbols, symbols[1:], strict=False))
            if left + right in ids
        ]
        if not pairs:
            break
        place = min(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return [
        index
        for symbol in symbols
        for index in (
            [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        )
    ]


TEXTS = [
    "The Republic of 1984 had 12,345 citizens; it's said they'd all left by 3.30pm.",
    "  def f(x):\n\treturn x ** 2  # naïve café\n\n\n",
    "你好，世界。Ελληνικά, русский, 日本語 🙂",
    " a", "a ", "   ", "▁", "x\0y", "", "ﬁ e\u0301",
]  # fmt: skip


@pytest.mark.slow  # many texts through a slow oracle
@given(
    text=st.one_of(st.sampled_from(TEXTS), st.text(alphabet="aeth ▁sn.", max_size=40), st.text(max_size=20))
)
@settings(max_examples=200, deadline=None)
def test_sentencepiece_joins_what_llama_cpp_joins(text, keys, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "sentencepiece.gguf"
    if not path.exists():
        write_tokenizer(path, **keys, merges=None, pre="default")
    assume(not any(token in text for token in SPECIAL))  # they are found before the text is cut
    tokenizer = gguf_tokenizer(path)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == (as_llama_cpp_does(text, keys) if text else [])
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert tokenizer.encode(text).ids == [1, *ids]


@pytest.mark.parametrize("longest", [2, 3, 4, 8, 16])
@given(
    text=st.lists(st.sampled_from([" ", "  ", "     ", "\n", "the", "man", "<用户>"]), max_size=12).map(
        "".join
    )
)
@settings(max_examples=40, deadline=None)
def test_runs_of_spaces_that_are_user_defined_are_joined(text, longest, keys, tmp_path_factory):
    """As they are spelt with "▁", no text holds them before it is cut."""
    runs = ["▁" * length for length in range(2, longest + 1)]
    keys = keys | {
        "tokens": keys["tokens"] + runs,
        "scores": keys["scores"] + [0.0] * len(runs),
        "token_type": keys["token_type"] + [4] * len(runs),
    }
    path = tmp_path_factory.getbasetemp() / f"spaces-{longest}.gguf"
    if not path.exists():
        write_tokenizer(path, **keys, merges=None)
    tokenizer = gguf_tokenizer(path)
    expected = [as_llama_cpp_does(part, keys) if part else [] for part in text.split("<用户>")]
    with_controls = [token for part in expected for token in (3, *part)][1:]
    assert tokenizer.encode(text, add_special_tokens=False).ids == with_controls
    assert len(tokenizer.get_added_tokens_decoder()) == len(SPECIAL)


def test_sentencepiece_cuts_long_texts_as_llama_cpp_does(keys, tmp_path):
    tokenizer = gguf_tokenizer(write_tokenizer(tmp_path / "a.gguf", **keys, merges=None))
    text, start = load_austen(), random.Random(0)
    for at in (start.randrange(len(text) - 300) for _ in range(40)):
        piece = text[at : at + 300]
        assert tokenizer.encode(piece, add_special_tokens=False).ids == as_llama_cpp_does(piece, keys)


def test_sentencepiece_is_that_of_transformers(keys, tmp_path):
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    ids = {token: index for index, token in enumerate(keys["tokens"])}
    pieces = slice(len(SPECIAL) + 256, None)
    merges = generate_merges(ids, dict(zip(keys["tokens"][pieces], keys["scores"][pieces], strict=True)))
    theirs = LlamaTokenizer(vocab=ids, merges=merges)
    ours = gguf_tokenizer(write_tokenizer(tmp_path / "a.gguf", **keys, merges=None))
    for text in [*(text for text in TEXTS if not text.startswith((" ", "▁"))), load_austen()[:20_000]]:
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(found) == theirs.decode(found, skip_special_tokens=True)


def test_sentencepiece_written_anew_is_the_same_in_stock_transformers(keys, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = gguf_tokenizer(write_tokenizer(tmp_path / "a.gguf", **keys, merges=None))
    model = Decoder(ModelConfig(8, 8, 1, 2, len(keys["tokens"]), eos_token_id=2))
    save_pretrained(model, tmp_path / "model", tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in [*TEXTS, "<用户>the man<AI>and</s>"]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
        assert load_tokenizer(tmp_path / "model").encode(text).ids == tokenizer.encode(text).ids


def test_sentencepiece_finds_special_tokens_first(keys, tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "a.gguf", **keys, merges=None))
    one, other = (as_llama_cpp_does(text, keys) for text in ("the man", "and"))
    assert tokenizer.encode("<用户>the man<AI>and</s>").ids == [1, 3, *one, 4, *other, 2]
    assert tokenizer.decode([1, 3, *one, 4, *other, 2]) == "<用户> the man<AI> and"


@pytest.mark.parametrize(
    ("changes", "around", "first"),
    [
        ({}, ([1], []), True),
        ({"add_bos_token": False}, ([], []), True),
        ({"add_eos_token": True}, ([1], [2]), True),
        ({"add_bos_token": False, "add_eos_token": True, "eos_token_id": 4}, ([], [4]), True),
        ({"add_space_prefix": False}, ([1], []), False),
    ],
)
def test_what_sentencepiece_puts_around_a_text(changes, around, first, keys, tmp_path):
    tokenizer = gguf_tokenizer(write_tokenizer(tmp_path / "a.gguf", **keys | changes, merges=None))
    before, after = around
    expected = as_llama_cpp_does(" the  man", keys, "▁" if first else "")
    assert tokenizer.encode(" the  man").ids == [*before, *expected, *after]
    prompt = load_tokenizer(tmp_path / "a.gguf").encode(" the  man").ids
    assert prompt == [*before, *expected], "a text that is closed has no answer"
    assert tokenizer.decode(expected) == " the  man"


@pytest.mark.parametrize(
    ("changes", "named", "ends"),
    [
        ({"bos_token_id": None}, {"bos_token": "<s>", "eos_token": "</s>"}, [2]),
        ({"eos_token_id": 4, "eot_token_id": 3}, {"bos_token": "<s>", "eos_token": "<AI>"}, [4, 3]),
        ({"model": "gpt2", "bos_token_id": None}, {}, []),  # nothing follows from this kind
    ],
)
def test_special_tokens_that_a_file_does_not_say(changes, named, ends, keys, tmp_path):
    path = write_tokenizer(tmp_path / "a.gguf", **keys | changes, merges=None)
    assert load_special_tokens(path) == named
    assert llama_cpp._ends(read_gguf(path)) == ends


def test_a_long_token_costs_no_more_than_its_length(tmp_path):
    """All ways to cut 20,000 letters in two are 400 MB."""
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "ab" * 10_000]
    keys = {"model": "llama", "tokens": tokens, "scores": [0.0] * 7, "token_type": [2, 3, 3, 1, 1, 1, 1]}
    path = write_tokenizer(tmp_path / "a.gguf", **keys, merges=None)
    tracemalloc.start()
    tokenizer = gguf_tokenizer(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    assert tokenizer.encode("abab", add_special_tokens=False).tokens == ["<unk>", "ab", "ab"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("ab▁", min_size=1, max_size=7), unique=True, max_size=12))
def test_every_way_to_cut_a_piece_in_two_is_a_merge(pieces):
    pieces = ["a", "b", "▁", *(piece for piece in pieces if len(piece) > 1)]
    keys = {
        "tokens": ["<unk>", *pieces],
        "scores": [0.0] + [-float(rank) for rank in range(len(pieces))],
        "token_type": [2] + [1] * len(pieces),
    }
    head = GGUFFile(Path("a.gguf"), {f"tokenizer.ggml.{name}": value for name, value in keys.items()}, {})
    head.metadata["tokenizer.ggml.model"] = "llama"
    model = json.loads(module._sentencepiece(head, keys["tokens"], keys["token_type"]).to_str())["model"]
    cuts = [[piece[:at], piece[at:]] for piece in pieces for at in range(1, len(piece))]
    expected = [cut for cut in cuts if cut[0] in pieces and cut[1] in pieces]
    assert model["merges"] == sorted(expected, key=lambda cut: (pieces.index("".join(cut)), -len(cut[0])))


def with_scores(scores: dict[str, float]) -> dict[str, object]:
    """A vocabulary of these pieces."""
    return {
        "model": "llama",
        "tokens": ["<unk>", *scores],
        "scores": [0.0, *scores.values()],
        "token_type": [2] + [1] * len(scores),
        "add_bos_token": False,
        "add_space_prefix": False,
    }


LETTERS = {"▁": -9.0, "a": -9.0, "b": -9.0}


@pytest.mark.parametrize(
    ("scores", "named"),
    [
        ({"ab": -3.0, "ba": -3.0}, "the tokens 'ab' and 'ba' one score, -3.0"),
        ({"aa": -1.0, "ab": -3.0, "aab": -3.0}, "the tokens 'ab' and 'aab' one score, -3.0"),
        ({"▁▁": 0.0, "▁a": 0.0, "b▁": 0.0}, "the tokens '▁a' and 'b▁' one score, 0.0"),
        ({"▁▁": -2.0, "▁▁▁": -1.0, "▁▁▁▁": -2.0}, "the tokens '▁▁' and '▁▁▁▁' one score, -2.0"),
        ({"▁▁": -2.0, "▁a": -2.0, "▁a▁": -1.0}, "the tokens '▁a' and '▁▁' one score, -2.0"),
    ],
)
def test_scores_that_tie_where_the_order_may_matter_are_refused(scores, named, tmp_path):
    path = write_tokenizer(tmp_path / "a.gguf", **with_scores(LETTERS | scores), merges=None)
    with pytest.raises(ValueError, match=f"a.gguf gives {named}, in tokenizer.ggml.scores; expected a score"):
        gguf_tokenizer(path)


@settings(deadline=None, max_examples=200)
@given(
    data=st.data(),
    learned=st.lists(st.text("ab▁", min_size=2, max_size=5).filter(lambda text: text.strip("▁")), unique=True, max_size=8),
    runs=st.sets(st.integers(2, 7)),
    first=st.integers(0, 3),
)  # fmt: skip
def test_ties_that_are_read_are_cut_as_llama_cpp_does(data, learned, runs, first):
    """Runs of spaces tie, also with one piece that was learned, and so does what no merges make."""
    scores = {piece: -float(rank) for rank, piece in enumerate(learned)}
    scores |= {"▁" * length: -float(first) for length in runs}
    keys = with_scores(LETTERS | scores | {"yyy": 0.0, "zzz": 0.0})
    head = GGUFFile(Path("a.gguf"), {f"tokenizer.ggml.{name}": value for name, value in keys.items()}, {})
    try:
        tokenizer = module._sentencepiece(head, keys["tokens"], keys["token_type"])
    except ValueError:
        assert first > 0, "nothing comes before the first piece and runs of its score"
        return
    for text in data.draw(st.lists(st.text("▁▁▁ab", min_size=1, max_size=20), min_size=5, max_size=5)):
        assert tokenizer.encode(text).ids == as_llama_cpp_does(text, keys, "")


def test_without_bytes_the_unknown_token_stands_for_what_no_piece_covers(tmp_path):
    keys = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "▁", "a", "▁a"], "scores": [0.0] * 3 + [-2.0, -3.0, -1.0], "token_type": [2, 3, 3, 1, 1, 1]}  # fmt: skip
    tokenizer = gguf_tokenizer(write_tokenizer(tmp_path / "a.gguf", **keys, merges=None))
    assert tokenizer.encode("a帽帽a").tokens == ["<s>", "▁a", "<unk>", "a"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scores": None}, "lacks the key tokenizer.ggml.scores"),
        (
            {"scores": [1.0]},
            r"gives 1 numbers in tokenizer.ggml.scores; expected one for each of its \d+ tokens",
        ),
        ({"scores": "high"}, "gives tokenizer.ggml.scores as 'high'; expected a list of numbers"),
        ({"unknown_token_id": 10_000}, "gives tokenizer.ggml.unknown_token_id as 10000; expected an id"),
        ({"bos_token_id": "<s>"}, "gives tokenizer.ggml.bos_token_id as '<s>'; expected an id"),
    ],
)
def test_damaged_sentencepiece_is_named(changes, sentence, keys, tmp_path):
    with pytest.raises(ValueError, match=f"a.gguf {sentence}"):
        gguf_tokenizer(write_tokenizer(tmp_path / "a.gguf", **keys | changes, merges=None))


def test_scores_are_finite(keys, tmp_path):
    scores = [math.nan, *keys["scores"][1:]]
    with pytest.raises(ValueError, match="tokenizer.ggml.scores a number that is not finite"):
        gguf_tokenizer(write_tokenizer(tmp_path / "a.gguf", **keys | {"scores": scores}, merges=None))


# A real model.


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return smollm2_file()


TALKS = ["<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", *TEXTS]


@pytest.mark.slow  # transformers makes its tokenizer of 49,152 tokens
def test_the_tokenizer_is_that_of_transformers(smollm2):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = load_tokenizer(smollm2)
    for text in [*TALKS, load_austen()[:20_000]]:
        ids = ours.encode(text).ids
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.slow  # many texts through a slow oracle
def test_text_is_split_by_the_rules_of_llama_cpp(smollm2):
    import regex

    # of LLAMA_VOCAB_PRE_TYPE_SMOLLM: one after the other
    digits = regex.compile(r"\p{N}")
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)")

    def cut(pattern, piece):
        at = 0
        for match in pattern.finditer(piece):
            yield from (part for part in (piece[at : match.start()], match.group()) if part)
            at = match.end()
        if at < len(piece):
            yield piece[at:]

    splitter = gguf_tokenizer(smollm2).pre_tokenizer
    for text in [*TALKS, "١٢٣ ½ Ⅻ 9", "a\t\tb  c \r\n x"]:
        expected = [text[slice(*span)] for _, span in splitter.pre_tokenize_str(text)]
        assert expected == [part for piece in cut(digits, text) for part in cut(words, piece)]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("tokenizer.ggml.model", "bert", "of the kind 'bert'; byte-level ones"),
        ("tokenizer.ggml.pre", "qwen2", "by the rules 'qwen2'; known are gpt-2 and smollm"),
        ("tokenizer.ggml.pre", None, "does not say by which rules its model splits text"),
        ("tokenizer.ggml.merges", None, "lacks the key tokenizer.ggml.merges"),
    ],
)
def test_tokenizers_of_other_kinds_are_refused(key, value, sentence, smollm2, monkeypatch):
    head = read_gguf(smollm2)
    changed = GGUFFile(head.path, head.metadata | {key: value}, head.tensors)
    monkeypatch.setattr(module, "read_gguf", lambda path: changed)
    with pytest.raises(ValueError, match=sentence):
        gguf_tokenizer(head.path)


def test_pieces_of_letters_that_are_no_pieces_are_refused(tmp_path):
    """Sentencepiece asks whether the joined text is a piece, a list of merges whether its parts are."""
    keys = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "▁", "子", "帽子"], "scores": [0.0] * 3 + [-2.0, -3.0, -1.0], "token_type": [2, 3, 3, 1, 1, 1]}  # fmt: skip
    with pytest.raises(ValueError, match="a.gguf has the token '帽子' and none for '帽' alone"):
        gguf_tokenizer(write_tokenizer(tmp_path / "a.gguf", **keys, merges=None))
