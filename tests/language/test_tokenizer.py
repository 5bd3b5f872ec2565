"""Byte-level BPE: equal to `tokenizers` in every merge and id, by any text; wrong variants are told apart."""

import random
import unicodedata
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import BYTES, CONTROLS, KINDS, LACKING, LEARNED, MARK
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from minicpm_lite.data.assets import load_austen, load_chinese_classics
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.language.tokenizer import (
    BytePairTokenizer,
    control_tokens,
    encode_whole,
    fast_tokenizer,
    leaves_out,
    misread_tokens,
    reading_all_as_text,
    split_words,
    train_tokenizer,
)
from minicpm_lite.language.writing import TextWriter
from minicpm_lite.pretrained.gguf import read_gguf

TEXTS = [load_austen()[:100_000], load_chinese_classics()[:20_000]]
FAST = train_tokenizer(load_austen()[:100_000], vocab_size=400)
MINE = BytePairTokenizer.train(TEXTS, 800)
CORNERS = [
    "",
    " ",
    "\n\n\n  \t end",
    "\x00\x01\x7f\x85\xa0\xad\u200d\u2028\ufeff\ufffd",
    "I'll they've don't 'S 's'd",
    "1234 ५६ Ⅷ ½ 3.14",
    "學而時習之,不亦說乎?",
    "👩‍👩‍👧‍👦 🇨🇳 👍🏽 é e\u0301 \U0010ffff",
    "a" * 2_000,
    "low lower lowest " * 20,
]
# Characters that Unicode 3.2 already knew: the tables of the packages are of different age.
KNOWN = st.characters(exclude_categories=("Cs",)).filter(
    lambda c: unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs")
)
PROSE = st.lists(
    st.one_of(
        st.sampled_from(["the", " the", "ing", "\n\n", "  ", "不亦", "學", "👍🏽", "'ll", "12", "!"]), KNOWN
    ),
    max_size=40,
).map("".join)


