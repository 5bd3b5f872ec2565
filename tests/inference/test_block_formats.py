"""The bytes of packed types: gguf-py's, bit for bit, over rows of every kind; and ways to get them wrong."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from minicpm_lite.inference import block_formats
from minicpm_lite.inference.block_formats import Int4, Int8, half_away_from_zero, low_and_high_nibbles
from minicpm_lite.inference.quantization import Quantized, block_format, dequantize, quantize

OURS = ["Q8_0", "Q5_0", "Q4_0", "TQ1_0", "TQ2_0"]  # those that gguf-py packs, too
LEAST_NORMAL = torch.finfo(torch.float32).tiny


def rows_of_every_kind(count: int, seed: int = 0, columns: int = 256) -> torch.Tensor:
    """Rows as weights are, and rows as they should not be: of each kind the same share."""
    torch.manual_seed(seed)
    rows = torch.randn(count, columns) * torch.exp(3 * torch.randn(count, 1))
    kinds = rows.chunk(10)
    kinds[1].copy_(torch.randint(-253, 254, kinds[1].shape) / 2)  # with a scale of 1 many ties
    kinds[1][:, ::32] = 127
    kinds[2].mul_(torch.rand_like(kinds[2]) < 0.05)  # mostly zeros, and whole blocks of them
    kinds[3].clamp_(-1, 1).sign_()  # one size, both signs
    kinds[4].mul_(1e-7)  # scales that float16 holds only in part, or not at all
    kinds[5].mul_(torch.where(torch.rand_like(kinds[5]) < 0.01, 1000, 1))  # outliers
    kinds[6].copy_(kinds[6].clamp(-1, 1) * 60_000)  # near the end of float16
    kinds[7].mul_(torch.where(torch.rand_like(kinds[7]) < 0.5, 1e-42, 1))  # denormal numbers among others
    kinds[8].abs_().neg_()  # one sign
    kinds[9].copy_(-torch.zeros_like(kinds[9]))
    kinds[9][::2, ::3] = 0.37
    return rows.clamp_(-60_000, 60_000)


def gguf_bytes(x: torch.Tensor, type: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quantize(x.numpy(), gguf.GGMLQuantizationType[type])


@pytest.mark.parametrize("type", OURS)
def test_bytes_are_those_of_gguf_py(type):
    x = rows_of_every_kind(10_000)
    expected = gguf_bytes(x, type)
    packed = quantize(x, type)
    assert np.array_equal(packed.data.numpy(), expected)
    theirs = gguf.dequantize(expected, gguf.GGMLQuantizationType[type])
    assert np.array_equal(dequantize(packed).numpy(), theirs)


@pytest.mark.parametrize("type", [*OURS, "Q4_K", "Q5_K", "Q6_K"])
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_any_bytes_are_read_as_gguf_py_reads_them(type, data, seed):
    """Also those that no quantiser would write."""
    kind, rows = block_format(type, 256), data.draw(st.integers(1, 4))
    packed = np.random.default_rng(seed).integers(0, 256, (rows, 256 // kind.block * kind.block_bytes))
    packed = packed.astype(np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(packed, gguf.GGMLQuantizationType[type])
    ours = dequantize(Quantized(type, torch.from_numpy(packed))).numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("type", [*OURS, "Q4_K", "Q5_K", "Q6_K", "INT4_G32", "INT4_G128", "INT8"])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_bytes_are_codes_and_scales_and_nothing_else(type, seed):
    """Packing what was unpacked gives the same bytes, for all codes that there are."""
    kind = block_format(type, 256)
    x = torch.randn(6, kind.block // kind.group, kind.group, generator=torch.Generator().manual_seed(seed))
    grid = kind.fit(x)
    codes = torch.randint(kind.lowest, kind.highest + 1, x.shape).to(torch.int16)
    packed = kind.pack(codes, grid)
    assert packed.shape == (6, kind.block_bytes) and packed.dtype == torch.uint8
    found, grid_found = kind.unpack(packed)
    assert torch.equal(found, codes)
    assert torch.equal(kind.pack(found, grid_found), packed)
    assert torch.equal(kind.values(found, grid_found), kind.values(codes, grid))


@pytest.mark.parametrize("type", OURS)
def test_weights_whose_scale_has_no_inverse_become_zero(type):
    """1 / scale is infinite then; what gguf-py's cast makes of it differs from one processor to another."""
    x = torch.full((1, 256), LEAST_NORMAL / 1000)
    x[0, ::2] = 0
    assert not dequantize(quantize(x, type)).any()


