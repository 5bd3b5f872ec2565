"""The vocabulary of the book's small models."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.data.assets import load_austen
from minicpm_lite.language.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(load_austen()[:100_000], vocab_size=400)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_size_and_compression():
    sample = load_austen()[200_000:201_000]
    assert TOKENIZER.get_vocab_size() == 400
    assert len(TOKENIZER.encode(sample).ids) < len(sample) / 1.5


def test_training_twice_gives_the_same_vocabulary():
    assert train_tokenizer(load_austen()[:100_000], vocab_size=400).get_vocab() == TOKENIZER.get_vocab()


def test_too_small_a_vocabulary():
    with pytest.raises(ValueError, match="the 256 bytes alone"):
        train_tokenizer("abc", vocab_size=100)
