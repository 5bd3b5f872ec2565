"""The book's prose: nothing is lost, and what is held out stays held out."""

import zlib

import pytest

from minicpm_lite.data import corpora
from minicpm_lite.data.assets import load_austen
from minicpm_lite.data.corpora import BLOCK_CHARACTERS, block_is_held_out, load_corpus, split_novels


@pytest.mark.slow  # learns a vocabulary from four million characters; the split alone has a test below
def test_corpus_holds_the_whole_text_once():
    corpus = load_corpus()
    train, validation = (corpus.tokenizer.decode(part.tolist()) for part in (corpus.train, corpus.validation))
    text = load_austen()
    assert len(train) + len(validation) == len(text)
    assert (train, validation) == split_novels()
    assert 0.04 < len(validation) / len(text) < 0.06
    assert validation == "".join(text[start : start + 20_000] for start in range(380_000, len(text), 400_000))
    assert int(corpus.train.max()) < 1024
    assert corpus.bytes_per_token == pytest.approx(len(validation.encode()) / len(corpus.validation))


@pytest.mark.slow  # learns a vocabulary from four million characters
def test_the_corpus_is_that_of_the_first_edition():
    """Recorded runs were trained on these very tokens."""
    corpus = load_corpus()
    tokens = [zlib.crc32(part.numpy().tobytes()) for part in (corpus.train, corpus.validation)]
    assert tokens == [1423998356, 3142737106]
    assert zlib.crc32(corpus.tokenizer.to_str().encode()) == 1410826050


def test_blocks_fall_on_one_side():
    text, parts = load_austen(), split_novels()
    blocks = [text[start : start + BLOCK_CHARACTERS] for start in range(0, len(text), BLOCK_CHARACTERS)]
    for side, part in enumerate(parts):
        assert part == "".join(block for i, block in enumerate(blocks) if block_is_held_out(i) == side)
    assert [i for i in range(60) if block_is_held_out(i)] == [19, 39, 59]


@pytest.mark.slow  # learns a vocabulary from four million characters
def test_the_corpus_is_made_once_and_each_caller_has_his_own(monkeypatch):
    first = load_corpus()
    monkeypatch.delattr(corpora, "train_tokenizer")
    held, size = first.train[:5].tolist(), first.tokenizer.get_vocab_size()
    first.train[:5] = -1
    first.validation[:5] = -1
    first.tokenizer.add_special_tokens(["</s>"])
    second = load_corpus(1024)
    assert second.train[:5].tolist() == held and second.validation.min() >= 0
    assert second.tokenizer.get_vocab_size() == size == 1024


def test_few_texts_are_remembered():
    for number in range(6):
        load_corpus(300, text=f"It is truth number {number}, universally acknowledged. " * 30)
    assert corpora._load_corpus.cache_info().currsize <= 4


@pytest.mark.parametrize("place", [0, 1150])  # in the part to train on, and in the held-out one
def test_half_a_character_is_one_sentence(place):
    text = "plain words " * 100
    with pytest.raises(ValueError, match=f"The text holds an unpaired surrogate, U\\+D800, at {place}"):
        load_corpus(300, text[:place] + "\ud800" + text[place:])
