"""Checkpoints of a run: every process writes its part, and any number of processes reads it, also one alone.

    run/step-00001000/shard-00001-model-00001-of-00001.safetensors    what process 0 held
                      shard-00002-…                                   what process 1 held
                      checkpoint.json                                 facts; sizes and checksums of the files

Choices, and the traps behind them:

- `torch.distributed.checkpoint` does the work, through its safetensors writer. With its usual writer the
  table of contents is a pickle, and a pickle may run any code when it is opened. Here each file says which
  piece of which tensor it holds, and the table is put together from that.
- So a missing file would go unnoticed, and the values in it would stay what they were. `require_whole`
  counts them first.
- A disk may give back other bits than it was given. So `read_tensors` compares each file's CRC-32 with what
  was noted when it was written; and the facts hold their own. The processes share the work, unless each
  machine has a copy on a disk of its own: then they look at all that they may read.
- While it writes, a process holds its part a second time, as bytes in the host's memory.
- Only tensors are written. Steps, schedules and configs are facts, in JSON. Since version 2 they say how
  often each parameter was moved, and since version 3 the losses are there; older ones are not read any more.
- Where machines share no file system, each would write its part to a disk of its own, and none would be
  whole. `require_shared` looks first.
- What every process holds, as a buffer, is written once, as one of them holds it.
- The folder is written beside its place and renamed, see `minicpm_lite.files`. What a killed process leaves
  is named ``.….writing`` and no one takes it for a checkpoint.
"""

import errno
import json
import math
import os
import re
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..config import model_config
from ..files import written_whole
from ..language.decoder import Decoder
from .processes import on_each, on_first, rank, world_size
from .state import BUILT_IN

__all__ = [
    "checkpoints",
    "is_checkpoint",
    "latest_checkpoint",
    "load_weights",
    "read_facts",
    "read_tensors",
    "require_shared",
    "require_whole",
    "write_checkpoint",
]

FACTS = "checkpoint.json"
_FORMAT = {"format": "minicpm_lite distributed checkpoint", "version": 3}
_CHECKPOINT = re.compile(r"step-(\d{8,})$")


def write_checkpoint(folder: str | Path, state: dict[str, Tensor], facts: dict) -> Path:
    """Write ``folder/step-…`` atomically; called by all processes alike, each writes its part.

    Args:
        folder: the run's.
        state: tensors by name; of a sharded one, every process holds its part.
        facts: fits into JSON; ``step`` names the checkpoint.

    Raises:
        OSError: it cannot be written, the disk is full, or some processes do not see the folder; nothing
            half-written is left, and earlier checkpoints stand.
    """
    final = Path(folder) / f"step-{facts['step']:08d}"
    try:
        on_first(lambda: final.parent.mkdir(parents=True, exist_ok=True))
        require_shared(final.parent)
        with _written_together(final) as beside:
            writer = dcp.HuggingFaceStorageWriter(str(beside), save_distributed=True)
            try:
                with _meant_alone():
                    dcp.save(
                        {name: tensor.contiguous() for name, tensor in state.items()},
                        storage_writer=writer,
                        no_dist=not dist.is_initialized(),
                    )
            except CheckpointException as failure:
                raise _cause(failure) from None
            files = on_first(lambda: {file.name: file.stat().st_size for file in sorted(beside.iterdir())})
            parts = on_each(lambda: {name: _checksum(beside / name) for name in _share(files)})
            checksums = {name: found for part in parts for name, found in part.items()}
            on_first(lambda: _add_facts(beside, _FORMAT | facts | {"files": files, "checksums": checksums}))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}. Earlier checkpoints stand.") from None
    return final


def require_shared(folder: Path) -> None:
    """Refuse a folder that is another one for some processes, as on machines that share no file system.

    Raises:
        OSError: a sentence that names the first process that does not see it; or it cannot be written.
    """
    if world_size() == 1:
        return
    name = on_first(lambda: _new_file(folder))
    seen = on_each(lambda: (folder / name).exists())
    on_first((folder / name).unlink)
    if not all(seen):
        raise OSError(
            errno.ENOENT,
            f"{folder} is another folder for process {seen.index(False)} than for process 0. Give one on a "
            "file system that all machines share",
        )


def _new_file(folder: Path) -> str:
    """Its name, which no file ever had there."""
    descriptor, path = tempfile.mkstemp(prefix=".seen-", dir=folder)
    os.close(descriptor)
    return Path(path).name


@contextmanager
def _written_together(path: Path) -> Iterator[Path]:
    """`written_whole` for all processes: the first one makes the place and names it, and all of them write.

    What is raised within must be raised in all processes.
    """
    place = ExitStack()
    beside = on_first(lambda: place.enter_context(written_whole(path, folder=True)))
    try:
        yield beside
    except Exception:
        on_first(lambda: place.__exit__(*sys.exc_info()))
        raise
    on_first(place.close)


def _add_facts(folder: Path, facts: dict) -> None:
    (folder / FACTS).write_text(json.dumps(facts | {"checksum": _checksum_of(facts)}, indent=1))


def _checksum_of(facts: dict) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _share(files: dict) -> list[str]:
    return sorted(files)[rank() :: world_size()]


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as content:
        while piece := content.read(1 << 20):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in a run's folder, or None."""
    found = checkpoints(folder)
    return found[max(found)] if found else None


