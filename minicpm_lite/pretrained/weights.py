"""Named tensors in safetensors files: one file, or several with an index that says which tensor is where.

    model.safetensors                                                     a small model
    model-00001-of-00002.safetensors, …, model.safetensors.index.json     a large one, in shards

Source: the safetensors format, and the names that transformers gives its files.

Choices, and the traps behind them:

- Only safetensors. A pickle file may run any code when it is opened.
- A file of numbers in less than 16 bits holds no weights but codes, whose scales are stored elsewhere.
- An index may be older than its files, so what it promises is compared with what they hold.
"""

import errno
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shown

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["read_weights", "write_weights"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FILE_NAME = re.compile(r"\w[\w.-]{0,200}")
_FLOATS = {"F64", "F32", "F16", "BF16"}


def read_weights(folder: Path) -> tuple[dict[str, tuple[int, ...]], Iterator[tuple[str, Tensor]]]:
    """The names and shapes of all tensors of a folder, and the tensors, read one by one when asked for.

    A tensor may be the file itself, mapped into memory: copy it before the file can change.

    Raises:
        FileNotFoundError: the folder holds no weights in safetensors, or lacks a file of the index.
        ValueError: a file is damaged, lacks what the index promises, stores a tensor that another file stores
            too, or numbers that are no weights.
    """
    files = _files(folder)
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}  # each stored tensor: its file and shape
    for file, promised in files.items():
        with _opened(file) as stored:
            here = set(stored.keys())
            if lacking := sorted(promised - here):
                raise ValueError(f"{file} lacks {few(lacking)}, which {_INDEX} says it holds.")
            for name in here:
                part = stored.get_slice(name)
                if part.get_dtype() not in _FLOATS:
                    raise ValueError(
                        f"{name} in {file} is stored as {part.get_dtype()}; only floating-point weights of "
                        "16 bits or more are read. Take the checkpoint that is not quantised."
                    )
                if name in found:
                    raise ValueError(f"{name} is stored twice: in {found[name][0].name} and in {file}.")
                found[name] = file, tuple(part.get_shape())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for file in files:
            with _opened(file) as stored:
                for name in stored.keys():  # noqa: SIM118, not a dict
                    yield name, stored.get_tensor(name)

    return {name: shape for name, (_, shape) in found.items()}, tensors()


def write_weights(folder: Path, weights: Mapping[str, Tensor], max_bytes: int) -> None:
    """Write named tensors in files of about ``max_bytes``; a tensor is never split.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = max_bytes
    for name, tensor in weights.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})  # without it transformers refuses
        except SafetensorError as error:  # what the package makes of the system's refusal
            raise OSError(errno.EIO, str(error)) from None
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in weights.values())
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files of weights, and which names the index promises in each."""
    if (folder / _SINGLE).is_file():
        return {folder / _SINGLE: set()}
    index = folder / _INDEX
    if not index.is_file():
        pickled = sorted(file.name for file in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
        raise FileNotFoundError(
            f"{folder} holds neither {_SINGLE} nor {_INDEX}"
            + (
                f", but {few(pickled)}. A pickle file may run any code when it is opened, so it is not "
                "read. Convert it where you trust it: transformers' from_pretrained, then save_pretrained."
                if pickled
                else "."
            )
        )
    promised = read_json(index).get("weight_map")
    if not isinstance(promised, dict) or not all(isinstance(name, str) for name in promised.values()):
        raise ValueError(f"{index} has no weight_map of names and files.")
    files: dict[Path, set[str]] = {}
    for name, file in promised.items():
        if not _FILE_NAME.fullmatch(file):
            raise ValueError(
                f"{index} puts {few([name])} in {shown(file)}; expected a file in the same folder."
            )
        files.setdefault(folder / file, set()).add(name)
    if absent := sorted(file.name for file in files if not file.is_file()):
        raise FileNotFoundError(
            f"{index} names {len(files)} files, {len(absent)} of them missing: {few(absent)}. Was the "
            "download cut short?"
        )
    return files


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({error}). Is it cut short, or a pointer that git-lfs "
            "left? Fetch it again."
        ) from None


def few(names: list[str], shown: int = 4) -> str:
    """The first names of a list, and how many more there are; one that does not print is quoted."""
    first = [name if name.isprintable() else repr(name) for name in names[:shown]]
    return ", ".join(first) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def read_json(file: Path) -> dict:
    """The names and values of a JSON file.

    Raises:
        ValueError: it is not JSON, something else than names with values, or a name stands there twice.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:  # of the encoding or of JSON
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds {type(content).__name__} {str(content)[:40]!r}; expected names with values."
        )
    return content


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the name {name!r} stands there twice.")
        values[name] = value
    return values


def write_json(file: Path, values: Mapping[str, object]) -> None:
    """Write names and values, as a person can read them."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
