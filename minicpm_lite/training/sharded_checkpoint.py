"""Sharded checkpoints: every process writes its part of a run, and any number of processes reads it.

    run/step-00001000/shard-00001-model-00001-of-00001.safetensors    what process 0 held
                      shard-00002-…                                   what process 1 held
                      checkpoint.json                                 facts, and the sizes of the files

Choices, and the traps behind them:

- `torch.distributed.checkpoint` does the work, through its safetensors writer. With its usual writer the
  table of contents is a pickle, and a pickle may run any code when it is opened. Here each file says which
  piece of which tensor it holds, and the table is put together from that.
- So a missing file would go unnoticed, and the values in it would stay what they were. `require_whole`
  counts them first.
- While it writes, a process holds its part a second time, as bytes in the host's memory.
- Only tensors are written. Steps, schedules and configs are facts, in JSON.
- The folder is written beside its place, synced and renamed, and has its facts written last. What a killed
  process leaves is named ``….writing`` and no one takes it for a checkpoint.
"""

import json
import math
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..config import model_config
from ..language.decoder import Decoder
from .processes import on_first
from .wsd import WSD, Cosine, Schedule

__all__ = [
    "checkpoints",
    "decay_schedule",
    "latest_checkpoint",
    "load_weights",
    "read_facts",
    "read_tensors",
    "require_same_past",
    "require_whole",
    "stable_schedule",
    "write_checkpoint",
]

FACTS = "checkpoint.json"
_FORMAT = {"format": "minicpm_lite distributed checkpoint", "version": 1}
_CHECKPOINT = re.compile(r"step-(\d{8,})$")


def write_checkpoint(folder: str | Path, state: dict[str, Tensor], facts: dict) -> Path:
    """Write ``folder/step-…`` atomically; called by all processes alike, each writes its part.

    Args:
        folder: the run's.
        state: tensors by name; of a sharded one, every process holds its part.
        facts: fits into JSON; ``step`` names the checkpoint.

    Raises:
        OSError: it cannot be written, or the disk is full; nothing half-written is left, and earlier
            checkpoints stand.
    """
    final = Path(folder) / f"step-{facts['step']:08d}"
    writing = final.with_name(final.name + ".writing")
    try:
        on_first(lambda: _new_folder(writing))
        try:
            dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(writing), save_distributed=True))
        except CheckpointException as failure:
            raise _cause(failure) from None
        on_first(lambda: _finish(writing, final, _FORMAT | facts))
    except OSError as error:
        on_first(lambda: shutil.rmtree(writing, ignore_errors=True))
        raise OSError(
            error.errno, f"{final} could not be written: {error.strerror}. Earlier checkpoints stand."
        ) from None
    return final


def decay_schedule(checkpoint: str | Path, decay_steps: int, **form: object) -> WSD:
    """The schedule of a checkpoint's run, with a decay that begins at the checkpoint.

    Args:
        checkpoint: taken in the stable stage of a WSD run.
        decay_steps: steps of the decay.
        form: ``form``, ``final_ratio`` or ``half_life`` of `WSD`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it was taken in the warm-up or the decay, or under another kind of schedule.
    """
    step, old = stable_schedule(Path(checkpoint))
    return WSD(old.peak_lr, old.warmup_steps, step - old.warmup_steps, decay_steps, **form)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in a run's folder, or None."""
    found = checkpoints(folder)
    return found[max(found)] if found else None


def read_facts(checkpoint: str | Path) -> dict:
    """What a checkpoint says about itself: step, schedule, configs, text, world size, torch version, files.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it was not written by `DistributedTrainer.save`.
    """
    path = Path(checkpoint) / FACTS
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {checkpoint}: it lacks {FACTS}.")
    try:
        facts = json.loads(path.read_text())
        if {key: facts[key] for key in _FORMAT} != _FORMAT or not {
            "step",
            "files",
            "schedule",
        } <= facts.keys():
            raise KeyError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is not that of a checkpoint of minicpm_lite, version {_FORMAT['version']}."
        ) from None
    return facts


