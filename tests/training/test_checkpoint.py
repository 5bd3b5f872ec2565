"""Checkpoint files: whole or not there, and the book's recorded ones load."""

from pathlib import Path

import pytest
import torch

from minicpm_lite.training.checkpoint import load_checkpoint, save_checkpoint

RECORDED = sorted((Path(__file__).parents[2] / "notebooks").rglob("recorded/*.safetensors"))


def test_tensors_and_facts_come_back(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    save_checkpoint(tmp_path / "file", tensors, {"step": 3, "names": ["ä"]})
    found, facts = load_checkpoint(tmp_path / "file")
    assert facts == {"step": 3, "names": ["ä"]}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(OSError, match="nowhere/file could not be written: No such file or directory"):
        save_checkpoint(tmp_path / "nowhere" / "file", {}, {})


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_recorded_checkpoints_load(path):
    tensors, facts = load_checkpoint(path)
    assert tensors and facts


def test_there_are_recorded_checkpoints():
    assert {path.name for path in RECORDED} >= {"decoder.safetensors", "moe.safetensors"}
