"""Byte-level BPE: text as numbers, from scratch, and the fast path by the `tokenizers` package.

BPE joins the most frequent pair of neighbouring symbols, again and again (Sennrich et al. 2016). Here the
first symbols are the 256 bytes, as in GPT-2: any text can be written, and no token means "unknown".

`BytePairTokenizer` is written to be read and equals `tokenizers` (``BpeTrainer``, ``ByteLevel``) in every
merge and every id. `train_tokenizer` calls that package, for the book's small models. Whatever takes a
tokenizer takes either: `fast_tokenizer` is the door.

Choices and traps:

- The text is cut into words first, by GPT-2's pattern. No merge crosses a cut, so words can be counted once.
- Equal counts: the smaller pair of ids is joined first. Without a rule the vocabulary depends on chance.
- The ids of the 256 bytes follow GPT-2's printable stand-ins, not the bytes: "!" is 0, and the space is 220.
- Encoding applies merges by rank, the order in which they were learned, not from left to right.
- A merge lowers the counts of the pairs beside it. Old counts that stay in the heap must be looked up again.
- The pattern asks Unicode what a letter is. Packages with tables of different age can differ on characters
  that were added after Unicode 14.
- A ``tokenizer.json`` may order to cut or pad every text, to leave out merges by chance, or to close every
  text with an end token. That belongs to the training it was made for: a long text would lose its end without
  a word, and a prompt would be over before its answer. So it is switched off. What is put in front stays.
- Added tokens are text as they stand; the letters of ``đem`` are no stand-ins for bytes. (`tokenizers` reads
  them as such, and so decodes them to something else.) Only where the name is one that a merge makes, as of
  ``Ġthe``, they are: the token is that word, and has its id.
- `tokenizers` drops letters that a vocabulary has no token for, and the places that it reports of the others
  are wrong behind one. So where a letter may be lacking, a twin with an unknown token reads the text, and
  what becomes that token is refused by name.
"""

import json
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from operator import index
from reprlib import repr as shown
from string import ascii_lowercase

import regex
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

__all__ = [
    "BYTE_TOKEN",
    "BytePairTokenizer",
    "control_tokens",
    "encode_whole",
    "fast_tokenizer",
    "leaves_out",
    "misread_tokens",
    "panics_as_errors",
    "reading_all_as_text",
    "require_several",
    "require_text",
    "split_words",
    "train_tokenizer",
]

# A contraction; or letters, digits or other signs, each with one space before; or blank space, of which the
# last sign is left for the word that follows.
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
_DIGIT = regex.compile(r"\p{N}|\P{N}+")
_OF_A_WORD = regex.compile(r"\w")

# GPT-2 writes each byte as one printable character: itself where it is one, else one from U+0100 on. Ids of
# bytes follow these characters, so the printable bytes come first.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = [*_PRINTABLE, *(byte for byte in range(256) if byte not in _PRINTABLE)]
_CHARACTERS = [chr(byte) for byte in _PRINTABLE] + [chr(0x100 + i) for i in range(256 - len(_PRINTABLE))]
_BYTE_OF = dict(zip(_CHARACTERS, _BYTES, strict=True))
_CHARACTER_OF = dict(zip(_BYTES, _CHARACTERS, strict=True))
_REMEMBERED_WORDS, _REMEMBERED_LETTERS = 100_000, 100  # a longer word hardly comes twice
_MOST_ENTRIES = 1 << 24
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # of sentencepiece vocabularies, for characters they lack


def _secret_letters() -> str:
    return "".join(secrets.choice(ascii_lowercase) for _ in range(32))


_LACKING = _secret_letters()  # for what a vocabulary has no token for, in the twins that tell of it
_ONE_TOKEN = Tokenizer(models.WordLevel({"a": 0}, "a")).encode("a")  # to see what is put around it


def split_words(text: str, individual_digits: bool = False) -> list[str]:
    """Cut a text into the words that merges do not cross; together they are the text again.

    Args:
        text: any string.
        individual_digits: every digit is a word of its own, as in SmolLM2.

    >>> split_words("I'll take 12 apples!")
    ['I', "'ll", ' take', ' 12', ' apples', '!']
    """
    parts = _DIGIT.findall(text) if individual_digits else [text]
    return [word for part in parts for word in _WORD.findall(part)]