def reference(texts, vocab_size):
    """The same training by the `tokenizers` package."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


REFERENCE = reference(TEXTS, 800)


# Equal to the reference


def test_the_worked_example_of_the_chapter():
    """By hand: th 6 times, " th" 5, " the" 3, " thi" 2; then all pairs occur once, and the smallest ids win."""
    tokenizer = BytePairTokenizer.train(["the then this the thin the"], 261)
    assert tokenizer.vocabulary[256:] == (b"th", b" th", b" the", b" thi", b"the")


def test_the_same_vocabulary_as_the_reference():
    assert BytePairTokenizer.from_tokenizers(REFERENCE) == MINE
    assert MINE.vocab_size == 800 and len(MINE.merges) == 800 - 256
    assert REFERENCE.token_to_id("!") == 0 and MINE.vocabulary[0] == b"!"
    assert REFERENCE.token_to_id("Ġ") == 220 and MINE.vocabulary[220] == b" "


@pytest.mark.parametrize("text", CORNERS, ids=range(len(CORNERS)))
def test_the_same_ids_at_the_corners(text):
    assert MINE.encode(text) == REFERENCE.encode(text).ids
    assert MINE.decode(MINE.encode(text)) == text


def test_the_same_ids_on_held_out_text():
    for text in (load_austen()[1_000_000:1_020_000], load_chinese_classics()[-5_000:]):
        assert MINE.encode(text) == REFERENCE.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(PROSE)
def test_the_same_ids_on_any_text(text):
    assert MINE.encode(text) == REFERENCE.encode(text).ids


@pytest.mark.slow  # many vocabularies
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(alphabet="aab b学\n", min_size=1, max_size=30), min_size=1, max_size=6),
    st.integers(256, 300),
)
def test_training_breaks_ties_like_the_reference(texts, vocab_size):
    """Few letters: many ties, overlaps such as "aaaa", and texts with no pair left."""
    assert BytePairTokenizer.train(texts, vocab_size) == BytePairTokenizer.from_tokenizers(
        reference(texts, vocab_size)
    )


def test_the_fast_path_is_the_same_training_on_single_lines():
    lines = load_austen()[:100_000].splitlines(keepends=True)
    assert BytePairTokenizer.from_tokenizers(FAST) == BytePairTokenizer.train(lines, 400)


def test_single_lines_never_join_blank_lines():
    text = "one\n\n\ntwo\n\n\n" * 5
    assert b"\n\n" in BytePairTokenizer.train([text], 260).vocabulary
    assert b"\n\n" not in BytePairTokenizer.train(text.splitlines(keepends=True), 280).vocabulary


@pytest.mark.slow(reason="trains on all 5 MB of text: half a minute")
def test_five_megabytes():
    texts = [load_austen(), load_chinese_classics()]
    tokenizer = BytePairTokenizer.train(texts, 8_000)
    assert tokenizer == BytePairTokenizer.from_tokenizers(reference(texts, 8_000))


# Any text comes back


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(text):
    assert MINE.decode(MINE.encode(text)) == text
    assert FAST.decode(FAST.encode(text).ids) == text


@settings(max_examples=200, deadline=None)
@given(st.text(), st.booleans())
def test_words_are_the_text(text, digits):
    assert "".join(split_words(text, digits)) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 799), max_size=12))
def test_any_ids_decode_like_the_reference(ids):
    """Most lists of ids cut characters in half: these become U+FFFD, as many as in the reference."""
    assert MINE.decode(ids) == REFERENCE.decode(ids, skip_special_tokens=False)


def test_half_a_character():
    ids = BytePairTokenizer.train(["x"], 256).encode("帽")
    assert len(ids) == 3 and MINE.decode(ids) == "帽"
    assert MINE.decode(ids[:2]) == "\ufffd" and MINE.decode(ids[1:]) == "\ufffd\ufffd"


def test_more_words_than_are_remembered(monkeypatch):
    monkeypatch.setattr("minicpm_lite.language.tokenizer._REMEMBERED_WORDS", 3)
    tokenizer = MINE.first(400)
    text = load_austen()[:2_000]
    assert tokenizer.encode(text) == naive_encode(tokenizer, text, min)
    assert len(tokenizer._encoded_words) <= 3


# Sizes


@pytest.mark.parametrize("size", [256, 257, 500, 800])
def test_a_smaller_vocabulary_is_the_beginning_of_a_larger_one(size):
    assert MINE.first(size) == BytePairTokenizer.train(TEXTS, size)


def test_a_text_with_too_few_pairs_gives_fewer_entries():
    tokenizer = BytePairTokenizer.train(["abc"], 1_000)
    assert tokenizer.vocabulary[256:] == (b"ab", b"abc")


def test_fewer_tokens_than_bytes():
    sample = load_austen()[200_000:201_000]
    assert FAST.get_vocab_size() == 400
    assert len(FAST.encode(sample).ids) < len(sample) / 1.5
    assert len(MINE.encode(sample)) < len(MINE.first(300).encode(sample)) < len(sample)


def test_training_twice_gives_the_same_vocabulary():
    assert train_tokenizer(load_austen()[:100_000], vocab_size=400).get_vocab() == FAST.get_vocab()


def test_every_merge_joins_earlier_tokens_inside_a_word():
    for place, (left, right) in enumerate(MINE.merges):
        assert max(left, right) < 256 + place
        assert MINE.vocabulary[256 + place] == MINE.vocabulary[left] + MINE.vocabulary[right]
    assert not any(b" " in token[1:].strip() for token in MINE.vocabulary)


# A released vocabulary


@pytest.fixture(scope="module")
def smollm2():
    """The vocabulary of SmolLM2, as `tokenizers` would load it: single digits, then GPT-2's pattern."""
    try:
        path = smollm2_file()
    except ImportError as missing:
        pytest.skip(str(missing))
    metadata = read_gguf(path).metadata
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, BytePairTokenizer.from_tokenizers(tokenizer)


def test_a_released_vocabulary(smollm2):
    theirs, mine = smollm2
    assert mine.vocab_size == 49_152 and mine.individual_digits
    assert [mine.vocabulary[i] for i in mine.encode("The capital of France is Paris.")] == [
        b"The", b" capital", b" of", b" France", b" is", b" Paris", b".",
    ]  # fmt: skip
    texts = [load_austen()[500_000:520_000], load_chinese_classics()[:5_000], *CORNERS[4:]]
    for text in texts:
        text = text.replace("\U0010ffff", "")
        assert mine.encode(text) == theirs.encode(text).ids
        assert mine.decode(mine.encode(text)) == text


def test_a_byte_that_a_released_vocabulary_lacks(smollm2):
    """It has no token for 21 bytes. `tokenizers` drops such characters; here that is refused."""
    theirs, mine = smollm2
    assert theirs.decode(theirs.encode("a\x04b").ids) == "ab"
    with pytest.raises(
        ValueError, match=r"no token for byte 0x04, which '\\x04' needs. Take the character out"
    ):
        mine.encode("a\x04b")


# The door for either kind


DIGITS = BytePairTokenizer(MINE.vocabulary, MINE.merges, individual_digits=True)


@pytest.mark.parametrize("tokenizer", [MINE, DIGITS, MINE.first(256)], ids=["words", "digits", "bytes"])
@settings(max_examples=100, deadline=None)
@given(text=PROSE, ids=st.lists(st.integers(0, 255), max_size=12))
def test_the_fast_twin_cuts_and_joins_as_the_original(tokenizer, text, ids):
    fast = fast_tokenizer(tokenizer)
    assert fast.encode(text).ids == tokenizer.encode(text)
    assert fast.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert fast.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


