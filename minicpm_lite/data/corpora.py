"""Texts as token streams: a vocabulary learned from the text, a held-out part, and windows to train on.

A run reads an endless sequence of windows, and each window is a function of its index alone. So a resumed run
sees the same data, several processes can share a batch, and mixtures can be built from sequences.
"""

import zlib
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from ..config import require_positive_integer
from ..language.tokenizer import train_tokenizer
from .assets import load_austen

__all__ = ["Corpus", "TokenWindows", "Windows", "batch_of", "load_corpus"]

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


@runtime_checkable
class Windows(Protocol):
    """An endless, shuffled sequence of training windows; each is a function of its index alone.

    A token that is context only, and not to be predicted, is stored as its complement ``~id``, which is
    negative: the question in front of an answer, for instance.

    Attributes:
        length: tokens that are predicted in a window, which holds one more.
    """

    length: int

    def __getitem__(self, index: int) -> Int[Tensor, " window"]:
        """The window of an index, counted from 0: ``length + 1`` token ids, or complements of them."""
        ...

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest token id in it."""
        ...

    def identity(self) -> dict:
        """What must be the same for a resumed run to see the same windows; fits into JSON."""
        ...


def batch_of(windows: Windows, step: int, batch_size: int) -> Int[Tensor, "batch_size window"]:
    """The windows of a step, counted from 0: ``batch_size`` of them, none of which any other step sees.

    >>> batch_of(TokenWindows(torch.arange(100), length=4, seed=0), step=7, batch_size=2).shape
    torch.Size([2, 5])
    """
    require_positive_integer("batch_size", batch_size)
    if step < 0:
        raise ValueError(f"The step is {step}; steps are counted from 0.")
    return torch.stack([windows[index] for index in range(step * batch_size, (step + 1) * batch_size)])


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """A stream of tokens, cut into windows.

    Each epoch cuts the stream into windows of ``length`` tokens at a random offset and visits them in random
    order; both follow from the seed and the epoch's number. A window overlaps the next by one token, so no
    token is predicted twice in an epoch; fewer than two windows' worth, at the ends, are left out.

    Attributes:
        tokens: the stream.
        length: tokens that are predicted in each window.
        seed: decides offsets and orders.

    >>> windows = TokenWindows(torch.arange(100), length=4, seed=0)
    >>> bool((windows[7] == windows[7]).all())
    True
    """

    tokens: Int[Tensor, " tokens"]
    length: int
    seed: int

    def __post_init__(self) -> None:
        require_positive_integer("length", self.length)
        if self._in_epoch < 1:
            raise ValueError(
                f"The stream holds {len(self.tokens)} tokens; windows of {self.length} need at least "
                f"{2 * self.length}. Give a longer text or shorter windows."
            )

    @property
    def _in_epoch(self) -> int:
        return (len(self.tokens) - self.length) // self.length  # the offset takes up to one window

    def __getitem__(self, index: int) -> Int[Tensor, " window"]:
        """The window of an index, counted from 0: ``length + 1`` token ids."""
        if index < 0:
            raise IndexError(f"The index of the window is {index}; windows are counted from 0.")
        epoch, position = divmod(index, self._in_epoch)
        offset, order = _epoch(self._in_epoch, self.length, self.seed, epoch)
        start = offset + order[position] * self.length
        return self.tokens[start : start + self.length + 1].long()

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest token id in the stream."""
        return int(self.tokens.min()), int(self.tokens.max())

    def identity(self) -> dict:
        """Number of tokens and their checksum, window length and seed."""
        return {"tokens": len(self.tokens), "checksum": self._checksum, "length": self.length,
                "seed": self.seed}  # fmt: skip

    @cached_property
    def _checksum(self) -> int:
        return zlib.crc32(self.tokens.cpu().long().contiguous().numpy().tobytes())


@lru_cache(maxsize=16)
def _epoch(windows: int, length: int, seed: int, epoch: int) -> tuple[int, list[int]]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return int(torch.randint(length, (1,), generator=generator)), torch.randperm(
        windows, generator=generator
    ).tolist()