@dataclass(frozen=True)
class BytePairTokenizer:
    """A byte-level BPE vocabulary: cuts any text into tokens and joins them again.

    Attributes:
        vocabulary: the bytes of each token; a token's place is its id.
        merges: pairs of ids, in the order in which they were learned.
        individual_digits: every digit is a word of its own.
        added: by id, what `fast` takes out of a text before it cuts words, such as ``<|im_start|>``. `encode`
            does not look for it: text is text.

    Raises:
        ValueError: a merge makes no token of the vocabulary.

    >>> tokenizer = BytePairTokenizer.train(["low low low lower lowest"], vocab_size=259)
    >>> tokenizer.vocabulary[256:]
    (b'lo', b'low', b' low')
    >>> tokenizer.decode(tokenizer.encode("a low hat 帽"))
    'a low hat 帽'
    """

    vocabulary: tuple[bytes, ...] = field(repr=False)
    merges: tuple[tuple[int, int], ...] = field(repr=False)
    individual_digits: bool = False
    added: Mapping[int, AddedToken] = field(default_factory=dict, repr=False, hash=False)
    _byte_ids: dict[int, int] = field(init=False, repr=False, compare=False)
    _ranks: dict[tuple[int, int], tuple[int, int]] = field(init=False, repr=False, compare=False)
    _encoded_words: dict[str, list[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Of two with the same bytes one was added; text is text, so it is the other.
        ids = {token: i for i, token in enumerate(self.vocabulary) if i in self.added}
        ids |= {token: i for i, token in enumerate(self.vocabulary) if i not in self.added}
        ranks = {}
        for rank, (left, right) in enumerate(self.merges):
            self._check_id(left)
            self._check_id(right)
            joined = self.vocabulary[left] + self.vocabulary[right]
            if joined not in ids:
                raise ValueError(
                    f"Merge {rank} makes {joined!r}, which is not in the vocabulary; add it there."
                )
            ranks[left, right] = rank, ids[joined]
        object.__setattr__(self, "_byte_ids", {b: ids[bytes([b])] for b in range(256) if bytes([b]) in ids})
        object.__setattr__(self, "_ranks", ranks)
        object.__setattr__(self, "_encoded_words", {})

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BytePairTokenizer":
        """Learn a vocabulary.

        Words do not cross from one text to the next. With whole documents runs of blank lines are joined
        too; with single lines, as in `train_tokenizer`, they never are.

        Args:
            texts: the training texts, one string each.
            vocab_size: entries, of which 256 are the bytes. There are fewer if no pair is left to join.

        Raises:
            TypeError: ``texts`` is one string, or holds something that is none.
            ValueError: fewer than 256 entries, no text at all, or an unpaired surrogate in a text.
        """
        _check_size(vocab_size)
        vocabulary = [bytes([byte]) for byte in _BYTES]
        byte_ids = {byte: i for i, byte in enumerate(_BYTES)}
        word_counts = _count_words(texts)
        words = [[byte_ids[byte] for byte in word.encode()] for word in word_counts]
        occurrences = list(word_counts.values())

        counts: Counter[tuple[int, int]] = Counter()
        where = defaultdict(set)  # the words that hold a pair, or once held it
        for i, word in enumerate(words):
            for pair in pairwise(word):
                counts[pair] += occurrences[i]
                where[pair].add(i)
        heap = [(-count, pair) for pair, count in counts.items()]
        heapify(heap)

        merges = []
        while len(vocabulary) < vocab_size and heap:
            negative_count, pair = heappop(heap)
            if -negative_count != counts[pair]:  # a merge beside it has lowered the count since
                if counts[pair]:
                    heappush(heap, (-counts[pair], pair))
                continue
            new = len(vocabulary)
            vocabulary.append(vocabulary[pair[0]] + vocabulary[pair[1]])
            merges.append(pair)
            born = set()
            for i in where.pop(pair):
                for old in pairwise(words[i]):
                    counts[old] -= occurrences[i]
                words[i] = _join(words[i], pair, new)
                for now in pairwise(words[i]):
                    counts[now] += occurrences[i]
                    if new in now:
                        where[now].add(i)
                        born.add(now)
            for now in born:
                heappush(heap, (-counts[now], now))
        return cls(tuple(vocabulary), tuple(merges))

    @classmethod
    def from_tokenizers(cls, tokenizer: Tokenizer) -> "BytePairTokenizer":
        """The same vocabulary as one of the `tokenizers` package.

        Added tokens keep their ids and are `added`. What the tokenizer puts around every text is left out.

        Raises:
            ValueError: it is not a byte-level BPE with GPT-2's pattern, or its ids have gaps.
        """
        description = json.loads(tokenizer.to_str())
        steps = description["pre_tokenizer"] or {}
        steps = steps.get("pretokenizers", [steps])
        splits_digits = steps[:1] == [{"type": "Digits", "individual_digits": True}]
        if splits_digits:
            steps = steps[1:]
        kinds = [(step.get("type"), step.get("add_prefix_space"), step.get("use_regex")) for step in steps]
        model = description["model"]
        changed = [
            "ignore_merges",
            "dropout",
            "continuing_subword_prefix",
            "end_of_word_suffix",
            "byte_fallback",
        ]
        changed = [name for name in changed if model.get(name)]
        if changed:
            raise ValueError(f"The model sets {', '.join(changed)}, by which it cuts text in another way.")
        if model["type"] != "BPE" or kinds != [("ByteLevel", False, True)] or description["normalizer"]:
            raise ValueError(
                f"Expected a BPE model behind ByteLevel(add_prefix_space=False), perhaps with single digits; "
                f"got {model['type']} behind {description['pre_tokenizer']}, normalised by "
                f"{description['normalizer']}. Other kinds cut text in another way."
            )
        ids = tokenizer.get_vocab(with_added_tokens=True)
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError(
                f"The vocabulary has {len(ids)} tokens, but their ids are not 0 to {len(ids) - 1}; "
                "close the gaps."
            )
        added = tokenizer.get_added_tokens_decoder()
        as_it_stands = {t.content for t in added.values()}.difference(_made_by_merges(model), _BYTE_OF)
        return cls(
            tuple(
                token.encode() if token in as_it_stands else _token_bytes(token)
                for token in sorted(ids, key=ids.get)
            ),
            tuple((ids[left], ids[right]) for left, right in model["merges"]),
            splits_digits,
            added,
        )

    @cached_property
    def fast(self) -> Tokenizer:
        """The same vocabulary as a tokenizer of the `tokenizers` package."""
        names = ["".join(_CHARACTER_OF[byte] for byte in token) for token in self.vocabulary]
        for i, token in self.added.items():
            names[i] = token.content
        tokenizer = Tokenizer(
            models.BPE(
                vocab={name: i for i, name in enumerate(names)},
                merges=[(names[left], names[right]) for left, right in self.merges],
            )
        )
        bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if self.individual_digits else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_of_words])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens(list(self.added.values()))  # each is in the vocabulary and keeps its id
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.vocabulary)

    def first(self, vocab_size: int) -> "BytePairTokenizer":
        """The vocabulary that the same training would have given at a smaller size: training only appends.

        Raises:
            ValueError: fewer than 256 entries, more than there are, or a vocabulary with other ids (special
                tokens, for instance) than training gives.
        """
        _check_size(vocab_size)
        if vocab_size > self.vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}; this vocabulary has {self.vocab_size} entries.")
        merges = self.merges[: vocab_size - 256]
        if self.vocab_size != 256 + len(self.merges) or any(max(p) >= 256 + i for i, p in enumerate(merges)):
            raise ValueError("This vocabulary was not made by BytePairTokenizer.train; train a smaller one.")
        return BytePairTokenizer(self.vocabulary[:vocab_size], merges, self.individual_digits)

    def encode(self, text: str) -> list[int]:
        """The ids of a text's tokens.

        Raises:
            TypeError: the text is not a str.
            ValueError: it holds an unpaired surrogate, half a character of UTF-16, which has no bytes; or a
                byte that the vocabulary lacks, as some released ones do (`tokenizers` drops it silently).
        """
        require_text(text)
        ids = []
        for word in split_words(text, self.individual_digits):
            if len(word) > _REMEMBERED_LETTERS:
                ids += self._encode_word(word.encode())
                continue
            if word not in self._encoded_words:
                if len(self._encoded_words) >= _REMEMBERED_WORDS:
                    self._encoded_words.clear()
                self._encoded_words[word] = self._encode_word(word.encode())
            ids += self._encoded_words[word]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens. Bytes that are no whole character become U+FFFD, "�".

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return b"".join(self.vocabulary[self._check_id(i)] for i in ids).decode("utf-8", errors="replace")

    def _encode_word(self, word: bytes) -> list[int]:
        """Join the pair of lowest rank, the leftmost first, until none is left.

        A heap holds the pairs that can be joined. Joining keeps the left place and empties the right one.
        """
        missing = sorted(set(word) - self._byte_ids.keys())
        if missing:
            raise ValueError(
                f"The vocabulary has no token for byte 0x{missing[0]:02X}, which {word.decode()!r} needs. "
                "Take the character out, or use a vocabulary with all 256 bytes."
            )
        ids = [self._byte_ids[byte] for byte in word]
        end = len(ids)
        left, right = list(range(-1, end - 1)), list(range(1, end + 1))  # neighbours of each place
        heap: list[tuple[int, int, int]] = []

        def offer(place: int) -> None:
            if place >= 0 and right[place] < end and (ids[place], ids[right[place]]) in self._ranks:
                rank, joined = self._ranks[ids[place], ids[right[place]]]
                heappush(heap, (rank, place, joined))

        for place in range(end):
            offer(place)
        while heap:
            rank, place, joined = heappop(heap)
            neighbour = right[place]
            if neighbour >= end or self._ranks.get((ids[place], ids[neighbour])) != (rank, joined):
                continue  # one of the two was joined with another in the meantime
            ids[place], ids[neighbour] = joined, -1
            right[place] = right[neighbour]
            if right[place] < end:
                left[right[place]] = place
            offer(left[place])
            offer(place)
        return [token for token in ids if token >= 0]

    def _check_id(self, token: int) -> int:
        if not 0 <= index(token) < self.vocab_size:
            raise ValueError(
                f"Token id {index(token)} is outside the vocabulary; ids go from 0 to {self.vocab_size - 1}."
            )
        return index(token)


