"""Weights in safetensors files: in one or in many, read as they were written, and every damage named."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from minicpm_lite.pretrained import weights as module
from minicpm_lite.pretrained.weights import few, read_json, read_weights, write_weights

TENSORS = {
    "model.embed_tokens.weight": torch.arange(400.0).view(100, 4),
    "model.layers.0.weight": torch.arange(30, dtype=torch.bfloat16).view(5, 6),
    "model.layers.1.weight": torch.arange(40, dtype=torch.float16).view(4, 10),
    "model.norm.weight": torch.arange(64.0),
    "lm_head.weight": torch.arange(400.0).view(100, 4).T,  # not contiguous
}


@pytest.fixture
def saved(tmp_path) -> Path:
    write_weights(tmp_path, TENSORS, 10_000)
    return tmp_path


@pytest.fixture
def sharded(tmp_path) -> Path:
    write_weights(tmp_path, TENSORS, 2_000)
    return tmp_path


@pytest.mark.parametrize("max_bytes", [10_000, 1_000, 300, 1])
def test_what_is_written_is_read_again(max_bytes, tmp_path):
    write_weights(tmp_path, TENSORS, max_bytes)
    assert ("model.safetensors.index.json" in os.listdir(tmp_path)) == (max_bytes < 10_000)
    shapes, tensors = read_weights(tmp_path)
    read = {name: tensor.clone() for name, tensor in tensors}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), max_floats=st.integers(1, 12))
def test_files_are_as_full_as_can_be_and_none_is_empty(sizes, max_floats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_weights(folder, {f"t{i:02}": torch.ones(size) for i, size in enumerate(sizes)}, 4 * max_floats)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        assert len(sizes) == 1 or sum(sizes) <= max_floats
        return
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == 4 * sum(sizes)
    files: dict[str, list[int]] = {}
    for size, (_, file) in zip(sizes, sorted(content["weight_map"].items()), strict=True):
        files.setdefault(file, []).append(size)
    filled = list(files.values())
    assert [size for file in filled for size in file] == sizes  # in order
    for one, following in zip(filled, [*filled[1:], [max_floats + 1]], strict=True):
        assert sum(one) <= max_floats or len(one) == 1
        assert sum(one) + following[0] > max_floats


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_named(saved, keep):
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        read_weights(saved)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_numbers_that_are_no_weights_are_named(dtype, saved):
    save_file({"codes": torch.zeros(4, dtype=dtype)}, saved / "model.safetensors")
    with pytest.raises(
        ValueError, match="codes in .* is stored as .*; only floating-point weights of 16 bits"
    ):
        read_weights(saved)


def test_a_shard_that_is_missing_or_emptied_is_named(sharded):
    files = sorted(file.name for file in sharded.glob("model-*"))
    index = sharded / "model.safetensors.index.json"
    save_file({"stranger": torch.ones(64)}, sharded / files[1])
    with pytest.raises(ValueError, match=rf"{files[1]} lacks .*, which model.safetensors.index.json says"):
        read_weights(sharded)
    shutil.copy(sharded / files[0], sharded / files[1])
    content = json.loads(index.read_text())
    content["weight_map"] = {n: f for n, f in content["weight_map"].items() if f != files[1]} | {
        next(n for n, f in content["weight_map"].items() if f == files[0]): files[1]
    }
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is stored twice: in model-0.* and in .*model-0"):
        read_weights(sharded)
    (sharded / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"names \d+ files, 1 of them missing: {files[1]}"):
        read_weights(sharded)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "index.json is not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "expected a file in the same folder"),
        ('{"weight_map": {"a": ".."}}', "expected a file in the same folder"),
        ('{"weight_map": {"\\n": "%s"}}' % ("9" * 5_000), r"puts '\\n' in '99+\.\.\.9+'; expected a file in"),
    ],
)
def test_an_index_that_is_none_is_refused(sharded, content, sentence):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_weights(sharded)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor .*index.json\.$"):
        read_weights(tmp_path)


def test_pickle_is_never_opened(saved):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("the pickle was opened",)

    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin. A pickle file may run any code"):
        read_weights(saved)


def test_a_disk_that_refuses_is_an_error_of_the_system(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path, TENSORS, 10_000)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b"[1]", r"holds list '\[1\]'; expected names with values"),
        (b"null", "holds NoneType 'None'"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "is not valid JSON: the name 'c' stands there twice"),
    ],
    ids=["cut", "no text", "deep", "list", "null", "twice"],
)
def test_json_that_is_none_is_refused(content, sentence, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json {sentence}"):
        read_json(tmp_path / "a.json")


def test_a_few_names_stand_for_many():
    assert few(["a", "b"]) == "a, b"
    assert few(list("abcdef")) == "a, b, c, d and 2 more"
