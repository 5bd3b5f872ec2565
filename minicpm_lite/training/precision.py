"""bfloat16 in training: compute with rounded weights, keep whole ones.

    rounded  = bfloat16(weights)                    before each pass, all of them, also the frozen ones
    gradient = d loss(rounded) / d rounded          forward and backward in bfloat16
    weights  = AdamW(weights, float32(gradient))    gradients are added over passes in float32

A bfloat16 has 8 significant bits. An update of a thousandth of a weight would round to nothing, so what is
moved stays in float32. Half the bytes are read and multiplied.

This is what `torch.distributed.fsdp` means by ``MixedPrecisionPolicy(param_dtype=bfloat16,
reduce_dtype=float32)``, so one process and many compute the same. ``torch.autocast``, which rounds the inputs
of matrix products alone, is something else.

Traps:

- The module computes itself, with its own buffers, modes, hooks and attributes; a copy would not follow them.
  So its weights stand aside while a pass is computed, backward as well: recomputation reads them again.
- Only parameters are rounded. A batch is given as it is: a module casts floating-point inputs to its weights'
  dtype where it takes them in. Buffers stay as they are, too, so a module that wants them in the dtype of its
  weights, as BatchNorm does on a CPU, trains in float32 alone.
- What is used twice in one pass, as a tied table, has its two gradients added in bfloat16, by autograd.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["rounded"]


@contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """Within, a module computes with its weights in bfloat16; the gradients come to the weights, in float32.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> nn.init.constant_(layer.weight, 1.001).item()
    1.0010000467300415
    >>> with rounded(layer):
    ...     print(layer.weight.item())
    ...     layer(torch.full((1, 1), 3.0, dtype=torch.bfloat16)).sum().backward()
    1.0
    >>> layer.weight.grad
    tensor([[3.]])
    """
    weights = [
        (module._parameters, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight.is_floating_point()
    ]
    short = {weight: weight.to(torch.bfloat16) for _, _, weight in weights}  # a tied one once
    try:
        for held, name, weight in weights:
            held[name] = short[weight]
        yield
    finally:
        for held, name, weight in weights:
            held[name] = weight