def test_the_fast_twin_is_the_tokenizer_that_the_vocabulary_came_from():
    fast = fast_tokenizer(MINE)
    assert fast.get_vocab() == REFERENCE.get_vocab() and fast.get_vocab_size() == MINE.vocab_size
    assert BytePairTokenizer.from_tokenizers(fast) == MINE
    assert BytePairTokenizer.from_tokenizers(DIGITS.fast) == DIGITS != MINE
    assert fast_tokenizer(MINE) is fast  # built once


@cache
def original_and_twin(digits: bool) -> tuple[Tokenizer, BytePairTokenizer]:
    """A tokenizer with added tokens of every kind, and ours made from it."""
    original = Tokenizer.from_str((DIGITS if digits else MINE).fast.to_str())
    kinds = {"<|im_start|>": {}, "<|end|>": {"lstrip": True}, "<é>": {"rstrip": True}, "<a b>": {}}
    original.add_special_tokens([AddedToken(token, normalized=False, **how) for token, how in kinds.items()])
    original.add_tokens([AddedToken("<|user|>", special=False), AddedToken("ab", single_word=True)])
    mine = BytePairTokenizer.from_tokenizers(Tokenizer.from_str(original.to_str()))
    assert mine.fast.get_added_tokens_decoder() == original.get_added_tokens_decoder() == mine.added
    assert BytePairTokenizer.from_tokenizers(mine.fast) == mine
    return original, mine


@pytest.mark.parametrize("digits", [False, True])
@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<|im_start|>", " <|end|> ", "<é>", "<a b>", "<|user|>", "the hat", "ab", "x", " "])
    )
)
def test_the_fast_twin_finds_the_added_tokens_of_the_original(digits, parts):
    """`encode` does not: text is text."""
    (original, mine), text = original_and_twin(digits), "".join(parts)
    ids = original.encode(text).ids
    assert mine.fast.encode(text).ids == ids
    for skip in (False, True):
        assert mine.fast.decode(ids, skip_special_tokens=skip) == original.decode(
            ids, skip_special_tokens=skip
        )
    assert mine.encode(text) == (DIGITS if digits else MINE).encode(text)


def test_digits_that_are_words_of_their_own_stay_so():
    for text in ("1234 ५६ Ⅷ ½ 3.14", "in 2024, 12 apples"):
        assert DIGITS.fast.encode(text).ids == DIGITS.encode(text)
    tokenizer = BytePairTokenizer.train(["12 12 12 12"], 258)
    digits = BytePairTokenizer(tokenizer.vocabulary, tokenizer.merges, individual_digits=True)
    assert len(tokenizer.fast.encode("12").ids) == 1 and len(digits.fast.encode("12").ids) == 2


def test_a_tokenizer_that_reads_whole_texts_is_given_back_as_it_is():
    assert fast_tokenizer(REFERENCE) is REFERENCE


@pytest.mark.parametrize(
    "order",
    [
        lambda tokenizer: tokenizer.enable_truncation(3),
        lambda tokenizer: tokenizer.enable_padding(length=50),
        lambda tokenizer: (tokenizer.enable_truncation(3, stride=1), tokenizer.enable_padding(pad_id=5)),
    ],
    ids=["cut", "pad", "both"],
)
def test_orders_to_cut_or_pad_are_left_out_and_stay_with_the_original(order):
    """Also where they come from a file, which is where they come from without being asked for."""
    texts = ["the cat and the hat", "x"]
    expected = [REFERENCE.encode(text).ids for text in texts]
    ordered = Tokenizer.from_str(REFERENCE.to_str())
    order(ordered)
    for tokenizer in (ordered, Tokenizer.from_str(ordered.to_str())):
        before = tokenizer.to_str()
        assert [each.ids for each in tokenizer.encode_batch(texts)] != expected
        whole = fast_tokenizer(tokenizer)
        assert [each.ids for each in whole.encode_batch(texts)] == expected
        assert [whole.encode(text).ids for text in texts] == expected
        assert whole.truncation is None and whole.padding is None
        assert whole.get_vocab() == tokenizer.get_vocab()
        assert tokenizer.to_str() == before


def test_special_tokens_of_an_ordered_tokenizer_are_kept():
    ordered = Tokenizer.from_str(REFERENCE.to_str())
    ordered.add_special_tokens(["<|end|>"])
    ordered.enable_truncation(2)
    assert fast_tokenizer(ordered).encode("the hat<|end|>").ids[-1] == ordered.token_to_id("<|end|>") == 800


def with_settings(*changes) -> Tokenizer:
    """The reference with a start and an end token, changed as its file could be."""
    tokenizer = Tokenizer.from_str(REFERENCE.to_str())
    tokenizer.add_special_tokens(["<s>", "</s>", "<|x:y|>"])
    for change in changes:
        change(tokenizer)
    return Tokenizer.from_str(tokenizer.to_str())


def around(single: str):
    def change(tokenizer: Tokenizer) -> None:
        special = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=special)

    return change


