"""A small trainer: AdamW, gradient clipping, any schedule, checkpoints that resume bit for bit.

It trains any module towards any objective. The batch and the learning rate of a step are functions of the
step alone, and nothing draws random numbers. So parameters, buffers, moments and the step number are the
whole state of a run: a run that is killed and resumed computes the same numbers as one that was not. (A
module with dropout trains, too; when it is resumed it draws other numbers.)
"""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import require_positive_integer
from ..data.windows import TokenWindows, Windows
from ..language.decoder import Decoder
from ..language.scoring import predicted, token_losses
from ..runtime import calm_threads
from .batches import Batches, WindowBatches, batch_to, require_fitting, split_batch
from .checkpoint import load_checkpoint, save_checkpoint
from .memory import recompute_blocks
from .objective import Objective, next_token
from .optimizer import adamw
from .precision import RoundedCopy
from .settings import Layout, TrainerConfig
from .state import (
    checkpoint_shapes,
    checkpoint_tensors,
    make_moments,
    require_same_run,
    run_identity,
    updates_made,
)
from .update import update
from .wsd import Schedule

__all__ = ["Trainer"]


@cache
def _compiled(loss: Callable) -> Callable:
    return torch.compile(loss)  # once for all trainers, so that branches of a run share it


class Trainer:
    """One run of training: a model, its data, a schedule, and how far it has come.

    Args:
        model: what is trained; its frozen parameters (``requires_grad=False``) stay as they are.
        batches: a stream of tokens, windows, or the batch of each step.
        schedule: rate of each step.
        config: what stays the same over the run. Batches of one's own have their own size and order.
        objective: what is minimised.
        layout: passes and recomputation.

    Attributes:
        step: updates made so far.
        losses: reported loss of each update: the next-token loss in nats a token, without a mixture's balance
            loss, or another objective's.
        grad_norms: norm of the gradient of each update, before clipping.

    Raises:
        ValueError: everything is frozen, or windows do not fit the model or the config.

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
        batches: Int[Tensor, " tokens"] | Windows | Batches,
        schedule: Schedule,
        config: TrainerConfig = TrainerConfig(),
        objective: Objective = next_token,
        layout: Layout = Layout(),
    ) -> None:
        if isinstance(batches, Tensor):
            batches = TokenWindows(batches, config.sequence_length, config.seed)
        if isinstance(batches, Windows):
            require_fitting(batches, config, model.config if isinstance(model, Decoder) else None)
            batches = WindowBatches(batches, config.batch_size)
        self.model, self.batches, self.schedule, self.config = model, batches, schedule, config
        self.objective, self.layout = objective, layout
        if layout.activation_checkpointing:
            recompute_blocks(model)
        self.optimizer = adamw(model, config, schedule.peak_lr)
        self._rounded = RoundedCopy(model) if config.precision == "bfloat16" else None
        self._loss = _compiled(objective.loss) if config.compile else objective.loss
        self.step = 0
        self.losses: list[float] = []
        self.grad_norms: list[float] = []

    def train(
        self,
        until: int | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 100,
        progress: bool = True,
    ) -> None:
        """Make updates up to step ``until`` (left out: to the end of the schedule).

        Args:
            until: the step to stop at.
            checkpoint: a file that is replaced every ``checkpoint_every`` steps and at the end; its folder is
                made if need be.
            checkpoint_every: in steps.
            progress: show a bar.

        Raises:
            ValueError: the batch of a step holds nothing to predict; the run is as it was before that step.
            FloatingPointError: a loss or a gradient is not finite; weights and moments are as before that
                step. Buffers that a module moves as it computes, such as the means of a BatchNorm, are not.
        """
        until = self.schedule.total_steps if until is None else until
        require_positive_integer("checkpoint_every", checkpoint_every)
        if checkpoint:
            Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)
        calm_threads()
        self.model.train()
        bar = tqdm(range(self.step, until), disable=not progress, leave=False, unit="step")
        for _ in bar:
            self._update()
            bar.set_postfix_str(f"loss {self.losses[-1]:.3f}", refresh=False)
            if checkpoint and self.step % checkpoint_every == 0 and self.step < until:
                self.save(checkpoint)
        if checkpoint:
            self.save(checkpoint)

    def _update(self) -> None:
        """One update. Interrupted before its end, it leaves weights, moments and step as they were."""
        passes = split_batch(self.batches[self.step], self.layout.micro_batch)
        model = self.model if self._rounded is None else self._rounded.refreshed()
        loss, grad_norm = update(
            self.step + 1,
            self.schedule,
            self.model,
            self.optimizer,
            self.config.max_grad_norm,
            loss=lambda part: self._loss(model, batch_to(part, self._device)),
            passes=[(part, self.objective.weight(part)) for part in passes],
        )
        self.step += 1
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)

    @torch.no_grad()
    def evaluate(self, tokens: Int[Tensor, " tokens"], batch_size: int = 32) -> float:
        """Mean loss over a held-out stream, cut into windows of the training length; in nats a token.

        For decoders. What is read and not predicted does not count. In float32 whatever the training
        precision. The model is left as it was, training or not.
        """
        length = self.config.sequence_length
        starts = range(0, len(tokens) - length, length)
        if not starts:
            raise ValueError(
                f"The held-out stream has {len(tokens)} tokens; at least {length + 1} are needed."
            )
        windows = (
            torch.stack([tokens[start : start + length + 1] for start in starts]).to(self._device).long()
        )
        training = self.model.training
        self.model.eval()
        total = sum(token_losses(self.model, part).sum().item() for part in windows.split(batch_size))
        self.model.train(training)
        return total / predicted(windows).sum().item()

    def branch(
        self, schedule: Schedule, batches: Int[Tensor, " tokens"] | Windows | Batches | None = None
    ) -> "Trainer":
        """A copy of this run that goes on under another schedule; this one is left as it is.

        A stable run of WSD is decayed this way, as often as one likes, and on other data if some are given.
        The step goes on, and with it the place in the data.
        """
        batches = self.batches if batches is None else batches
        other = Trainer(
            copy.deepcopy(self.model), batches, schedule, self.config, self.objective, self.layout
        )
        other.step = self.step
        other.losses, other.grad_norms = list(self.losses), list(self.grad_norms)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other

    def save(self, path: str | Path) -> None:
        """Write the whole state of the run to one safetensors file, atomically.

        Raises:
            OSError: the folder is missing or cannot be written, or the disk is full; the old file stands.
        """
        tensors = checkpoint_tensors(self.model, self.optimizer)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["grad_norms"] = torch.tensor(self.grad_norms, dtype=torch.float64)
        facts = {"step": self.step, "updates": updates_made(self.model, self.optimizer)}
        save_checkpoint(path, tensors, facts | self._identity())

    def load(self, path: str | Path) -> None:
        """Go on from a file of `save`. Everything is checked before anything is changed.

        The file does not know its schedule, so any is taken. One with another future makes a branch; that it
        has the same past is for the caller to see to (`DistributedTrainer.load` does).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated or foreign, belongs to another model, trainer config, text,
                objective or choice of trained parameters, or lacks a tensor.
        """
        tensors, facts = load_checkpoint(path)
        require_same_run(path, facts, self._identity())
        expected = checkpoint_shapes(self.model, facts["updates"])
        expected |= {name: torch.Size([facts["step"]]) for name in ("losses", "grad_norms")}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if expected != found:
            wrong = sorted(
                name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
            )
            raise ValueError(
                f"{path} does not fit this run: {wrong[0]} is missing, extra or of another shape."
            )
        make_moments(self.model, self.optimizer, facts["updates"])
        for name, tensor in checkpoint_tensors(self.model, self.optimizer).items():
            tensor.copy_(tensors[name])
        self.step = facts["step"]
        self.losses, self.grad_norms = tensors["losses"].tolist(), tensors["grad_norms"].tolist()

    def _identity(self) -> dict[str, dict]:
        return run_identity(self.model, self.config, self.batches.identity(), self.objective.name)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
