"""A small trainer: AdamW, gradient clipping, any schedule, checkpoints that resume bit for bit.

The batch of a step and the learning rate of a step are functions of the step alone, and the model has no
dropout. So weights, optimiser moments and the step number are the whole state of a run: a run that is killed
and resumed computes the same numbers as one that was not.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..config import ModelConfig, require_positive_integer, require_positive_number
from ..data.corpora import TokenWindows, Windows, batch_of
from ..language.decoder import Decoder
from ..language.moe import balance_loss
from .checkpoint import load_checkpoint, save_checkpoint
from .wind_tunnel import mup_groups
from .wsd import Schedule

__all__ = ["Trainer", "TrainerConfig", "next_token_loss", "parameter_groups", "require_same_run",
           "require_trainable", "run_identity", "training_loss"]  # fmt: skip

Precision = Literal["float32", "bfloat16"]
Parametrization = Literal["standard", "mup"]
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of one parameter


@dataclass(frozen=True)
class TrainerConfig:
    """What stays the same over a run, apart from model, data and schedule.

    Attributes:
        batch_size: sequences in a batch.
        sequence_length: tokens predicted in each sequence.
        weight_decay: of AdamW, on matrices; norms, embeddings and output layer are not decayed.
        betas: of AdamW.
        max_grad_norm: longer gradients are shortened to this norm.
        parametrization: "standard" gives all parameters one learning rate; "mup" divides that of matrices by
            the model's ``width_ratio``, as MiniCPM does.
        precision: "bfloat16" computes matrix products in bfloat16; weights and moments stay in float32.
        compile: compile forward and backward. On 2 CPU cores this takes about half a minute and then makes
            a small model's steps about a third faster: it pays for runs of several minutes.
        seed: decides the order of the data.
    """

    batch_size: int = 12
    sequence_length: int = 128
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    parametrization: Parametrization = "standard"
    precision: Precision = "float32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive_integer("batch_size", self.batch_size)
        require_positive_integer("sequence_length", self.sequence_length)
        require_positive_number("max_grad_norm", self.max_grad_norm)
        if self.weight_decay != 0:
            require_positive_number("weight_decay", self.weight_decay)
        for name, known in (("parametrization", Parametrization), ("precision", Precision)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(get_args(known))}.")

    @property
    def batch_tokens(self) -> int:
        """Tokens predicted in one step."""
        return self.batch_size * self.sequence_length


def parameter_groups(model: Decoder, config: TrainerConfig, peak_lr: float) -> list[dict]:
    """Parameter groups for an optimiser: matrices with weight decay; tables and norms without.

    Each group's own ``lr`` is its peak: the schedule's, or what µP makes of it.
    """
    groups = mup_groups(model, peak_lr, config.weight_decay)
    return groups if config.parametrization == "mup" else [group | {"lr": peak_lr} for group in groups]


def require_trainable(model: ModelConfig, config: TrainerConfig, windows: Windows) -> None:
    """Refuse windows whose ids or whose length the model or the trainer does not know.

    Raises:
        ValueError: a sentence that says which.
    """
    smallest, largest = windows.id_range()
    if largest >= model.vocab_size or smallest < 0:
        raise ValueError(
            f"The text has token ids from {smallest} to {largest}; the model knows "
            f"0 to {model.vocab_size - 1}. Was it cut into tokens with another vocabulary?"
        )
    if windows.length != config.sequence_length:
        raise ValueError(
            f"The windows predict {windows.length} tokens each, and sequence_length is "
            f"{config.sequence_length}. Make them the same."
        )
    if windows.length > model.max_position_embeddings:
        raise ValueError(
            f"sequence_length is {windows.length}; the model was made for "
            f"{model.max_position_embeddings} tokens (max_position_embeddings)."
        )


def run_identity(model: ModelConfig, config: TrainerConfig, windows: Windows) -> dict[str, dict]:
    """What must be the same for a checkpoint to fit a run; as JSON gives it back, with lists for tuples."""
    trainer = asdict(config)
    del trainer["compile"]  # decides how, not what
    identity = {"model config": asdict(model), "trainer config": trainer, "text": windows.identity()}
    return json.loads(json.dumps(identity))


def require_same_run(path: str | Path, facts: dict, identity: dict[str, dict]) -> None:
    """Refuse a checkpoint whose facts differ from a run's `run_identity`.

    Raises:
        ValueError: a sentence that names the first field that differs.
    """
    for part, mine in identity.items():
        theirs = facts.get(part)
        for field in mine:
            if theirs is None or theirs.get(field) != mine[field]:
                raise ValueError(
                    f"{path} belongs to another {part}: its {field} is "
                    f"{None if theirs is None else theirs.get(field)!r}, this run's is {mine[field]!r}."
                )


def next_token_loss(
    model: Decoder, window: Int[Tensor, "batch window"], reduction: str = "mean"
) -> Float[Tensor, ""]:
    """Cross entropy of each token of a window, but the first, given those before it; in nats a token.

    Complements ``~id`` stand for tokens that are read and not predicted: they count neither in the sum nor in
    the mean (see `minicpm_lite.data.corpora.Windows`).
    """
    logits = model(torch.where(window < 0, ~window, window)[:, :-1])
    targets = window[:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1), targets.clamp(min=-1), ignore_index=-1, reduction=reduction)


def training_loss(
    model: Decoder, window: Int[Tensor, "batch window"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """What is minimised, and the next-token loss in it: they differ by the balance loss of a mixture."""
    loss = next_token_loss(model, window)
    mixture = model.config.mixture
    if mixture is None or mixture.balance_loss_weight == 0:
        return loss, loss.detach()
    return loss + mixture.balance_loss_weight * balance_loss(model), loss.detach()


@cache
def _compiled_loss() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(training_loss)  # once for all trainers, so that branches of a run share it


class Trainer:
    """One run of training: a model, its data, a schedule, and how far it has come.

    Attributes:
        step: updates made so far.
        losses: next-token loss of each update, in nats a token; without a mixture's balance loss.
        grad_norms: norm of the gradient of each update, before clipping.

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
        model: Decoder,
        text: Int[Tensor, " tokens"] | Windows,
        schedule: Schedule,
        config: TrainerConfig = TrainerConfig(),
    ) -> None:
        self.model, self.schedule, self.config = model, schedule, config
        if isinstance(text, Tensor):
            text = TokenWindows(text, config.sequence_length, config.seed)
        self.windows = text
        require_trainable(model.config, config, text)
        self._loss = _compiled_loss() if config.compile else training_loss
        self.step = 0
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config, schedule.peak_lr), betas=config.betas, fused=True
        )
        # with a schedule of another peak, groups keep their ratios
        self._lr_ratios = [group["lr"] / schedule.peak_lr for group in self.optimizer.param_groups]

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
        """
        until = self.schedule.total_steps if until is None else until
        require_positive_integer("checkpoint_every", checkpoint_every)
        if checkpoint:
            Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)
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
        """One update. Interrupted anywhere before its end, it leaves the run as it was."""
        step = self.step + 1
        window = batch_of(self.windows, self.step, self.config.batch_size).to(self._device)
        self.optimizer.zero_grad(set_to_none=True)
        for group, ratio in zip(self.optimizer.param_groups, self._lr_ratios, strict=True):
            group["lr"] = self.schedule(step) * ratio
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            minimised, loss = self._loss(self.model, window)
        minimised.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"The gradient of step {step} is not finite (loss {loss.item():.3g}). The learning rate "
                f"there is {self.schedule(step):.3g}; a lower peak or a longer warm-up usually cures it."
            )
        loss_now, norm_now = loss.item(), norm.item()
        self.optimizer.step()
        self.step = step
        self.losses.append(loss_now)
        self.grad_norms.append(norm_now)

    @torch.no_grad()
    def evaluate(self, tokens: Int[Tensor, " tokens"], batch_size: int = 32) -> float:
        """Mean loss over a held-out stream, cut into windows of the training length; in nats a token.

        In float32 whatever the training precision. The model is left as it was, training or not.
        """
        length = self.config.sequence_length
        starts = range(0, len(tokens) - length, length)
        if not starts:
            raise ValueError(
                f"The held-out stream has {len(tokens)} tokens; at least {length + 1} are needed."
            )
        windows = torch.stack([tokens[start : start + length + 1] for start in starts]).to(self._device)
        training = self.model.training
        self.model.eval()
        total = sum(next_token_loss(self.model, part, "sum").item() for part in windows.split(batch_size))
        self.model.train(training)
        return total / (len(windows) * length)

    def branch(self, schedule: Schedule, text: Int[Tensor, " tokens"] | Windows | None = None) -> "Trainer":
        """A copy of this run that goes on under another schedule; this one is left as it is.

        A stable run of WSD is decayed this way, as often as one likes, and on another text if one is given.
        The step goes on, and with it the index of the windows.
        """
        model = copy.deepcopy(self.model)
        other = Trainer(model, self.windows if text is None else text, schedule, self.config)
        other.step = self.step
        other.losses, other.grad_norms = list(self.losses), list(self.grad_norms)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other

    def save(self, path: str | Path) -> None:
        """Write the whole state of the run to one safetensors file, atomically."""
        tensors = {f"model.{name}": p for name, p in self.model.named_parameters()}  # tied tables once
        for name, parameter in self.model.named_parameters():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{moment}.{name}"] = value
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["grad_norms"] = torch.tensor(self.grad_norms, dtype=torch.float64)
        save_checkpoint(path, tensors, {"step": self.step, **self._identity()})

    def load(self, path: str | Path) -> None:
        """Go on from a file of `save`. Another schedule than the saved run's is allowed: that is a branch.

        Everything is checked before anything is changed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated or foreign, belongs to another model, trainer config or text, or
                lacks a tensor.
        """
        tensors, facts = load_checkpoint(path)
        require_same_run(path, facts, self._identity())
        parameters = dict(self.model.named_parameters())
        expected = self._shapes(facts["step"])
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if expected != found:
            wrong = sorted(
                name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
            )
            raise ValueError(
                f"{path} does not fit this run: {wrong[0]} is missing, extra or of another shape."
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
        self.optimizer.state.clear()
        self.step = facts["step"]
        for name, parameter in parameters.items() if self.step else ():
            self.optimizer.state[parameter] = {
                moment: tensors[f"optimizer.{moment}.{name}"].to(self._device) for moment in _MOMENTS
            }
        self.losses, self.grad_norms = tensors["losses"].tolist(), tensors["grad_norms"].tolist()

    def _shapes(self, step: int) -> dict[str, torch.Size]:
        """Name and shape of every tensor of a checkpoint; before the first update there are no moments."""
        shapes = {"losses": torch.Size([step]), "grad_norms": torch.Size([step])}
        for name, parameter in self.model.named_parameters():
            shapes[f"model.{name}"] = parameter.shape
            if step:
                shapes |= {f"optimizer.{moment}.{name}": parameter.shape for moment in _MOMENTS[1:]}
                shapes[f"optimizer.step.{name}"] = torch.Size([])
        return shapes

    def _identity(self) -> dict[str, dict]:
        return run_identity(self.model.config, self.config, self.windows)

    @property
    def _device(self) -> torch.device:
        return self.model.embed_tokens.weight.device
