"""Training on as many processes as there are: the trainer, with model, optimiser and batch spread over them.

    torchrun --nproc-per-node 8 -m minicpm_lite.cli train --config minicpm-1.2b --data shards --out run

Every process keeps its part of each weight, gradient and moment, and gathers a block's weights just before it
computes with them: FSDP2, ``torch.distributed.fsdp.fully_shard``. One process, two on a laptop and a cluster
run the same code; a run gives the same losses on any of them, up to rounding.

Choices, and the traps behind them:

- **The batch is divided, not multiplied.** ``batch_size`` counts the windows of a step over all processes,
  and process r takes its stretch of them. The order of the data is that of `Trainer`, at any world size.
- **The mean is over tokens, not over processes.** Where windows hold tokens that are not predicted, a mean of
  the processes' means is another number. So each pass counts by its share of the whole step's tokens.
- **Weights do not depend on the world size.** The model is made without memory. Then each process draws each
  parameter whole, from a generator seeded by its name, and keeps its part: one parameter at a time in memory.
- **Gradients are reduced after every pass**, so that they are never held whole. It costs communication that
  ``set_requires_gradient_sync(False)`` would save, and saves 4 bytes a parameter on every device.
- **bfloat16 without rounded angles.** Weights are rounded to bfloat16 as they are gathered, and gradients are
  added in float32: see `minicpm_lite.training.precision`. FSDP would also cast what a block is given. The
  rotary angles must stay in float32, so that is switched off.
- **Errors are everyone's.** What one process finds (a damaged shard, a full disk) all processes raise.
- **Checkpoints** are safetensors, and any number of processes reads them: see `sharded_checkpoint`.
- With experts, the balance loss is that of each pass on each process, by its share, not of the whole batch.
"""

import json
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm.auto import tqdm

from ..config import ModelConfig, require_positive_integer
from ..data.windows import Windows
from ..files import written_whole
from ..language.decoder import Decoder
from ..optional import require
from ..runtime import calm_threads
from .batches import batch_to, require_fitting, split_batch
from .branch import require_known, require_same_past, stable_schedule
from .memory import recompute_blocks
from .objective import Objective, next_token
from .optimizer import adamw
from .processes import on_first, raise_together
from .settings import Layout, TrainerConfig
from .sharded_checkpoint import checkpoints, read_facts, read_tensors, require_whole, write_checkpoint
from .state import (
    checkpoint_shapes,
    checkpoint_tensors,
    make_moments,
    require_same_run,
    run_identity,
    updates_made,
)
from .update import update
from .wsd import WSD, Schedule

__all__ = ["DistributedTrainer", "initialise"]

