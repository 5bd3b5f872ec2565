"""bfloat16 in training: compute with rounded weights, keep whole ones.

    rounded  = bfloat16(weights)                    before each update, all of them, also the frozen ones
    gradient = d loss(rounded) / d rounded          forward and backward in bfloat16
    weights  = AdamW(weights, float32(gradient))    gradients are added over passes in float32

A bfloat16 has 8 significant bits. An update of a thousandth of a weight would round to nothing, so what is
moved stays in float32. Half the bytes are read and multiplied.

This is what `torch.distributed.fsdp` means by ``MixedPrecisionPolicy(param_dtype=bfloat16,
reduce_dtype=float32)``, so one process and many compute the same. ``torch.autocast``, which rounds the inputs
of matrix products alone, is something else.

Traps:

- Only parameters are rounded. Buffers are the module's own; one that it assigns anew (``self.mean = ...``)
  is assigned in the copy, and `hand_back` brings it home. A batch is given as it is: a module casts
  floating-point inputs to its weights' dtype where it takes them in.
- What is used twice in one pass, as a tied table, has its two gradients added in bfloat16, by autograd.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["RoundedCopy"]


class RoundedCopy:
    """A copy of a module with parameters in bfloat16, whose gradients go to the module, in float32.

    >>> whole = nn.Linear(1, 1, bias=False)
    >>> nn.init.constant_(whole.weight, 1.001).item()
    1.0010000467300415
    >>> rounded = RoundedCopy(whole).refreshed()
    >>> rounded.weight.item()
    1.0
    >>> rounded(torch.full((1, 1), 3.0, dtype=torch.bfloat16)).sum().backward()
    >>> whole.weight.grad
    tensor([[3.]])
    """

    def __init__(self, model: nn.Module) -> None:
        self._whole = model
        self._rounded = {
            parameter: nn.Parameter(parameter.detach().to(_dtype(parameter)), parameter.is_floating_point())
            for parameter in model.parameters()
        }
        stand_in = {id(whole): rounded for whole, rounded in self._rounded.items()}
        stand_in |= {id(buffer): buffer for buffer in model.buffers()}  # shared, not copied
        self._model = copy.deepcopy(model, stand_in)
        for whole, rounded in self._rounded.items():
            if rounded.requires_grad:
                rounded.register_post_accumulate_grad_hook(partial(_hand_over, whole))

    @torch.no_grad()
    def refreshed(self) -> nn.Module:
        """The copy, with the module's present weights, what of them is frozen, buffers, modes and configs."""
        for whole, rounded in self._rounded.items():
            rounded.requires_grad_(whole.requires_grad).copy_(whole)
            rounded.grad = None  # of a pass that was interrupted
        for mine, theirs in zip(self._model.modules(), self._whole.modules(), strict=True):
            mine.training = theirs.training
            mine._buffers.update(theirs._buffers)
            if "config" in vars(theirs):
                mine.config = theirs.config  # `extend_context` gives a decoder another one
        return self._model

    def hand_back(self) -> None:
        """Give the module the buffers of the copy, which may have assigned new ones in its passes."""
        for mine, theirs in zip(self._model.modules(), self._whole.modules(), strict=True):
            theirs._buffers.update(mine._buffers)


def _dtype(parameter: Tensor) -> torch.dtype:
    return torch.bfloat16 if parameter.is_floating_point() else parameter.dtype


def _hand_over(whole: Tensor, rounded: Tensor) -> None:
    gradient = rounded.grad.to(whole.dtype)
    if whole.grad is None:
        whole.grad = gradient
    else:
        whole.grad += gradient
    rounded.grad = None
