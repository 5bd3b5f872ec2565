"""K-quants: blocks of 256 weights whose groups have small scales of their own, in units of the block's.

    Q4_K, Q5_K   8 groups of 32:  value = (d * s) * code - (dmin * m)    codes from 0, s and m from 0 to 63
    Q6_K        16 groups of 16:  value = (d * s) * code                 codes -32 .. 31, s from -128 to 127

    type   block  bytes  bits a weight   beside the codes
    Q4_K     256    144         4.5      d and dmin in float16, 8 s and 8 m of 6 bits in 12 bytes
    Q5_K     256    176         5.5      the same
    Q6_K     256    210         6.5625   d in float16, 16 s of 8 bits

Sources: ggml-common.h, the layout; gguf-py 0.19.0, which reads it. How the scales are found is not part of
the format. The idea is llama.cpp's: several stretches of each group, weighted least squares for each, and a
weight that is large counts more. The search here is our own, and goes further: once the scales of the groups
are whole numbers, each tries its neighbours, and d is fitted again (`_refined`). By what both minimise it
comes nearer to the weights than llama.cpp (0 to 10%, on rows of five kinds); in plain squares, it does on
average.

Choices, and the traps behind them:

- Each value is rounded to the nearest that its stored grid has. It lies within half a step if it lies within
  the grid; and least squares may leave the largest few outside, where that helps all the others.
- Zero lies within the range of each group of Q4_K, for m is not negative: a group of large positive weights
  spends codes on it.
- The scales of Q6_K have signs: there is one more code below zero than above.
"""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .block_formats import (
    BlockFormat,
    Codes,
    Grid,
    Groups,
    Packed,
    Scales,
    as_bytes,
    bits,
    from_bytes,
    from_nibbles,
    inverse_of,
    low_and_high_nibbles,
)

__all__ = ["Q4_K", "Q5_K", "Q6_K"]

Factor = Float[Tensor, "blocks 1 1"]

_ROUNDS = 2  # of refinement; a third gains less than a thousandth


