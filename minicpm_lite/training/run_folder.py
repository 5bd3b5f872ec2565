"""The folder of a run: the metrics of each step, the checkpoints that stay, and how it is taken up again.

    run/metrics.jsonl      {"step": 1, "units": 1536, "loss": 7.1, "lr": 0.001, ...}
        step-00001000/     a checkpoint, see `sharded_checkpoint`
        tensorboard/       the same metrics as events, if they were asked for

The first process keeps the metrics. A run that is killed leaves lines of steps that its last checkpoint has
not seen; whoever goes on makes these steps again, so the lines are dropped.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Self

from ..files import written_whole
from ..optional import require
from .processes import on_first, rank
from .sharded_checkpoint import checkpoints

__all__ = ["RunFolder"]

_METRICS = "metrics.jsonl"
_EVENTS = {"loss", "lr", "grad_norm", "tokens_per_second"}


class RunFolder:
    """A run's folder, open while steps are made; a context, in every process alike.

    Args:
        path: made if need be.
        step: that of the run; later lines of the metrics are dropped.
        keep: how many of the newest checkpoints stay.
        decay_start: a step whose checkpoint always stays.
        tensorboard: write events, too.

    Raises:
        FileExistsError: the folder holds a later checkpoint.
        OSError: it cannot be written.
    """

    def __init__(
        self, path: str | Path, step: int, keep: int, decay_start: int | None, tensorboard: bool
    ) -> None:
        self.path = Path(path)
        self._keep, self._decay_start, self._tensorboard = keep, decay_start, tensorboard
        self._metrics = self._events = None
        on_first(lambda: self._open(step))

    def _open(self, step: int) -> None:
        if self._tensorboard:
            _writer()  # before anything is changed
        self.path.mkdir(parents=True, exist_ok=True)
        later = [found for found in checkpoints(self.path) if found > step]
        if later:
            raise FileExistsError(
                f"{self.path} holds a checkpoint of step {max(later)}, and this run is at step {step}. Load "
                "that checkpoint to go on, or choose another folder."
            )
        for left in self.path.glob(".step-*.writing"):
            shutil.rmtree(left)  # by a process that was killed in a save
        path = self.path / _METRICS
        if path.exists():
            with written_whole(path) as beside, path.open() as old, beside.open("w") as new:
                whole = (line for line in old if line.endswith("}\n"))
                new.writelines(line for line in whole if json.loads(line)["step"] <= step)
        self._metrics = path.open("a")
        if self._tensorboard:
            events = str(self.path / "tensorboard")
            self._events = _writer().SummaryWriter(events, purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._metrics is not None:
            with suppress(OSError):  # a full disk was reported when the line was written
                self._metrics.close()
        if self._events is not None:
            self._events.close()

    def add(self, line: dict) -> None:
        """Write the metrics of a step.

        Raises:
            OSError: in the first process alone: a full disk.
        """
        if rank() != 0:
            return
        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise OSError(
                error.errno, f"{self.path / _METRICS} could not be written: {error.strerror}"
            ) from None
        if self._events is not None:
            for name in _EVENTS & line.keys():
                self._events.add_scalar(name, line[name], line["step"])

    def prune(self) -> None:
        """Remove the checkpoints that need not stay."""
        on_first(self._prune)

    def _prune(self) -> None:
        found = checkpoints(self.path)
        for step in sorted(found)[: -self._keep]:
            if step != self._decay_start:
                shutil.rmtree(found[step])


def _writer() -> ModuleType:
    """torch's writer of events, which needs a package that torch does not bring."""
    for module in ("tensorboard", "torch.utils.tensorboard"):
        found = require(module, install="tensorboard", purpose="write TensorBoard events")
    return found