def read_facts(checkpoint: str | Path) -> dict:
    """What a checkpoint says about itself: step, schedule, configs, text, world size, torch version, files.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it was not written by `Trainer.save`, or has been changed since.
    """
    path = Path(checkpoint).expanduser() / FACTS
    if not path.is_file():
        newest = latest_checkpoint(checkpoint)
        hint = f" The newest one in this run is {newest}." if newest else ""
        raise FileNotFoundError(f"There is no checkpoint at {checkpoint}: it lacks {FACTS}.{hint}")
    try:
        facts = json.loads(path.read_text())
        checksum = facts.pop("checksum")
        if {key: facts[key] for key in _FORMAT} != _FORMAT:
            raise KeyError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is not that of a checkpoint of minicpm_lite, version {_FORMAT['version']}."
        ) from None
    if checksum != _checksum_of(facts):
        raise ValueError(f"{path} is damaged: it is not as it was written. Use an earlier checkpoint.")
    return facts


def load_weights(checkpoint: str | Path) -> Decoder:
    """The decoder of a checkpoint, whole, in float32 on the CPU, ready to be used; needs no other process.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged or foreign, or holds another module than a plain decoder.
    """
    checkpoint = Path(checkpoint).expanduser()
    facts = read_facts(checkpoint)
    if "model config" not in facts:
        raise ValueError(
            f"{checkpoint} holds a {facts['model']['class']}, which is no decoder. Make such a module, and "
            "load the checkpoint with the Trainer of its run."
        )
    config = model_config(facts["model config"], f"The model config of {checkpoint}")
    with torch.device("meta"):
        model = Decoder(config)
    own = dict(model.named_parameters())
    for name, kind in facts["choice of parameters"].items():
        if BUILT_IN in kind or name not in own:
            raise ValueError(
                f"{checkpoint} holds a decoder that was changed inside: {name} is {kind}. Make such a one "
                "and load the checkpoint with the Trainer of its run."
            )
    model.to_empty(device="cpu")
    state = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    require_whole(checkpoint, facts, {name: tensor.shape for name, tensor in state.items()}, extra=True)
    read_tensors(checkpoint, facts, state, alone=True)
    return model.eval()


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """Whole checkpoints of a run's folder, by their step. What a killed save left is none."""
    folder = Path(folder).expanduser()
    return {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _CHECKPOINT.match(path.name)) and is_checkpoint(path)
    }


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder is a whole checkpoint of ours."""
    return (Path(path).expanduser() / FACTS).is_file()


def run_of(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint's run, also if the checkpoint is given by a link of another name."""
    path = Path(os.path.abspath(Path(checkpoint).expanduser()))
    return (path if _CHECKPOINT.match(path.name) else path.resolve()).parent


def require_whole(
    checkpoint: str | Path, facts: dict, shapes: dict[str, torch.Size], extra: bool = False
) -> None:
    """Refuse a checkpoint that lacks a file, a tensor or a piece of one.

    Args:
        checkpoint: its folder.
        facts: what `read_facts` gave.
        shapes: of the tensors that are wanted, by name.
        extra: whether it may hold others, too.

    Raises:
        ValueError: a sentence that names the file or the tensor.
    """
    for name, size in facts["files"].items():
        file = Path(checkpoint) / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise ValueError(
                f"{file} is {'missing' if found is None else f'{found} bytes long'}; it was written with "
                f"{size} bytes. Use an earlier checkpoint."
            )
    try:
        stored = dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    except Exception as error:  # of whatever kind torch's reader makes of a damaged header
        raise ValueError(f"A file of {checkpoint} is damaged ({error}). Use an earlier checkpoint.") from None
    for name in sorted(shapes.keys() | (stored.keys() if not extra else set())):
        if name not in shapes or name not in stored or stored[name].size != shapes[name]:
            raise ValueError(
                f"{checkpoint} does not fit this run: {name} is missing, extra or of another shape."
            )
        values = sum(math.prod(chunk.sizes) for chunk in stored[name].chunks)
        if values != math.prod(shapes[name]):
            raise ValueError(
                f"{checkpoint} holds {values} of the {math.prod(shapes[name])} values of {name}."
            )


def read_tensors(checkpoint: str | Path, facts: dict, state: dict[str, Tensor], alone: bool = False) -> None:
    """Fill tensors from a checkpoint, in place; of a sharded one, every process its part.

    Args:
        checkpoint: its folder.
        facts: what `read_facts` gave.
        state: the tensors, by name.
        alone: this process reads, and others do not take part.

    Raises:
        ValueError: a file cannot be read, or is not as it was written; then nothing was read.
    """
    checksums = facts["checksums"]
    if alone:
        _require_unchanged(checkpoint, checksums)
    else:
        places = on_each(lambda: _place(Path(checkpoint) / FACTS))
        own = _share(checksums) if len(set(places)) == 1 else checksums
        on_each(lambda: _require_unchanged(checkpoint, {name: checksums[name] for name in own}))
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    try:
        with _meant_alone():
            dcp.load(state, storage_reader=reader, no_dist=alone or not dist.is_initialized())
    except CheckpointException as failure:
        cause = _cause(failure)
        if not isinstance(cause, Exception):  # whoever interrupts a program is not told of its files
            raise cause from None
        raise ValueError(f"{checkpoint} could not be read: {cause}") from None


def _place(file: Path) -> tuple[int, int]:
    """What tells a file from its copies, from whatever machine one looks."""
    status = file.stat()
    return status.st_ino, status.st_ctime_ns  # the second one cannot be copied


def _require_unchanged(checkpoint: str | Path, checksums: dict[str, int]) -> None:
    for name, checksum in checksums.items():
        file = Path(checkpoint) / name
        if _checksum(file) != checksum:
            raise ValueError(f"{file} is damaged: it is not as it was written. Use an earlier checkpoint.")


@contextmanager
def _meant_alone() -> Iterator[None]:
    """Without torch's warning that one process works alone, where that is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _cause(failure: CheckpointException) -> BaseException:
    """What went wrong in a distributed read or write: the operating system's word, if one process has it."""
    errors = [error for error, _ in failure.failures.values()]
    return next((error for error in errors if isinstance(error, OSError)), errors[0])
