"""Batches: a function of the step, any nesting of tensors, cut along the rows."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from minicpm_lite import ModelConfig
from minicpm_lite.data.windows import TokenWindows, batch_of
from minicpm_lite.training.batches import (
    WindowBatches,
    batch_to,
    checksum,
    part_of,
    require_fitting,
    split_batch,
)
from minicpm_lite.training.settings import TrainerConfig

TOKENS = torch.arange(1000) % 40
ROWS = torch.arange(10).view(5, 2)
BATCH = {"text": ROWS, "pairs": (ROWS * 10, [ROWS[:, 0]])}


def test_windows_as_batches():
    windows = TokenWindows(TOKENS, 16, 0)
    batches = WindowBatches(windows, 3)
    assert torch.equal(batches[4], batch_of(windows, 4, 3)) and batches[4].shape == (3, 17)
    assert batches.identity() == windows.identity()


def test_a_batch_goes_to_a_device_in_its_shape():
    moved = batch_to(BATCH, torch.device("meta"))
    assert moved["text"].is_meta and moved["pairs"][0].is_meta and moved["pairs"][1][0].is_meta
    assert (type(moved), type(moved["pairs"]), type(moved["pairs"][1])) == (dict, tuple, list)
    with pytest.raises(TypeError, match="A batch holds a str; expected tensors"):
        batch_to({"text": "words"}, torch.device("cpu"))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_the_pieces_of_a_batch_are_the_batch(rows):
    pieces = split_batch(BATCH, rows)
    assert [len(piece["text"]) for piece in pieces] == [min(rows, 5 - start) for start in range(0, 5, rows)]
    assert torch.equal(torch.cat([piece["text"] for piece in pieces]), ROWS)
    assert torch.equal(torch.cat([piece["pairs"][0] for piece in pieces]), ROWS * 10)
    assert torch.equal(torch.cat([piece["pairs"][1][0] for piece in pieces]), ROWS[:, 0])


class Pair(NamedTuple):
    better: torch.Tensor
    worse: torch.Tensor


@dataclass
class Slices:
    """Images of different numbers of slices: all slices below each other, and how many each image has."""

    slices: torch.Tensor
    counts: tuple[int, ...]

    def __len__(self):
        return len(self.counts)

    def __getitem__(self, rows):
        before, mine = sum(self.counts[: rows.start]), self.counts[rows]
        return Slices(self.slices[before : before + sum(mine)], mine)

    def to(self, device):
        return Slices(self.slices.to(device), self.counts)


def test_a_named_tuple_keeps_its_names():
    first, second = split_batch(Pair(ROWS, ROWS + 1), 3)
    assert isinstance(first, Pair) and torch.equal(second.worse, ROWS[3:] + 1)
    assert batch_to(first, torch.device("meta")).better.is_meta


def test_ragged_rows_are_cut_by_an_object_that_knows_them():
    images = Slices(torch.arange(9), (1, 3, 0, 4, 1))
    pieces = split_batch({"images": images, "text": ROWS}, 2)
    assert [piece["images"].slices.tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [len(piece["text"]) for piece in pieces] == [2, 2, 1]
    moved = batch_to(pieces[0], torch.device("meta"))["images"]
    assert moved.slices.is_meta and moved.counts == (1, 3)
    with pytest.raises(ValueError, match=r"its parts have \[4, 5\] rows"):
        split_batch((images, ROWS[:4]), 2)


def test_a_batch_that_is_not_cut_may_have_any_rows():
    uneven = (ROWS, ROWS[:3])
    assert split_batch(uneven, None) == [uneven]
    with pytest.raises(ValueError, match=r"its parts have \[3, 5\] rows"):
        split_batch(uneven, 2)


@pytest.mark.parametrize(
    ("tokens", "length", "sentence"),
    [
        (TOKENS + 1, 16, "ids from 1 to 40; the model knows 0 to 39"),
        (TOKENS, 65, "sequence_length is 65; the model was made for 64"),
    ],
)
def test_windows_that_a_model_does_not_know(tokens, length, sentence):
    model = ModelConfig(32, 80, 2, 4, 40, max_position_embeddings=64)
    windows, config = TokenWindows(tokens, length, 0), TrainerConfig(4, length)
    with pytest.raises(ValueError, match=sentence):
        require_fitting(windows, config, model)
    require_fitting(windows, config, None)  # a module that is no decoder may know them
    with pytest.raises(ValueError, match=f"predict {length} tokens each, and sequence_length is 8"):
        require_fitting(windows, TrainerConfig(4, 8), None)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_parts_make_the_whole(world_size):
    """Windows and other batches alike; and the checksum knows which process reads what."""

    class Doubled:
        def __getitem__(self, step):
            return windows[step], 2.0 * windows[step]

    windows = WindowBatches(TokenWindows(TOKENS, 16, 0), 6)
    for step in range(3):
        parts = [part_of(windows, step, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), windows[step])
        pairs = [part_of(Doubled(), step, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([pair[1] for pair in pairs]), 2.0 * windows[step])
        for whole, cut in ((windows[step], parts), (Doubled()[step], pairs)):
            assert checksum(whole) == sum(checksum(part, rank) for rank, part in enumerate(cut))


def test_a_checksum_knows_rows_and_their_order():
    batch = torch.randint(40, (6, 17), generator=torch.Generator().manual_seed(0))
    changed = batch.clone()
    changed[3, 5] += 1
    sums = [checksum(each) for each in (batch, batch.flip(0), changed, {"a": batch, "b": batch[:, :1]})]
    assert len(set(sums)) == 4


def test_of_windows_only_the_own_part_is_read():
    read = []

    class Watched(TokenWindows):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    part_of(WindowBatches(Watched(TOKENS, 16, 0), 6), step=5, rank=1, world_size=3)
    assert read == [32, 33]


@pytest.mark.parametrize("rows", [0, 3, 5])
def test_rows_that_processes_cannot_share(rows):
    class Few:
        def __getitem__(self, step):
            return {"text": torch.zeros(rows, 2)}

    with pytest.raises(ValueError, match=f"A step has {rows} rows, which 2 processes cannot share evenly"):
        part_of(Few(), 0, 0, 2)


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(3), torch.zeros(0, 4), torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3).T > 0, torch.zeros(2, 0),
     Slices(torch.arange(3), (1, 2))],
)  # fmt: skip
def test_any_batch_has_a_checksum(batch):
    assert checksum(batch) >= 0