SETTINGS = {
    "truncation": (lambda t: t.enable_truncation(3), 0),
    "padding": (lambda t: t.enable_padding(length=50), 0),
    "dropout": (lambda t: setattr(t.model, "dropout", 0.9), 0),
    "start": (around("<s> $A"), 1),
    "two in front": (around("<s> <s> $A"), 2),
    "end": (around("$A </s>"), 0),
    "both": (around("<s> $A </s>"), 1),
    "two behind": (around("<s> $A </s> </s>"), 1),
    "bert": (lambda t: setattr(t, "post_processor", processors.BertProcessing(("</s>", 801), ("<s>", 800))), 1),
    "roberta": (lambda t: setattr(t, "post_processor", processors.RobertaProcessing(("</s>", 801), ("<s>", 800))), 1),
    "byte level": (lambda t: setattr(t, "post_processor", processors.ByteLevel(trim_offsets=True)), 0),
    "in a row": (
        lambda t: setattr(
            t, "post_processor",
            processors.Sequence([
                processors.ByteLevel(),
                processors.TemplateProcessing("start $A </s>", special_tokens=[
                    {"id": "start", "ids": [802], "tokens": ["<|x:y|>"]}, ("</s>", 801)]),
            ]),
        ), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=20, deadline=None)
@given(text=PROSE, cut=st.booleans(), pad=st.booleans(), chance=st.booleans())
def test_of_all_settings_of_a_file_only_what_stands_in_front_acts(name, text, cut, pad, chance):
    change, front = SETTINGS[name]
    others = [
        SETTINGS[each][0] for each, on in (("truncation", cut), ("padding", pad), ("dropout", chance)) if on
    ]
    tokenizer = with_settings(change, *others)
    before, whole = tokenizer.to_str(), fast_tokenizer(tokenizer)
    expected = REFERENCE.encode(text).ids
    for _ in range(2):
        ids = whole.encode(text).ids
        assert ids[front:] == expected == whole.encode(text, add_special_tokens=False).ids
        assert [each.ids for each in whole.encode_batch([text, "x"])] == [ids, whole.encode("x").ids]
    assert len(ids[:front]) == front and set(ids[:front]) <= {800, 802}
    assert tokenizer.to_str() == before  # which was given keeps them
    again = Tokenizer.from_str(whole.to_str())
    assert fast_tokenizer(again) is again and again.encode(text).ids == ids


@pytest.mark.parametrize("name", [*KINDS, *LACKING])
@pytest.mark.parametrize("single", ["$A", "<s> $A"])
def test_the_copy_without_settings_differs_in_nothing_else(name, single):
    """It shares the vocabulary and is made anew at each call, so that it is never an old one."""
    tokenizer = Tokenizer.from_str((KINDS | LACKING)[name].to_str())
    tokenizer.add_special_tokens(["<s>"])
    around(single)(tokenizer) if "</s>" in tokenizer.get_vocab() else None
    tokenizer.enable_truncation(3)
    for word in ("the cat", "first cat", "second cat"):
        tokenizer.add_tokens([word])
        as_it_is = Tokenizer.from_str(tokenizer.to_str())
        as_it_is.no_truncation()
        assert fast_tokenizer(tokenizer).to_str() == as_it_is.to_str()
    assert tokenizer.truncation is not None


def test_settings_of_our_own_fast_twin_and_spelt_tokens_as_text_do_not_act():
    mine = BytePairTokenizer.train(["the cat and the hat"], 260)
    mine.fast.enable_truncation(2)
    assert fast_tokenizer(mine).encode("the hat").ids == mine.encode("the hat")
    tokenizer = Tokenizer.from_str(REFERENCE.to_str())
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.encode_special_tokens = True
    assert (
        len(tokenizer.encode("<|im_end|>").ids) > 1 == len(fast_tokenizer(tokenizer).encode("<|im_end|>").ids)
    )


def test_what_decides_how_a_text_is_cut_is_kept():
    lowered = with_settings(
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()), lambda t: t.enable_truncation(2)
    )
    assert fast_tokenizer(lowered).encode("The HAT").ids == REFERENCE.encode("the hat").ids
    plain = with_settings(around("<s> $A"))
    assert fast_tokenizer(plain) is plain


STAND_INS = st.text("éđ¡ĠĊabê<|>用", min_size=2, max_size=6)


