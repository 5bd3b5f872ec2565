"""The format GGUF: read as gguf-py reads it, and damage named before anything of its size is read."""

import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.pretrained.gguf import read_gguf

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def write_file(path: Path, tensors_a_part: int = 0) -> Path:
    """A file with a key of every type and a tensor of every kind that gguf-py packs; split, if asked for."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_a_part)
    for size in (8, 16, 32, 64):
        getattr(writer, f"add_uint{size}")(f"unsigned.{size}", 2**size - 3)
        getattr(writer, f"add_int{size}")(f"signed.{size}", 3 - 2 ** (size - 1))
    writer.add_float32("single", 0.5)
    writer.add_float64("double", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 帽 🙂")
    writer.add_array("numbers", [3, -1, 4])
    writer.add_array("texts", ["a", "", "Ġb"])
    numbers = np.random.default_rng(0)
    for kind in KINDS:
        tensor = numbers.standard_normal((3, 64), dtype=np.float32)
        packed = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"blk.0.{kind}", gguf.quantize(tensor, packed), raw_dtype=packed)
    writer.add_tensor("deep", numbers.standard_normal((2, 3, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("source", ["made here", pytest.param("SmolLM2", marks=pytest.mark.slow)])
def test_the_head_is_what_gguf_py_reads(source, tmp_path):
    path = write_file(tmp_path / "model.gguf") if source == "made here" else smollm2_file()
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents()
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.start, mine.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert (mine.quantization, mine.shape) == (
            tensor.tensor_type.name,
            tuple(tensor.shape[::-1].tolist()),
        )


def test_numbers_are_unpacked_as_gguf_py_unpacks_them(tmp_path):
    path = write_file(tmp_path / "model.gguf")
    ours = read_gguf(path)
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        read = ours.read(tensor.name)
        assert read.dtype == torch.float32 and torch.equal(read, torch.from_numpy(np.array(expected)))
        read += 1  # a copy that may be written


def test_a_key_that_is_missing_is_named(tmp_path):
    file = read_gguf(write_file(tmp_path / "model.gguf"))
    assert file.value("single") == 0.5 and file.value("none", 7) == 7
    with pytest.raises(ValueError, match="model.gguf lacks the key none. Was it converted"):
        file.value("none")


def test_a_type_that_cannot_be_unpacked_is_named(tmp_path, monkeypatch):
    file = read_gguf(write_file(tmp_path / "model.gguf"))

    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(ValueError, match="blk.0.Q4_0 in .* is stored as Q4_0, which gguf cannot unpack"):
        file.read("blk.0.Q4_0")


def test_a_file_that_is_cut_short_is_named(tmp_path):
    path = write_file(tmp_path / "model.gguf")
    content = path.read_bytes()
    for keep in (0, 3, 4, 7, 20, 30, 200, 700, 1_000, len(content) // 2, len(content) - 100):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match="model.gguf (ends within|ends at byte|is not a GGUF)"):
            read_gguf(path)


# Files that were split.


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    write_file(tmp_path / "model.gguf", tensors_a_part=4)
    return sorted(tmp_path.iterdir())


def test_parts_are_read_as_one_whichever_is_given(parts, tmp_path):
    assert [part.name for part in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = read_gguf(write_file(tmp_path / "whole.gguf"))
    for part in parts:
        joined = read_gguf(part)
        assert joined.path == parts[0]
        split = {key: joined.metadata[key] for key in joined.metadata if key.startswith("split.")}
        assert split == {"split.no": 0, "split.count": 3, "split.tensors.count": 9}
        assert joined.metadata == whole.metadata | split
        assert list(joined.tensors) == list(whole.tensors)
        for name in whole.tensors:
            assert torch.equal(joined.read(name), whole.read(name))


def test_parts_that_are_missing_are_named(parts):
    parts[1].unlink()
    with pytest.raises(
        FileNotFoundError, match="is one of 3 parts, 1 of them missing: model-00002-of-00003.gguf. Fetch"
    ):
        read_gguf(parts[2])
    parts[0].unlink()
    with pytest.raises(FileNotFoundError, match="2 of them missing: model-00001-of-00003.gguf, model-00002"):
        read_gguf(parts[2])


def test_parts_that_do_not_belong_together_are_named(parts, tmp_path):
    renamed = tmp_path / "first.gguf"
    renamed.write_bytes(parts[0].read_bytes())
    with pytest.raises(ValueError, match="first.gguf says that it is one of 3 parts; expected a name that"):
        read_gguf(renamed)
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(
        ValueError, match=r"00003-of-00003.gguf says by .* that it is \(1, 3\); expected \(2, 3\)"
    ):
        read_gguf(parts[0])


def test_a_tensor_in_two_parts_is_named(parts):
    twin = parts[1].read_bytes()
    number = twin.index(b"split.no") + len(b"split.no") + 4
    parts[2].write_bytes(twin[:number] + b"\2\0" + twin[number + 2 :])
    with pytest.raises(
        ValueError, match="blk.0.Q4_0, .* of .*00003-of-00003.gguf is in model-00002-of-00003.gguf"
    ):
        read_gguf(parts[0])


@pytest.mark.parametrize("count", [1, 9])
def test_the_number_of_tensors_is_that_of_all_parts(count, parts):
    content = parts[0].read_bytes()
    number = content.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    parts[0].write_bytes(content[:number] + struct.pack("<i", count) + content[number + 4 :])
    if count == 9:
        assert len(read_gguf(parts[1]).tensors) == 9
    else:
        with pytest.raises(ValueError, match="hold 9 tensors, and split.tensors.count is 1"):
            read_gguf(parts[1])


@pytest.mark.slow  # every byte of a head
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_heads_are_refused_or_harmless(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    source = folder / "whole.gguf"
    if not source.exists():
        write_file(source)
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 1_500))] = data.draw(st.integers(0, 255))
    path = folder / "damaged.gguf"
    path.write_bytes(content)
    try:
        read_gguf(path)
    except ValueError as error:
        assert "damaged.gguf" in str(error)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"GGML" + bytes(100), "does not begin with the letters GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is GGUF of version 1; 2 and 3 are read"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "ends within its head"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77), "the key a the type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 2**60), "ends within the key a"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1), "the key a a list of type 9"),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"\xff"), "not UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 32, 999, 0), "stores t as type 999"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 9, 32, 0, 0), "t has 9 dimensions"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * struct.pack("<Q1sII", 1, b"a", 4, 1), "holds the key a twice"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + 2 * struct.pack("<Q1sIQIQ", 1, b"t", 1, 1, 0, 0), "holds the tensor t twice"),
        (b"GGUF" + struct.pack("<IQQQ2sII", 3, 0, 1, 2, b"a\n", 4, 1), r"holds the name 'a\\n', near its head"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 33, 2, 0), "rows of 33 numbers in Q4_0, whose blocks are 32"),
    ],
)  # fmt: skip
def test_heads_that_are_none_are_refused(content, sentence, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_gguf(tmp_path / "model.gguf")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_gguf(tmp_path / "nowhere.gguf")


def test_without_the_package_the_command_is_named(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ImportError, match=r'needed to read GGUF files.*pip install "minicpm_lite\[pretrained\]"'
    ):
        read_gguf(tmp_path / "model.gguf")
