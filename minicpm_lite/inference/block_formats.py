"""Formats of packed weights: which values a block can hold, and where each bit of it lies.

    value = scale * code - minimum        codes are whole numbers; a scale, and perhaps a minimum, for a group

A row is cut into blocks, a block into groups. A block is stored as its scales and its codes, and says nothing
of its neighbours, so a row begins at a byte and can be read alone.

    type          block  bytes  bits a weight   codes        beside the codes
    Q8_0             32     34         8.5      -127 .. 127  scale in float16
    Q5_0             32     22         5.5       -16 .. 15   scale in float16
    Q4_0             32     18         4.5        -8 .. 7    scale in float16
    TQ2_0           256     66      2.0625        -1 .. 1    scale in float16
    TQ1_0           256     54      1.6875        -1 .. 1    scale in float16; five codes share a byte
    INT4_G128       128     68        4.25         0 .. 15   scale and least value in float16; also others
    INT8            row  row + 4      8 + …     -127 .. 127  scale in float32

Sources: ggml-common.h and gguf-py 0.19.0 for ggml's types, whose bytes these are; Hu et al. 2024, "MiniCPM",
arXiv 2404.06395, appendix D for INT4: scale = (max - min) / 15, zero = -min / scale - 8, code = round(w /
scale + zero) from -8 to 7. (Ours counts from 0 and stores min, which says the same.)

Choices, and the traps behind them:

- ggml rounds weights by the scale in float32 and stores it in float16. So the nearest code is that of a scale
  which no reader sees; what it is off by is at most 2^-11 of a value, or what float16 loses of a scale below
  6.1e-5. `Grid` knows both.
- Q4_0 and Q5_0 spend their one code more on the sign of the largest weight: scale = largest / -8, with its
  sign. A weight as large and of the other sign would be code 8, which is not there: it is 7, a whole step
  off.
- ggml rounds halves up in Q4_0 and Q5_0, and away from zero in Q8_0 and the ternary types. `torch.round`,
  which rounds them to the even neighbour, gives other bytes.
- A block of zeros has scale 0 (and -0.0 where -8 divides it), and so has one whose scale is so small that its
  inverse is no number.
- A low nibble is not the left neighbour of its high nibble: it stands half a block before it.
- Which of the codes is 0 is a choice, too: TQ1_0 and TQ2_0 store code + 1, Q4_0 stores code + 8.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor

__all__ = ["Q4_0", "Q5_0", "Q8_0", "TQ1_0", "TQ2_0", "BlockFormat", "Grid", "Int4", "Int8"]

Groups = Float[Tensor, "blocks groups width"]
Scales = Float[Tensor, "blocks groups 1"]
Codes = Int[Tensor, "blocks groups width"]
Packed = UInt8[Tensor, "blocks bytes"]


class Grid(NamedTuple):
    """The values that the groups of some blocks can take.

    Attributes:
        scale: the distance of two values, as a reader of the bytes computes it.
        inverse: what a weight is multiplied by to find its code; 0 where the scale is 0.
        minimum: what a reader subtracts, or None for nothing.
        stored: what a block holds beside its codes, as it is written.
    """

    scale: Scales
    inverse: Scales
    minimum: Scales | None
    stored: tuple[Tensor, ...]

    def of_group(self, group: int) -> "Grid":
        """The grid of one group of each block."""
        one = slice(group, group + 1)
        minimum = None if self.minimum is None else self.minimum[:, one]
        return Grid(self.scale[:, one], self.inverse[:, one], minimum, self.stored)


class BlockFormat(ABC):
    """How a block of weights is stored. A subclass fits the grid, and knows the place of each bit.

    Attributes:
        block: weights in a block.
        group: weights of it that share a scale.
        block_bytes: bytes of a block.
        lowest: the first code.
        highest: the last code.
    """

    block: int
    group: int
    block_bytes: int
    lowest: int
    highest: int

    @abstractmethod
    def fit(self, x: Groups) -> Grid:
        """The grid for these weights."""

    @abstractmethod
    def pack(self, codes: Codes, grid: Grid) -> Packed:
        """The bytes of blocks."""

    @abstractmethod
    def unpack(self, packed: Packed) -> tuple[Codes, Grid]:
        """The codes and the grid that bytes hold."""

    def nearest(self, scaled: Groups) -> Groups:
        """A whole number for each multiple of the scale; how it rounds a half is the format's."""
        return torch.round(scaled)

    def round(self, x: Groups, grid: Grid) -> Codes:
        """The code of each weight: the nearest there is on its grid."""
        scaled = (x if grid.minimum is None else x + grid.minimum) * grid.inverse
        return self.nearest(scaled).clamp(self.lowest, self.highest).to(torch.int16)

    def values(self, codes: Codes, grid: Grid) -> Groups:
        """What the codes stand for."""
        values = codes * grid.scale
        return values if grid.minimum is None else values - grid.minimum