class _KQuant(BlockFormat):
    """A grid of ``factors``, float16 for a block, times ``counts``, whole numbers for each group.

    Attributes:
        least, most: the first and the last count.
    """

    block = 256
    least: int
    most: int

    @abstractmethod
    def _grid(self, factors: Sequence[Factor], counts: Sequence[Scales]) -> Grid:
        """The grid that they make, with both as what is stored."""

    @abstractmethod
    def _factors(
        self, x: Groups, importance: Groups, codes: Codes, counts: Sequence[Scales]
    ) -> Sequence[Factor]:
        """The factors with the least error, by least squares over a block, given all else."""

    def _counted(self, scales: Sequence[Scales], factors: Sequence[Factor]) -> Grid:
        """The grid that is nearest to scales of the groups."""
        factors = [factor.to(torch.float16) for factor in factors]
        counts = [
            (scale * inverse_of(factor.float())).round().clamp(self.least, self.most)
            for scale, factor in zip(scales, factors, strict=True)
        ]
        return self._grid(factors, counts)

    def _error(self, x: Groups, importance: Groups, grid: Grid) -> Groups:
        return importance * (self.values(self.round(x, grid), grid) - x).square()

    def _refined(self, x: Groups, importance: Groups, grid: Grid) -> Grid:
        """Each group takes the best counts next to its own; then each block the better of its factors."""
        for _ in range(_ROUNDS):
            factors, counts = grid.stored[: len(grid.stored) // 2], grid.stored[len(grid.stored) // 2 :]
            best, best_error = counts, torch.inf
            for steps in product((0, -1, 1), repeat=len(counts)):
                near = [(n + by).clamp(self.least, self.most) for n, by in zip(counts, steps, strict=True)]
                error = self._error(x, importance, self._grid(factors, near)).sum(-1, keepdim=True)
                better = error < best_error
                best = [torch.where(better, new, old) for new, old in zip(near, best, strict=True)]
                best_error = torch.where(better, error, best_error)
            grid = self._grid(factors, best)
            fitted = self._factors(x, importance, self.round(x, grid), best)
            fitted = [factor.to(torch.float16) for factor in fitted]
            error = self._error(x, importance, self._grid(fitted, best)).sum((1, 2), keepdim=True)
            better = error < best_error.sum(1, keepdim=True)
            factors = [torch.where(better, new, old) for new, old in zip(fitted, factors, strict=True)]
            grid = self._grid(factors, best)
        return grid


class _ScaleAndMin(_KQuant):
    """Q4_K and Q5_K: factors d and dmin; counts s and m, of 6 bits, for each group of 32."""

    group, lowest, least, most = 32, 0, 0, 63

    def fit(self, x: Groups) -> Grid:
        size = _size(x)
        importance = size.square().mean(-1, keepdim=True).sqrt() + size
        scale, minimum = _stretch_and_shift(x, importance, self.highest)
        factors = [largest.amax(1, keepdim=True) / self.most for largest in (scale, minimum)]
        return self._refined(x, importance, self._counted([scale, minimum], factors))

    def _grid(self, factors: Sequence[Factor], counts: Sequence[Scales]) -> Grid:
        (d, dmin), (s, m) = factors, counts
        scale = d.float() * s
        return Grid(scale, inverse_of(scale), dmin.float() * m, (d, dmin, s, m))

    def _factors(
        self, x: Groups, importance: Groups, codes: Codes, counts: Sequence[Scales]
    ) -> tuple[Factor, Factor]:
        """The d and dmin for which d * (s * code) - dmin * m is nearest to x."""
        s, m = counts
        one, other = s * codes, -m

        def total(values: Groups) -> Factor:
            return (importance * values).sum((1, 2), keepdim=True)

        aa, ab, bb = total(one * one), total(one * other), total(other * other)
        ax, bx = total(one * x), total(other * x)
        inverse = inverse_of(aa * bb - ab * ab)
        d = torch.where(bb > 0, (bb * ax - ab * bx) * inverse, ax * inverse_of(aa))
        return d, (aa * bx - ab * ax) * inverse

    def _pack_scales(self, grid: Grid) -> Packed:
        """d, dmin, and 6 bits for each s and m: those of the first four groups lie whole in a byte each.

        Of the others the low four bits share a byte, and the high two stand above those of the first four.
        """
        d, dmin, s, m = grid.stored
        (s, s_later), (m, m_later) = (each.to(torch.uint8).flatten(1).chunk(2, dim=1) for each in (s, m))
        twelve = [s | s_later >> 4 << 6, m | m_later >> 4 << 6, s_later & 15 | (m_later & 15) << 4]
        return torch.cat([as_bytes(d), as_bytes(dmin), *twelve], dim=1)

    def _unpack_scales(self, packed: Packed) -> Grid:
        d, dmin = from_bytes(packed[:, :4], torch.float16)[..., None, None].unbind(1)
        s, m, later = packed[:, 4:16].chunk(3, dim=1)
        s = torch.cat([s & 63, later & 15 | s >> 6 << 4], dim=1)
        m = torch.cat([m & 63, later >> 4 | m >> 6 << 4], dim=1)
        return self._grid((d, dmin), (s[..., None].float(), m[..., None].float()))


class _Q4_K(_ScaleAndMin):
    """The scales; then for each two groups 32 bytes, the first group's codes in the low nibbles."""

    block_bytes, highest = 144, 15

    def pack(self, codes: Codes, grid: Grid) -> Packed:
        return torch.cat([self._pack_scales(grid), low_and_high_nibbles(_in_pairs(codes))], dim=1)

    def unpack(self, packed: Packed) -> tuple[Codes, Grid]:
        codes = from_nibbles(packed[:, 16:], 64).unflatten(-1, (2, 32)).flatten(1, 2)
        return codes, self._unpack_scales(packed)


class _Q5_K(_ScaleAndMin):
    """The scales; 32 bytes with the fifth bit of the codes, one bit a group; then nibbles as in Q4_K."""

    block_bytes, highest = 176, 31

    def pack(self, codes: Codes, grid: Grid) -> Packed:
        fifth = (codes >> 4 << bits(0, 8, 1, codes)[:, None]).sum(1).to(torch.uint8)  # over groups
        nibbles = low_and_high_nibbles(_in_pairs(codes & 15))
        return torch.cat([self._pack_scales(grid), fifth, nibbles], dim=1)

    def unpack(self, packed: Packed) -> tuple[Codes, Grid]:
        fifth = packed[:, 16:48][:, None] >> bits(0, 8, 1, packed)[:, None] & 1  # (blocks, groups, 32)
        nibbles = from_nibbles(packed[:, 48:], 64).unflatten(-1, (2, 32)).flatten(1, 2)
        return nibbles | fifth.to(torch.int16) << 4, self._unpack_scales(packed)


class _Q6_K(_KQuant):
    """Factor d; counts s, of 8 bits and with signs, for each group of 16.

    For each half of a block 64 bytes of nibbles and 32 bytes of the two bits above; then s, then d. A half is
    four stretches of 32 codes. The low nibbles hold the first two stretches, the high ones the last two; a
    byte of upper bits holds those of one code of each stretch.
    """

    group, block_bytes, lowest, highest, least, most = 16, 210, -32, 31, -128, 127

    def fit(self, x: Groups) -> Grid:
        importance = _size(x).square()
        scale = _stretch(x, importance, self.lowest, self.highest)
        largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
        return self._refined(x, importance, self._counted([scale], [largest / self.least]))

    def _grid(self, factors: Sequence[Factor], counts: Sequence[Scales]) -> Grid:
        (d,), (s,) = factors, counts
        scale = d.float() * s
        return Grid(scale, inverse_of(scale), None, (d, s))

    def _factors(
        self, x: Groups, importance: Groups, codes: Codes, counts: Sequence[Scales]
    ) -> tuple[Factor]:
        """The d for which d * (s * code) is nearest to x."""
        scaled = counts[0] * codes
        cross, square = ((importance * other * scaled).sum((1, 2), keepdim=True) for other in (x, scaled))
        return (cross * inverse_of(square),)

    def pack(self, codes: Codes, grid: Grid) -> Packed:
        d, s = grid.stored
        stretches = (codes + 32).view(-1, 2, 4, 32)  # (blocks, halves, stretches, 32)
        low = (stretches & 15).view(-1, 2, 2, 64)
        low = (low[:, :, 0] | low[:, :, 1] << 4).to(torch.uint8).flatten(1)
        high = (stretches >> 4 << bits(0, 8, 2, codes)[:, None]).sum(2).to(torch.uint8).flatten(1)
        return torch.cat([low, high, as_bytes(s.to(torch.int8)), as_bytes(d)], dim=1)

    def unpack(self, packed: Packed) -> tuple[Codes, Grid]:
        low, high = packed[:, :128].reshape(-1, 2, 64), packed[:, 128:192].reshape(-1, 2, 1, 32)
        low = torch.cat([low & 15, low >> 4], dim=-1).view(-1, 2, 4, 32)
        codes = low | (high >> bits(0, 8, 2, packed)[:, None] & 3) << 4
        s = from_bytes(packed[:, 192:208], torch.int8).float()[..., None]
        d = from_bytes(packed[:, 208:], torch.float16)[..., None]
        return codes.to(torch.int16).view(-1, 16, 16) - 32, self._grid((d,), (s,))


def _in_pairs(codes: Codes) -> Int[Tensor, "blocks pairs 64"]:
    return codes.unflatten(1, (4, 2)).flatten(2)


def _size(x: Groups) -> Groups:
    """|x| as a share of the block's largest, so that no square is beyond float32."""
    return x.abs() * inverse_of(x.abs().amax((1, 2), keepdim=True))


def _stretch_and_shift(x: Groups, importance: Groups, highest: int) -> tuple[Scales, Scales]:
    """A scale and a minimum for each group: of 21 stretches the codes with the least error after a fit."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    span = inverse_of(high - low)
    total, total_x = importance.sum(-1, keepdim=True), (importance * x).sum(-1, keepdim=True)
    best_scale, best_low = (high - low) / highest, low
    codes = ((x - low) * (highest * span)).round()
    best_error = (importance * (best_scale * codes + low - x).square()).sum(-1, keepdim=True)
    for step in range(21):
        codes = ((x - low) * ((highest - 1 + 0.1 * step) * span)).round().clamp(0, highest)
        weighted = importance * codes
        first, second = weighted.sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)
        cross = (weighted * x).sum(-1, keepdim=True)
        inverse = inverse_of(total * second - first.square())
        scale, shift = (
            (total * cross - total_x * first) * inverse,
            (second * total_x - first * cross) * inverse,
        )
        scale, shift = torch.where(shift > 0, cross * inverse_of(second), scale), shift.clamp(max=0)
        error = (importance * (scale * codes + shift - x).square()).sum(-1, keepdim=True)
        better = (error < best_error) & (scale > 0)
        best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, shift, best_low)
        best_error = torch.where(better, error, best_error)
    return best_scale, -best_low


def _stretch(x: Groups, importance: Groups, lowest: int, highest: int) -> Scales:
    """A scale for each group, with the sign that gives its largest weight the lowest code; 19 stretches."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best_scale = best_gain = torch.zeros_like(largest)
    for step in range(-9, 10):
        codes = (x * ((lowest - 0.1 * step) * inverse_of(largest))).round().clamp(lowest, highest)
        cross = (importance * x * codes).sum(-1, keepdim=True)
        inverse = inverse_of((importance * codes.square()).sum(-1, keepdim=True))
        gain = cross.square() * inverse  # by so much a scale of cross * inverse lowers the squared error
        best_scale = torch.where(gain > best_gain, cross * inverse, best_scale)
        best_gain = torch.maximum(gain, best_gain)
    return best_scale


Q4_K, Q5_K, Q6_K = _Q4_K(), _Q5_K(), _Q6_K()