def fast_tokenizer(tokenizer: Tokenizer | BytePairTokenizer) -> Tokenizer:
    """A tokenizer of the `tokenizers` package that reads whole texts as they are, from either kind.

    One that cuts or pads texts, leaves out merges by chance, takes control tokens for text or puts tokens
    behind every text is copied without these settings; the one that was given keeps them. Tokens that it puts
    in front stay.

    Raises:
        TypeError: something else was given.
        ValueError: a letter was added that stands for a byte in the vocabulary; texts would lose it. Or what
            is put around texts has no id.

    >>> tokenizer = train_tokenizer("the cat and the hat", vocab_size=260)
    >>> tokenizer.enable_truncation(2)
    >>> len(tokenizer.encode("the hat").ids), len(fast_tokenizer(tokenizer).encode("the hat").ids)
    (2, 4)
    """
    tokenizer = tokenizer.fast if isinstance(tokenizer, BytePairTokenizer) else tokenizer
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"The tokenizer is of type {type(tokenizer).__name__}; expected a BytePairTokenizer or a "
            "Tokenizer of the tokenizers package (transformers' fast ones hold it as backend_tokenizer)."
        )
    of_bytes = tokenizer.decoder is not None and b'"ByteLevel"' in tokenizer.decoder.__getstate__()
    for token, added in tokenizer.get_added_tokens_decoder().items():
        if (name := added.content) not in _BYTE_OF or name.isascii() or not of_bytes:
            continue
        if tokenizer.decode([token], skip_special_tokens=False) != name:
            raise ValueError(
                f"{name!r} was added as a token, and in this vocabulary that letter stands for the byte "
                f"0x{_BYTE_OF[name]:02X}, as which it would be read. Leave it out: texts can hold it anyway."
            )
    cuts = tokenizer.truncation or tokenizer.padding or tokenizer.encode_special_tokens
    by_chance = bool(getattr(tokenizer.model, "dropout", None))
    try:
        with panics_as_errors():
            around = tokenizer.post_processor.process(_ONE_TOKEN) if tokenizer.post_processor else _ONE_TOKEN
    except ValueError as error:
        raise ValueError(
            f"The tokenizer's post-processor cannot be applied to a text ({error}). Does it name a token "
            "without its id?"
        ) from None
    front = around.special_tokens_mask.index(0)
    closes = len(around.ids) > front + 1
    if not (cuts or by_chance or closes):
        return tokenizer
    model = tokenizer.model
    if by_chance:
        model = Tokenizer.from_str(tokenizer.to_str()).model
        model.dropout = None
    whole = Tokenizer(model)  # one vocabulary for both, since to copy a large one takes a fifth of a second
    whole.normalizer, whole.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    whole.post_processor, whole.decoder = tokenizer.post_processor, tokenizer.decoder
    whole.add_tokens(list(tokenizer.get_added_tokens_decoder().values()))
    if closes:
        before = [
            {"id": str(i), "ids": [i], "tokens": [token]}
            for i, token in zip(around.ids[:front], around.tokens[:front], strict=True)
        ]
        single = [*(each["id"] for each in before), "$A"]
        whole.post_processor = processors.TemplateProcessing(single, special_tokens=before)
    return whole


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise as a ValueError what `tokenizers` panics with, whose class is no Exception and in no module."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None


