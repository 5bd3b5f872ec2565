"""One update, for one process and for many: rates, passes, clipping, refusal, step.

A step is computed in passes, cut from its batch and shared by the processes. Each pass gives a mean over its
units (predicted tokens, pairs), and the step is the mean over all units of all passes of all processes:

    share    = units of the pass / units of the step
    gradient = sum over the passes of share * gradient of the pass
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .batches import Batch
from .wsd import Schedule

__all__ = ["NotFinite", "NothingPredicted", "update"]


class NothingPredicted(ValueError):
    """No process has anything to predict in a step; all processes raise it together."""


class NotFinite(FloatingPointError):
    """The loss or the gradient of a step is not finite; all processes raise it together."""


def update(
    step: int,
    schedule: Schedule,
    model: nn.Module,
    optimizer: Optimizer,
    max_grad_norm: float,
    loss: Callable[[Batch], tuple[Tensor, Tensor]],
    passes: Sequence[tuple[Batch, int]],
    units: int | None = None,
    add_up: Callable[[Tensor], Tensor] = lambda reported: reported,
    computing: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[float, float]:
    """Move the weights once. An error before the end leaves them and the moments as they were.

    Args:
        step: its number, counted from 1.
        schedule: gives the rate; each group takes its ``lr_ratio`` of it.
        model: what is trained, whole or sharded.
        optimizer: of the model's parameters.
        max_grad_norm: a longer gradient is shortened to this norm.
        loss: of a pass, minimised and reported; the gradients go to the model's parameters.
        passes: what this process computes, each with the units that its loss is a mean over.
        units: of the whole step, if other processes have a part of it.
        add_up: the sum of a number over the processes.
        computing: holds while a pass is computed, forward and backward.

    Returns:
        The reported loss of the step, and the norm of its gradient before clipping.

    Raises:
        NothingPredicted: the step has nothing to learn from.
        NotFinite: loss or gradient.
        ValueError: the loss has no gradient for any weight of a whole model, or the schedule gives no rate.
    """
    units = sum(weight for _, weight in passes) if units is None else units
    if not units:
        raise NothingPredicted(
            f"The batch of step {step} holds nothing that is to be predicted, so it has no loss. Leave such "
            "batches out."
        )
    if not 0 <= (rate := schedule(step)) < math.inf:
        raise ValueError(
            f"The schedule gives the rate {rate:.3g} for step {step}; expected a finite number, not below 0."
        )
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
    total = 0.0
    for batch, weight in passes:
        with computing():
            minimised, reported = loss(batch)
            (minimised * (weight / units)).backward()
        total = total + reported.detach() * (weight / units)
    trained = [weight for weight in model.parameters() if weight.requires_grad]  # others keep old gradients
    if not isinstance(model, FSDPModule) and all(weight.grad is None for weight in trained):
        raise ValueError(
            f"No weight of the {type(model).__name__} has a gradient in step {step}: its loss was computed "
            "by another module. Let the objective use the one that it is given."
        )
    norm = nn.utils.clip_grad_norm_(trained, max_grad_norm)
    norm_now = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    loss_now = add_up(total).item()
    if not (math.isfinite(norm_now) and math.isfinite(loss_now)):
        raise NotFinite(
            f"The gradient of step {step} is not finite (norm {norm_now:.3g}, loss {loss_now:.3g}). The "
            f"learning rate there is {rate:.3g}; a lower peak or a longer warm-up usually cures it."
        )
    optimizer.step()
    return loss_now, norm_now
