"""The folder of a run: the metrics of each step, the checkpoints that stay, and how it is taken up again.

    run/metrics.jsonl      {"step": 1, "units": 1536, "loss": 7.1, "lr": 0.001, ...}
        step-00001000/     a checkpoint, see `sharded_checkpoint`
        tokenizer.json     what made the ids that are read, if it is known
        chat_template.jinja    how its model is asked, if somebody put it there
        tensorboard/       the same metrics as events, if they were asked for

The first process keeps the metrics. A run that is killed leaves lines of steps that its last checkpoint has
not seen; whoever goes on makes these steps again, so the lines are dropped. So is a damaged line, with those
behind it.

A folder is one run's, since whoever writes there prunes checkpoints. While it is open no other program opens
it. It is empty, or holds earlier checkpoints of this very run: same identity, same rates up to there, same
`Origin`. A branch has the past of its trunk and is another run, and so is one that began with other weights.
Whoever goes on need not have these: a checkpoint says what they were. What an attempt without a checkpoint
left is replaced, lines included, and nothing else is; a run that is refused changes nothing.
"""

import json
import math
import re
import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Self

from ..data.mixtures import noted_tokenizers
from ..data.shards import TOKENIZER, is_tokenizer
from ..files import locked, remove, written_whole
from ..optional import require
from ..pretrained.checkpoints import read_tokenizer
from .branch import require_same_past
from .processes import on_first, rank
from .sharded_checkpoint import checkpoints, read_facts, require_shared
from .state import require_same_run
from .wsd import Schedule

__all__ = ["Origin", "RunFolder", "require_noted", "require_own"]

_METRICS = "metrics.jsonl"
_LINE = re.compile(rb'\{"step": \d+, "units": ')  # how a line of it begins
_EVENTS = {"loss", "lr", "grad_norm", "tokens_per_second"}


@dataclass(frozen=True)
class Origin:
    """Where a run began, by which it is told from others of the same settings; its checkpoints say so, too.

    Attributes:
        branched_at: the step at which it branched from another run, if it did.
        start_weights: a checksum of the weights with which it began, or what it branched from; None: it is
            not known, as in older checkpoints.
    """

    branched_at: int | None
    start_weights: int | None

    @classmethod
    def of(cls, facts: dict) -> Self:
        """That of the run of a checkpoint."""
        return cls(facts["branched_at"], facts.get("start_weights"))

    def require_that_of(self, checkpoint: Path, facts: dict) -> None:
        """Refuse a checkpoint of a run that began elsewhere.

        Raises:
            FileExistsError: a sentence that says where.
        """
        theirs, what = Origin.of(facts), None
        if theirs.branched_at != self.branched_at:
            what = f"{_branched(theirs.branched_at)}, and this run {_branched(self.branched_at)}"
        elif None not in (theirs.start_weights, self.start_weights) and theirs != self:
            what = "began with other weights than this one"
        if what is not None:
            raise FileExistsError(
                f"{checkpoint} is of a run that {what}. Choose another folder, so that both can go on."
            )


