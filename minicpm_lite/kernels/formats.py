"""How weights are packed: the blocks of ggml, and what each of them means.

    type    block  bytes  bits a weight  a weight is
    F32         1      4  32             itself
    Q8_0       32     34   8.5           scale * q,                 q from -128 to 127
    Q5_0       32     22   5.5           scale * (q - 16),          q from 0 to 31
    Q4_0       32     18   4.5           scale * (q - 8),           q from 0 to 15
    Q6_K      256    210   6.5625        scale * s * (q - 32),      s from -128 to 127 for each 16 weights
    Q5_K      256    176   5.5           scale * s * q - min * m,   s and m from 0 to 63 for each 32 weights
    Q4_K      256    144   4.5           the same with q from 0 to 15
    TQ2_0     256     66   2.0625        scale * (q - 1),           q from 0 to 3; a quantiser writes 0 to 2

Scales and mins of a block are float16. A row of weights is packed by itself, so a packed matrix has shape
(outputs, bytes of a row). Which scale and which q to choose is the quantiser's matter, not this one's.

Source: ggml-common.h and ggml-quants.c of llama.cpp; gguf-py 0.19.0, which the tests hold this equal to.

Trap: neighbours in a byte are no neighbours in the row. The low and the high half of a byte of Q4_0 stand 16
weights apart, those of Q4_K 32, so that whole vectors can be unpacked by one shift.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["FORMATS", "Format", "find_format"]


@dataclass(frozen=True)
class Format:
    """How weights of one type lie in memory.

    Attributes:
        name: of the type, as gguf has it.
        number: of the type in ggml.
        block: weights that are packed together; a row is a multiple of it.
        nbytes: bytes of a block.
        unpack: from blocks of bytes to blocks of float32.
    """

    name: str
    number: int
    block: int
    nbytes: int
    unpack: Callable[[UInt8[Tensor, "*rows nbytes"]], Float[Tensor, "*rows block"]]

    def row_bytes(self, features: int) -> int:
        """Bytes of a row of so many weights.

        Raises:
            ValueError: the row is no multiple of the block.
        """
        if features % self.block:
            raise ValueError(
                f"A row has {features} weights; {self.name} packs {self.block} at a time, so expected a "
                f"multiple of {self.block}."
            )
        return features // self.block * self.nbytes


def find_format(type: str) -> Format:
    """The format of a type.

    Raises:
        ValueError: there is none of that name.

    >>> find_format("Q4_0").row_bytes(4096)
    2304
    """
    if type not in FORMATS:
        raise ValueError(f"type is {type!r}; expected one of {', '.join(FORMATS)}.")
    return FORMATS[type]


def _half(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16).float()


def _whole(bytes: Tensor) -> Tensor:
    return bytes.view(torch.int8).float()


def _f32(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float32)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks[..., :2]) * _whole(blocks[..., 2:])


def _nibbles(packed: Tensor) -> Tensor:
    """Low halves, then high halves."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _bits(packed: Tensor, shifts: range, mask: int) -> Tensor:
    """Fields of each byte in a dimension of their own, before that of the bytes."""
    return torch.stack([packed >> shift & mask for shift in shifts], dim=-2)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks[..., :2]) * (_nibbles(blocks[..., 2:]).float() - 8)


def _q5_0(blocks: Tensor) -> Tensor:
    fifth = _bits(blocks[..., 2:6], range(8), 1).mT.flatten(-2)  # (..., 32)
    return _half(blocks[..., :2]) * ((_nibbles(blocks[..., 6:]) | fifth << 4).float() - 16)


def _scaled(blocks: Tensor, q: Tensor) -> Tensor:
    """What Q4_K and Q5_K make of their 8 groups of q."""
    scale, min, six = blocks[..., :16].split([2, 2, 12], dim=-1)
    first, second, last = six.split(4, dim=-1)  # 6 bits of scales 0-3, of mins 0-3; 4 bits of all others
    scales = torch.cat([first & 63, last & 15 | first >> 6 << 4], dim=-1).float()  # (..., 8)
    mins = torch.cat([second & 63, last >> 4 | second >> 6 << 4], dim=-1).float()
    weights = (_half(scale) * scales)[..., None] * q.float() - (_half(min) * mins)[..., None]
    return weights.flatten(-2)


def _q4_k(blocks: Tensor) -> Tensor:
    packed = blocks[..., 16:].unflatten(-1, (4, 32))
    return _scaled(blocks, _bits(packed, range(0, 8, 4), 15).flatten(-3, -2))


def _q5_k(blocks: Tensor) -> Tensor:
    packed = blocks[..., 48:].unflatten(-1, (4, 32))
    fifth = _bits(blocks[..., 16:48], range(8), 1)  # (..., 8, 32)
    return _scaled(blocks, _bits(packed, range(0, 8, 4), 15).flatten(-3, -2) | fifth << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, scale = blocks.split([128, 64, 16, 2], dim=-1)
    low = _bits(low.unflatten(-1, (2, 64)), range(0, 8, 4), 15)  # (..., 2, 2, 64)
    high = _bits(high.unflatten(-1, (2, 32)), range(0, 8, 2), 3)  # (..., 2, 4, 32)
    q = (low.flatten(-3) | high.flatten(-3) << 4).float() - 32
    scales = _half(scale) * _whole(scales)  # (..., 16)
    return (scales[..., None] * q.unflatten(-1, (16, 16))).flatten(-2)


def _tq2_0(blocks: Tensor) -> Tensor:
    q = _bits(blocks[..., :64].unflatten(-1, (2, 32)), range(0, 8, 2), 3)  # (..., 2, 4, 32)
    return _half(blocks[..., 64:]) * (q.flatten(-3).float() - 1)


FORMATS = {
    format.name: format
    for format in (
        Format("F32", 0, 1, 4, _f32),
        Format("Q8_0", 8, 32, 34, _q8_0),
        Format("Q5_0", 6, 32, 22, _q5_0),
        Format("Q4_0", 2, 32, 18, _q4_0),
        Format("Q6_K", 14, 256, 210, _q6_k),
        Format("Q5_K", 13, 256, 176, _q5_k),
        Format("Q4_K", 12, 256, 144, _q4_k),
        Format("TQ2_0", 35, 256, 66, _tq2_0),
    )
}
