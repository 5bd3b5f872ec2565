"""Linear layers for a few rows at a time, as decoding has them: the weights are read once, packed or not.

    linear(x, weight, "F32")              x W^T for float32 weights
    linear(x, packed, "Q4_0")             the same for packed weights, which stay packed
    linears(x, [packed, other], "Q4_0")   the same for several, in one call
    dequantize(packed, "Q4_0")            the weights that the bytes stand for
    reference(x, packed, "Q4_0")          what `linear` computes, in PyTorch: dequantise, then multiply

PyTorch's own layer is made for many rows, and reads the weights several times for 2 to 16. The kernels are
C++ (``linear.cpp``, which says how), compiled at first use. Where they cannot be, one warning says why, and
PyTorch computes the same.

Packed weights are multiplied in whole numbers, for which x is rounded to 8 bits: in each group of 32 numbers
to multiples of a step, the largest size in the group / 127. An output is off by at most

    sum over groups of  step / 2 * (sum of |w|)

and by what float32 rounds. A row with NaN or an infinite number comes out as NaN.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from .build import built
from .formats import FORMATS, Format, find_format

__all__ = ["FORMATS", "Format", "dequantize", "find_format", "linear", "linears", "reference"]

# Of float32; somewhere between 30 and 130 rows, as the processor is, PyTorch's layer catches up. With packed
# weights it never does: they must be unpacked for it.
_MOST_ROWS = 32


def linear(
    x: Float[Tensor, "*batch features"], weight: Shaped[Tensor, "outputs row"], type: str
) -> Float[Tensor, "*batch outputs"]:
    """Multiply by a matrix of weights, each row of which gives an output.

    A row of x gives the same bits whatever rows come with it, and with any number of threads; of float32
    weights that holds up to 32 rows, and PyTorch's layer takes more.

    Args:
        x: in float32, or in float16 or bfloat16, from which it is converted and to which the result is.
        weight: float32 (outputs, features) for "F32", else bytes (outputs, bytes of a row).
        type: how the weights are packed; one of `FORMATS`.

    Raises:
        ValueError: an unknown type; x or weight of another dtype, shape or device than that asks for; or a
            gradient would be asked for, which the kernels have not.

    >>> linear(torch.ones(1, 3), torch.tensor([[1.0, 2.0, 3.0]]), "F32")
    tensor([[6.]])
    """
    return linears(x, [weight], type)[0]


def linears(
    x: Float[Tensor, "*batch features"], weights: Sequence[Shaped[Tensor, "_outputs row"]], type: str
) -> tuple[Float[Tensor, "*batch _outputs"], ...]:
    """Multiply by several matrices of one type, as `linear` by each, bit for bit.

    A decoder's small matrices take little longer than what a call takes beside: its way from Python, rounding
    x, waking the threads. Here all that is done once.

    Raises:
        ValueError: what `linear` refuses.
    """
    format = _checked(x, weights, type)
    few = type != "F32" or x.numel() <= _MOST_ROWS * x.shape[-1]
    if not (few and x.is_cpu and built("linear")):
        return tuple(_by_torch(x, weight, format) for weight in weights)
    if x.dtype == torch.float32:
        y = torch.ops.minicpm_lite.linear(x, weights, format.number)
    else:
        y = torch.ops.minicpm_lite.linear(x.float(), weights, format.number).to(x.dtype)
    return (y,) if len(weights) == 1 else y.split_with_sizes([weight.shape[0] for weight in weights], -1)


def reference(
    x: Float[Tensor, "*batch features"], weight: Shaped[Tensor, "outputs row"], type: str
) -> Float[Tensor, "*batch outputs"]:
    """What `linear` computes, with x as it is, in PyTorch alone.

    Raises:
        ValueError: what `linear` refuses.
    """
    return _by_torch(x, weight, _checked(x, [weight], type))


def dequantize(weight: Shaped[Tensor, "*outputs row"], type: str) -> Float[Tensor, "*outputs features"]:
    """The weights that packed bytes stand for, in float32.

    Raises:
        ValueError: an unknown type, or bytes that are no whole blocks of it.

    >>> dequantize(torch.tensor([[0, 60] + [7, 9] * 8], dtype=torch.uint8), "Q4_0")[0, :4]  # scale 1
    tensor([-1.,  1., -1.,  1.])
    """
    format = find_format(type)
    features = _features(weight, format)
    if weight.is_cpu and type != "F32" and built("linear"):
        rows = weight.reshape(math.prod(weight.shape[:-1]), weight.shape[-1])
        unpacked = torch.ops.minicpm_lite.dequantize(rows, format.number, features)
        return unpacked.view(*weight.shape[:-1], features)
    return _unpack(weight, format)


def _by_torch(x: Tensor, weight: Tensor, format: Format) -> Tensor:
    return F.linear(x.float(), _unpack(weight, format)).to(x.dtype)


def _unpack(weight: Tensor, format: Format) -> Tensor:
    if format.name == "F32":
        return weight
    blocks = weight.unflatten(-1, (weight.shape[-1] // format.nbytes, format.nbytes))
    return format.unpack(blocks).flatten(-2)


def _features(weight: Tensor, format: Format) -> int:
    """How many weights a row holds.

    Raises:
        ValueError: the rows are no such weights.
    """
    packed = format.name != "F32"
    dtype, row = torch.uint8 if packed else torch.float32, weight.shape[-1] if weight.ndim else 1
    if weight.dtype != dtype or row % format.nbytes and packed:
        expected = f"bytes (uint8), {format.nbytes} for each {format.block} weights of a row"
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}; {format.name} expects "
            f"{expected if packed else 'float32'}."
        )
    return row // format.nbytes * format.block if packed else row


def _checked(x: Tensor, weights: Sequence[Tensor], type: str) -> Format:
    """The format of the weights.

    Raises:
        ValueError: what `linear` refuses.
    """
    format = find_format(type)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}; expected float32, float16 or bfloat16. Convert it: x.float().")
    for weight in weights:
        features = _features(weight, format)
        if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != features:
            raise ValueError(
                f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected two dimensions of "
                f"weight, and (..., {features}) of x, as many as a row of weight holds in {type}."
            )
        if x.device != weight.device:
            raise ValueError(
                f"x is on {x.device} and weight on {weight.device}; expected both on one device."
            )
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in weights)):
        raise ValueError(
            f"A gradient would be asked for through a linear layer of {type}, which has none. Compute under "
            "torch.no_grad(); to train, use torch.nn.functional.linear and float weights."
        )
    return format
