"""Windows: what a run reads, as an endless sequence in which each window is a function of its index alone.

So a resumed run sees the same data, several processes can share a batch, and mixtures can be built from
sequences. `Windows` is the protocol, `TokenWindows` the sequence of one stream of tokens:

    epoch, place = divmod(index, windows in an epoch)
    window = stream[start : start + length + 1]       start = offset(epoch) + order(epoch)[place] * length

Choices and traps:

- A window is the caller's own: whoever marks in place what is read only does not write into the stream.
- Each epoch begins at another offset, of less than a window, so that the cuts fall elsewhere.
- An identity says of shards what their index says: the checksums of their files. The same tokens, cut into
  files of another size (``shard_tokens``), are other data: a run does not go on with them, and a decay reads
  them from the beginning. Checkpoints hold identities, so what they are made of cannot change any more.
- The kind of stream decides how the order of an epoch is made, and nobody can choose otherwise: a run that
  was begun in one order cannot go on in another one. A tensor is in memory, and so may its order be:
  ``torch.randperm``. Shards may hold 10^12 tokens; in windows of 4,096 a stored order would take 2 GB in
  every process, so theirs is a `Permutation`, which is computed where it is asked.
"""

import math
import operator
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from ..config import require_positive_integer
from ..language.scoring import readable
from ..runtime import require_seed
from .shards import Shards

__all__ = ["Permutation", "TokenWindows", "Windows", "batch_of", "require_stream", "stream_identity"]

Made = TypeVar("Made")

_MASK = (1 << 64) - 1
_KINDS = (torch.int64, torch.int32, torch.int16)
_ROUNDS = 8  # of the Feistel network; 4 already pass as random, and the rounds cost next to nothing


@runtime_checkable
class Windows(Protocol):
    """An endless, shuffled sequence of training windows; each is a function of its index alone.

    A token that is read and not predicted, such as the question in front of an answer, has the mark of
    `minicpm_lite.language.scoring.context_only`.

    Attributes:
        length: tokens that are predicted in a window, which holds one more.
    """

    length: int

    def __getitem__(self, index: int) -> Int[Tensor, " window"]:
        """The window of an index, counted from 0: ``length + 1`` token ids, some of them with the mark."""
        ...

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest token id in it."""
        ...

    def identity(self) -> dict:
        """What must be the same for a resumed run to see the same windows; fits into JSON.

        It says what is read, by checksums, and never where it lies: a folder may be moved.
        """
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


def recent(epochs: dict[int, Made], epoch: int, make: Callable[[], Made]) -> Made:
    """What was made for an epoch, or is made now; of the epochs, the last two are kept.

    Each sequence of windows keeps its own: a limit for all together would, where a mixture has more sequences
    than that, draw an epoch anew for each window.
    """
    if epoch not in epochs:
        for old in [*epochs][:-1]:
            del epochs[old]
        epochs[epoch] = make()
    return epochs[epoch]


def require_stream(tokens: Int[Tensor, " tokens"] | Shards) -> None:
    """Refuse what is no stream of token ids.

    Raises:
        TypeError: neither a tensor nor shards, such as a list of ids.
        ValueError: a tensor of other numbers, or of several dimensions.
    """
    if not isinstance(tokens, Tensor | Shards):
        raise TypeError(
            f"The stream is of type {type(tokens).__name__}; expected a tensor of token ids, "
            "torch.as_tensor(ids), or Shards."
        )
    if isinstance(tokens, Tensor) and tokens.ndim != 1:
        raise ValueError(
            f"The stream is of shape {tuple(tokens.shape)}; expected one dimension, the tokens: "
            "tokens.flatten()."
        )
    if isinstance(tokens, Tensor) and tokens.dtype not in _KINDS:
        raise ValueError(
            f"The stream is of type {tokens.dtype}; expected int64, int32 or int16: tokens.long()."
        )


def stream_identity(tokens: Int[Tensor, " tokens"] | Shards) -> dict:
    """Number of tokens of a stream and their checksum, of shards also who made them."""
    if isinstance(tokens, Shards):
        return tokens.identity()
    checksum = zlib.crc32(tokens.cpu().long().contiguous().numpy().tobytes())
    return {"tokens": len(tokens), "checksum": checksum}


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """A stream of tokens, in memory or in shards, cut into windows.

    Each epoch cuts the stream into windows of ``length`` tokens at a random offset and visits them in random
    order; both follow from the seed and the epoch's number. A window overlaps the next by one token, so no
    token is predicted twice in an epoch; fewer than two windows' worth, at the ends, are left out.

    Attributes:
        tokens: the stream. (A tensor and shards with the same tokens are read in different orders.)
        length: tokens that are predicted in each window, which holds one more.
        seed: decides offsets and orders.

    >>> windows = TokenWindows(torch.arange(100), length=4, seed=0)
    >>> bool((windows[7] == windows[7]).all())
    True
    """

    tokens: Int[Tensor, " tokens"] | Shards
    length: int
    seed: int

    def __post_init__(self) -> None:
        require_positive_integer("length", self.length)
        require_seed(self.seed)
        require_stream(self.tokens)
        if self._in_epoch < 1:
            raise ValueError(
                f"{getattr(self.tokens, 'folder', 'The stream')} holds {len(self.tokens)} tokens; windows of "
                f"{self.length} need at least {2 * self.length}. Give a longer text or shorter windows."
            )

    @cached_property
    def _epochs(self) -> dict[int, tuple[int, Sequence[int]]]:
        return {}

    @property
    def _in_epoch(self) -> int:
        return (len(self.tokens) - self.length) // self.length  # the offset takes up to one window

    def __getitem__(self, index: int) -> Int[Tensor, " window"]:
        """The window of an index, counted from 0: ``length + 1`` token ids.

        Raises:
            IndexError: the index is negative.
            ValueError: the shard it lies in is damaged.
        """
        index = operator.index(index)  # a number of numpy's, too
        if index < 0:
            raise IndexError(f"The index of the window is {index}; windows are counted from 0.")
        epoch, place = divmod(index, self._in_epoch)
        epoch_of = _computed_epoch if isinstance(self.tokens, Shards) else _drawn_epoch
        offset, order = recent(
            self._epochs, epoch, lambda: epoch_of(self._in_epoch, self.length, self.seed, epoch)
        )
        start = offset + order[place] * self.length
        return self.tokens[start : start + self.length + 1].to(torch.long, copy=True)

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest token id in the stream."""
        if isinstance(self.tokens, Shards):
            return self.tokens.id_range()
        ids = readable(self.tokens)
        return int(ids.min()), int(ids.max())

    def identity(self) -> dict:
        """Number of tokens and their checksum, of shards also who made them; window length and seed."""
        return self._stream | {"length": self.length, "seed": self.seed}

    @cached_property
    def _stream(self) -> dict:
        return stream_identity(self.tokens)


