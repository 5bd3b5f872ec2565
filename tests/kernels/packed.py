"""Packed weights for the tests, of any bytes, and what gguf's numpy code makes of them."""

import gguf
import numpy as np
import torch
from hypothesis import strategies as st

from minicpm_lite.kernels import FORMATS

PACKED = [name for name in FORMATS if name != "F32"]
HALVES = {  # where float16 stand in a block
    "Q8_0": [0], "Q5_0": [0], "Q4_0": [0], "Q6_K": [208], "Q5_K": [0, 2], "Q4_K": [0, 2], "TQ2_0": [64],
}  # fmt: skip
VALUES = {  # and where what they scale stands
    "Q8_0": slice(2, 34), "Q5_0": slice(2, 22), "Q4_0": slice(2, 18), "Q6_K": slice(0, 192),
    "Q5_K": slice(16, 176), "Q4_K": slice(16, 144), "TQ2_0": slice(0, 64),
}  # fmt: skip
EXTREME = [0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 1.0, -1.0, 65504.0, -65504.0]  # zeros, subnormals, the largest


def make_packed(
    type: str, outputs: int, blocks: int, seed: int, scales: list[float] | None = None
) -> torch.Tensor:
    """(outputs, bytes of a row): random bytes, and scales from a list, or about those of a real model."""
    random = np.random.default_rng(seed)
    packed = random.integers(0, 256, (outputs, blocks, FORMATS[type].nbytes), dtype=np.uint8)
    for at in HALVES[type]:
        size = (outputs, blocks, 1)
        found = random.choice(scales, size) if scales else random.normal(0, 0.01, size)
        packed[..., at : at + 2] = found.astype(np.float16).view(np.uint8)
    return torch.from_numpy(packed.reshape(outputs, -1))


def by_gguf(packed: torch.Tensor, type: str) -> torch.Tensor:
    with np.errstate(invalid="ignore"):  # infinite scales are among what it is given
        return torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[type]))


def mins_of(packed: torch.Tensor, type: str) -> torch.Tensor:
    """For each weight the size of what is subtracted from it: what is left where all values are 0."""
    blocks = packed.clone().view(len(packed), -1, FORMATS[type].nbytes)
    if type not in ("Q4_K", "Q5_K"):
        return torch.zeros(len(packed), blocks.shape[1] * FORMATS[type].block)
    blocks[..., VALUES[type]] = 0
    return by_gguf(blocks.flatten(1), type).abs()


def make_case(type: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and x, the same in every process."""
    weight = torch.ones(7, 51).cumsum(1).sin() if type == "F32" else make_packed(type, 7, 2, seed=8)
    features = 51 if type == "F32" else 2 * FORMATS[type].block
    return weight, torch.arange(rows * features).sin().view(rows, features)


@st.composite
def packed_weights(draw) -> tuple[str, torch.Tensor]:
    """A type, and weights of it: few or many outputs, one block or three, scales of all sizes."""
    type = draw(st.sampled_from(PACKED))
    scales = draw(st.none() | st.lists(st.sampled_from(EXTREME), min_size=1, max_size=4))
    outputs, blocks = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    return type, make_packed(type, outputs, blocks, draw(st.integers(0, 2**32 - 1)), scales)