@settings(max_examples=25, deadline=None)
@given(names=st.lists(STAND_INS, min_size=1, max_size=4, unique=True), data=st.data())
def test_added_tokens_are_text_as_they_stand(names, data):
    """Though their letters may be those with which GPT-2 writes bytes."""
    names = [name for name in names if name not in REFERENCE.get_vocab()]
    tokenizer = Tokenizer.from_str(REFERENCE.to_str())
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    mine = BytePairTokenizer.from_tokenizers(tokenizer)
    ids = data.draw(st.lists(st.integers(0, 799 + len(names)), max_size=8))
    runs, text = [b""], ""
    for i in ids:
        runs[-1] += names[i - 800].encode() if i >= 800 else MINE.vocabulary[i]
    assert mine.decode(ids) == runs[0].decode("utf-8", "replace")
    for i, name in enumerate(names, start=800):
        assert mine.decode([i]) == name
        writer = TextWriter(tokenizer, stop=[name])
        text = "".join(writer.push(each) for each in [*REFERENCE.encode("the ").ids, i, i])
        assert writer.stopped and text == "the "
        writer = TextWriter(mine)
        pushed = [writer.push(each) for each in [i, *REFERENCE.encode("the").ids, i, i]] + [writer.finish()]
        assert "".join(pushed) == f"{name}the{name}{name}" == writer.text
    assert BytePairTokenizer.from_tokenizers(mine.fast) == mine


def test_an_added_token_that_a_byte_or_a_merge_makes_stays_what_it_makes():
    tokenizer = Tokenizer.from_str(REFERENCE.to_str())
    tokenizer.add_tokens(["x", "Ġthe", "đem"])
    assert tokenizer.get_vocab_size() == 801
    mine = BytePairTokenizer.from_tokenizers(tokenizer)
    assert mine.vocabulary == (*MINE.vocabulary, "đem".encode())
    ids = tokenizer.encode("over the đem the top").ids
    writer = TextWriter(tokenizer)
    written = "".join(writer.push(token) for token in ids) + writer.finish()
    assert written == mine.decode(ids) == "over the đem the top"


@settings(max_examples=50, deadline=None)
@given(st.sets(st.sampled_from(["\n", " ", " the", "  ", "é", "帽", "the hat"]), min_size=1), st.data())
def test_an_added_token_with_the_bytes_of_another_leaves_text_as_it_was(names, data):
    """It is found by `fast` alone; and merges go on making what they made."""
    tokenizer = Tokenizer.from_str(REFERENCE.to_str())
    tokenizer.add_tokens(sorted(names))
    mine = BytePairTokenizer.from_tokenizers(tokenizer)
    text = "".join(data.draw(st.lists(st.sampled_from(["the", " hat", "\n", " ", "é", "帽", "."]))))
    assert mine.encode(text) == REFERENCE.encode(text).ids
    assert mine.fast.encode(text).ids == tokenizer.encode(text).ids
    assert mine.decode(mine.encode(text)) == text


def test_an_added_letter_that_stands_for_a_byte_is_refused():
    """A text's "ñ" would be read as half a character."""
    tokenizer = Tokenizer.from_str(REFERENCE.to_str())
    tokenizer.add_tokens(["ñ"])
    assert tokenizer.decode(tokenizer.encode("ñ").ids) == "\ufffd"
    with pytest.raises(ValueError, match="'ñ' was added as a token, .* stands for the byte 0xF1"):
        fast_tokenizer(tokenizer)
    other = Tokenizer.from_str(KINDS["first_only"].to_str())
    other.add_tokens(["ñ"])
    assert fast_tokenizer(other) is other and other.encode("ñ").ids[-1] == other.token_to_id("ñ")


def test_long_words_are_not_remembered():
    tokenizer = MINE.first(400)
    text = "etaoin" * 1000
    for _ in range(2):
        assert tokenizer.decode(tokenizer.encode(text + " the " + text)) == text + " the " + text
    assert all(len(word) <= 100 for word in tokenizer._encoded_words)


# A twin that reads all that is spelt as text

FRAGMENTS = [
    "a man",
    " and a wife",
    "the",
    "is",
    " ",
    "\n",
    "<",
    "</",
    "s>",
    "|>",
    "end",
    "think",
    "人",
    "<unk>",
    "[UNK]",
]
SPELT = st.lists(st.sampled_from([*CONTROLS, *FRAGMENTS]), max_size=10).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=SPELT)
def test_no_text_becomes_a_control_token(kind, text):
    tokenizer = KINDS[kind]
    twin = reading_all_as_text(tokenizer)
    ids = twin.encode(text).ids
    assert control_tokens(tokenizer).keys().isdisjoint(ids)
    if not any(name in text for name in CONTROLS):
        assert ids == tokenizer.encode(text).ids
    if kind in ("byte_level", "prepended", "first_only") and not text.startswith(" "):  # which lose no letter
        assert (
            twin.decode(ids, skip_special_tokens=False)
            == tokenizer.decode(ids, skip_special_tokens=False)
            == text
        )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from([*CONTROLS, *FRAGMENTS[:6]]), max_size=10))
