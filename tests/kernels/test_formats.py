"""What packed bytes mean, held equal to gguf's own numpy code, bit for bit, in PyTorch and in C++."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import HALVES, PACKED, VALUES, by_gguf, make_packed, packed_weights

from minicpm_lite import kernels
from minicpm_lite.kernels import FORMATS, dequantize, find_format, formats
from minicpm_lite.kernels.build import built


def by_pytorch(packed: torch.Tensor, type: str) -> torch.Tensor:
    format = FORMATS[type]
    return format.unpack(packed.view(len(packed), -1, format.nbytes)).flatten(1)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in every bit, the sign of zero among them; one NaN is as good as another."""
    numbers = ~expected.isnan()
    return bool(
        found.shape == expected.shape
        and found.dtype == expected.dtype
        and torch.equal(found.isnan(), ~numbers)
        and torch.equal(found[numbers].view(torch.int32), expected[numbers].view(torch.int32))
    )


@pytest.mark.parametrize("name", PACKED)
def test_blocks_are_those_of_gguf(name):
    kind, format = gguf.GGMLQuantizationType[name], FORMATS[name]
    assert (format.name, format.number) == (name, kind.value)
    assert (format.block, format.nbytes) == gguf.GGML_QUANT_SIZES[kind]


def test_the_kernels_are_built_here():
    """Else the tests of this part would compare PyTorch with itself."""
    assert built("linear")


@given(packed_weights())
@settings(deadline=None, max_examples=150)
def test_weights_are_those_of_gguf(given):
    type, packed = given
    expected = by_gguf(packed, type)
    assert same_bits(by_pytorch(packed, type), expected)
    assert same_bits(dequantize(packed, type), expected)


@pytest.mark.parametrize("type", PACKED)
def test_any_bytes_are_read_as_gguf_reads_them(type):
    """Also where scales are infinite or no numbers, as in a damaged file."""
    packed = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (300, 2 * FORMATS[type].nbytes), dtype=np.uint8)
    )
    expected = by_gguf(packed, type)
    assert not expected.isfinite().all()
    assert same_bits(by_pytorch(packed, type), expected)
    assert same_bits(dequantize(packed, type), expected)


