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
(outputs, bytes of a row). Where each bit lies is known to `inference.block_formats` and `inference.k_quants`
alone, which write the blocks and read them; here stands what the kernels need to know of them.

Source: ggml-common.h and ggml-quants.c of llama.cpp; gguf-py 0.19.0, which the tests hold this equal to.

Trap: neighbours in a byte are no neighbours in the row. The low and the high half of a byte of Q4_0 stand 16
weights apart, those of Q4_K 32, so that whole vectors can be unpacked by one shift.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..inference.block_formats import Q4_0, Q5_0, Q8_0, TQ2_0, BlockFormat
from ..inference.k_quants import Q4_K, Q5_K, Q6_K

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


def _reader(kind: BlockFormat) -> Callable[[Tensor], Tensor]:
    """Blocks of bytes, in any shape, as the weights that they stand for."""

    def unpack(blocks: Tensor) -> Tensor:
        values = kind.values(*kind.unpack(blocks.reshape(-1, kind.block_bytes)))
        return values.reshape(*blocks.shape[:-1], kind.block)

    return unpack


def _of(name: str, number: int, kind: BlockFormat) -> Format:
    return Format(name, number, kind.block, kind.block_bytes, _reader(kind))


FORMATS = {
    format.name: format
    for format in (
        Format("F32", 0, 1, 4, lambda blocks: blocks.view(torch.float32)),
        _of("Q8_0", 8, Q8_0),
        _of("Q5_0", 6, Q5_0),
        _of("Q4_0", 2, Q4_0),
        _of("Q6_K", 14, Q6_K),
        _of("Q5_K", 13, Q5_K),
        _of("Q4_K", 12, Q4_K),
        _of("TQ2_0", 35, TQ2_0),
    )
}
