"""The trainer: AdamW, clipping, any schedule, checkpoints that resume bit for bit, one process or many.

It trains any module towards any objective. The batch and the learning rate of a step are functions of the
step alone, and nothing draws random numbers. So parameters, buffers, moments and the step number are the
whole state of a run: a run that is killed and resumed computes the same numbers as one that was not. (A
module with dropout trains, too; when it is resumed it draws other numbers.)

Under torchrun, inside `processes`, the layout's ``sharded`` cuts the model over all of them; each then reads
and computes its part of every step, and a checkpoint is written by all and read by any number.
"""

import copy
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from numbers import Integral
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ..config import require_positive_integer
from ..data.mixtures import require_one_tokenizer
from ..data.shards import Shards
from ..data.windows import Windows, require_stream, stream_identity
from ..language.decoder import Decoder
from ..language.scoring import evaluating, readable
from ..runtime import calm_threads
from .batches import (
    Batch,
    Batches,
    WindowBatches,
    batch_to,
    checksum,
    fitting_batches,
    part_of,
    require_known,
    split_batch,
)
from .branch import require_same_past, schedule_facts, stable_schedule
from .distributed import cut_again, leave_unreached, shard
from .interruption import Interruption
from .memory import recompute_blocks
from .objective import Objective, next_token
from .optimizer import adamw
from .precision import rounded
from .processes import add_up, on_each, on_first, raise_together, rank, world_size
from .run_folder import Origin, RunFolder, require_own
from .settings import Layout, TrainerConfig
from .sharded_checkpoint import checkpoints, read_facts, read_tensors, require_whole, write_checkpoint
from .state import (
    buffers_given_back,
    checkpoint_shapes,
    checkpoint_tensors,
    make_moments,
    own_memory,
    require_one_run,
    require_own_memory,
    require_same_run,
    run_identity,
    updates_made,
    weight_checksums,
)
from .update import NotFinite, NothingPredicted, update
from .wsd import WSD, Schedule

__all__ = ["Trainer"]


@cache
def _compiled(loss: Callable) -> Callable:
    return torch.compile(loss)  # once for all trainers, so that branches of a run share it


def _require_long_enough(model: nn.Module) -> None:
    """Refuse to train weights in which most updates round to nothing."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and torch.finfo(parameter.dtype).bits < 32:
            raise ValueError(
                f"{name} is trained and is in {str(parameter.dtype).removeprefix('torch.')}, in which most "
                'updates round to nothing. Give model.float(); with TrainerConfig(precision="bfloat16") it '
                "computes in bfloat16 all the same."
            )


def _place(folder: str | Path | None) -> Path | None:
    """Where a folder lies, with the home directory for ``~``; the empty name is refused."""
    if folder == "":
        raise ValueError('folder is an empty name; expected a path, such as "run".')
    return None if folder is None else Path(folder).expanduser()


def _some_rates(schedule: Schedule, steps: range) -> dict[str, float]:
    """Of a schedule of any kind: the rates by which processes tell that theirs are the same."""
    return {f"rate at step {step}": schedule(step) for step in steps[:: 1 + len(steps) // 1000]}


def _require_same_choice(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse to go on with other trained parameters than those that the optimizer was made for."""
    moved = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (parameter in moved):
            raise ValueError(
                f"{name} was {'set free' if parameter.requires_grad else 'frozen'} since the trainer was "
                "made. What is trained is chosen before; make another Trainer."
            )
    if gone := len(moved.difference(model.parameters())):
        raise ValueError(
            f"{gone} parameters that this trainer was made for are not in the model any more; they were "
            "packed or exchanged. Make another Trainer."
        )


def _has_load_hooks(part: nn.Module) -> bool:
    """Whether a part of a module does something of its own when its state is loaded."""
    own = type(part)._load_from_state_dict is not nn.Module._load_from_state_dict
    return own or bool(part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks)