@pytest.mark.parametrize("scale", [*range(0, 1024, 37), 1023, 1024, 0x7BFF, 0x7C00, 0x7E00, 0x8001, 0xFC00])
def test_every_kind_of_scale_is_read(scale):
    """Zero, subnormal, normal, the largest, infinite, no number; also where subnormal floats are off."""
    packed = make_packed("Q8_0", 1, 1, seed=scale)
    packed[:, :2] = torch.tensor([scale & 255, scale >> 8])
    expected = by_gguf(packed, "Q8_0")
    torch.set_flush_denormal(True)
    try:
        assert same_bits(dequantize(packed, "Q8_0"), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("type", PACKED)
def test_rows_of_a_table_are_unpacked_in_any_shape(type):
    packed = make_packed(type, 6, 2, seed=1)
    ids = torch.tensor([[0, 5, 5], [2, 1, 0]])
    assert torch.equal(dequantize(packed[ids], type), by_gguf(packed, type)[ids])
    assert torch.equal(dequantize(packed[3], type), by_gguf(packed, type)[3])
    assert torch.equal(dequantize(packed[::2], type), by_gguf(packed, type)[::2])
    assert dequantize(packed[:0], type).shape == (0, 2 * FORMATS[type].block)


def test_float32_stays_what_it_is():
    weight = torch.randn(2, 3)
    assert dequantize(weight, "F32") is weight


# Wrong ones


def swap_nibbles(packed: torch.Tensor, type: str) -> torch.Tensor:
    """As if high and low halves of bytes were the other way round."""
    blocks = packed.clone().view(len(packed), -1, FORMATS[type].nbytes)
    values = blocks[..., VALUES[type]]
    blocks[..., VALUES[type]] = values << 4 | values >> 4
    return by_pytorch(blocks.flatten(1), type)


def forget_the_scale(packed: torch.Tensor, type: str) -> torch.Tensor:
    blocks = packed.clone().view(len(packed), -1, FORMATS[type].nbytes)
    at = HALVES[type][0]
    blocks[..., at : at + 2] = torch.tensor([0, 60])  # 1
    return by_pytorch(blocks.flatten(1), type)


def forget_the_min(packed: torch.Tensor, type: str) -> torch.Tensor:
    blocks = packed.clone().view(len(packed), -1, FORMATS[type].nbytes)
    blocks[..., 2:4] = 0
    return by_pytorch(blocks.flatten(1), type)


def interleave(packed: torch.Tensor, type: str) -> torch.Tensor:
    """As if the halves of a byte were neighbours in the row."""
    width = 32 if type in ("Q4_0", "Q5_0") else 64
    return by_pytorch(packed, type).unflatten(1, (-1, 2, width // 2)).mT.flatten(1)


WRONG = [
    *((swap_nibbles, type) for type in PACKED),
    *((forget_the_scale, type) for type in PACKED),
    *((forget_the_min, type) for type in ("Q4_K", "Q5_K")),
    *((interleave, type) for type in ("Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K")),
]


@pytest.mark.parametrize(("wrong", "type"), WRONG, ids=lambda each: getattr(each, "__name__", each))
def test_wrong_readings_are_rejected(wrong, type):
    packed = make_packed(type, 5, 2, seed=2)
    assert same_bits(by_pytorch(packed, type), by_gguf(packed, type))
    assert not same_bits(wrong(packed, type), by_gguf(packed, type))


# Refused


@pytest.mark.parametrize("type", ["Q4_1", "q4_0", "", 2, None])
def test_unknown_types_are_refused(type):
    with pytest.raises(ValueError, match=r"type is .*; expected one of F32, Q8_0, Q5_0, Q4_0, Q6_K, .*TQ2_0"):
        find_format(type)


@given(st.sampled_from(PACKED), st.integers(1, 2000))
def test_rows_are_whole_blocks(type, features):
    format = FORMATS[type]
    if features % format.block:
        with pytest.raises(
            ValueError, match=f"A row has {features} weights; {type} packs {format.block} at a"
        ):
            format.row_bytes(features)
    else:
        assert format.row_bytes(features) == make_packed(type, 1, features // format.block, 0).shape[1]


@pytest.mark.parametrize(
    ("weight", "type", "sentence"),
    [
        (
            torch.zeros(2, 17, dtype=torch.uint8),
            "Q4_0",
            r"\(2, 17\); Q4_0 expects bytes \(uint8\), 18 for each 32",
        ),
        (torch.zeros(2, 18, dtype=torch.int8), "Q4_0", "weight is torch.int8 of shape"),
        (torch.zeros(2, 18), "Q4_0", "weight is torch.float32"),
        (torch.zeros(2, 18, dtype=torch.uint8), "F32", "weight is torch.uint8 .*; F32 expects float32"),
        (torch.zeros(2, 18, dtype=torch.float64), "F32", "weight is torch.float64 .*; F32 expects float32"),
        (torch.zeros((), dtype=torch.uint8), "Q8_0", "Q8_0 expects bytes"),
    ],
)
def test_what_are_no_such_blocks_is_refused(weight, type, sentence):
    with pytest.raises(ValueError, match=sentence):
        kernels.dequantize(weight, type)


def test_the_table_of_the_docstring_is_that_of_the_formats():
    lines = [line.split() for line in formats.__doc__.splitlines()]
    table = {line[0]: line[1:4] for line in lines if line and line[0] in FORMATS}
    for name, format in FORMATS.items():
        bits = f"{8 * format.nbytes / format.block:g}"
        assert table[name] == [str(format.block), str(format.nbytes), bits]
