"""Checkpoint files: whole or not there, and the book's recorded ones load."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


def test_every_bit_of_a_file_counts(tmp_path):
    """A bit that flips is refused, or what is read is what was written."""
    path = tmp_path / "file"
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor(1.5, dtype=torch.bfloat16),
        "c": torch.ones(0),
    }
    facts = {"step": 3, "names": ["ä"]}
    save_checkpoint(path, tensors, facts)
    content = path.read_bytes()
    refused = 0
    for at in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[at // 8] ^= 1 << at % 8
        path.unlink()  # where a file is cut and written again, some systems wait for the disk
        path.write_bytes(damaged)
        try:
            found, read = load_checkpoint(path)
        except ValueError:
            refused += 1
            continue
        assert read == facts and found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert refused > 7 * len(content)


def test_a_number_that_changed_is_told(tmp_path):
    save_checkpoint(tmp_path / "file", {"x": torch.ones(100)}, {})
    content = bytearray((tmp_path / "file").read_bytes())
    content[-3] ^= 0x40
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="file is not what was written: its checksums differ"):
        load_checkpoint(tmp_path / "file")


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a pipe or a device"), ("folder", "a folder")):
        with pytest.raises(FileExistsError, match=f"{name} is {kind}, which"):
            save_checkpoint(tmp_path / name, {}, {})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and (tmp_path / "folder").is_dir()


def test_checksums_that_are_hidden_are_not_passed_over(tmp_path):
    """A flipped bit in the name "crc32" must not make an old file of a new one."""
    save_checkpoint(tmp_path / "file", {"x": torch.ones(1)}, {})
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content.replace(b"crc32", b"crc22"))
    with pytest.raises(ValueError, match="not a checkpoint of minicpm_lite"):
        load_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("facts", ["{", "[" * 100_000], ids=["cut", "deep"])
def test_facts_without_a_checksum_that_are_none(facts, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "file", metadata={"minicpm_lite": facts})
    with pytest.raises(ValueError, match="holds facts that are not JSON"):
        load_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_recorded_checkpoints_load(path):
    tensors, facts = load_checkpoint(path)
    assert tensors and facts


def test_there_are_recorded_checkpoints():
    assert {path.name for path in RECORDED} >= {"decoder.safetensors", "moe.safetensors"}