def misread_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """By id, the added tokens whose letters `tokenizers` would wrongly take for bytes when it decodes them.

    Of what a merge makes, too, such as "Ġthe", the letters are bytes: it is a word of the vocabulary.
    """
    added = {token: each.content for token, each in tokenizer.get_added_tokens_decoder().items()}
    taken = {
        token: name
        for token, name in added.items()
        if len(name) > 1
        and not BYTE_TOKEN.fullmatch(name)  # which does stand for a byte
        and all(character in _BYTE_OF for character in name)
        and tokenizer.decode([token], skip_special_tokens=False) != name
    }
    words = _made_by_merges(json.loads(tokenizer.to_str())["model"]) if taken else ()
    return {token: name for token, name in taken.items() if name not in words}


def _made_by_merges(model: Mapping) -> list[str]:
    """What each merge of a described model makes, in their order."""
    prefix = model.get("continuing_subword_prefix") or ""
    return [left + right.removeprefix(prefix) for left, right in model.get("merges", [])]


def control_tokens(tokenizer: Tokenizer) -> dict[int, AddedToken]:
    """By id, what a template may write into a text to steer a model, such as ``<|im_start|>``.

    These are the added tokens that are special, and of the others those between marks, such as ``<think>``,
    since not all models declare theirs. Added words and signs, as "mRNA" and "->", are text; so are bytes,
    runs of blanks, and what is one common letter or sign, as the "!" that some pad with.
    """
    added = tokenizer.get_added_tokens_decoder()
    return {i: token for i, token in added.items() if _steers(token)}


