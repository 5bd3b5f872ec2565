"""Checkpoint files: tensors in safetensors, facts about them as JSON in its header.

A file is written beside its place and renamed, so a reader finds either the old one or the new one, whole.
Beside the facts stand checksums of them and of each tensor, so a bit that flipped is found. The recorded
files of the book are older, have none, and are read.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import written_whole

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """Write tensors and JSON-able facts to one safetensors file, atomically.

    Tensors that share memory (tied embeddings) must be given once. One process writes a file at a time.

    Raises:
        FileExistsError: the path is a folder, a pipe or a device, which are never replaced.
        OSError: the folder is missing or cannot be written, or the disk is full; the old file stands.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(facts)
    # `save_file` would spare the bytes, but hides what the operating system says, and leaves a file of its
    # own beside when it is killed.
    content = save(tensors, metadata={"minicpm_lite": text, "crc32": json.dumps(_checksums(tensors, text))})
    with written_whole(path) as beside:
        beside.write_bytes(content)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Read what `save_checkpoint` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is not a safetensors file, was not written by `save_checkpoint`, or
            is not any more what was written.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). It may be truncated or of another format; "
            "use an earlier checkpoint."
        ) from None
    if "minicpm_lite" not in metadata or not metadata.keys() <= {"minicpm_lite", "crc32"}:
        raise ValueError(f"{path} is a safetensors file, but not a checkpoint of minicpm_lite.")
    text = metadata["minicpm_lite"]
    if "crc32" in metadata and metadata["crc32"] != json.dumps(_checksums(tensors, text)):
        raise ValueError(
            f"{path} is not what was written: its checksums differ. It was damaged since; use an earlier "
            "checkpoint."
        )
    try:
        return tensors, json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} holds facts that are not JSON ({error}); use an earlier checkpoint."
        ) from None


def _checksums(tensors: Mapping[str, Tensor], facts: str) -> dict[str, int]:
    """The CRC-32 of the facts (under an empty name) and of each tensor: its type, its shape, its bytes."""
    sums = {"": zlib.crc32(facts.encode())}
    for name in sorted(tensors):
        tensor = tensors[name]
        kind = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sums[name] = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), kind)
    return sums