def _require_no_hooks(model: nn.Module, how: str) -> None:
    """Refuse hooks of gradients where other parameters will stand in the place of those that have them."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError(f"{name} has a hook of its gradient, which would be lost when it is {how}")


class Trainer:
    """One run of training: a model, its data, a schedule, and how far it has come.

    Args:
        model: what is trained; its frozen parameters (``requires_grad=False``) stay as they are. Sharded, it
            is cut in place; an objective then calls the module as a whole, or the ``embed``, ``states`` and
            ``logits`` of its decoder, since these are what gathers weights.
        batches: a stream of tokens, in memory or in shards; windows; or the batch of each step. Another of
            these kinds may be put in its place, and of the same tokenizer.
        schedule: rate of each step.
        config: what stays the same over the run. Batches of one's own have their own size and order.
        objective: what is minimised.
        layout: passes, recomputation, and whether the model is cut over the processes.

    Attributes:
        model: as given, and it stays, as `config` and `layout` do.
        objective: as given; another in its place acts from the next step on, as `batches` and `schedule` do.
            A checkpoint knows the newest of each, and not what was there before.

    Raises:
        ValueError: everything is frozen, or what is trained holds numbers shorter than float32, or a
            parameter that is to be cut over processes has a hook of its gradient, or two tensors share
            memory, or it is compiled; windows do not fit the model or the config, or the batches give none
            of a step; there are several processes, and the layout keeps the model whole, the batch cannot be
            shared evenly, or they were given different models, data, configs or layouts; or the model is on
            the meta device and not drawn, see `distributed.shard`.

    >>> from minicpm_lite.config import ModelConfig
    >>> from minicpm_lite.training.wsd import WSD
    >>> config = ModelConfig(
    ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10
    ... )
    >>> trainer = Trainer(Decoder(config), torch.arange(100) % 10, WSD(1e-2, 2, 6, 2), TrainerConfig(2, 8))
    >>> trainer.train(progress=False)
    >>> trainer.step
    10
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Int[Tensor, " tokens"] | Shards | Windows | Batches,
        schedule: Schedule,
        config: TrainerConfig = TrainerConfig(),
        objective: Objective = next_token,
        layout: Layout = Layout(),
    ) -> None:
        self._model, self._config, self._layout = model, config, layout
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self.batches = batches
        if world_size() > 1 and not layout.sharded:
            raise ValueError(
                f"{world_size()} processes were started, and the layout keeps the model whole in each. Give "
                "Layout(sharded=True), so that they train one model together."
            )
        if not layout.sharded and any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                f"The {type(model).__name__} is on the meta device and has no weights. Make it elsewhere, or "
                "give Layout(sharded=True), with which a decoder's weights are drawn."
            )
        if hasattr(model, "_orig_mod"):  # weights would be saved under other names
            raise ValueError(
                "The model is what torch.compile made of one. Give the model itself; what has it compiled is "
                "TrainerConfig(compile=True)."
            )
        _require_long_enough(model)
        require_own_memory(model)
        own_memory(model)
        self.schedule, self.objective = schedule, objective
        checksums = json.dumps(weight_checksums(model), sort_keys=True)  # what is drawn later has the seed
        self._origin = Origin(None, zlib.crc32(checksums.encode()))
        self._computing = nullcontext
        if layout.sharded:
            told = {"trainer config": asdict(config), "layout": asdict(layout)}
            require_one_run(self._identity() | told)
            _require_no_hooks(model, "cut over processes. Give Layout(), which keeps the model whole.")
            shard(model, config)
        if layout.activation_checkpointing:
            recompute_blocks(model)  # around the blocks that `shard` compiled
        if config.precision == "bfloat16" and not layout.sharded:
            self._computing = partial(rounded, model)
        self.optimizer = adamw(model, config, schedule.peak_lr)
        self._reached = leave_unreached(model, self.optimizer) if layout.sharded else set()
        self._trouble: Exception | None = None
        self._interruption = Interruption()
        self._stop: BaseException | None = None

    @property
    def model(self) -> nn.Module:
        """What is trained; the optimizer was made for it, so it stays."""
        return self._model

    @property
    def config(self) -> TrainerConfig:
        """What stays the same over the run."""
        return self._config

    @property
    def layout(self) -> Layout:
        """How the steps are computed, for which the model was prepared."""
        return self._layout

    @property
    def step(self) -> int:
        """Updates made so far."""
        return len(self._losses)

    @property
    def losses(self) -> list[float]:
        """Reported loss of each update; a copy, since the run's own goes into its checkpoints.

        The next-token loss in nats a token, without a mixture's balance loss, or another objective's. That of
        a skipped step is nan.
        """
        return list(self._losses)

    @property
    def grad_norms(self) -> list[float]:
        """Norm of the gradient of each update, before clipping; a copy, too."""
        return list(self._grad_norms)

    @property
    def batches(self) -> Batches:
        """The batch of each step."""
        return self._batches

    @batches.setter
    def batches(self, batches: Int[Tensor, " tokens"] | Shards | Windows | Batches) -> None:
        shape = self.model.config if isinstance(self.model, Decoder) else None
        fitting = fitting_batches(batches, self.config, shape)
        if self.step:
            read = self.batches.identity()
            require_one_tokenizer({"these batches": fitting.identity(), "what this run has read": read})
        self._batches = fitting

    def train(
        self,
        until: int | None = None,
        folder: str | Path | None = None,
        checkpoint_every: int = 1000,
        keep: int = 2,
        tensorboard: bool = False,
        progress: bool = True,
        skip_non_finite: int = 0,
        tokenizer: str | Path | None = None,
    ) -> None:
        """Make updates up to step ``until`` (left out: to the end of the schedule), all in training mode.

        SIGTERM, SIGHUP and SIGINT (Ctrl-C) end the run after the present step, with a folder after a
        checkpoint; a Ctrl-C after that ends it at once, perhaps half-way through an update. Only the main
        thread notes them.

        Args:
            until: the step to stop at.
            folder: where checkpoints (``step-00001000``) and ``metrics.jsonl`` go, a line for each step.
            checkpoint_every: in steps. One more is taken where the schedule's decay begins, and at the end.
            keep: how many of the newest checkpoints stay. That of the decay's beginning always does.
            tensorboard: write the metrics as TensorBoard events, too.
            progress: show a bar.
            skip_non_finite: how many steps of the run, from its beginning or its branching on, may be passed
                over because their loss or gradient is not finite. Such a step changes nothing but the step
                number.
            tokenizer: the tokenizer.json that made the ids which are read; a copy is kept in the folder, for
                `generate` and `export`. A folder that has the run's own keeps it.

        Raises:
            FileExistsError: the folder holds a later checkpoint than this run's step, or another run's, or a
                tokenizer that may be another's, or another program writes to it.
            FloatingPointError: a loss or a gradient is not finite.
            ValueError: the run is beyond ``until`` or the end of its schedule; parameters were frozen, set
                free or shortened since the trainer was made; the batch of a step holds nothing to predict, or
                a shard is damaged; the objective computes with another module than it is given; the schedule
                gives no rate for a step, or a checkpoint could not bring it back; the tokenizer is not the
                one that shards note; processes were told different things; or the folder's name is empty.
            OSError: a full disk; earlier checkpoints stand.
            KeyboardInterrupt, SystemExit: after SIGINT, or with code 143 after SIGTERM, 129 after SIGHUP.
        """
        folder = _place(folder)
        ends = (
            f"The schedule ends at step {self.schedule.total_steps}" if until is None else f"until is {until}"
        )
        until = self.schedule.total_steps if until is None else until
        if not isinstance(until, Integral):
            raise ValueError(f"until is {until!r}; expected a whole number, the step to stop at.")
        require_positive_integer("checkpoint_every", checkpoint_every)
        require_positive_integer("keep", keep)
        if skip_non_finite != 0:
            require_positive_integer("skip_non_finite", skip_non_finite)
        decay_start = self.schedule.decay_start if isinstance(self.schedule, WSD) else None
        told = {"step": self.step, "until": until, "checkpoint_every": checkpoint_every,
                "skip_non_finite": skip_non_finite, "folder": "given" if folder else "left out"}  # fmt: skip
        saved = schedule_facts(self.schedule) if folder else {}  # which a checkpoint will need
        rates, text = {}, {}  # one process need not tell itself
        if world_size() > 1:
            rates, text = _some_rates(self.schedule, range(self.step + 1, until + 1)), self.batches.identity()
        require_one_run({"call of train": told, "schedule": saved | rates, "text": text})
        if until < self.step:
            raise ValueError(
                f"{ends}, and the run is at step {self.step} already. Give a later one to go on, or load an "
                "earlier checkpoint."
            )
        self._trouble = self._stop = None  # what was reported before may have been mended
        self._interruption = Interruption()
        calm_threads()
        cut_again(self.model)
        _require_same_choice(self.model, self.optimizer)
        _require_long_enough(self.model)
        own_memory(self.model)
        self.model.train()
        began = self.step
        bar = tqdm(range(self.step, until), disable=rank() != 0 or not progress, leave=False, unit="step")
        # of several processes one may raise alone, and cannot save alone
        in_a_step = (Exception,) if world_size() == 1 else (NothingPredicted, NotFinite)
        with self._writing(folder, keep, decay_start, tensorboard, tokenizer) as run:
            for _ in bar:
                started = time.perf_counter()
                with self._saving_after(folder, began, Exception):
                    read = self._read()
                with self._saving_after(folder, began, *in_a_step):
                    metrics = self._update(*read, started, skip_non_finite)
                bar.set_postfix_str(f"loss {self._losses[-1]:.3f}", refresh=False)
                if run is not None:
                    try:
                        run.add(metrics)
                    except OSError as error:  # of the first process; the others hear of it in the next step
                        self._trouble = error
                    if self._stop or self.step % checkpoint_every == 0 or self.step in (decay_start, until):
                        self.save(folder)
                        run.prune()
                if self._stop:
                    raise self._stop
            if run is not None and began == until:
                if until not in checkpoints(folder):
                    self.save(folder)
                run.prune()  # what a run left that was killed when it had saved its last step
            raise_together(self._trouble)

    @contextmanager
    def _writing(
        self,
        folder: str | Path | None,
        keep: int,
        decay_start: int | None,
        tensorboard: bool,
        tokenizer: str | Path | None,
    ) -> Iterator[RunFolder | None]:
        """The open folder of the run, if it has one; meanwhile signals wait for the end of a step."""
        with self._interruption:
            if not folder:
                yield None
                return
            past = (self.step, self._identity(), self.schedule, self._origin)
            with RunFolder(folder, *past, keep, decay_start, tensorboard, tokenizer) as run:
                yield run

    @contextmanager
    def _saving_after(
        self, folder: str | Path | None, began: int, *errors: type[Exception]
    ) -> Iterator[None]:
        """Save what was made since a step, if an error comes that all processes raise between two steps."""
        try:
            yield
        except errors:
            if folder and self.step > began:
                self.save(folder)
            raise

    def _update(
        self, passes: list[tuple[Batch, int]], units: int, seen: int, started: float, skip_non_finite: int
    ) -> dict:
        """One update of what was read, and its metrics. Interrupted before its end, it changes nothing."""
        self._reached.clear()
        skipped, compute = False, self.objective.loss
        if self.config.compile and not self.layout.sharded:
            compute = _compiled(compute)
        try:
            with buffers_given_back(self.model):
                loss, grad_norm = update(
                    self.step + 1,
                    self.schedule,
                    self.model,
                    self.optimizer,
                    self.config.max_grad_norm,
                    loss=lambda part: compute(self.model, batch_to(part, self._device)),
                    passes=passes,
                    units=units,
                    add_up=self._add_up,
                    computing=self._computing,
                )
        except NotFinite:
            skipped = sum(map(math.isnan, self._losses[self._origin.branched_at or 0 :])) < skip_non_finite
            if not skipped:
                raise
            loss = grad_norm = math.nan
        self._grad_norms.append(grad_norm)
        self._losses.append(loss)  # and it counts as a step
        seconds = time.perf_counter() - started
        metrics = {"step": self.step, "units": units, "loss": None if skipped else loss,
                   "lr": self.schedule(self.step), "grad_norm": None if skipped else grad_norm, "data": seen,
                   "seconds": round(seconds, 4)}  # fmt: skip
        if skipped:
            metrics["skipped"] = True
        if isinstance(self.batches, WindowBatches):
            tokens = self.config.batch_tokens
            metrics |= {
                "tokens": self.step * tokens,
                "tokens_per_second": round(tokens / seconds, 1),
            }
        return metrics

    def _add_up(self, loss: Tensor) -> Tensor:
        """The step's loss over all processes. With it travels whether one of them was told to stop."""
        totals = add_up(torch.cat([loss[None], self._interruption.wishes().to(loss)]))
        self._stop = Interruption.error(totals[1:])
        return totals[0]

    def _read(self) -> tuple[list[tuple[Batch, int]], int, int]:
        """This process's passes, with the units of each; of all processes, the units and a checksum."""
        passes, units, seen, error = [], 0, 0, self._trouble
        try:
            batch = part_of(self.batches, self.step, rank(), world_size())
            pieces = split_batch(batch, self.layout.micro_batch)
            passes = [(part, self.objective.weight(part)) for part in pieces]
            units, seen = sum(weight for _, weight in passes), checksum(batch, rank()) % 2**32
        except Exception as found:  # of any kind: raised below, in all processes
            error = found
        totals = torch.tensor([units, seen, error is not None], device=self._device)
        units, seen, failed = add_up(totals).tolist()
        if failed:
            raise_together(error)
        return passes, units, seen % 2**32

    @torch.no_grad()
    def evaluate(self, tokens: Int[Tensor, " tokens"] | Shards, batch_size: int = 32) -> float:
        """Mean loss over a held-out stream, cut into windows of the training length; in nats a token.

        Processes of a model that is cut call it together, with as many tokens each.

        It is the loss that the run reports of its steps, so documents are kept apart if they are in training.
        For objectives whose batches are windows of tokens; another's mean is over its own units. What is read
        and not predicted does not count. A whole model computes in float32 whatever the training precision;
        one that is cut computes in that precision, in which its weights are gathered. The model is left as it
        was, training or not.

        Raises:
            TypeError: neither a tensor nor shards, such as a list of ids.
            ValueError: the stream is too short, holds no whole numbers, ids that the model does not know, or
                nothing that is predicted, or shards note another tokenizer than those of the run; or
                processes were given other streams.
        """
        require_stream(tokens)
        require_positive_integer("batch_size", batch_size)
        length = self.config.sequence_length
        starts = range(0, len(tokens) - length, length)
        noted = stream_identity(tokens)
        require_one_run({"call of evaluate": {"batch_size": batch_size}, "held-out stream": noted})
        require_one_tokenizer({"the held-out stream": noted, "the data of this run": self.batches.identity()})
        if not starts:
            raise ValueError(
                f"The held-out stream has {len(tokens)} tokens; at least {length + 1} are needed."
            )
        windows = torch.stack([tokens[start : start + length + 1] for start in starts]).long()
        if isinstance(self.model, Decoder):
            ids = readable(windows)
            require_known((int(ids.min()), int(ids.max())), self.model.config)
        parts = windows.split(batch_size)
        units = sum(self.objective.weight(part) for part in parts)
        if not units:
            raise ValueError("The held-out stream holds nothing that is to be predicted, so it has no loss.")
        try:
            with evaluating(self.model):
                total = sum(self.objective.summed(self.model, part.to(self._device)) for part in parts)
        finally:
            cut_again(self.model)
        return total / units

    def branch(
        self, schedule: Schedule, batches: Int[Tensor, " tokens"] | Shards | Windows | Batches | None = None
    ) -> "Trainer":
        """A copy of this run that goes on under another schedule; this one is left as it is.

        A stable run of WSD is decayed this way, as often as one likes, and on other data if some are given.
        The step goes on, and with it the place in the data. The schedule may have another past, as that of a
        fine-tuning has; so going back to the peak from a decay is allowed here, though it undoes the decay.

        Raises:
            ValueError: the model is cut over processes, or a parameter has a hook of its gradient; then
                `save` it and `branch_from` the checkpoint. Or parameters were frozen or set free since the
                trainer was made, or the other data were cut with another tokenizer.
        """
        if self.layout.sharded:
            raise ValueError(
                "A model that is cut over processes is not copied. Save the run, make a Trainer with the "
                "other schedule, and let it branch_from the checkpoint."
            )
        _require_no_hooks(
            self.model,
            "copied. Save the run, make a Trainer with the other schedule, and let it branch_from the "
            "checkpoint.",
        )
        _require_same_choice(self.model, self.optimizer)
        batches = self.batches if batches is None else batches
        other = Trainer(
            copy.deepcopy(self.model), batches, schedule, self.config, self.objective, self.layout
        )
        text, before = other.batches.identity(), self.batches.identity()
        require_one_tokenizer({"the data of the branch": text, "those of this run": before})
        other._origin = replace(self._origin, branched_at=self.step)
        other._losses, other._grad_norms = list(self._losses), list(self._grad_norms)
        make_moments(other.model, other.optimizer, updates_made(self.model, self.optimizer))
        mine = checkpoint_tensors(self.model, self.optimizer)
        for name, tensor in checkpoint_tensors(other.model, other.optimizer).items():
            tensor.copy_(mine[name])
        return other

    def save(self, folder: str | Path) -> Path:
        """Write the whole state of the run to ``folder/step-…``, atomically; every process writes its part.

        What the run saved there at this step is replaced.

        Raises:
            FileExistsError: another run has a checkpoint of this step there, or the newest one.
            ValueError: the schedule is one that a checkpoint could not bring back, parameters were frozen or
                set free since the trainer was made, or the folder's name is empty.
            OSError: it cannot be written, or the disk is full; nothing half-written is left, and earlier
                checkpoints stand.
        """
        folder = _place(folder)
        identity = self._identity()
        _require_same_choice(self.model, self.optimizer)

        def check() -> None:
            there = checkpoints(folder)
            for step in there.keys() & {self.step, max(there, default=0)}:
                require_own(there[step], identity, self.schedule, self._origin)

        on_first(check)
        facts = {
            "step": self.step,
            **asdict(self._origin),
            "updates": updates_made(self.model, self.optimizer),
            "schedule": schedule_facts(self.schedule),
            "processes": world_size(),
            "torch": torch.__version__,
        }
        curves = {
            name: torch.tensor(curve, dtype=torch.float64)
            for name, curve in (("losses", self._losses), ("grad_norms", self._grad_norms))
        }
        tensors = checkpoint_tensors(self.model, self.optimizer) | curves
        return write_checkpoint(folder, tensors, facts | identity)

    def load(self, checkpoint: str | Path) -> None:
        """Go on from a checkpoint of `save`, whatever the number of processes that wrote it.

        Everything is checked and read before anything is changed; what is read lies beside the weights until
        then, in as much memory as their gradients take in a step. The schedule may have another future than
        the saved run's, but not another past.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it is damaged or foreign, or belongs to another model, trainer config, text,
                objective, choice of trained parameters or schedule; or processes were given different ones;
                or None was given, as `latest_checkpoint` finds none.
        """
        if checkpoint is None:
            raise ValueError("The checkpoint is None: there is none to go on from. Begin with train().")
        self._load(_place(checkpoint), self._identity())

    def branch_from(self, checkpoint: str | Path) -> None:
        """Start from a checkpoint of another run's stable stage, perhaps with other text.

        Weights, moments and step are taken over; the step goes on, and with it the place in the data. Make
        the trainer with `decay_schedule` of the checkpoint. The model may know other tokens that end a text.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it was taken in the warm-up or the decay, its text was cut with another tokenizer, or
                it does not fit as `load` says.
        """
        checkpoint, identity = _place(checkpoint), self._identity()
        text = identity.pop("text")

        def check() -> None:
            stable_schedule(checkpoint)
            before = read_facts(checkpoint).get("text", {})
            require_one_tokenizer({"the data of this run": text, f"what {checkpoint} read": before})

        on_first(check)
        self._load(checkpoint, identity, may_differ=("eos_token_id",))  # other text may end at other tokens
        self._origin = replace(self._origin, branched_at=self.step)

    def _load(
        self, checkpoint: str | Path, identity: dict[str, dict], may_differ: tuple[str, ...] = ()
    ) -> None:
        def check() -> dict:
            facts = read_facts(checkpoint)
            require_same_run(checkpoint, facts, identity, may_differ)
            require_same_past(checkpoint, facts, self.schedule)
            shapes = checkpoint_shapes(self.model, facts["updates"])
            shapes |= {name: torch.Size([facts["step"]]) for name in ("losses", "grad_norms")}
            require_whole(checkpoint, facts, shapes)
            return facts

        facts, *others = on_each(check)
        if different := [process for process, theirs in enumerate(others, start=1) if theirs != facts]:
            raise ValueError(
                f"{checkpoint} is another checkpoint for process {different[0]} than for process 0. Give all "
                "of them the same one, or copies of it."
            )
        step, updates = facts["step"], facts["updates"]
        moments = dict(self.optimizer.state)
        try:
            make_moments(self.model, self.optimizer, updates)
            tensors = checkpoint_tensors(self.model, self.optimizer)
            kept = {name: torch.empty_like(tensors[name]) for name in tensors if name.startswith("model.")}
            curves = {name: torch.empty(step, dtype=torch.float64) for name in ("losses", "grad_norms")}
            read_tensors(checkpoint, facts, tensors | kept | curves)  # which may fail, so what is kept waits
        except BaseException:
            self.optimizer.state.clear()
            self.optimizer.state.update(moments)
            raise
        for name, tensor in kept.items():
            tensors[name].copy_(tensor)
        if any(map(_has_load_hooks, self.model.modules())):  # what it derives from its weights, it makes anew
            now = {name.removeprefix("model."): tensors[name] for name in kept}
            self.model.load_state_dict(now, strict=False)
        self._origin = Origin.of(facts)
        self._losses, self._grad_norms = curves["losses"].tolist(), curves["grad_norms"].tolist()

    def _identity(self) -> dict[str, dict]:
        cut_again(self.model)
        return run_identity(self.model, self.config, self.batches.identity(), self.objective.name)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