def _steers(token: AddedToken) -> bool:
    name = token.content.replace("▁", " ").strip()  # sentencepiece's blank
    if not name or BYTE_TOKEN.fullmatch(name):
        return False
    if token.special:
        return len(name) > 1 or name not in _BYTE_OF  # of a sign such as "!", for padding, texts are made
    return any(map(str.isalnum, name)) and not (name[0].isalnum() or name[-1].isalnum())


def encode_whole(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> Encoding:
    """The tokens of a text, all of it: `tokenizers` would drop letters that the vocabulary has no token for.

    Args:
        tokenizer: as `fast_tokenizer` or `reading_all_as_text` gives it, so that it cuts and pads nothing.
        text: to be read.
        add_special_tokens: with the start token in front, if the tokenizer has one.

    Raises:
        ValueError: it has none for a letter or word, and no unknown token either; the sentence names it.

    >>> tokenizer = train_tokenizer("the cat and the hat", vocab_size=260)
    >>> encode_whole(tokenizer, "the hat").tokens
    ['the', 'Ġ', 'h', 'at']
    """
    reader = tokenizer if _surely_whole(tokenizer, text) else _reader(tokenizer.to_str())
    encoding = reader.encode(text, add_special_tokens=add_special_tokens)
    if (lacking := reader.token_to_id(_LACKING)) in encoding.ids:
        start, end = encoding.offsets[encoding.ids.index(lacking)]
        raise ValueError(
            f"The vocabulary has no token for {shown(text[start:end])}, which a text holds, so it would be "
            "left out. Train the tokenizer with all 256 bytes, as train_tokenizer does, or with an unknown "
            "token; or clean the text."
        )
    return encoding


def leaves_out(reader: Tokenizer, ids: list[int]) -> bool:
    """Whether `encode_whole` refuses a text of which a tokenizer of `reading_all_as_text` makes these ids."""
    return reader.token_to_id(_LACKING) in ids


def _surely_whole(tokenizer: Tokenizer, text: str) -> bool:
    """Whether it is plain, without making another tokenizer, that nothing of a text is left out."""
    model = tokenizer.model
    unknown = getattr(model, "unk_token", None)
    if unknown is not None and model.token_to_id(unknown) is not None:
        return True
    if isinstance(model, models.BPE):
        by_letter = not (model.continuing_subword_prefix or model.end_of_word_suffix)
    else:
        by_letter = isinstance(model, models.Unigram)
    if not by_letter:
        return False
    read = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is not None:
        read = "".join(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(read))
    return all(_has_token(model, letter) for letter in set(read))


def _has_token(model: models.Model, letter: str) -> bool:
    try:
        tokens = model.tokenize(letter)
    except Exception:  # as the package raises where it misses an unknown token
        return False
    return bool(tokens) and tokens[-1].offsets[1] == len(letter.encode())  # all the bytes that stand for it


def reading_all_as_text(tokenizer: Tokenizer | BytePairTokenizer) -> Tokenizer:
    """A twin with the same ids, in which no text becomes a control token, however it spells one.

    What a text spells like one of the `control_tokens` is cut as ordinary words are, and all else as by
    `fast_tokenizer`. The twin knows them by secret names instead, which its ``get_added_tokens_decoder``
    tells. It is remembered, and the same for all who ask: leave it as it is.

    >>> tokenizer = train_tokenizer("the cat and the hat", vocab_size=260)
    >>> tokenizer.add_special_tokens(["</s>"])
    1
    >>> twin = reading_all_as_text(tokenizer)
    >>> tokenizer.encode("hat</s>").tokens, twin.encode("hat</s>").tokens
    (['h', 'at', '</s>'], ['h', 'at', '<', '/', 's', '>'])
    >>> twin.encode("hat" + twin.id_to_token(260)).ids == tokenizer.encode("hat</s>").ids
    True
    """
    return _reader(fast_tokenizer(tokenizer).to_str(), all_as_text=True)


@lru_cache(maxsize=4)  # a large vocabulary takes a second
def _reader(description: str, all_as_text: bool = False) -> Tokenizer:
    """A twin with the same ids, in which what would be left out becomes the token `_LACKING`."""
    described = json.loads(description)
    if all_as_text:
        _rename_controls(described, control_tokens(Tokenizer.from_str(description)))
    twin, model = Tokenizer.from_str(json.dumps(described)), described["model"]
    largest = max(twin.get_vocab().values(), default=-1)
    if isinstance(model["vocab"], list):  # of Unigram: places are ids
        if model.get("unk_id") is not None:
            return twin
        gap = range(len(model["vocab"]), largest + 1)
        model["vocab"] += [*([f"{_LACKING}{i}", 0.0] for i in gap), [_LACKING, 0.0]]
        model["unk_id"] = len(model["vocab"]) - 1
    else:
        if model.get("unk_token") in model["vocab"]:
            return twin
        model["vocab"][_LACKING] = largest + 1
        model["unk_token"] = _LACKING
    alone = json.dumps(described | {"added_tokens": []})
    twin.model = Tokenizer.from_str(alone).model  # the added tokens keep the ids they have
    return twin


def _rename_controls(described: dict, controls: Mapping[int, AddedToken]) -> None:
    """Give control tokens names in a description that no text spells."""
    model = described["model"]
    makes = _made_by_merges(model)
    names = {token.content for token in controls.values()}
    secret = {name: _secret_name(name) for name in names}
    for added in described["added_tokens"]:
        added["content"] = secret.get(added["content"], added["content"])
    # no text is cut into an entry that it cannot spell and that no merge makes
    if isinstance(model["vocab"], list):  # of Unigram, with scores
        model["vocab"] = [[secret.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {secret.get(piece, piece): i for piece, i in model["vocab"].items()}
    if "unk_token" in model:
        model["unk_token"] = secret.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        merges = zip(model["merges"], makes, strict=True)
        model["merges"] = [pair for pair, made in merges if names.isdisjoint((*pair, made))]


def _secret_name(name: str) -> str:
    """One that nobody can guess. Blanks at its ends stay, since a tokenizer may read them with it, and signs
    that are of no word, beside which a token may stand that is a word of its own."""
    bare = name.strip()
    first, last = ("" if _OF_A_WORD.match(each) else each for each in (bare[:1], bare[-1:]))
    return name.replace(bare, first + _secret_letters() + last)


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary from a text. Any string round-trips; there is no unknown token.

    It is trained on single lines, so a run of blank lines stays one token a line.

    Raises:
        TypeError: the text is not a str.
        ValueError: fewer entries than the 256 bytes that every vocabulary holds, or more than there can be;
            or the text holds an unpaired surrogate.

    >>> tokenizer = train_tokenizer("the cat and the hat", vocab_size=260)
    >>> tokenizer.decode(tokenizer.encode("the hat 帽").ids)
    'the hat 帽'
    """
    _check_size(vocab_size)
    require_text(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def _count_words(texts: Iterable[str]) -> Counter[str]:
    require_several(texts)
    counts: Counter[str] = Counter()
    for text in texts:
        require_text(text)
        counts.update(split_words(text))
    if not counts:
        raise ValueError("The training texts are empty; there is nothing to learn a vocabulary from.")
    return counts


def _join(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """The word with every occurrence of the pair joined, from left to right."""
    joined, place = [], 0
    while place < len(word):
        if word[place] == pair[0] and place + 1 < len(word) and word[place + 1] == pair[1]:
            joined.append(new)
            place += 2
        else:
            joined.append(word[place])
            place += 1
    return joined


def _token_bytes(token: str) -> bytes:
    """The bytes of a token as `tokenizers` writes it; a special token may use any characters."""
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()


def _check_size(vocab_size: int) -> None:
    if vocab_size < 256:
        raise ValueError(f"vocab_size is {vocab_size}; the 256 bytes alone take 256 entries.")
    if vocab_size > _MOST_ENTRIES:  # for which `tokenizers` would ask for memory at once, and end the process
        raise ValueError(f"vocab_size is {vocab_size}; expected at most {_MOST_ENTRIES} entries.")


def require_several(texts: Iterable[str]) -> None:
    """Refuse one text in place of several: it would be taken letter by letter.

    Raises:
        TypeError: it is one.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string; give a list of strings, such as [text].")


def require_text(text: str) -> None:
    """Refuse what cannot be written as bytes, with a sentence.

    Raises:
        TypeError: not a str.
        ValueError: an unpaired surrogate.
    """
    if not isinstance(text, str):
        raise TypeError(f"The text is of type {type(text).__name__}; expected str. Decode bytes first.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text holds an unpaired surrogate, U+{ord(text[error.start]):04X}, at {error.start}: "
            "half a character of UTF-16, which has no UTF-8 bytes. Replace it, for instance with "
            'text.encode("utf-8", "replace").decode().'
        ) from None