_METRICS = "metrics.jsonl"


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Draw the weights of a model anew; the same ones, whole or sharded, over however many processes.

    The distributions are those of `Decoder`; each parameter has a generator of its own, seeded by its name.
    """
    tables = {id(table) for table in model.tables}
    for name, parameter in model.named_parameters():
        std = model.config.init_std / (1 if id(parameter) in tables else model.config.width_ratio**0.5)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        whole = torch.ones(parameter.shape)
        if parameter.ndim > 1:
            whole.normal_(std=std, generator=generator)
        if isinstance(parameter, DTensor):  # every process has drawn it, so nothing is sent
            whole = distribute_tensor(
                whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.copy_(whole)


def _sharded_decoder(
    config: ModelConfig,
    trainer: TrainerConfig,
    layout: Layout,
    mesh: DeviceMesh,
    frozen: Callable[[str], bool],
) -> Decoder:
    """A decoder of which every process holds its part, block by block."""
    with torch.device("meta"):
        model = Decoder(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen(name))
    if layout.activation_checkpointing:
        recompute_blocks(model)
    reduced = torch.bfloat16 if trainer.precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(
        param_dtype=reduced, reduce_dtype=torch.float32 if reduced else None, cast_forward_inputs=False
    )
    for block in model.layers:
        if trainer.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    _callable_apart(model)
    model.to_empty(device=mesh.device_type)
    initialise(model, trainer.seed)
    return model


def _callable_apart(model: Decoder) -> None:
    """Let an objective call the parts of a forward pass: each gathers the weights, as the whole does.

    Within a call of the whole they are gathered already. To do it again would free them at its end, and the
    backward pass would have to gather the tables once more.
    """
    within = {part: getattr(model, part) for part in ("embed", "states", "logits")}
    for part in within:
        register_fsdp_forward_method(model, part)
    apart = {part: getattr(model, part) for part in within}
    model.register_forward_pre_hook(lambda *call: vars(model).update(within))
    model.register_forward_hook(lambda *call: vars(model).update(apart), always_call=True)


class DistributedTrainer:
    """One run of training over all processes: `Trainer`'s updates, with checkpoints that any number can load.

    Make it inside `processes`, in every process alike.

    Args:
        model: the shape; weights are drawn from the trainer config's seed.
        windows: what is read; every process reads its own part of each step.
        schedule: rate of each step: WSD or Cosine.
        config: ``batch_size`` is the windows of a step over all processes.
        layout: passes and recomputation.
        device: what `processes` gave.
        objective: what is minimised, of a decoder and the windows of a pass. It calls the decoder as a whole,
            or its ``embed``, ``states`` and ``logits``, since these are what gathers the weights.
        frozen: of a parameter's name, whether it stays as it was drawn or loaded.

    Attributes:
        step: updates made so far.
        losses: reported loss of each update since this trainer was made; of the next token, in nats.
        grad_norms: norm of the gradient of each of them, before clipping.

    Raises:
        ValueError: windows that do not fit the model, a schedule that a checkpoint could not bring back, or a
            batch that the processes cannot share evenly.
    """

    def __init__(
        self,
        model: ModelConfig,
        windows: Windows,
        schedule: Schedule,
        config: TrainerConfig = TrainerConfig(),
        layout: Layout = Layout(),
        device: torch.device | str = "cpu",
        objective: Objective = next_token,
        frozen: Callable[[str], bool] = lambda name: False,
    ) -> None:
        require_fitting(windows, config, model)
        require_known(schedule)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if config.batch_size % self.world_size:
            raise ValueError(
                f"A step has {config.batch_size} windows, which {self.world_size} processes cannot share "
                f"evenly. Make batch_size a multiple of {self.world_size}."
            )
        self.windows, self.schedule, self.config, self.layout = windows, schedule, config, layout
        self.device, self.objective = torch.device(device), objective
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        self.model = _sharded_decoder(model, config, layout, mesh, frozen)
        self.optimizer = adamw(self.model, config, schedule.peak_lr)
        self.step = 0
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self._trouble: Exception | None = None

    def train(
        self,
        until: int | None = None,
        folder: str | Path | None = None,
        checkpoint_every: int = 1000,
        keep: int = 2,
        tensorboard: bool = False,
        progress: bool = True,
    ) -> None:
        """Make updates up to step ``until`` (left out: to the end of the schedule).

        Args:
            until: the step to stop at.
            folder: where checkpoints (``step-00001000``) and ``metrics.jsonl`` go, a line for each step.
            checkpoint_every: in steps. One more is taken where the schedule's decay begins, and at the end.
            keep: how many of the newest checkpoints stay. That of the decay's beginning always does.
            tensorboard: write the metrics as TensorBoard events, too.
            progress: show a bar.

        Raises:
            FileExistsError: the folder holds a later checkpoint than this run's step.
            FloatingPointError: a gradient is not finite; weights and moments are as before that step.
            ValueError: a damaged shard.
            OSError: a full disk; earlier checkpoints stand.
        """
        until = self.schedule.total_steps if until is None else until
        require_positive_integer("checkpoint_every", checkpoint_every)
        require_positive_integer("keep", keep)
        decay_start = self.schedule.decay_start if isinstance(self.schedule, WSD) else None
        self._trouble = None  # what was reported before may have been mended
        metrics = None
        if folder:
            metrics = _Metrics(Path(folder))
            on_first(lambda: _prepare(Path(folder), self.step, tensorboard))
            on_first(lambda: metrics.open(self.step, tensorboard))
        calm_threads()
        self.model.train()
        bar = tqdm(range(self.step, until), disable=self.rank != 0 or not progress, leave=False, unit="step")
        try:
            for _ in bar:
                line = self._update()
                bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
                if metrics is not None and self.rank == 0:
                    try:
                        metrics.add(line)
                    except OSError as error:  # a full disk, which the others hear of in the next step
                        self._trouble = error
                due = self.step % checkpoint_every == 0 or self.step in (decay_start, until)
                if folder and due:
                    self.save(folder)
                    on_first(lambda: _prune(Path(folder), keep, decay_start))
            raise_together(self._trouble)
        finally:
            if metrics is not None:
                metrics.close()

    def _update(self) -> dict:
        """One update. An error before its end leaves weights, moments and step as they were."""
        started = time.perf_counter()
        step, mine = self.step + 1, self.config.batch_size // self.world_size
        windows, units, checksum = self._read(self.step * self.config.batch_size + self.rank * mine, mine)
        loss, grad_norm = update(
            step,
            self.schedule,
            self.model,
            self.optimizer,
            self.config.max_grad_norm,
            loss=self._loss,
            passes=[(p, self.objective.weight(p)) for p in split_batch(windows, self.layout.micro_batch)],
            units=units,
            add_up=_sum_over_processes,
        )
        self.step = step
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        seconds = time.perf_counter() - started
        return {"step": step, "tokens": step * self.config.batch_tokens, "loss": loss,
                "lr": self.schedule(step), "grad_norm": grad_norm, "data": checksum,
                "tokens_per_second": round(self.config.batch_tokens / seconds, 1),
                "seconds": round(seconds, 4)}  # fmt: skip

    def _loss(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        minimised, reported = self.objective.loss(self.model, batch_to(windows, self.device))
        return minimised * self.world_size, reported  # FSDP takes the mean of the processes' gradients

    def _read(self, first: int, count: int) -> tuple[Tensor, int, int]:
        """This process's windows; of all, the units that count and a checksum that knows their order."""
        windows, units, error = torch.zeros(0, 1, dtype=torch.long), 0, self._trouble
        try:
            windows = torch.stack([self.windows[index] for index in range(first, first + count)])
            units = self.objective.weight(windows)
        except (ValueError, OSError) as found:
            error = found
        checksum = sum(
            zlib.crc32(window.numpy().tobytes()) * (1 + place)
            for place, window in enumerate(windows, start=self.rank * count)
        )
        totals = torch.tensor([units, checksum, error is not None], device=self.device)
        units, checksum, failed = _sum_over_processes(totals).tolist()
        if failed:
            raise_together(error)
        return windows, units, checksum

    def save(self, folder: str | Path) -> Path:
        """Write the whole state of the run to ``folder/step-…``, atomically; every process writes its part.

        Raises:
            OSError: it cannot be written, or the disk is full; nothing half-written is left, and earlier
                checkpoints stand.
        """
        facts = {
            "step": self.step,
            "updates": updates_made(self.model, self.optimizer),
            "schedule": {"kind": type(self.schedule).__name__} | asdict(self.schedule),
            "processes": self.world_size,
            "torch": torch.__version__,
        }
        tensors = checkpoint_tensors(self.model, self.optimizer)
        return write_checkpoint(folder, tensors, facts | self._identity())

    def load(self, checkpoint: str | Path) -> None:
        """Go on from a checkpoint of `save`, whatever the number of processes that wrote it.

        Everything is checked and read before anything is changed; what is read lies beside the weights until
        then, in as much memory as their gradients take in a step. The schedule may have another future than
        the saved run's, but not another past; `Trainer.load`, which does not know it, takes any.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it is damaged or foreign, or belongs to another model, trainer config, text,
                objective or schedule.
        """
        self._load(checkpoint, self._identity())

    def branch_from(self, checkpoint: str | Path) -> None:
        """Start from a checkpoint of another run's stable stage, perhaps with other text.

        Weights, moments and step are taken over; the step goes on, and with it the index of the windows. Make
        the trainer with `decay_schedule` of the checkpoint.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it was taken in the warm-up or the decay, or does not fit as `load` says.
        """
        on_first(lambda: stable_schedule(checkpoint))
        identity = self._identity()
        del identity["text"]
        self._load(checkpoint, identity)

    def _load(self, checkpoint: str | Path, identity: dict[str, dict]) -> None:
        def check() -> tuple[int, dict[str, int]]:
            facts = read_facts(checkpoint)
            require_same_run(checkpoint, facts, identity)
            require_same_past(checkpoint, facts, self.schedule)
            require_whole(checkpoint, checkpoint_shapes(self.model, facts["updates"]))
            return facts["step"], facts["updates"]

        step, updates = on_first(check)
        moments = dict(self.optimizer.state)
        try:
            make_moments(self.model, self.optimizer, updates)
            tensors = checkpoint_tensors(self.model, self.optimizer)
            weights = {name: torch.empty_like(tensors[name]) for name in tensors if name.startswith("model.")}
            read_tensors(checkpoint, tensors | weights)  # which may fail, so the weights wait
        except BaseException:
            self.optimizer.state.clear()
            self.optimizer.state.update(moments)
            raise
        for name, weight in weights.items():
            tensors[name].copy_(weight)
        self.step = step

    def _identity(self) -> dict[str, dict]:
        return run_identity(self.model, self.config, self.windows.identity(), self.objective.name)