class RunFolder:
    """A run's folder, open while steps are made; a context, in every process alike.

    Args:
        path: made if need be.
        step: that of the run; later lines of the metrics are dropped.
        identity: the run's, see `state.run_identity`.
        schedule: the run's.
        origin: the run's.
        keep: how many of the newest checkpoints stay.
        decay_start: a step whose checkpoint always stays.
        tensorboard: write events, too.
        tokenizer: a file, of which a copy is kept, once for the run; None: it is not known.

    Raises:
        FileExistsError: the folder holds a later checkpoint or another run's, or beside no checkpoint a
            tokenizer where that of the run is not known, or files of such names that no attempt left; or
            another program has it open.
        ValueError: the tokenizer is not the one that the data note.
        OSError: it cannot be written, or some processes do not see it.
    """

    def __init__(
        self,
        path: str | Path,
        step: int,
        identity: dict[str, dict],
        schedule: Schedule,
        origin: Origin,
        keep: int,
        decay_start: int | None,
        tensorboard: bool,
        tokenizer: str | Path | None,
    ) -> None:
        self.path = Path(path)
        self._keep, self._decay_start, self._tensorboard = keep, decay_start, tensorboard
        self._metrics = self._events = None
        self._hold = ExitStack()
        try:
            on_first(self._make)
            require_shared(self.path)
            on_first(lambda: self._open(step, identity, schedule, origin, tokenizer))
        except BaseException:
            self._hold.close()
            raise

    def _make(self) -> None:
        if self._tensorboard:
            _writer()  # before anything is changed
        self.path.mkdir(parents=True, exist_ok=True)
        self._hold.enter_context(locked(self.path))

    def _open(
        self,
        step: int,
        identity: dict[str, dict],
        schedule: Schedule,
        origin: Origin,
        tokenizer: str | Path | None,
    ) -> None:
        found = checkpoints(self.path)
        if found and max(found) > step:
            raise FileExistsError(
                f"{self.path} holds a checkpoint of step {max(found)}, and this run is at step {step}. Load "
                "that checkpoint to go on (the command line does with --resume), remove what is later to go "
                "on from here, or choose another folder."
            )
        if found:
            require_own(found[max(found)], identity, schedule, origin)
        path, kept = self.path / _METRICS, self.path / TOKENIZER
        if tokenizer is not None:
            require_noted(Path(tokenizer), identity["text"])
        if not found:
            _require_an_attempt(path, kept, tokenizer and Path(tokenizer))
        own = found and kept.exists()  # and its ids are what they were
        if tokenizer is not None and not own:  # whatever an earlier attempt may have left
            with written_whole(kept) as beside:
                shutil.copyfile(tokenizer, beside)
        elif kept.exists() and not found:
            raise FileExistsError(
                f"{kept} lies beside no checkpoint, perhaps of an earlier attempt, and which tokenizer made "
                "the ids of this run is not known. Remove it, or choose another folder."
            )
        for left in [*self.path.glob(".step-*.writing"), *self.path.glob(".step-*.pruned")]:
            remove(left)  # by a process that was killed in a save, or as it pruned
        past = step if found else 0  # up to there, lines are of this run
        if path.exists():
            with written_whole(path) as beside, path.open("rb") as old, beside.open("wb") as new:
                new.writelines(takewhile(lambda line: _step(line) <= past, old))
        self._metrics = path.open("a")
        if self._tensorboard:
            events = str(self.path / "tensorboard")
            self._events = _writer().SummaryWriter(events, purge_step=past + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._metrics is not None:
            with suppress(OSError):  # a full disk was reported when the line was written
                self._metrics.close()
        if self._events is not None:
            self._events.close()
        self._hold.close()

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
            for name in (each for each in _EVENTS if line.get(each) is not None):  # no loss of a skipped step
                self._events.add_scalar(name, line[name], line["step"])

    def prune(self) -> None:
        """Remove the checkpoints that need not stay."""
        on_first(self._prune)

    def _prune(self) -> None:
        found = checkpoints(self.path)
        for step in sorted(found)[: -self._keep]:
            if step != self._decay_start:
                gone = self.path / f".{found[step].name}.pruned"
                found[step].rename(gone)  # so that half a one is none
                remove(gone)


def require_own(checkpoint: Path, identity: dict[str, dict], schedule: Schedule, origin: Origin) -> None:
    """Refuse a folder of which a checkpoint is another run's; the arguments are those of `RunFolder`.

    Raises:
        FileExistsError: a sentence that says by what it is another one.
    """
    try:
        facts = read_facts(checkpoint)
        require_same_run(checkpoint, facts, identity)
        require_same_past(checkpoint, facts, schedule)
    except ValueError as error:
        raise FileExistsError(f"{error} Choose another folder for this run.") from None
    origin.require_that_of(checkpoint, facts)


def _require_an_attempt(metrics: Path, kept: Path, tokenizer: Path | None) -> None:
    """Refuse to replace what no attempt of a run left: metrics of something else, a model's tokenizer."""
    foreign = None
    if metrics.exists():
        with metrics.open("rb") as file:
            first = file.readline()
        if first.endswith(b"\n") and not _LINE.match(first):  # half a line is of an attempt that was killed
            foreign = metrics
    elif tokenizer is not None and kept.exists() and kept.read_bytes() != tokenizer.read_bytes():
        foreign = kept
    if foreign is not None:
        raise FileExistsError(
            f"{foreign} lies beside no checkpoint and is not what an attempt left, so it is not replaced. "
            "Choose another folder."
        )


def require_noted(tokenizer: Path, text: dict) -> None:
    """Refuse a tokenizer that is not the one of which the data that are read note the checksum.

    Args:
        tokenizer: a file; its JSON may be spelled otherwise than in the copy beside the shards.
        text: what a run reads, as its facts have it.

    Raises:
        ValueError: it is another one, or none. Where nothing was noted, any will do.
    """
    read_tokenizer(tokenizer)  # a damaged file is refused with what is wrong about it
    noted = noted_tokenizers(text)
    if noted and not is_tokenizer(tokenizer, noted):
        raise ValueError(
            f"{tokenizer} is not the tokenizer that made the ids of this run: its checksum is not the one "
            f"that was noted with them. Take the {TOKENIZER} of the run, or the one beside the shards."
        )


def _branched(branched_at: int | None) -> str:
    if branched_at is None:
        return "began at step 0"
    return f"branched from another one at step {branched_at}"


def _step(line: bytes) -> float:
    """The step of a line of metrics; of a line that is none, one later than any."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"}\n") else math.inf
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def _writer() -> ModuleType:
    """torch's writer of events, which needs a package that torch does not bring."""
    for module in ("tensorboard", "torch.utils.tensorboard"):
        found = require(module, install="tensorboard", purpose="write TensorBoard events")
    return found