def test_by_their_secret_names_the_twin_reads_control_tokens_as_the_tokenizer_does(kind, parts):
    """The stretches between them, too: a blank put before a text or a stretch stands where it stood."""
    tokenizer = KINDS[kind]
    twin = reading_all_as_text(tokenizer)
    secret = twin.get_added_tokens_decoder()
    names = {token.content: secret[i].content for i, token in control_tokens(tokenizer).items()}
    text = "".join(names.get(part, part) for part in parts)
    assert twin.encode(text).ids == tokenizer.encode("".join(parts)).ids
    assert secret.keys() == tokenizer.get_added_tokens_decoder().keys()


def test_pieces_of_a_text_with_a_control_token_are_those_of_words():
    tokenizer = KINDS["byte_level"]
    assert reading_all_as_text(tokenizer).encode("said</s>the<think>").tokens == [
        *tokenizer.encode("said<").tokens, *tokenizer.encode("/s").tokens, *tokenizer.encode(">the<").tokens,
        *tokenizer.encode("think>").tokens,
    ]  # fmt: skip


def test_the_twin_of_a_tokenizer_that_cuts_and_pads_reads_whole_texts():
    made = BytePairTokenizer.train(["the cat and the hat"], 260)
    tokenizer = Tokenizer.from_str(made.fast.to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=20)
    text = "the cat and the hat"
    for each in (made, tokenizer):
        assert reading_all_as_text(each).encode(text).ids == made.encode(text)


def test_what_is_no_control_token():
    """Single letters, words, signs, blanks, bytes; and the piece of an ordinary word stays one."""
    tokenizer = Tokenizer.from_str(REFERENCE.to_str())
    tokenizer.add_tokens(["Ġthe", "  ", "<0x0A>", "x", "mRNA", "cat", "in vitro", "▁▁", "->", "👍🏽"])
    tokenizer.add_special_tokens(["</s>", "EOS"])
    twin = reading_all_as_text(tokenizer)
    for text in ("é the  cat\n", "over the top", "mRNA in vitro\ncat", "a ▁▁ b"):
        assert twin.encode(text).ids == tokenizer.encode(text).ids
    tokenizer.add_tokens(["é"])
    assert [token.content for token in control_tokens(tokenizer).values()] == ["</s>", "EOS"]
    tokenizer = KINDS["prepended"]
    assert reading_all_as_text(tokenizer).encode("人").tokens == [
        "▁",
        *(f"<0x{byte:02X}>" for byte in "人".encode()),
    ]


@pytest.mark.parametrize("normalized", [False, True])
def test_runs_of_sentencepiece_blanks_stay_one_token(normalized):
    """As in vocabularies of Gemma's kind, in which code is indented by added tokens."""
    pieces = ["<unk>", *BYTES, "▁", *"def(x):return=\n", "▁▁", "▁▁▁▁", "de", "def"]
    merges = [("d", "e"), ("de", "f"), ("▁", "▁"), ("▁▁", "▁▁")]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_tokens([AddedToken(run, normalized=normalized) for run in ("▁▁▁▁", "▁▁")])
    text = "def f(x):\n    return  x"
    assert "▁▁▁▁" in tokenizer.encode(text).tokens
    assert reading_all_as_text(tokenizer).encode(text).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", LACKING)
@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.sampled_from([*LEARNED, MARK, "tac", "é", "caté", "Z", "帽子", "­"]), max_size=6))
def test_what_a_vocabulary_lacks_is_refused_and_nothing_else(kind, parts):
    """For whatever model, steps before it and decoder; what an added token holds is not lacking."""
    tokenizer, text = LACKING[kind], " ".join(parts)
    lacking = {"caté", "é", "Z", "帽子", "­"}
    if kind == "bytes, no accents":
        lacking -= {"caté", "é"}
    if kind in ("whole words", "word pieces", "words with ends"):  # no word that was learned ends in "c"
        lacking |= {"tac"}
    twin = reading_all_as_text(tokenizer)
    if lacking.isdisjoint(parts):
        assert encode_whole(tokenizer, text).ids == tokenizer.encode(text).ids
        assert leaves_out(twin, twin.encode(text).ids) == (MARK in parts)
        return
    with pytest.raises(ValueError, match="The vocabulary has no token for .*, which a text holds") as refusal:
        encode_whole(tokenizer, text)
    assert any(
        repr(letter) in str(refusal.value) or letter in str(refusal.value) for letter in "".join(lacking)
    )
    assert leaves_out(twin, twin.encode(text).ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.sampled_from([*FRAGMENTS, "é", "帽子", "Z"]), max_size=6))
def test_nothing_is_lacking_where_there_is_an_unknown_token_or_every_byte(kind, parts):
    tokenizer, text = KINDS[kind], "".join(parts)
    assert encode_whole(tokenizer, text).ids == tokenizer.encode(text).ids
    assert not leaves_out(reading_all_as_text(tokenizer), reading_all_as_text(tokenizer).encode(text).ids)