def _sum_over_processes(number: Tensor) -> Tensor:
    dist.all_reduce(number)
    return number


class _Metrics:
    """A JSON line for each step, and TensorBoard events; opened and kept by the first process alone."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _METRICS
        self.file = self.events = None

    def open(self, step: int, tensorboard: bool) -> None:
        self.file = self.path.open("a")
        if tensorboard:
            writer = _tensorboard().SummaryWriter
            self.events = writer(str(self.path.with_name("tensorboard")), purge_step=step + 1)

    def add(self, line: dict) -> None:
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, f"{self.path} could not be written: {error.strerror}") from None
        if self.events is not None:
            for name in ("loss", "lr", "grad_norm", "tokens_per_second"):
                self.events.add_scalar(name, line[name], line["step"])

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # a full disk was reported when the line was written
                self.file.close()
        if self.events is not None:
            self.events.close()


def _prepare(folder: Path, step: int, tensorboard: bool) -> None:
    """Make a run's folder ready to go on after ``step``: later lines of the metrics are dropped."""
    if tensorboard:
        _tensorboard()
    folder.mkdir(parents=True, exist_ok=True)
    later = [found for found in checkpoints(folder) if found > step]
    if later:
        raise FileExistsError(
            f"{folder} holds a checkpoint of step {max(later)}, and this run is at step {step}. Load that "
            "checkpoint to go on, or choose another folder."
        )
    for left in folder.glob(".step-*.writing"):
        shutil.rmtree(left)  # by a process that was killed in a save
    path = folder / _METRICS
    if path.exists():
        with written_whole(path) as beside, path.open() as old, beside.open("w") as new:
            new.writelines(line for line in old if line.endswith("}\n") and json.loads(line)["step"] <= step)


def _tensorboard() -> ModuleType:
    """torch's writer, which needs a package that torch does not bring."""
    for module in ("tensorboard", "torch.utils.tensorboard"):
        found = require(module, install="tensorboard", purpose="write TensorBoard events")
    return found


def _prune(folder: Path, keep: int, decay_start: int | None) -> None:
    found = checkpoints(folder)
    for step in sorted(found)[:-keep]:
        if step != decay_start:
            shutil.rmtree(found[step])
