"""Weights in few bits: which types there are, and rounding each weight to the nearest value of its type.

    packed = quantize(weight, "Q4_0")      bytes, a few for each block of weights
    weight' = dequantize(packed)           what they stand for

Round to nearest looks at each weight alone. `gptq` and `awq` choose with data, and store the same types; what
the types are is in `block_formats` and `k_quants`.

How far a weight can be from its value, with the step of its group (the distance of two values):

- Q8_0, INT8: half a step.
- Q4_0, Q5_0: half a step; but up to a whole one for a weight that is as large as the largest of its block and
  has the other sign, for which there is no code.
- TQ1_0, TQ2_0: half a step, and a step is the largest weight of the block: nothing, if the weights are
  ternary.
- INT4: half a step, and what rounding to float16 does to the smallest weight of its group.
- Q4_K, Q5_K, Q6_K: half a step within the values of the group; beyond the last, the distance to the last.

To this comes, in each type with a scale in float16, what rounding to float16 does to the scale, times the
code.

Trap: a row must be a multiple of the block. llama.cpp then takes another type, and so does `mixtures`; here
it is an error, because whoever asks for a type should get it.
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from .block_formats import Q4_0, Q5_0, Q8_0, TQ1_0, TQ2_0, BlockFormat, Grid, Int4, Int8
from .k_quants import Q4_K, Q5_K, Q6_K

__all__ = ["Quantized", "block_format", "dequantize", "finite_grid", "quantize", "require_finite_weight"]

_FIXED = {
    "Q8_0": Q8_0,
    "Q6_K": Q6_K,
    "Q5_K": Q5_K,
    "Q5_0": Q5_0,
    "Q4_K": Q4_K,
    "Q4_0": Q4_0,
    "TQ2_0": TQ2_0,
    "TQ1_0": TQ1_0,
}
_INT4 = re.compile(r"INT4_G(\d+)")
_AT_ONCE = 1 << 20  # weights; the temporaries of these stay in the cache


@dataclass(frozen=True)
class Quantized:
    """A packed matrix, or several.

    Attributes:
        type: its name, e.g. "Q4_0".
        data: the bytes, those of a row together.

    Raises:
        ValueError: there is no such type, or rows that are no whole number of its blocks.
    """

    type: str
    data: UInt8[Tensor, "*rows bytes"]

    def __post_init__(self) -> None:
        columns, row_bytes = self.shape[-1], self.data.shape[-1]
        kind = block_format(self.type, columns)
        if columns // kind.block * kind.block_bytes != row_bytes:
            raise ValueError(
                f"A row of {row_bytes} bytes is no multiple of {kind.block_bytes}, a block of {self.type}."
            )

    @property
    def shape(self) -> torch.Size:
        """The shape of what is packed."""
        return torch.Size([*self.data.shape[:-1], _columns(self.type, self.data.shape[-1])])

    @property
    def bits_per_weight(self) -> float:
        """With the scales."""
        return 8 * self.data.numel() / self.shape.numel()


def quantize(weight: Float[Tensor, "*rows columns"], type: str) -> Quantized:
    """Round each weight to the nearest value that its type can hold, and pack them.

    Args:
        weight: each row is packed by itself.
        type: "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_0", "TQ2_0", "TQ1_0"; "INT4_G128" or with another
            even group; "INT8", with one scale for a row.

    Raises:
        ValueError: an unknown type, a row that is no multiple of its block, or weights that are not finite or
            so large that their scale is not.

    >>> quantize(torch.linspace(-1, 1, 64).view(2, 32), "Q4_0").data.shape
    torch.Size([2, 18])
    """
    columns = weight.shape[-1]
    kind = block_format(type, columns)
    require_finite_weight(weight)
    groups = weight.detach().float().reshape(-1, kind.block // kind.group, kind.group)
    if not groups.isfinite().all():
        raise ValueError(f"Weights as large as {weight.abs().max():.3g} are beyond float32.")
    packed = []
    for part in groups.split(max(1, _AT_ONCE // kind.block)):
        grid = finite_grid(kind, part)
        packed.append(kind.pack(kind.round(part, grid), grid))
    row_bytes = columns // kind.block * kind.block_bytes
    return Quantized(type, torch.cat(packed).view(*weight.shape[:-1], row_bytes))


def dequantize(quantized: Quantized) -> Float[Tensor, "*rows columns"]:
    """What packed weights stand for, in float32.

    >>> packed = quantize(torch.tensor([[1.0, -0.25] * 16]), "Q8_0")
    >>> dequantize(packed)[0, :2]
    tensor([ 0.9999, -0.2520])
    """
    kind = block_format(quantized.type, quantized.shape[-1])
    blocks = quantized.data.reshape(-1, kind.block_bytes)
    values = torch.empty(len(blocks), kind.block, dtype=torch.float32, device=blocks.device)
    at_once = max(1, _AT_ONCE // kind.block)
    for part, out in zip(blocks.split(at_once), values.split(at_once), strict=True):
        out.copy_(kind.values(*kind.unpack(part)).flatten(1))
    return values.view(quantized.shape)


def block_format(type: str, columns: int) -> BlockFormat:
    """The format of a type, for rows of so many weights.

    Raises:
        ValueError: there is no such type, or its blocks do not fit the row.
    """
    kind = _format(type, columns)
    if columns == 0 or columns % kind.block:
        raise ValueError(
            f"Rows of {columns} weights do not divide into blocks of {kind.block}, as {type} has them. "
            "Take a type with smaller blocks, such as Q8_0 or Q4_0 of 32."
        )
    return kind


def _format(type: str, columns: int) -> BlockFormat:
    if type in _FIXED:
        return _FIXED[type]
    if type == "INT8":
        return Int8(columns)
    group = _INT4.fullmatch(str(type))
    if group and int(group[1]) and int(group[1]) % 2 == 0:
        return Int4(int(group[1]))
    raise ValueError(
        f"There is no type {type!r}. Known are {', '.join(_FIXED)}, INT8, and INT4_G128 or with another even "
        "number of weights in a group."
    )


def _columns(type: str, row_bytes: int) -> int:
    """How many weights a row of so many bytes holds."""
    if type == "INT8":
        return row_bytes - 4
    kind = _format(type, 0)
    return row_bytes // kind.block_bytes * kind.block


def require_finite_weight(weight: Tensor) -> None:
    """Refuse weights that no type can hold.

    Raises:
        ValueError: some are infinite or no numbers.
    """
    if not weight.isfinite().all():
        broken = int((~weight.isfinite()).sum())
        raise ValueError(
            f"{broken:,} of {weight.numel():,} weights are infinite or no numbers; none of them can be "
            "quantised. Are the weights whole?"
        )


def finite_grid(kind: BlockFormat, x: Float[Tensor, "blocks groups width"]) -> Grid:
    """The grid that a format fits to weights.

    Raises:
        ValueError: they are so large that float16 has no scale for them.
    """
    grid = kind.fit(x)
    if not all(stored.isfinite().all() for stored in grid.stored):
        raise ValueError(
            f"Weights as large as {x.abs().max():.3g} need a scale beyond 65,504, the largest of float16. "
            "Divide them by a constant, and multiply what they give by it."
        )
    return grid
