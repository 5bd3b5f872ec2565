"""GGUF, the one-file format of llama.cpp and Ollama: its keys, its table of tensors, its packed numbers.

    header:  "GGUF", version, number of tensors, number of keys
    keys:    name, type, value                          the shape and the tokenizer
    table:   name, sizes (innermost first), type, offset   for each tensor
    tensors: each at a multiple of the alignment, in blocks of quantised numbers

A large model is split into files ``name-00001-of-00003.gguf``. The keys stand in the first; each has the
table of its own tensors, and three keys that say which part of what it is (split.no counts from 0).

What the keys mean, and how a model is made of the tensors, is the matter of `llama_cpp` and `gguf_tokenizer`.

Sources: ggml's gguf specification; gguf-py 0.19.0, which unpacks the blocks.

Sizes are checked against the length of the file before anything of that size is read.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from types import ModuleType
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..optional import require
from .weights import few

__all__ = ["GGUFFile", "GGUFTensor", "read_gguf"]

_SCALARS = {  # GGUF's value types: struct's letter
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the table of tensors.

    Attributes:
        path: the file that holds it.
        shape: as PyTorch orders it, the innermost size last.
        quantization: name of the type, e.g. "Q4_0".
        start: first byte in the file.
        nbytes: how many bytes.
    """

    path: Path
    shape: tuple[int, ...]
    quantization: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """What the head of a GGUF file says, or the heads of all its parts.

    Attributes:
        path: the file, or its first part.
        metadata: keys with their values.
        tensors: names with their entries, in the order of the file.
    """

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, GGUFTensor]

    def value(self, key: str, default: object = None) -> object:
        """The value of a key.

        Raises:
            ValueError: the file lacks it, and no default was given.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.path} lacks the key {key}. Was it converted with an older program?")
        return value

    def read(self, name: str) -> Float[Tensor, "..."]:
        """A tensor, unpacked to float32.

        Raises:
            ValueError: its type cannot be unpacked.
        """
        gguf = _package()
        entry = self.tensors[name]
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            packed = np.frombuffer(file.read(entry.nbytes), dtype=np.uint8)
        kind = gguf.GGMLQuantizationType[entry.quantization]
        try:
            numbers = gguf.dequantize(packed.reshape(*entry.shape[:-1], -1), kind)
        except NotImplementedError:
            raise ValueError(
                f"{name} in {entry.path} is stored as {entry.quantization}, which gguf cannot unpack. "
                "Convert the model to another type, such as Q8_0."
            ) from None
        return torch.from_numpy(numbers.astype(np.float32)).view(entry.shape)  # a copy that may be written


def read_gguf(path: str | Path) -> GGUFFile:
    """The keys and the table of tensors of a GGUF file; no tensor is read.

    Args:
        path: the file, or any part of one that was split.

    Raises:
        FileNotFoundError: there is no such file, or a part of it is missing.
        ValueError: the file is of another format or version, or ends too early; the message says where.
        ImportError: the package gguf is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    file = _read_file(path)
    return file if file.metadata.get("split.count", 1) in (0, 1) else _join(file)


def _join(file: GGUFFile) -> GGUFFile:
    """All parts of a file that was split, as if they were one; ``file`` is any of them."""
    path, count = file.path, file.metadata["split.count"]
    name = _PART.fullmatch(path.name)
    if name is None or count != int(name[3]):
        raise ValueError(
            f"{path} says that it is one of {shown(count)} parts; expected a name that ends in "
            "-00001-of-00003.gguf or the like, by which the others are found. Give it its name again."
        )
    names = [f"{name[1]}-{number:05}-of-{name[3]}{name[4]}" for number in range(1, int(name[3]) + 1)]
    if missing := [part for part in names if not path.with_name(part).is_file()]:
        raise FileNotFoundError(
            f"{path} is one of {len(names)} parts, {len(missing)} of them missing: {few(missing)}. Fetch "
            "them, too."
        )
    parts = [_read_file(path.with_name(part)) for part in names]
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        said = part.metadata.get("split.no"), part.metadata.get("split.count")
        if said != (number, len(parts)):
            raise ValueError(
                f"{part.path} says by split.no and split.count that it is {shown(said)}; expected "
                f"{(number, len(parts))}. Was it renamed?"
            )
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise ValueError(f"{few(twice)} of {part.path} is in {tensors[twice[0]].path.name}, too.")
        tensors |= part.tensors
    first = parts[0]
    if len(tensors) != (total := first.metadata.get("split.tensors.count")):
        raise ValueError(
            f"{first.path} and the other parts hold {len(tensors)} tensors, and split.tensors.count is "
            f"{shown(total)}."
        )
    return GGUFFile(first.path, first.metadata, tensors)