def test_names_of_bytes_are_read_as_bytes():
    """In a vocabulary that was trained with them they are added tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["fine and fine"], trainer)
    ids, writer = tokenizer.encode("fine 🙂?").ids, TextWriter(tokenizer)
    assert misread_tokens(tokenizer) == {}
    written = "".join(map(writer.push, ids)) + writer.finish()
    assert written == tokenizer.decode(ids, skip_special_tokens=False) == "fine 🙂?"


@pytest.mark.parametrize("name", ["\ue000", "␂", "🛑"])
def test_a_special_token_of_one_sign_is_a_control_token(name):
    tokenizer = Tokenizer.from_str(REFERENCE.to_str())
    tokenizer.add_special_tokens([name, "!"])  # the last is a sign of texts, with which some pad
    (control,) = control_tokens(tokenizer)
    assert tokenizer.id_to_token(control) == name
    ids = reading_all_as_text(tokenizer).encode(f"the hat!{name}").ids
    assert control not in ids and tokenizer.decode(ids, skip_special_tokens=False) == f"the hat!{name}"


def test_a_tokenizer_that_has_changed_gets_another_twin():
    tokenizer = Tokenizer.from_str(REFERENCE.to_str())
    assert reading_all_as_text(tokenizer).encode("<new>").ids == tokenizer.encode("<new>").ids
    tokenizer.add_tokens(["<new>"])
    assert reading_all_as_text(tokenizer).encode("<new>").ids == REFERENCE.encode("<new>").ids
    assert tokenizer.encode("<new>").ids == [800]


# Wrong implementations that the tests above must reject


def naive_train(texts, vocab_size, key=lambda count, pair: (-count, pair), cut=split_words, stale=False):
    """Count everything anew for each merge; `key` decides which pair is joined."""
    vocabulary = list(MINE.vocabulary[:256])
    ids = {token: i for i, token in enumerate(vocabulary)}
    words = [[ids[bytes([byte])] for byte in word.encode()] for text in texts for word in cut(text)]
    merges, counts = [], None
    while len(vocabulary) < vocab_size:
        if not stale or counts is None:
            counts = Counter(pair for word in words for pair in pairwise(word))
        else:  # counts can rise but never fall
            counts = Counter(pair for word in words for pair in pairwise(word)) | counts
            counts -= Counter({pair: counts[pair] for pair in merges})
        if not counts:
            break
        pair = min(counts, key=lambda pair: key(counts[pair], pair))
        merges.append(pair)
        vocabulary.append(vocabulary[pair[0]] + vocabulary[pair[1]])
        for word in words:
            place = 0
            while place < len(word) - 1:
                if (word[place], word[place + 1]) == pair:
                    word[place : place + 2] = [len(vocabulary) - 1]
                place += 1
    return BytePairTokenizer(tuple(vocabulary), tuple(merges))


def naive_encode(tokenizer, text, choose):
    """Join pairs that have a merge until none is left; `choose` picks the place."""
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}
    result = []
    for word in split_words(text):
        ids = [tokenizer.vocabulary.index(bytes([byte])) for byte in word.encode()]
        while places := [(ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]:
            rank, place = choose(places)
            ids[place : place + 2] = [256 + rank]
        result += ids
    return result


SAMPLE = [load_austen()[300_000:304_000], load_chinese_classics()[:500]]


def test_training_equals_counting_anew_for_each_merge():
    assert naive_train(SAMPLE, 330) == BytePairTokenizer.train(SAMPLE, 330)


@pytest.mark.parametrize(
    "variant",
    [
        {"key": lambda count, pair: -count},  # ties: whichever came first in the text
        {"key": lambda count, pair: (-count, -pair[0], -pair[1])},  # ties: the larger ids
        {"cut": lambda text: [text]},  # no cutting into words
        {"cut": str.split},  # cut at spaces, which are lost
        {"stale": True},  # counts are not lowered
    ],
    ids=["ties-by-text", "ties-by-larger", "uncut", "spaces-lost", "stale-counts"],
)
def test_wrong_training_gives_another_vocabulary(variant):
    assert naive_train(SAMPLE, 330, **variant) != BytePairTokenizer.train(SAMPLE, 330)


def test_wrong_encoding_gives_other_tokens():
    text = SAMPLE[0]
    assert naive_encode(MINE, text, min) == MINE.encode(text)
    assert naive_encode(MINE, text, lambda places: min(places, key=lambda p: p[1])) != MINE.encode(text)
    assert naive_encode(MINE, text, max) != MINE.encode(text)


def test_the_longest_token_first_is_not_bpe():
    """A greedy longest match is another rule: here the merges cut "ab|c" and the longest match does not."""
    base = MINE.vocabulary[:256]
    a, b, c = (base.index(letter) for letter in (b"a", b"b", b"c"))
    tokenizer = BytePairTokenizer((*base, b"bc", b"ab"), ((b, c), (a, b)))
    assert [tokenizer.vocabulary[i] for i in tokenizer.encode("abc")] == [b"a", b"bc"]


def test_long_words_stay_fast():
    letters = random.Random(0).choices("etaoinshr", k=50_000)
    assert MINE.decode(MINE.encode("".join(letters))) == "".join(letters)


# Errors


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: train_tokenizer("abc", 100), ValueError, "vocab_size is 100; the 256 bytes alone take 256"),
        (lambda: train_tokenizer("abc", 10**12), ValueError, "vocab_size is 1000000000000; expected at most 16777216"),
        (lambda: train_tokenizer("a\ud800", 300), ValueError, r"U\+D800, at 1: half a character"),
        (lambda: BytePairTokenizer.train(["abc"], 255), ValueError, "vocab_size is 255; the 256 bytes alone"),
        (lambda: BytePairTokenizer.train([], 300), ValueError, "training texts are empty; there is nothing"),
        (lambda: BytePairTokenizer.train(["", ""], 300), ValueError, "training texts are empty"),
        (lambda: BytePairTokenizer.train("abc", 300), TypeError, r"one string; give a list .* such as \[text\]"),
        (lambda: BytePairTokenizer.train(["a\ud800"], 300), ValueError, r"U\+D800, at 1: half a character"),
        (lambda: MINE.encode("ab\udfff"), ValueError, r"unpaired surrogate, U\+DFFF, at 2: .* Replace it, for"),
        (lambda: MINE.decode([0, 800]), ValueError, "Token id 800 is outside the vocabulary; ids go from 0 to 799"),
        (lambda: MINE.decode([-1]), ValueError, "Token id -1 is outside the vocabulary"),
        (lambda: MINE.first(801), ValueError, "vocab_size is 801; this vocabulary has 800 entries"),
        (lambda: MINE.first(10), ValueError, "vocab_size is 10; the 256 bytes alone"),
        (lambda: BytePairTokenizer(MINE.vocabulary[:256], ((0, 256),)), ValueError, "Token id 256 is outside"),
        (lambda: BytePairTokenizer(MINE.vocabulary[:256], ((0, 1),)), ValueError, "Merge 0 makes .* not in the vocabulary"),
    ],
)  # fmt: skip
def test_errors_are_sentences(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_other_types_are_refused_with_a_sentence(unchecked):
    tokenizer = BytePairTokenizer.train(["abc"], 257)
    for call, kind in ((lambda: BytePairTokenizer.train([b"abc"], 300), "bytes"), (lambda: tokenizer.encode(None), "NoneType")):  # fmt: skip
        with pytest.raises(TypeError) as refusal:
            call()
        assert str(refusal.value) == f"The text is of type {kind}; expected str. Decode bytes first."
    for other, kind in (("tokenizer.json", "str"), (None, "NoneType")):
        with pytest.raises(TypeError) as refusal:
            fast_tokenizer(other)
        assert str(refusal.value) == (
            f"The tokenizer is of type {kind}; expected a BytePairTokenizer or a Tokenizer of the tokenizers "
            "package (transformers' fast ones hold it as backend_tokenizer)."
        )


def test_the_advice_on_surrogates_works():
    assert MINE.encode("ab\udfff".encode("utf-8", "replace").decode()) == MINE.encode("ab?")


def test_other_kinds_of_tokenizers_are_refused():
    prefixed = reference(["abc"], 256)
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    lowered = reference(["abc"], 256)
    lowered.normalizer = normalizers.Lowercase()
    for other in (prefixed, lowered, Tokenizer(models.WordLevel({"a": 0}, "a")), Tokenizer(models.BPE())):
        with pytest.raises(ValueError, match="Expected a BPE model behind ByteLevel"):
            BytePairTokenizer.from_tokenizers(other)


def test_a_vocabulary_with_gaps_is_refused():
    gap = Tokenizer(models.BPE({"a": 0, "b": 2}, []))
    gap.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(ValueError, match="2 tokens, but their ids are not 0 to 1; close the gaps"):
        BytePairTokenizer.from_tokenizers(gap)


def test_a_loaded_vocabulary_with_special_tokens_has_no_smaller_ones():
    special = reference(["abc abc"], 260)
    special.add_special_tokens(["<|end|>"])
    tokenizer = BytePairTokenizer.from_tokenizers(special)
    assert tokenizer.decode([tokenizer.vocab_size - 1]) == "<|end|>"
    assert tokenizer.encode("<|end|>")[0] != tokenizer.vocab_size - 1  # text is text
    with pytest.raises(ValueError, match="not made by BytePairTokenizer.train"):
        tokenizer.first(257)


def test_a_letter_may_be_added_to_a_vocabulary_that_has_no_bytes():
    """In WordPiece it stands for itself, though a normaliser writes it otherwise."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_tokens([AddedToken("é")])
    assert fast_tokenizer(tokenizer).encode("é a").ids == tokenizer.encode("é a").ids
