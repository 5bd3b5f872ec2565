"""K-quants: readable by gguf-py, nearer to the weights than llama.cpp's own, wrong packings told apart.

``llama_cpp.safetensors`` holds rows of weights (normal, with heavy tails, shifted, of very different sizes,
of one sign) and what llama.cpp makes of them: the bytes of ``ggml_quantize_chunk``, without an importance
matrix, of the llama.cpp in llama-cpp-python 0.3.36.
"""

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from minicpm_lite.inference import k_quants
from minicpm_lite.inference.quantization import Quantized, block_format, dequantize, quantize

TYPES = ["Q4_K", "Q5_K", "Q6_K"]
STORED = load_file(Path(__file__).parent / "llama_cpp.safetensors")
WEIGHTS = STORED["weights"].float()


def squared(packed: Quantized, x: torch.Tensor) -> torch.Tensor:
    return (dequantize(packed) - x).square()


def read_by_gguf(packed: Quantized) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[packed.type]
    return torch.from_numpy(gguf.dequantize(packed.data.numpy(), kind))


@pytest.mark.parametrize("type", TYPES)
def test_gguf_py_reads_what_is_packed(type):
    packed = quantize(WEIGHTS, type)
    assert torch.equal(read_by_gguf(packed), dequantize(packed))


@pytest.mark.parametrize("type", TYPES)
def test_llama_cpp_s_bytes_are_read(type):
    theirs = Quantized(type, STORED[type])
    assert torch.equal(dequantize(theirs), read_by_gguf(theirs))
    assert squared(theirs, WEIGHTS).sum() < 0.01 * WEIGHTS.square().sum()


def importance(type: str, x: torch.Tensor) -> torch.Tensor:
    """What the searches count an error by, ours and llama.cpp's."""
    if type == "Q6_K":
        return x.square()
    groups = x.unflatten(-1, (-1, 32))
    return (groups.square().mean(-1, keepdim=True).sqrt() + groups.abs()).flatten(-2)


@pytest.mark.parametrize("type", TYPES)
def test_the_error_is_at_most_llama_cpp_s(type):
    """In what both searches minimise, for rows of each kind; and in plain squares all together."""
    ours, theirs = squared(quantize(WEIGHTS, type), WEIGHTS), squared(Quantized(type, STORED[type]), WEIGHTS)
    counted = importance(type, WEIGHTS)
    plain = []
    for kind in range(5):  # normal, heavy, shifted, sizes, one sign
        rows = slice(8 * kind, 8 * kind + 8)
        assert (counted * ours)[rows].sum() <= (counted * theirs)[rows].sum(), kind
        plain.append((ours[rows].sum() / theirs[rows].sum()).item())
    assert sum(plain) / 5 <= 1 and max(plain) <= 1.005


@pytest.mark.parametrize("type", TYPES)
def test_refinement_never_makes_a_block_worse(type, monkeypatch):
    counted = importance(type, WEIGHTS)

    def errors(rounds: int) -> torch.Tensor:
        monkeypatch.setattr(k_quants, "_ROUNDS", rounds)
        return (counted * squared(quantize(WEIGHTS, type), WEIGHTS)).unflatten(-1, (-1, 256)).sum(-1)

    none, some = errors(0), errors(2)
    assert bool((some <= none * (1 + 1e-5)).all())
    assert (some / none)[none > 0].mean() < 0.99


@pytest.mark.parametrize("type", TYPES)
def test_special_blocks(type):
    """Zeros, one value, one large weight among zeros, one sign, values that fill the codes exactly."""
    x = torch.zeros(6, 256)
    x[1] = 0.75
    x[2] = -0.75
    x[3, 100] = 5
    x[4] = torch.arange(256) % 16
    x[5] = -x[4]
    out = dequantize(quantize(x, type))
    assert not out[0].any()
    assert (out[1:3].abs() - 0.75).abs().max() < 0.01
    assert abs(out[3, 100] - 5) < 0.05 and (out[3].abs() > 0.01).sum() == 1
    assert (out[4:] - x[4:]).abs().max() < (0.02 if type != "Q6_K" else 0.25)  # half of 16 / 32


def test_scales_of_six_bits_lie_where_the_format_says():
    """By hand: the first four whole in a byte each, of the last four the low bits in one byte, the high
    above."""
    kind = block_format("Q4_K", 256)
    s, m = torch.arange(40, 48.0)[None, :, None], torch.arange(8, 64, 7.0)[None, :, None]
    grid = kind._grid(torch.ones(2, 1, 1, 1).half().unbind(), (s, m))
    twelve = kind.pack(torch.zeros(1, 8, 32, dtype=torch.int16), grid)[0, 4:16].tolist()
    s, m = [int(each) for each in s.flatten()], [int(each) for each in m.flatten()]
    for j in range(4):
        assert twelve[j] & 63 == s[j] and twelve[4 + j] & 63 == m[j]
        assert twelve[j] >> 6 == s[4 + j] >> 4 and twelve[4 + j] >> 6 == m[4 + j] >> 4
        assert twelve[8 + j] & 15 == s[4 + j] & 15 and twelve[8 + j] >> 4 == m[4 + j] & 15


# Mistakes that people make. gguf-py must read something else, or the error must be larger than llama.cpp's.


def minima_added(patch):
    right = k_quants._stretch_and_shift
    patch.setattr(k_quants, "_stretch_and_shift", lambda *x: (right(*x)[0], (-right(*x)[1]).clamp(min=0)))


def no_search(patch):
    def fit(x, importance, highest):
        low = x.amin(-1, keepdim=True).clamp(max=0)
        return (x.amax(-1, keepdim=True) - low) / highest, -low

    patch.setattr(k_quants, "_stretch_and_shift", fit)
    patch.setattr(k_quants, "_ROUNDS", 0)


def groups_not_in_pairs(patch):
    def low_and_high(codes):
        return (codes[:, :4] | codes[:, 4:] << 4).to(torch.uint8).flatten(1)

    patch.setattr(k_quants, "_in_pairs", lambda codes: codes)
    patch.setattr(k_quants, "low_and_high_nibbles", low_and_high)


def counts_one_too_high(patch):
    right = k_quants._KQuant._counted

    def counted(self, scales, factors):
        grid = right(self, scales, factors)
        half = len(grid.stored) // 2
        return self._grid(grid.stored[:half], [(n + 1).clamp(max=self.most) for n in grid.stored[half:]])

    patch.setattr(k_quants._KQuant, "_counted", counted)
    patch.setattr(k_quants, "_ROUNDS", 0)


@pytest.mark.parametrize("mistake", [minima_added, no_search, groups_not_in_pairs, counts_one_too_high])
def test_wrong_quantisers_are_told_apart(mistake, monkeypatch):
    mistake(monkeypatch)
    x = WEIGHTS[:8]
    ours = (read_by_gguf(quantize(x, "Q4_K")) - x).square().sum()
    assert ours > squared(Quantized("Q4_K", STORED["Q4_K"][:8]), x).sum()
