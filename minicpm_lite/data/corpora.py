"""Texts as token streams: a vocabulary learned from the text, a part to train on, and a held-out part."""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from ..language.tokenizer import train_tokenizer
from .assets import load_austen

__all__ = ["BLOCK_CHARACTERS", "Corpus", "block_is_held_out", "load_corpus", "split_novels"]

BLOCK_CHARACTERS = 20_000  # of the novels, about ten pages
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


def load_corpus(vocab_size: int = 1024) -> Corpus:
    """Jane Austen's novels as tokens of a byte-level BPE with ``vocab_size`` entries.

    One block of 20,000 characters in twenty is held out, so the held-out text comes from every novel. The
    first call takes a few seconds; the result is remembered.
    """
    return _load_corpus(vocab_size)


@cache
def _load_corpus(vocab_size: int) -> Corpus:
    training, held_out = split_novels()
    tokenizer = train_tokenizer(training, vocab_size)
    train, validation = (torch.tensor(tokenizer.encode(part).ids) for part in (training, held_out))
    return Corpus(tokenizer, train, validation, len(held_out.encode()) / len(validation))


def split_novels() -> tuple[str, str]:
    """Jane Austen's novels in two parts: the blocks to train on, and those that are held out."""
    text, parts = load_austen(), ([], [])
    for block, start in enumerate(range(0, len(text), BLOCK_CHARACTERS)):
        parts[block_is_held_out(block)].append(text[start : start + BLOCK_CHARACTERS])
    training, held_out = map("".join, parts)
    return training, held_out


def block_is_held_out(block: int) -> bool:
    """Whether a block of the novels, counted from 0, is held out."""
    return block % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
