"""Small texts, models and settings of sparse attention, which the tests of this folder share.

Everything is in float64: where two blocks score almost alike, rounding may choose either, and a test could
not tell that from a mistake.
"""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from minicpm_lite.config import ModelConfig, SparseConfig
from minicpm_lite.language.decoder import Decoder

SMALL = SparseConfig(
    kernel_size=4, kernel_stride=2, block_size=4, window_size=4, topk=2, dense_len=0
)  # three blocks: the first, the best, the own one
LEVELS = {
    "exact": SMALL,
    "approximate": replace(SMALL, approximate_lse=True),
    "two levels": replace(SMALL, coarse_topk=2),
}
MODEL = ModelConfig(
    hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6, vocab_size=50,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=200, init_std=0.5,
)  # fmt: skip
CLOSE = dict(atol=1e-10, rtol=1e-10)


def make_qkv(
    batch: int = 2,
    heads: int = 6,
    kv_heads: int = 2,
    queries: int = 50,
    keys: int = 50,
    dim: int = 8,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=random) for shape in shapes)


def make_model(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(MODEL).double().eval()


def make_ids(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(50, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@st.composite
def configs(draw) -> SparseConfig:
    """Settings of every shape that windows and blocks can have."""
    stride = draw(st.integers(1, 3))
    block = stride * draw(st.integers(1, 4))
    size = stride * draw(st.integers(1, block // stride))
    topk = draw(st.integers(1, 4))
    return SparseConfig(
        kernel_size=size,
        kernel_stride=stride,
        block_size=block,
        window_size=block * draw(st.integers(1, 3)),
        topk=topk,
        init_blocks=draw(st.integers(0, topk)),
        dense_len=draw(st.sampled_from([-1, 0, 7, 20])),
        approximate_lse=draw(st.booleans()),
        coarse_topk=draw(st.none() | st.integers(topk, topk + 3)),
    )
