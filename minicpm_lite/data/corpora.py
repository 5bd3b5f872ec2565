"""Texts as token streams: a vocabulary learned from the text, a held-out part, and batches by step."""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from ..config import require_positive_integer
from ..language.tokenizer import train_tokenizer
from .assets import load_austen

__all__ = ["Corpus", "TokenBatches", "load_corpus"]

_BLOCK_CHARACTERS = 20_000  # about ten pages
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
    text = load_austen()
    blocks = [text[start : start + _BLOCK_CHARACTERS] for start in range(0, len(text), _BLOCK_CHARACTERS)]
    held_out = "".join(blocks[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY])
    del blocks[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    training = "".join(blocks)
    tokenizer = train_tokenizer(training, vocab_size)
    train, validation = (torch.tensor(tokenizer.encode(part).ids) for part in (training, held_out))
    return Corpus(tokenizer, train, validation, len(held_out.encode()) / len(validation))


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """The batch of each step, as a function of the step alone: a resumed run sees the same data.

    Each epoch cuts the stream into windows of ``length`` tokens at a random offset and visits them in random
    order; both follow from the seed and the epoch's number. A window overlaps the next by one token, so no
    token is predicted twice in an epoch; fewer than two windows' worth, at the ends, are left out.

    Attributes:
        tokens: the stream.
        batch_size: windows in a batch.
        length: tokens that are predicted in each window.
        seed: decides offsets and orders.

    >>> batches = TokenBatches(torch.arange(100), batch_size=2, length=4, seed=0)
    >>> batches(0).shape
    torch.Size([2, 5])
    >>> bool((batches(7) == batches(7)).all())
    True
    """

    tokens: Int[Tensor, " tokens"]
    batch_size: int
    length: int
    seed: int

    def __post_init__(self) -> None:
        require_positive_integer("batch_size", self.batch_size)
        require_positive_integer("length", self.length)
        if self._windows < 1:
            raise ValueError(
                f"The stream holds {len(self.tokens)} tokens; windows of {self.length} need at least "
                f"{2 * self.length}. Give a longer text or shorter windows."
            )

    @property
    def _windows(self) -> int:
        return (len(self.tokens) - self.length) // self.length  # the offset takes up to one window

    def __call__(self, step: int) -> Int[Tensor, "batch_size window"]:
        """The windows of a step, counted from 0; each has ``length + 1`` tokens."""
        if step < 0:
            raise ValueError(f"The step is {step}; steps are counted from 0.")
        first = step * self.batch_size
        starts = [self._start(index) for index in range(first, first + self.batch_size)]
        return torch.stack([self.tokens[start : start + self.length + 1] for start in starts]).long()

    def _start(self, index: int) -> int:
        epoch, position = divmod(index, self._windows)
        offset, order = _epoch(self._windows, self.length, self.seed, epoch)
        return offset + order[position] * self.length


@lru_cache(maxsize=4)
def _epoch(windows: int, length: int, seed: int, epoch: int) -> tuple[int, list[int]]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return int(torch.randint(length, (1,), generator=generator)), torch.randperm(
        windows, generator=generator
    ).tolist()