def inverse_of(scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 / scale, and 0 where that is no finite number."""
    inverse = 1 / scale
    return torch.where(inverse.isfinite(), inverse, 0)


def as_bytes(stored: Tensor) -> Packed:
    """Numbers of each block as their bytes, the lowest first."""
    return stored.flatten(1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def from_bytes(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The numbers that the bytes of each block are."""
    return packed.clone(memory_format=torch.contiguous_format).view(dtype)


def as_halves(packed: Packed) -> Scales:
    """The float16 that two bytes of each block are, in float32."""
    return from_bytes(packed, torch.float16).float()[..., None]


def low_and_high_nibbles(codes: Codes) -> Packed:
    """Codes from 0 to 15: the first half of a group in the low nibbles, the second in the high ones."""
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return (low | high << 4).flatten(1)


def from_nibbles(packed: Packed, width: int) -> Codes:
    """The same way back, for groups of ``width`` codes."""
    nibbles = packed.unflatten(-1, (-1, width // 2))
    return torch.cat([nibbles & 15, nibbles >> 4], dim=-1).to(torch.int16)


def bits(first: int, end: int, step: int, like: Tensor) -> Integer[Tensor, " fields"]:
    """Where fields of a byte begin, to shift by; as numbers that shifting leaves as they are."""
    return torch.arange(first, end, step, dtype=like.dtype, device=like.device)


def half_away_from_zero(scaled: Groups) -> Groups:
    """Halves go away from zero: 2.5 becomes 3, and -2.5 becomes -3."""
    size = scaled.abs()
    below = size.floor()
    return scaled.sign() * (below + (size - below >= 0.5))  # size + 0.5 would round itself


class _OneScale(BlockFormat):
    """A block is one group, with a scale in float16 and codes on both sides of zero."""

    def _grid(self, scale: Scales) -> Grid:
        half = scale.to(torch.float16)
        return Grid(half.float(), inverse_of(scale), None, (half,))

    def _read(self, half: Packed) -> Grid:
        return self._grid(as_halves(half))


class _Q8_0(_OneScale):
    """Two bytes of scale, then 32 codes of one byte."""

    block = group = 32
    block_bytes, lowest, highest = 34, -127, 127
    nearest = staticmethod(half_away_from_zero)

    def fit(self, x: Groups) -> Grid:
        return self._grid(x.abs().amax(-1, keepdim=True) / 127)

    def pack(self, codes: Codes, grid: Grid) -> Packed:
        return torch.cat([as_bytes(grid.stored[0]), as_bytes(codes.to(torch.int8))], dim=1)

    def unpack(self, packed: Packed) -> tuple[Codes, Grid]:
        codes = from_bytes(packed[:, 2:], torch.int8).to(torch.int16)
        return codes[:, None], self._read(packed[:, :2])


class _SignedLargest(_OneScale):
    """The weight of largest size is the lowest code, whatever its sign."""

    def fit(self, x: Groups) -> Grid:
        at = x.abs().argmax(-1, keepdim=True)
        return self._grid(x.gather(-1, at) / self.lowest)

    def nearest(self, scaled: Groups) -> Groups:
        return (scaled + (0.5 - self.lowest)).floor() + self.lowest


class _Q4_0(_SignedLargest):
    """Two bytes of scale, then 16 bytes of nibbles that hold code + 8."""

    block = group = 32
    block_bytes, lowest, highest = 18, -8, 7

    def pack(self, codes: Codes, grid: Grid) -> Packed:
        return torch.cat([as_bytes(grid.stored[0]), low_and_high_nibbles(codes + 8)], dim=1)

    def unpack(self, packed: Packed) -> tuple[Codes, Grid]:
        return from_nibbles(packed[:, 2:], 32) - 8, self._read(packed[:, :2])


class _Q5_0(_SignedLargest):
    """Two bytes of scale, four with the fifth bit of code + 16 of each weight, then nibbles as in Q4_0."""

    block = group = 32
    block_bytes, lowest, highest = 22, -16, 15

    def pack(self, codes: Codes, grid: Grid) -> Packed:
        stored = codes + 16
        fifth = (stored >> 4).unflatten(-1, (4, 8)) << bits(0, 8, 1, codes)  # (blocks, 1, bytes, bits)
        fifth = fifth.sum(-1).to(torch.uint8).flatten(1)
        return torch.cat([as_bytes(grid.stored[0]), fifth, low_and_high_nibbles(stored & 15)], dim=1)

    def unpack(self, packed: Packed) -> tuple[Codes, Grid]:
        fifth = packed[:, 2:6, None] >> bits(0, 8, 1, packed) & 1  # (blocks, bytes, bits)
        codes = from_nibbles(packed[:, 6:], 32) | fifth.flatten(1)[:, None].to(torch.int16) << 4
        return codes - 16, self._read(packed[:, :2])


class _Ternary(_OneScale):
    """Codes -1, 0 and 1 on the largest size of a block, so nothing is lost of weights that are ternary."""

    block = group = 256
    lowest, highest = -1, 1
    nearest = staticmethod(half_away_from_zero)

    def fit(self, x: Groups) -> Grid:
        return self._grid(x.abs().amax(-1, keepdim=True))


class _TQ2_0(_Ternary):
    """For each half of a block 32 bytes of four codes, 32 weights apart, the first lowest; then the scale."""

    block_bytes = 66

    def pack(self, codes: Codes, grid: Grid) -> Packed:
        fields = (codes + 1).view(-1, 2, 4, 32)  # (blocks, halves, place in the byte, bytes)
        packed = (fields << bits(0, 8, 2, codes)[:, None]).sum(-2).to(torch.uint8)
        return torch.cat([packed.flatten(1), as_bytes(grid.stored[0])], dim=1)

    def unpack(self, packed: Packed) -> tuple[Codes, Grid]:
        fields = packed[:, :64].reshape(-1, 2, 1, 32) >> bits(0, 8, 2, packed)[:, None] & 3
        return fields.view(-1, 1, 256).to(torch.int16) - 1, self._read(packed[:, 64:])


class _TQ1_0(_Ternary):
    """Five codes are a number of base 3 below 243 = 3^5, stored as the fraction of 256 that it is of 243.

    The first digit is then read off without a division: times 3, what stands above 256. So on for the others.
    48 bytes hold five codes each: 32 of them those of the first 160 weights, 32 apart, 16 those of the next
    80, 16 apart. Four bytes hold the last 16 weights, four in each and a digit left over. Then the scale.
    """

    block_bytes = 54
    _parts = ((160, 5), (80, 5), (16, 4))  # weights, digits in a byte

    def pack(self, codes: Codes, grid: Grid) -> Packed:
        packed = []
        for part, (weights, digits) in zip(
            (codes + 1).flatten(1).split([weights for weights, _ in self._parts], dim=1),
            self._parts,
            strict=True,
        ):
            place = 3 ** torch.arange(4, 4 - digits, -1, device=codes.device)  # the first digit counts 81
            number = (part.unflatten(1, (digits, weights // digits)) * place[:, None]).sum(1)
            packed.append((number * 256 + 242).div(243, rounding_mode="floor").to(torch.uint8))
        return torch.cat([*packed, as_bytes(grid.stored[0])], dim=1)

    def unpack(self, packed: Packed) -> tuple[Codes, Grid]:
        codes = []
        for part, (_, digits) in zip(packed[:, :52].split([32, 16, 4], dim=1), self._parts, strict=True):
            place = 3 ** torch.arange(digits, device=packed.device)
            left = part[:, None] * place[:, None] & 255  # without the digits before
            codes.append((left * 3 >> 8).flatten(1).to(torch.int16))
        return torch.cat(codes, dim=1)[:, None] - 1, self._read(packed[:, 52:])


class Int4(BlockFormat):
    """MiniCPM-1's groups: 16 values, evenly spaced from the smallest weight to the largest.

    Two bytes of scale, two of the smallest weight, then nibbles, the first half of the group in the low ones.
    """

    lowest, highest = 0, 15

    def __init__(self, group: int) -> None:
        self.block = self.group = group
        self.block_bytes = 4 + group // 2

    def fit(self, x: Groups) -> Grid:
        low, high = x.aminmax(dim=-1, keepdim=True)
        return self._grid(((high - low) / 15).to(torch.float16), low.to(torch.float16))

    def _grid(self, scale: Tensor, low: Tensor) -> Grid:
        return Grid(scale.float(), inverse_of(scale.float()), -low.float(), (scale, low))

    def pack(self, codes: Codes, grid: Grid) -> Packed:
        return torch.cat([*map(as_bytes, grid.stored), low_and_high_nibbles(codes)], dim=1)

    def unpack(self, packed: Packed) -> tuple[Codes, Grid]:
        scale, low = from_bytes(packed[:, :4], torch.float16)[..., None, None].unbind(1)
        return from_nibbles(packed[:, 4:], self.group), self._grid(scale, low)


class Int8(BlockFormat):
    """A row is one block: four bytes of scale, then a code of one byte for each weight."""

    lowest, highest = -127, 127

    def __init__(self, columns: int) -> None:
        self.block = self.group = columns
        self.block_bytes = 4 + columns

    def fit(self, x: Groups) -> Grid:
        return self._grid(x.abs().amax(-1, keepdim=True) / 127)

    def _grid(self, scale: Scales) -> Grid:
        return Grid(scale, inverse_of(scale), None, (scale,))

    def pack(self, codes: Codes, grid: Grid) -> Packed:
        return torch.cat([as_bytes(grid.stored[0]), as_bytes(codes.to(torch.int8))], dim=1)

    def unpack(self, packed: Packed) -> tuple[Codes, Grid]:
        codes = from_bytes(packed[:, 4:], torch.int8).to(torch.int16)
        return codes[:, None], self._grid(from_bytes(packed[:, :4], torch.float32)[..., None])


Q8_0, Q5_0, Q4_0, TQ1_0, TQ2_0 = _Q8_0(), _Q5_0(), _Q4_0(), _TQ1_0(), _TQ2_0()