def _drawn_epoch(windows: int, length: int, seed: int, epoch: int) -> tuple[int, Sequence[int]]:
    """Offset and order of an epoch, drawn and kept."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(length, (1,), generator=generator))
    return offset, torch.randperm(windows, generator=generator).tolist()


def _computed_epoch(windows: int, length: int, seed: int, epoch: int) -> tuple[int, "Permutation"]:
    """Offset and order of an epoch, computed where they are asked."""
    return _hash(seed, epoch, 0) % length, Permutation(windows, _hash(seed, epoch, 1))


@dataclass(frozen=True)
class Permutation:
    """The numbers 0 to ``size - 1`` in random order, each computed when it is asked for; no table is kept.

    A Feistel network on a grid of about ``sqrt(size)`` rows and columns: in turn, rows are shifted by a hash
    of the column and columns by a hash of the row. Every shift can be undone, so no two numbers meet. The
    grid has a few cells too many; a number that lands there goes through the network again until it does
    not (cycle walking). Sources: Luby and Rackoff 1988; Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains".

    Attributes:
        size: how many numbers.
        key: another key, another order.

    >>> [Permutation(10, key=1)[position] for position in range(10)]
    [4, 8, 7, 1, 6, 3, 9, 5, 2, 0]
    """

    size: int
    key: int

    def __post_init__(self) -> None:
        require_positive_integer("size", self.size)

    @cached_property
    def _grid(self) -> tuple[int, int]:
        rows = math.isqrt(self.size - 1) + 1
        return rows, -(-self.size // rows)

    def __getitem__(self, position: int) -> int:
        """The number at a position, counted from 0."""
        if not 0 <= position < self.size:
            raise IndexError(
                f"The position is {position}; this permutation has positions 0 to {self.size - 1}."
            )
        number = self._shuffled(position)
        while number >= self.size:
            number = self._shuffled(number)
        return number

    def _shuffled(self, number: int) -> int:
        rows, columns = self._grid
        row, column = divmod(number, columns)
        for turn in range(0, _ROUNDS, 2):
            row = (row + _hash(self.key, turn, column)) % rows
            column = (column + _hash(self.key, turn + 1, row)) % columns
        return row * columns + column


def _hash(*values: int) -> int:
    """64 bits that depend on every value, which pass the finaliser of SplitMix64 (Steele et al. 2014)."""
    mixed = 0
    for value in values:
        mixed = (mixed + value + 0x9E3779B97F4A7C15) & _MASK
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
        mixed ^= mixed >> 31
    return mixed