def _read_file(path: Path) -> GGUFFile:
    """The keys and the table of one file."""
    gguf = _package()
    with path.open("rb") as file:
        reader = _Reader(path, file)
        if reader.take(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with the letters GGUF.")
        version = reader.number("I")
        if version not in (2, 3):
            raise ValueError(
                f"{path} is GGUF of version {version}; 2 and 3 are read, in little-endian order. "
                "Convert it anew."
            )
        tensor_count, key_count = reader.number("Q"), reader.number("Q")
        metadata = {}
        for _ in range(key_count):
            key = reader.name()
            reader.at = f"the key {key}"
            if key in metadata:
                raise ValueError(f"{path} holds the key {key} twice. Which of them counts, no one knows.")
            metadata[key] = reader.value(reader.number("I"))
        tensors = {}
        for _ in range(tensor_count):
            name = reader.name()
            reader.at = f"the entry of {name}"
            if name in tensors:
                raise ValueError(f"{path} holds the tensor {name} twice. Which of them counts, no one knows.")
            dimensions = reader.number("I")
            if not 1 <= dimensions <= 4:
                raise ValueError(f"{path} says that {name} has {dimensions} dimensions; 1 to 4 are possible.")
            shape = tuple(reversed([reader.number("Q") for _ in range(dimensions)]))
            tensors[name] = shape, reader.number("I"), reader.number("Q")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{path} says that general.alignment is {alignment!r}; expected a whole number.")
        start = -(-file.tell() // alignment) * alignment  # the next multiple
    entries = {}
    for name, (shape, kind, offset) in tensors.items():
        try:
            quantization = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"{path} stores {name} as type {kind}, which gguf does not know.") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        if shape[-1] % block:
            raise ValueError(
                f"{path} says that {name} has rows of {shape[-1]} numbers in {quantization.name}, whose "
                f"blocks are {block}."
            )
        nbytes = int(np.prod(shape, dtype=object)) // block * block_bytes
        entries[name] = GGUFTensor(path, shape, quantization.name, start + offset, nbytes)
        if start + offset + nbytes > reader.size:
            raise ValueError(
                f"{path} ends at byte {reader.size:,}, and {name} should reach to byte "
                f"{start + offset + nbytes:,}. The file is cut short; fetch it again."
            )
    return GGUFFile(path, metadata, entries)


class _Reader:
    """Takes values from the head of a file, and says where the file ended too early."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size
        self.at = "its head"

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError(f"{self.path} ends within {self.at}. The file is cut short or damaged.")
        return self.file.read(count)

    def number(self, letter: str) -> int | float | bool:
        return struct.unpack("<" + letter, self.take(struct.calcsize(letter)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} holds text that is not UTF-8, near {self.at}.") from None

    def name(self) -> str:
        name = self.text()
        if not name.isprintable():
            raise ValueError(
                f"{self.path} holds the name {name[:40]!r}, near {self.at}. The file is damaged."
            )
        return name

    def value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"{self.path} gives {self.at} the type {kind}; the format has types 0 to 12.")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            letter = _SCALARS[kind]
            return list(struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(letter))))
        if kind != _STRING:
            raise ValueError(f"{self.path} gives {self.at} a list of type {kind}, which is not read.")
        return [self.text() for _ in range(count)]


def _package() -> ModuleType:
    return require("gguf", install="minicpm_lite[pretrained]", purpose="read GGUF files")
