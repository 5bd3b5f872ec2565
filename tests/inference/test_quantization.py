"""Rounding to nearest: how far a weight can be from its value, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from minicpm_lite.inference.quantization import Quantized, block_format, dequantize, quantize

TYPES = ["Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_0", "TQ2_0", "TQ1_0", "INT4_G32", "INT4_G128", "INT8"]
floats = st.floats(-60_000, 60_000, width=32) | st.floats(-1, 1, width=32)
HALF = 2.0**-11  # what float16 loses of a number, as a share of it
LEAST_HALF = 2.0**-25  # and of one that is small


def require_nearest(x: torch.Tensor, type: str) -> None:
    """Every weight has the nearest value of its grid, as far as float16 knows the grid."""
    kind = block_format(type, x.shape[-1])
    groups = x.reshape(-1, kind.block // kind.group, kind.group)
    data = quantize(x, type).data.reshape(-1, kind.block_bytes)
    codes, grid = kind.unpack(data)
    error = (kind.values(codes, grid) - groups).abs()
    for step in (-1, 1):
        other = (codes + step).clamp(kind.lowest, kind.highest)
        theirs = (kind.values(other, grid) - groups).abs()
        lost = codes.abs() * (grid.scale.abs() * HALF + LEAST_HALF) + 1e-5 * groups.abs() + 1e-36
        assert bool((error <= theirs + 2 * lost).all()), f"{type}: code {step:+} is nearer"


@pytest.mark.parametrize("type", TYPES)
@given(x=arrays.arrays("float32", (2, 256), elements=floats))
@settings(max_examples=25, deadline=None)
def test_each_weight_gets_the_nearest_value(type, x):
    require_nearest(torch.from_numpy(x), type)


@pytest.mark.parametrize("type", ["Q8_0", "Q5_0", "Q4_0", "TQ2_0", "TQ1_0", "INT4_G32", "INT4_G128", "INT8"])
@given(x=arrays.arrays("float32", (2, 256), elements=floats))
@settings(max_examples=25, deadline=None)
def test_the_error_is_at_most_half_a_step(type, x):
    """And what float16 loses; in Q4_0 and Q5_0 a step where a weight is beyond the last code."""
    x = torch.from_numpy(x)
    kind, packed = block_format(type, 256), quantize(x, type)
    groups = x.reshape(-1, kind.block // kind.group, kind.group)
    grid = kind.fit(groups)
    step = torch.where(grid.inverse != 0, 1 / grid.inverse, 0).abs()
    steps = torch.full_like(groups, 0.5)
    if type in ("Q4_0", "Q5_0"):
        opposite = groups * grid.inverse > kind.highest + 0.5
        steps[opposite] = 1
    codes = kind.round(groups, grid)
    lost = codes.abs() * (step * HALF + LEAST_HALF)
    if type.startswith("INT4"):  # the least weight is stored in float16, too; the last code falls short
        lost = 15 * (step * HALF + LEAST_HALF) + groups.abs().amax(-1, keepdim=True) * HALF + LEAST_HALF
    error = (dequantize(packed).view_as(groups) - groups).abs()
    assert bool((error <= steps * step + lost + 1e-5 * groups.abs() + LEAST_HALF).all())


@pytest.mark.parametrize("type", ["Q4_K", "Q5_K", "Q6_K"])
@given(x=arrays.arrays("float32", (1, 512), elements=st.floats(-1, 1, width=32)))
@settings(max_examples=25, deadline=None)
def test_within_its_grid_a_k_quant_is_at_most_half_a_step_off(type, x):
    kind, x = block_format(type, 512), torch.from_numpy(x)
    groups = x.reshape(-1, kind.block // kind.group, kind.group)
    codes, grid = kind.unpack(quantize(x, type).data.reshape(-1, kind.block_bytes))
    ends = torch.tensor([kind.lowest, kind.highest]).expand(*grid.scale.shape[:2], 2)
    values = kind.values(ends, grid)
    inside = (groups >= values.amin(-1, keepdim=True)) & (groups <= values.amax(-1, keepdim=True))
    error = (kind.values(codes, grid) - groups).abs()
    assert bool((error <= grid.scale.abs() / 2 + 1e-5)[inside].all())


def test_a_weight_of_the_other_sign_is_a_whole_step_off():
    """The bound of Q4_0 is reached: the format has no code 8."""
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1] = -8, 8
    assert dequantize(quantize(x, "Q4_0"))[0, :2].tolist() == [-8, 7]


@pytest.mark.parametrize("type", TYPES)
def test_shape_and_dtype_make_no_difference(type):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 256)
    packed = quantize(x, type)
    assert packed.shape == x.shape and dequantize(packed).shape == x.shape
    assert packed.bits_per_weight == 8 * packed.data.numel() / x.numel()
    flat = quantize(x.flatten(0, 1), type)
    assert torch.equal(flat.data, packed.data.flatten(0, 1)), "a row is packed by itself"
    assert torch.equal(quantize(x.transpose(0, 1), type).data, packed.data.transpose(0, 1))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert torch.equal(quantize(x.to(dtype), type).data, quantize(x.to(dtype).float(), type).data)


@pytest.mark.parametrize("type", TYPES)
def test_more_weights_than_are_taken_at_once(type, monkeypatch):
    x = torch.randn(7, 512)
    whole = quantize(x, type)
    monkeypatch.setattr("minicpm_lite.inference.quantization._AT_ONCE", 600)
    assert torch.equal(quantize(x, type).data, whole.data)
    assert torch.equal(dequantize(whole), dequantize(quantize(x, type)))


@pytest.mark.parametrize("type", [type for type in TYPES if type != "INT8"])
def test_what_is_rounded_already_hardly_moves(type):
    """Rounding twice is rounding once, but for scales that are fitted anew."""
    once = dequantize(quantize(torch.randn(20, 256), type))
    twice = dequantize(quantize(once, type))
    assert (twice - once).norm() <= 0.02 * once.norm()


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(type, broken):
    x = torch.randn(2, 256)
    x[1, 3] = broken
    with pytest.raises(ValueError, match="1 of 512 weights are infinite or no numbers"):
        quantize(x, type)


@pytest.mark.parametrize("type", [type for type in TYPES if type != "INT8"])
def test_weights_beyond_float16_are_refused(type):
    x = torch.randn(2, 256)
    x[0, 0] = 3e38
    with pytest.raises(ValueError, match="need a scale beyond 65,504"):
        quantize(x, type)


def test_a_row_that_is_no_multiple_of_the_block_is_refused():
    with pytest.raises(ValueError, match="Rows of 576 weights do not divide into blocks of 256, as Q4_K has"):
        quantize(torch.zeros(1, 576), "Q4_K")
    with pytest.raises(ValueError, match="Rows of 0 weights"):
        quantize(torch.zeros(1, 0), "Q8_0")


@pytest.mark.parametrize("type", ["Q4_2", "q4_0", "INT4", "INT4_G0", "INT4_G7", "", None, 4])
def test_an_unknown_type_is_refused(type, unchecked):
    with pytest.raises(ValueError, match="There is no type"):
        quantize(torch.zeros(1, 256), type)


@pytest.mark.parametrize(("type", "size"), [("Q4_0", 35), ("INT8", 4)])
def test_bytes_that_are_no_row_are_refused(type, size):
    with pytest.raises(ValueError):
        dequantize(Quantized(type, torch.zeros(1, size, dtype=torch.uint8)))


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "INT8"])
def test_no_rows_are_packed_as_no_rows(type):
    packed = quantize(torch.zeros(0, 64), type)
    assert packed.shape == (0, 64) and dequantize(packed).shape == (0, 64)


def test_weights_beyond_float32_are_named_so():
    with pytest.raises(ValueError, match="Weights as large as 1e\\+39 are beyond float32"):
        quantize(torch.full((1, 32), 1e39, dtype=torch.float64), "INT8")