def test_a_row_of_int4_known_by_hand():
    """From -1 to 2 in fifteen steps of 0.2: as the paper has it, zero = 1/0.2 - 8 = -3, codes -8 to 7."""
    x = torch.linspace(-1, 2, 16)[None] + torch.tensor([0.04, -0.04]).repeat(8)
    x[0, 0], x[0, 15] = -1, 2
    kind, groups = Int4(16), x[:, None]
    grid = kind.fit(groups)
    assert_close(grid.scale.flatten(), torch.tensor([0.2]), atol=1e-4, rtol=0)
    codes = kind.round(groups, grid) - 8
    papers = (x / 0.2 + (1 / 0.2 - 8)).round().clamp(-8, 7)
    assert torch.equal(codes.flatten().float(), papers.flatten())
    assert_close(0.2 * (papers - (1 / 0.2 - 8)), torch.linspace(-1, 2, 16)[None], atol=1e-6, rtol=0)


def test_a_row_of_int8_has_one_scale():
    x = torch.tensor([[127.0, -63.4, 0.5, -0.5, 1.5, 0.0]])
    codes, grid = Int8(6).unpack(quantize(x, "INT8").data)
    assert grid.scale.item() == 1 and codes.flatten().tolist() == [127, -63, 0, 0, 2, 0]  # halves to even


@pytest.mark.parametrize("type", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_lose_nothing(type):
    torch.manual_seed(0)
    scale = torch.rand(50, 3, 1).half().float()
    x = (torch.randint(-1, 2, (50, 3, 256)) * scale).flatten(1)
    assert torch.equal(dequantize(quantize(x, type)), x)


def test_bits_a_weight():
    x = torch.randn(2, 256)
    expected = {"Q8_0": 8.5, "Q5_0": 5.5, "Q4_0": 4.5, "TQ1_0": 1.6875, "TQ2_0": 2.0625, "Q4_K": 4.5,
                "Q5_K": 5.5, "Q6_K": 6.5625, "INT4_G128": 4.25, "INT4_G64": 4.5, "INT8": 8 + 32 / 256}  # fmt: skip
    assert {type: quantize(x, type).bits_per_weight for type in expected} == expected


# Mistakes that people make. Each must give other bytes on the same rows.


def halves_to_even(patch):
    patch.setattr(type(block_formats.Q8_0), "nearest", staticmethod(torch.round))


def neighbours_share_a_byte(patch):
    def pairs(codes):
        low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        return (low | high << 4).flatten(1)

    patch.setattr(block_formats, "low_and_high_nibbles", pairs)


def high_nibbles_first(patch):
    patch.setattr(
        block_formats, "low_and_high_nibbles", lambda codes: low_and_high_nibbles(codes.roll(16, dims=-1))
    )


def scale_without_its_sign(patch):
    def fit(self, x):
        return self._grid(x.abs().amax(-1, keepdim=True) / 8)

    patch.setattr(type(block_formats.Q4_0), "fit", fit)


def scale_of_seven(patch):
    def fit(self, x):
        return self._grid(x.abs().amax(-1, keepdim=True) / 7)

    patch.setattr(type(block_formats.Q4_0), "fit", fit)


def rounded_by_the_stored_scale(patch):
    def grid(self, scale):
        half = scale.half()
        return block_formats.Grid(half.float(), block_formats.inverse_of(half.float()), None, (half,))

    for kind in (block_formats.Q8_0, block_formats.Q4_0):
        patch.setattr(type(kind), "_grid", grid)


def trits_without_the_ceiling(patch):
    right = torch.Tensor.div
    patch.setattr(torch.Tensor, "div", lambda x, by, **how: right(x - 242 if by == 243 else x, by, **how))


def trits_in_the_other_order(patch):
    right = type(block_formats.TQ2_0).pack

    def pack(self, codes, grid):
        return right(self, codes.view(-1, 2, 4, 32).flip(2).reshape(codes.shape), grid)

    patch.setattr(type(block_formats.TQ2_0), "pack", pack)


@pytest.mark.parametrize(
    ("type", "mistake"),
    [
        ("Q8_0", halves_to_even),
        ("Q4_0", neighbours_share_a_byte),
        ("Q4_0", high_nibbles_first),
        ("Q4_0", scale_without_its_sign),
        ("Q4_0", scale_of_seven),
        ("Q4_0", rounded_by_the_stored_scale),
        ("Q8_0", rounded_by_the_stored_scale),
        ("TQ1_0", trits_without_the_ceiling),
        ("TQ2_0", trits_in_the_other_order),
    ],
)
def test_wrong_bytes_are_told_apart(type, mistake, monkeypatch):
    x = rows_of_every_kind(1000)
    mistake(monkeypatch)
    assert not np.array_equal(quantize(x, type).data.numpy(), gguf_bytes(x, type))


def test_half_away_from_zero_at_the_edge():
    """0.49999997 + 0.5 rounds to 1 in float32, so adding a half and cutting off is wrong."""
    edge = torch.tensor([0.49999997, -0.49999997, 0.5, -0.5, 2.5, -2.5, 8388607.5])
    found = half_away_from_zero(edge[None, None])
    assert found.flatten().tolist() == [0, 0, 1, -1, 3, -3, 8388608]
