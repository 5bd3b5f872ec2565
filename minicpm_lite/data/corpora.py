"""Texts as token streams: a vocabulary learned from the text, a part to train on, and a held-out part."""

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from ..language.tokenizer import require_text, train_tokenizer
from .assets import load_austen

__all__ = ["BLOCK_CHARACTERS", "Corpus", "block_is_held_out", "load_corpus", "split_novels"]

BLOCK_CHARACTERS = 20_000  # about ten pages
_HELD_OUT_EVERY = 20  # one block in twenty, 5 %, from all over the text


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as tokens: a part to train on and a held-out part.

    Attributes:
        tokenizer: learned from the training part.
        train: token ids of the training part, one after another.
        validation: token ids of the held-out part.
        bytes_per_token: of the held-out part, so that losses per token become bits per byte.
    """

    tokenizer: Tokenizer
    train: Int[Tensor, " train_tokens"]
    validation: Int[Tensor, " held_out_tokens"]
    bytes_per_token: float


def load_corpus(vocab_size: int = 1024, text: str | None = None) -> Corpus:
    """A text as tokens of a byte-level BPE with ``vocab_size`` entries, learned from its training part.

    One block of 20,000 characters in twenty is held out, so the held-out text comes from all over the text;
    of one that has no twenty such blocks, they are shorter. The first call takes a few seconds; the results
    of the last few are remembered, and each caller gets a copy.

    Args:
        vocab_size: ids of the vocabulary; a short text may give fewer.
        text: left out: Jane Austen's novels.

    Raises:
        TypeError: the text is not a str.
        ValueError: the text has fewer than a thousand characters, or holds half a character.

    >>> corpus = load_corpus(300, text="It is a truth universally acknowledged. " * 100)
    >>> corpus.tokenizer.decode(corpus.validation[:5].tolist())
    'It is a truth universally'
    """
    text = load_austen() if text is None else text
    require_text(text)
    return copy.deepcopy(_load_corpus(vocab_size, text))


@lru_cache(maxsize=4)  # a corpus may be large
def _load_corpus(vocab_size: int, text: str) -> Corpus:
    if len(text) < 1000:
        raise ValueError(f"The text has {len(text)} characters; at least 1,000 are needed to hold some out.")
    training, held_out = _split(text)
    tokenizer = train_tokenizer(training, vocab_size)
    train, validation = (torch.tensor(tokenizer.encode(part).ids) for part in (training, held_out))
    return Corpus(tokenizer, train, validation, len(held_out.encode()) / len(validation))


def split_novels() -> tuple[str, str]:
    """Jane Austen's novels in two parts: the blocks to train on, and those that are held out."""
    return _split(load_austen())


def _split(text: str) -> tuple[str, str]:
    size = min(BLOCK_CHARACTERS, len(text) // _HELD_OUT_EVERY)
    parts: tuple[list[str], list[str]] = ([], [])
    for block, start in enumerate(range(0, len(text), size)):
        parts[block_is_held_out(block)].append(text[start : start + size])
    training, held_out = map("".join, parts)
    return training, held_out


def block_is_held_out(block: int) -> bool:
    """Whether a block of a text, counted from 0, is held out."""
    return block % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
