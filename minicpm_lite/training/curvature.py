"""The way down: what the loss looks like along the updates of a run.

While the learning rate of WSD falls, MiniCPM's authors follow three figures: the norm of the gradient, the
cosine between the gradients of one update and the next, and the curvature of the loss along the update.
Source: Hu et al. 2024, arXiv 2404.06395, section 4.

Choices and traps:

- The second derivative is a difference of gradients, not of losses: a loss of 3 in float32 is exact to some
  1e-7, which a division by the square of a small step blows up.
- Derivatives are taken where the update began, in float32, of what was minimised there, with the batch that
  it was computed from, in its passes, with the buffers of then, and with what chance drew then, as dropout
  does. Only what is trained moves; frozen parameters have no part in it.
- The gradient of a small batch is mostly noise, and so are its norm and its cosine with the next one.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..config import require_positive_number
from .batches import batch_to, split_batch
from .state import hold_buffers
from .trainer import Trainer

__all__ = ["DecayReading", "directional_curvature", "directional_derivatives", "watch_decay"]

_STEP = 1e-2


def directional_derivatives(
    loss: Callable[[], Float[Tensor, ""]],
    parameters: Iterable[Tensor],
    direction: Iterable[Tensor],
    step: float = _STEP,
) -> tuple[float, float]:
    """First and second derivative of a loss along a direction, where the parameters are now.

    The direction is taken with length 1. The first derivative is the gradient times the direction. The second
    is a central difference of gradients, which is exact for a quadratic whatever the step. The parameters are
    put back bit for bit, and no ``grad`` is touched.

    Args:
        loss: computes the loss anew at each call.
        parameters: what it depends on.
        direction: one tensor for each parameter; for the paper's measure, the update.
        step: of the difference, in units of the parameters.

    Raises:
        ValueError: the direction is zero or not finite, or its tensors are not those of the parameters.
    """
    require_positive_number("step", step)
    parameters, direction = list(parameters), list(direction)
    if [part.shape for part in direction] != [parameter.shape for parameter in parameters]:
        raise ValueError(
            f"There are {len(parameters)} parameters, and the direction has {len(direction)} tensors; "
            "expected one of its shape for each."
        )
    return _derivatives(lambda: torch.autograd.grad(loss(), parameters), parameters, direction, step)


def _derivatives(
    gradients: Callable[[], Sequence[Tensor]],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    step: float,
) -> tuple[float, float]:
    """The same of a loss of which only the gradients are given."""
    length = math.sqrt(sum(part.double().square().sum().item() for part in direction))
    if not 0 < length < math.inf:
        raise ValueError(f"The direction has length {length}; expected a finite length above 0.")
    here = [parameter.detach().clone() for parameter in parameters]

    def slope(shift: float) -> float:
        with torch.no_grad():
            for parameter, start, part in zip(parameters, here, direction, strict=True):
                parameter.copy_(start + shift / length * part)
        along = zip(gradients(), direction, strict=True)
        return sum((gradient.double() * part).sum().item() for gradient, part in along) / length

    try:
        first = slope(0.0)
        second = (slope(step) - slope(-step)) / (2 * step)
    finally:
        with torch.no_grad():
            for parameter, start in zip(parameters, here, strict=True):
                parameter.copy_(start)
    return first, second


def directional_curvature(first: float, second: float) -> float:
    """Curvature ``|D2| / (1 + D1^2)^1.5`` of the loss as a curve along a direction.

    Source: Hu et al. 2024, arXiv 2404.06395, section 4.

    >>> directional_curvature(0.0, -2.0)
    2.0
    """
    return abs(second) / (1 + first**2) ** 1.5


@dataclass(frozen=True)
class DecayReading:
    """What one update looked like.

    Attributes:
        step: of the update, counted from 1.
        lr: its learning rate.
        grad_norm: of its gradient, before clipping.
        cosine: between its gradient and that of the update before.
        first: derivative of its batch's loss along the update, before it; nats a token per unit length.
        second: the second derivative there. Both are nan for an update that moved nothing, at a rate of 0.
    """

    step: int
    lr: float
    grad_norm: float
    cosine: float
    first: float
    second: float

    @property
    def curvature(self) -> float:
        """Of the loss along the update."""
        return directional_curvature(self.first, self.second)


def watch_decay(trainer: Trainer, until: int, every: int = 10) -> Iterator[DecayReading]:
    """Train up to step ``until`` and read one update in ``every``; the updates are those of `Trainer.train`.

    A reading takes two updates, for the two gradients, and three further gradients of the second one's batch.
    Every trained parameter must have a gradient.

    Raises:
        ValueError: ``every`` is less than 2; the model is cut over processes; or the loss of a reading has no
            gradient for any weight of the model.
    """
    if every < 2:
        raise ValueError(f"every is {every}; a reading takes two updates, so at least 2 is needed.")
    if trainer.layout.sharded:  # a loss depends on what was gathered, not on the parts that stay
        raise ValueError(
            "The model is cut over processes, and no gradient of a loss is taken for a part. Save the run, "
            "load it into a Trainer with Layout(), and watch that."
        )
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    while trainer.step + every <= until:
        trainer.train(trainer.step + every - 1, progress=False)
        gradient_before = _flat([parameter.grad for parameter in parameters])
        place = [parameter.detach().clone() for parameter in parameters]
        then = _hold(trainer.model)
        trainer.train(trainer.step + 1, progress=False)
        gradient = _flat([parameter.grad for parameter in parameters])
        update = [p.detach() - start for p, start in zip(parameters, place, strict=True)]
        first, second = _derivatives_at(trainer, parameters, place, then, update)
        yield DecayReading(
            trainer.step,
            trainer.schedule(trainer.step),
            trainer.grad_norms[-1],
            F.cosine_similarity(gradient_before, gradient, dim=0).item(),
            first,
            second,
        )
    trainer.train(until, progress=False)


def _derivatives_at(
    trainer: Trainer,
    parameters: list[Tensor],
    place: list[Tensor],
    then: Callable[[], None],
    update: list[Tensor],
) -> tuple[float, float]:
    """Derivatives along the last update, at the place it began; all stays as it is."""
    if not any(part.any() for part in update):
        return math.nan, math.nan  # there is no direction
    batch = batch_to(trainer.batches[trainer.step - 1], place[0].device)
    passes = split_batch(batch, trainer.layout.micro_batch)  # each may have a balance loss of its own
    weights = [trainer.objective.weight(part) for part in passes]
    units = sum(weights)
    back_to_now = _hold(trainer.model)

    def gradients() -> list[Tensor]:
        then()  # a loss in training mode may move buffers, and draw
        total, reached = [torch.zeros_like(parameter) for parameter in parameters], False
        for part, weight in zip(passes, weights, strict=True):  # one after another, for the memory
            loss = trainer.objective.loss(trainer.model, part)[0] * (weight / units)
            own = torch.autograd.grad(loss, parameters, allow_unused=True)  # it may leave an expert out
            for whole, gradient in zip(total, own, strict=True):
                if gradient is not None:
                    whole += gradient
                    reached = True
        if not reached:
            raise ValueError(
                f"The loss of step {trainer.step} has no gradient for any weight of the "
                f"{type(trainer.model).__name__}: it was computed by another module. Let the objective use "
                "the one that it is given."
            )
        return total

    now = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, start in zip(parameters, place, strict=True):
            parameter.copy_(start)
    try:
        return _derivatives(gradients, parameters, update, _STEP)
    finally:
        back_to_now()
        with torch.no_grad():
            for parameter, value in zip(parameters, now, strict=True):
                parameter.copy_(value)


def _hold(model: nn.Module) -> Callable[[], None]:
    """Note buffers and random states; the function that comes gives them back, as often as it is called."""
    buffers, cpu = hold_buffers(model), torch.get_rng_state()
    gpu = next(model.parameters()).device
    drawn = torch.cuda.get_rng_state(gpu) if gpu.type == "cuda" else None

    def give_back() -> None:
        buffers()
        torch.set_rng_state(cpu)
        if drawn is not None:
            torch.cuda.set_rng_state(drawn, gpu)

    return give_back


def _flat(tensors: Sequence[Tensor]) -> Float[Tensor, " numbers"]:
    return torch.cat([tensor.flatten() for tensor in tensors])