def load_weights(checkpoint: str | Path) -> Decoder:
    """The model of a checkpoint, whole, in float32 on the CPU; needs no other process.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged or foreign.
    """
    checkpoint = Path(checkpoint)
    facts = read_facts(checkpoint)
    config = model_config(facts["model config"], f"The model config of {checkpoint}")
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    state = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    require_whole(checkpoint, {name: tensor.shape for name, tensor in state.items()}, extra=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what is wanted
        read_tensors(checkpoint, state, no_dist=True)
    return model


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """Whole checkpoints of a run's folder, by their step. What a killed save left is none."""
    return {
        int(match[1]): path
        for path in (Path(folder).iterdir() if Path(folder).is_dir() else ())
        if (match := _CHECKPOINT.match(path.name)) and (path / FACTS).is_file()
    }


def _new_folder(path: Path) -> None:
    if path.exists():  # left by a process that was killed in a save
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _finish(writing: Path, final: Path, facts: dict) -> None:
    """Add the facts to what all processes have written, and give the checkpoint its name."""
    sizes = {file.name: file.stat().st_size for file in sorted(writing.iterdir())}
    with (writing / FACTS).open("w") as file:
        file.write(json.dumps(facts | {"files": sizes}, indent=1))
        file.flush()
        os.fsync(file.fileno())
    _sync(writing)
    if final.exists():  # the same step, saved twice
        shutil.rmtree(final)
    os.replace(writing, final)
    _sync(final.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stable_schedule(checkpoint: str | Path) -> tuple[int, WSD]:
    """Step and schedule of a checkpoint from which a decay may begin.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it was taken in the warm-up or the decay, or under another kind of schedule.
    """
    facts = read_facts(checkpoint)
    step, schedule = facts["step"], _schedule(facts)
    if not isinstance(schedule, WSD):
        raise ValueError(
            f"{checkpoint} was trained with the schedule {facts['schedule']['kind']}, which has no stable "
            "stage. A decay begins from a run of WSD."
        )
    if step < schedule.warmup_steps:
        raise ValueError(
            f"{checkpoint} was taken in the warm-up, at step {step} of {schedule.warmup_steps}. A decay "
            "begins in the stable stage."
        )
    if schedule.decay_steps and step > schedule.decay_start:
        raise ValueError(
            f"{checkpoint} was taken at step {step}, in or after the decay that began at step "
            f"{schedule.decay_start}. Its rate has already fallen, and going back to the peak would undo the "
            f"decay. Take a checkpoint of the stable stage, such as step-{schedule.decay_start:08d}."
        )
    return step, schedule


def require_same_past(checkpoint: str | Path, facts: dict, schedule: Schedule) -> None:
    """Refuse a checkpoint up to which another schedule gave other rates; the future may differ.

    Raises:
        ValueError: a sentence that names the first step that differs.
    """
    old = _schedule(facts)
    for step in range(1, facts["step"] + 1):
        if not math.isclose(old(step), schedule(step), rel_tol=1e-9):
            raise ValueError(
                f"{checkpoint} belongs to another schedule: its rate at step {step} was {old(step):.6g}, "
                f"this run's is {schedule(step):.6g}."
            )


def _schedule(facts: dict) -> Schedule:
    values = dict(facts["schedule"])
    kind = {"WSD": WSD, "Cosine": Cosine}[values.pop("kind")]
    if values.get("half_life"):
        del values["final_ratio"]  # follows from it
    return kind(**values)


def require_whole(checkpoint: str | Path, shapes: dict[str, torch.Size], extra: bool = False) -> None:
    """Refuse a checkpoint that lacks a file, a tensor or a piece of one.

    Args:
        checkpoint: its folder.
        shapes: of the tensors that are wanted, by name.
        extra: whether it may hold others, too.

    Raises:
        ValueError: a sentence that names the file or the tensor.
    """
    for name, size in read_facts(checkpoint)["files"].items():
        file = Path(checkpoint) / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise ValueError(
                f"{file} is {'missing' if found is None else f'{found} bytes long'}; it was written with "
                f"{size} bytes. Use an earlier checkpoint."
            )
    try:
        stored = dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    except SafetensorError as error:
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


def read_tensors(checkpoint: str | Path, state: dict[str, Tensor], no_dist: bool = False) -> None:
    """Fill tensors from a checkpoint, in place; of a sharded one, every process its part.

    Raises:
        ValueError: a file cannot be read.
    """
    try:
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=no_dist)
    except CheckpointException as failure:
        raise ValueError(f"{checkpoint} could not be read: {_cause(failure)}") from None


def _cause(failure: CheckpointException) -> Exception:
    """What went wrong in a distributed read or write: the operating system's word, if one process has it."""
    errors = [error for error, _ in failure.failures.values()]
    return next((error for error in errors if isinstance(error, OSError)), errors[0])
