"""What a step reads: its batch is a function of the step's number alone.

So a run that is killed and resumed reads what one that was not would have read, and needs no position in a
stream to be saved.

A batch is a tensor, or a tuple, list or dict of them, whose first dimensions count the same rows: windows of
tokens, pairs to compare, images with their text. Where rows are ragged, as images of different numbers of
slices are, an object that knows its rows stands in a tensor's place: see `Rows`.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from ..config import ModelConfig
from ..data.shards import Shards
from ..data.windows import TokenWindows, Windows, batch_of
from .processes import world_size
from .settings import TrainerConfig

__all__ = [
    "Batch",
    "Batches",
    "Rows",
    "WindowBatches",
    "batch_to",
    "checksum",
    "fitting_batches",
    "part_of",
    "require_even",
    "require_fitting",
    "require_known",
    "split_batch",
]

Batch = Any
"""A tensor or other `Rows`, or a tuple, list or dict of batches."""


@runtime_checkable
class Rows(Protocol):
    """What can be cut along its rows and put on a device, as a tensor can."""

    def __len__(self) -> int:
        """How many rows."""
        ...

    def __getitem__(self, rows: slice) -> Self:
        """Those of them."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        ...


@runtime_checkable
class Batches(Protocol):
    """The batch of each step."""

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, counted from 0; the same one whenever it is asked for."""
        ...

    def identity(self) -> dict:
        """What must be the same for a resumed run to see the same batches; fits into JSON."""
        ...


@dataclass(frozen=True, eq=False)
class WindowBatches:
    """Windows, ``batch_size`` of them a step.

    >>> from minicpm_lite.data.windows import TokenWindows
    >>> WindowBatches(TokenWindows(torch.arange(100), length=4, seed=0), batch_size=2)[7].shape
    torch.Size([2, 5])
    """

    windows: Windows
    batch_size: int

    def __getitem__(self, step: int) -> Int[Tensor, "batch_size window"]:
        return batch_of(self.windows, step, self.batch_size)

    def identity(self) -> dict:
        """The windows'; the batch size stands in the trainer's config."""
        return self.windows.identity()


def fitting_batches(
    given: Int[Tensor, " tokens"] | Shards | Windows | Batches,
    config: TrainerConfig,
    model: ModelConfig | None,
) -> Batches:
    """The batch of each step, of whatever says what is read.

    Args:
        given: a stream of tokens, in memory or in shards; windows; or the batch of each step.
        config: the trainer's.
        model: the shape of a decoder; None for another module, of which nothing is known.

    Raises:
        ValueError: it is something else; or windows do not fit the config or the model, or come in batches of
            another size than the config's, or processes cannot share them evenly.
    """
    if isinstance(given, Tensor | Shards):
        given = TokenWindows(given, config.sequence_length, config.seed)
    if isinstance(given, Windows):
        given = WindowBatches(given, config.batch_size)
    if isinstance(given, WindowBatches):
        require_fitting(given.windows, config, model)
        if given.batch_size != config.batch_size:  # which is what a checkpoint and the metrics know
            raise ValueError(
                f"The batches are of {given.batch_size} windows, and batch_size is {config.batch_size}. Make "
                "them the same, or give the windows alone."
            )
        require_even(config.batch_size, world_size())
    elif not isinstance(given, Batches):
        raise ValueError(
            f"The batches are a {type(given).__name__}; expected tokens, shards, windows, or an object "
            "of which [step] is the batch of a step and identity() says what is read."
        )
    return given


def require_fitting(windows: Windows, config: TrainerConfig, model: ModelConfig | None) -> None:
    """Refuse windows whose length or whose ids the trainer or the model does not know.

    Raises:
        ValueError: a sentence that says which.
    """
    if windows.length != config.sequence_length:
        raise ValueError(
            f"The windows predict {windows.length} tokens each, and sequence_length is "
            f"{config.sequence_length}. Make them the same."
        )
    if model is None:
        return
    require_known(windows.id_range(), model)
    if windows.length > model.max_position_embeddings:
        raise ValueError(
            f"sequence_length is {windows.length}; the model was made for "
            f"{model.max_position_embeddings} tokens (max_position_embeddings)."
        )


def require_known(id_range: tuple[int, int], model: ModelConfig) -> None:
    """Refuse a text with ids that the model does not know.

    Args:
        id_range: its smallest and its largest id.
        model: the shape.

    Raises:
        ValueError: a sentence with both ranges.
    """
    smallest, largest = id_range
    if largest >= model.vocab_size or smallest < 0:
        raise ValueError(
            f"The text has token ids from {smallest} to {largest}; the model knows "
            f"0 to {model.vocab_size - 1}. Was it cut into tokens with another vocabulary?"
        )


def batch_to(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return _changed(batch, lambda part: part.to(device))


def part_of(batches: Batches, step: int, rank: int, world_size: int) -> Batch:
    """A process's part of a step's batch: its stretch of the rows, as many as every other's.

    Of windows no others are read. Any other batch is made whole in every process, and cut.

    Raises:
        ValueError: the processes cannot share the rows evenly.

    >>> from minicpm_lite.data.windows import TokenWindows
    >>> batches = WindowBatches(TokenWindows(torch.arange(100), length=4, seed=0), batch_size=6)
    >>> torch.equal(part_of(batches, step=3, rank=1, world_size=2), batches[3][3:])
    True
    """
    if world_size == 1:
        return batches[step]
    if isinstance(batches, WindowBatches):
        require_even(batches.batch_size, world_size)
        return batch_of(batches.windows, step * world_size + rank, batches.batch_size // world_size)
    batch = batches[step]
    rows = _rows(batch)
    require_even(rows, world_size)
    return split_batch(batch, rows // world_size)[rank]


def require_even(rows: int, world_size: int) -> None:
    """Refuse a step that processes cannot share: each must have as many passes as the others.

    Raises:
        ValueError: a sentence with both numbers.
    """
    if rows % world_size or not rows:
        raise ValueError(
            f"A step has {rows} rows, which {world_size} processes cannot share evenly. Make batches of a "
            f"multiple of {world_size} rows."
        )


def checksum(batch: Batch, rank: int = 0) -> int:
    """Of the tensors in a process's part of a step; the sum over all parts knows the rows and their order.

    >>> whole = torch.arange(12).view(4, 3)
    >>> checksum(whole) == checksum(whole[:2], rank=0) + checksum(whole[2:], rank=1)
    True
    """
    tensors: list[Tensor] = []
    _changed(batch, lambda part: tensors.append(part) if isinstance(part, Tensor) else None)
    return sum(
        zlib.crc32(row.reshape(-1).contiguous().view(torch.uint8).numpy()) * (1 + rank * len(tensor) + place)
        for tensor in tensors
        for place, row in enumerate(tensor.cpu())
    )


def split_batch(batch: Batch, rows: int | None) -> list[Batch]:
    """Cut a batch into pieces of at most ``rows`` rows; None leaves it whole.

    Raises:
        ValueError: its parts count different rows.

    >>> [piece["a"].tolist() for piece in split_batch({"a": torch.arange(3), "b": torch.zeros(3, 2)}, 2)]
    [[0, 1], [2]]
    """
    if rows is None:
        return [batch]
    return [
        _changed(batch, lambda part, start=start: part[start : start + rows])
        for start in range(0, _rows(batch), rows)
    ]


def _rows(batch: Batch) -> int:
    lengths: list[int] = []
    _changed(batch, lambda part: lengths.append(len(part)))
    if len(set(lengths)) != 1:
        raise ValueError(
            f"A batch is cut along its rows, and its parts have {sorted(set(lengths))} rows. Give parts with "
            "the same first dimension, or leave micro_batch out."
        )
    return lengths[0]


def _changed(batch: Batch, change: Callable[[Rows], Any]) -> Batch:
    """The batch with every tensor, or what stands in its place, changed."""
    if isinstance(batch, Mapping):
        return {name: _changed(part, change) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_changed(part, change) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # a named tuple
    if isinstance(batch, Rows):
        return change(batch)
    raise TypeError(f"A batch holds a {type(batch).__name__}; expected tensors, in tuples, lists or dicts.")
