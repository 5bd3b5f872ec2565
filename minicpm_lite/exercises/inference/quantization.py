"""Checks and quiz of the chapter on quantisation."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...config import load_config
from ...inference.mixtures import mixture, packed_size
from ...inference.quantization import dequantize, quantize
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _groups(
    weights, group, bits, highest=None, by_row=False, rounded=torch.round, inner=False, offset=0, guarded=True
):
    top = (2 ** (bits - 1) - 1 if highest is None else highest) + offset
    parts = weights.reshape(*weights.shape[:-1], -1, weights.shape[-1] if by_row else group)
    size = parts.abs().mean(-1, keepdim=True) if inner else parts.abs().amax(-1, keepdim=True)
    step = size / top
    codes = rounded(parts / (torch.where(step > 0, step, 1) if guarded else step)).clamp(-top, top)
    return (codes * step).reshape(weights.shape)


@exercise(
    "round groups",
    wrong=(
        lambda weights, group, bits: _groups(weights, group, bits, by_row=True),
        lambda weights, group, bits: _groups(weights, group, 4),
        lambda weights, group, bits: _groups(weights, 4, bits),
        lambda weights, group, bits: _groups(weights, group, bits, offset=1),  # 8 levels on each side
        lambda weights, group, bits: _groups(weights, group, bits, highest=2**bits - 1),
        lambda weights, group, bits: _groups(weights, group, bits, rounded=torch.trunc),
        lambda weights, group, bits: _groups(weights, group, bits, rounded=torch.floor),
        lambda weights, group, bits: _groups(weights, group, bits, inner=True),
        lambda weights, group, bits: _groups(weights, group, bits).reshape(-1, group),
        lambda weights, group, bits: _groups(weights, group, bits, guarded=False),
        lambda weights, group, bits: weights,
    ),
    without=("a loop", "quantize", "dequantize"),
)  # fmt: skip
def round_groups(answer):
    """Each group has a step of its own, so a large weight spoils its own group and no other."""
    by_hand = torch.tensor([[0.86, -0.33, 0.14, -1.4, 0.52, 0.05, 1.06, -0.72]])
    assert same(answer(by_hand.clone(), 8, 4), [[0.8, -0.4, 0.2, -1.4, 0.6, 0.0, 1.0, -0.8]]), (
        "The eight weights of the pencil example, one group, 4 bits: the step is 1.4 / 7 = 0.2."
    )
    halves = answer(by_hand.clone(), 4, 4)
    assert same(halves, _groups(by_hand, 4, 4)), (
        "The same in two groups of four: the second group's largest is 1.06, so its step is 1.06 / 7. "
        "The result has the shape of the weights."
    )
    for seed, (group, bits) in enumerate(((4, 3), (16, 4), (8, 8), (32, 2))):
        weights = _drawn(seed, 3, 64)
        got = answer(weights.clone(), group, bits)
        assert tuple(got.shape) == (3, 64), "The result has the shape of the weights."
        assert same(got, _groups(weights, group, bits)), (
            f"Groups of {group} with {bits} bits: codes go from -{2 ** (bits - 1) - 1} to "
            f"{2 ** (bits - 1) - 1}, and the largest size of a group is the last code."
        )
    weights = torch.cat([torch.zeros(1, 8), _drawn(9, 1, 8)], dim=1)
    got = answer(weights.clone(), 8, 4)
    assert same(got, _groups(weights, 8, 4)), "A group of zeros has step 0. It stays zeros, and no NaN."


def _q4_0_values(block, pairs=False, swapped=False, offset=8, sign=True, start=2, order="<"):
    data = torch.as_tensor(block, dtype=torch.uint8)
    scale = data[:2].flip(0) if order == ">" else data[:2]
    scale = scale.contiguous().view(torch.float16).float()
    scale = scale if sign else scale.abs()
    low, high = (data[start:] & 15).float(), (data[start:] >> 4).float()
    if swapped:
        low, high = high, low
    codes = torch.stack([low, high], 1).flatten() if pairs else torch.cat([low, high])
    return scale * (codes - offset)


@exercise(
    "read Q4_0",
    wrong=(
        lambda block: _q4_0_values(block, pairs=True),
        lambda block: _q4_0_values(block, swapped=True),
        lambda block: _q4_0_values(block, offset=7.5),
        lambda block: _q4_0_values(block, offset=0),
        lambda block: _q4_0_values(block, offset=7),
        lambda block: _q4_0_values(block, sign=False),
        lambda block: _q4_0_values(block, order=">"),
        lambda block: _q4_0_values(block, pairs=True, offset=7.5),
        lambda block: _q4_0_values(block).unsqueeze(0),
    ),
    without=("dequantize",),
)
def read_q4_0(answer):
    """These are the values that llama.cpp reads from the same 18 bytes."""
    for seed, sign in enumerate((1, -1, 1)):
        weights = _drawn(seed, 1, 32)
        weights[0, seed] = 4.0 * sign
        packed = quantize(weights, "Q4_0")
        got, expected = answer(packed.data[0].clone()), dequantize(packed)[0]
        assert tuple(getattr(got, "shape", ())) == (32,), "18 bytes are one block: 32 values, in one row."
        ratio = torch.as_tensor(got, dtype=torch.float32)
        assert same(ratio.sort().values, expected.sort().values), (
            "These are not the values that were stored, in whatever order. Look at the 16 codes of the "
            "film: which one stands for zero? And what is the sign of the scale?"
            if sign > 0
            else "Here the largest weight is negative, so the scale is positive, before it was negative."
        )
        assert same(ratio, expected), (
            "The values are right, and their order is not: which two weights share a byte, and which of them "
            "stands in the low half?"
        )
    zeros = quantize(torch.zeros(1, 32), "Q4_0")
    assert same(answer(zeros.data[0].clone()), [0.0] * 32), "A block of zeros is read as zeros."


_NORMAL_32 = 0.0859  # RMS error over RMS, 32 normal weights in Q4_0, mean of a million blocks


@exercise(
    "forecast",
    wrong=(0.299, 0.299 / 2, 0.299**2 / 12, 0.074, 0.043, 0.0986, "0.086", 0.17),
)
def forecast(answer):
    """Errors are spread evenly over a step, and the root of the mean square of that is the step over √12."""
    assert not isinstance(answer, str), f"Expected a number, not the text {answer!r}."
    assert not same(answer, 0.299, tolerance=0.01), (
        "That is the step. An error lies anywhere between minus half a step and half a step; what is the "
        "root of its mean square?"
    )
    assert abs(float(answer) / _NORMAL_32 - 1) < 0.05, (
        "First the step, as a share of σ: the largest weight is the code -8. Then the error, which is spread "
        "evenly over one step; its mean square is a twelfth of the square of the step."
    )


def _gptq_row(weights, hessian, step, lowest=-8, highest=7, factor=None, sign=-1, backwards=False):
    w, h = weights.clone().double(), hessian.double()
    found = torch.zeros_like(w)
    order = list(range(len(w)))[:: -1 if backwards else 1]
    for place, j in enumerate(order):
        found[j] = step * (w[j] / step).round().clamp(lowest, highest)
        rest = order[place + 1 :]
        if rest:
            change = found[j] - w[j]
            inner, cross = h[rest][:, rest], h[rest, j]
            if factor == "diagonal":
                w[rest] = w[rest] + sign * cross / h[rest, rest] * change
            elif factor == "own":
                w[rest] = w[rest] + sign * cross / h[j, j] * change
            else:
                w[rest] = w[rest] + sign * torch.linalg.solve(inner, cross) * change
    return found.to(weights.dtype)


@exercise(
    "GPTQ of a row",
    wrong=(
        lambda weights, hessian, step: step * (weights / step).round().clamp(-8, 7),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, sign=1),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, factor="diagonal"),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, factor="own"),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, lowest=-1000, highest=1000),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, lowest=-7),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, backwards=True),
        lambda weights, hessian, step: _gptq_row(weights, torch.eye(len(weights)), step),
        lambda weights, hessian, step: _gptq_row(weights, hessian, 1.0),
    ),
    without=("gptq",),
)
def gptq_row(answer):
    """One weight is rounded; the others, as far as they are free, mend what that did to the output."""
    two = torch.tensor([1.4, 0.4]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    assert same(answer(two[0].clone(), two[1].clone(), 1.0), [1.0, 1.0]), (
        "The example of the text: 1.4 becomes 1, and what that takes away the second weight makes up for. "
        "0.4 becomes 0.4 + 1 · 0.4 = 0.8, and is rounded to 1."
    )
    assert same(answer(two[0].clone(), torch.eye(2), 1.0), [1.0, 0.0]), (
        "If inputs have nothing in common, no weight can mend another, and each is rounded to its nearest."
    )
    assert same(answer(torch.tensor([2.6]), torch.eye(1), 1.0), [3.0]), (
        "A single weight has nobody to help it."
    )
    for seed, step in enumerate((0.25, 0.4, 0.3, 0.2)):
        weights, x = _drawn(seed, 6), _drawn(seed + 50, 9, 6) @ _drawn(seed + 70, 6, 6)
        hessian = x.T @ x + 0.05 * torch.eye(6)
        got, expected = answer(weights.clone(), hessian.clone(), step), _gptq_row(weights, hessian, step)
        assert same(got[0], expected[0], 1e-4), (
            "The first weight has not been changed by anybody: it is rounded to the nearest multiple of the "
            f"step, with a code from -8 to 7. Here it is {weights[0]:.3f}, the step {step}."
        )
        assert same(got, expected, 1e-4), (
            "With six weights one comes out otherwise. All weights that are still free move together: the "
            "change of them that makes the error least solves H_rest · change = -(column j of H) · error."
        )
    weights = torch.tensor([3.0, -3.0, 0.1])
    assert same(answer(weights.clone(), torch.eye(3), 0.25), [1.75, -2.0, 0.0]), (
        "Codes end at -8 and 7: with a step of 0.25, 3 becomes 1.75, and -3 becomes -2."
    )


def _dot(block, x, offset=8, exact=False, levels=127, scaled=True, squared=False, pairs=False, rounded=True):
    data = torch.as_tensor(block, dtype=torch.uint8)
    scale = data[:2].contiguous().view(torch.float16).float().item()
    low, high = (data[2:] & 15).double(), (data[2:] >> 4).double()
    codes = (torch.stack([low, high], 1).flatten() if pairs else torch.cat([low, high])) - offset
    x = x.double()
    step = x.abs().max().item() / levels
    q = x if exact else x * 0 if step == 0 else (x / step).round() if rounded else (x / step).trunc()
    step = 1.0 if exact or not scaled else step
    return scale ** (2 if squared else 1) * step * float(codes @ q)


@exercise(
    "product of a block",
    wrong=(
        lambda block, x: _dot(block, x, exact=True),
        lambda block, x: _dot(block, x, offset=0),
        lambda block, x: _dot(block, x, levels=128),
        lambda block, x: _dot(block, x, levels=7),
        lambda block, x: _dot(block, x, scaled=False),
        lambda block, x: _dot(block, x, squared=True),
        lambda block, x: _dot(block, x, pairs=True),
        lambda block, x: _dot(block, x, rounded=False),
        lambda block, x: abs(_dot(block, x)),
    ),
    without=("linear", "dequantize", "reference"),
)
def block_product(answer):
    """This is what the kernel computes: whole numbers, and two multiplications of floats at the end."""
    for seed in range(4):
        block = quantize(_drawn(seed, 1, 32), "Q4_0").data[0]
        x = _drawn(seed + 10, 32) * 10.0 ** (seed - 1)
        got, expected, exact = (
            float(answer(block.clone(), x.clone())),
            _dot(block, x),
            _dot(block, x, exact=True),
        )
        assert not abs(got - exact) < 0.01 * abs(expected - exact), (
            "That is the product with x as it is. The kernel rounds x to 8 bits first: to multiples of the "
            "largest size in the group / 127."
        )
        assert abs(got - expected) < 1e-4 * max(1e-3, x.abs().max().item()), (
            f"The kernel gives {expected:.5f}, yours {got:.5f}. Codes of the weights, codes of x, the sum of "
            "their 32 products; then that times the scale of the weights and the step of x."
        )
    block = quantize(_drawn(7, 1, 32), "Q4_0").data[0]
    assert float(answer(block.clone(), torch.zeros(32))) == 0, "An x of zeros gives 0, and no NaN."


def _was_rounded(weight, block=32, bits=4, per=max, equal=True, whole=False):
    rows = weight.reshape(-1, weight.numel() if whole else block)
    counts = [len(set(row.tolist())) for row in rows]
    most = per(counts)
    return most <= 2**bits if equal else most < 2**bits


@exercise(
    "was rounded",
    wrong=(
        lambda weight, block, bits: _was_rounded(weight, block, bits, whole=True),
        lambda weight, block, bits: _was_rounded(weight, 32, bits),
        lambda weight, block, bits: _was_rounded(weight, block, 4),
        lambda weight, block, bits: _was_rounded(weight, block, bits, per=min),
        lambda weight, block, bits: _was_rounded(weight, block, bits, equal=False),
        lambda weight, block, bits: _was_rounded(weight[:1], block, bits),
        lambda weight, block, bits: not _was_rounded(weight, block, bits),
        lambda weight, block, bits: True,
        lambda weight, block, bits: _was_rounded(weight.flatten()[:block], block, bits),
    ),
)
def was_rounded(answer):
    """A file cannot hide it. It is the first thing to ask of weights on which methods are compared."""
    clean = _drawn(0, 4, 128)
    assert not answer(clean.clone(), 32, 4), "Normal numbers: 32 different ones in each block of 32."
    for seed, (type, block, bits) in enumerate((("INT4_G32", 32, 4), ("Q4_0", 32, 4), ("INT4_G64", 64, 4))):
        rounded = dequantize(quantize(_drawn(seed, 4, 128), type))
        assert answer(rounded.clone(), block, bits), (
            f"These were rounded to {type}: no block of {block} has more than {2**bits} values."
        )
    rounded = dequantize(quantize(_drawn(4, 4, 128), "INT4_G32"))
    assert not answer(rounded.clone(), 64, 4), (
        "block is an argument: these were rounded in blocks of 32, so 64 neighbours have more than 16 values."
    )
    many = dequantize(quantize(_drawn(5, 4, 512), "Q8_0"))
    assert not answer(many.clone(), 32, 4), "Q8_0 has more than 16 values a block."
    assert answer(torch.arange(8.0).repeat(4, 16), 32, 3), "bits is an argument: here are 8 values, 3 bits."
    assert not answer(torch.arange(16.0).repeat(2, 8), 32, 3), "Sixteen values are too many for 3 bits."
    assert answer(torch.arange(16.0).repeat(2, 8), 32, 4), "Sixteen values are what 4 bits can say."
    half = torch.cat([torch.zeros(2, 128), _drawn(6, 2, 128)])
    assert not answer(half.clone(), 32, 4), (
        "Some blocks have few values and others have many: that was not rounded."
    )
    shifted = dequantize(quantize(_drawn(8, 4, 128), "INT4_G32")) * 1e-3
    assert answer(shifted.clone(), 32, 4), "Small weights are weights, too: compare them as they are."


_BUDGET = 4.75e9  # bytes
_EIGHT = load_config("minicpm4-8b")
_Q6, _SMALL = mixture("Q6_K", _EIGHT), mixture("Q4_0", _EIGHT)


@exercise(
    "my mixture",
    wrong=(
        _Q6,
        _SMALL | {"lm_head.weight": "Q4_0"},
        {name: type for name, type in _SMALL.items() if name != "embed_tokens.weight"},
        {name: type for name, type in _SMALL.items() if "layers.31." not in name},
        _SMALL | {"layers.32.mlp.up_proj.weight": "Q4_0"},
        _SMALL | {"layers.0.mlp.up_proj.weight": "Q3"},
        "Q4_0",
        _SMALL,  # values are not more precise than the rest
    ),
)
def my_mixture(answer):
    """It fits. What it costs in loss, only data tell; a model that you can run is the place to ask."""
    assert isinstance(answer, Mapping), (
        f"Expected a type for each matrix by its name, as `mixture` gives it, not {type(answer).__name__}."
    )
    missing = sorted(set(_SMALL) - set(answer))
    assert not missing, f"{missing[0]} has no type; so it would stay in full precision."
    unknown = sorted(set(answer) - set(_SMALL))
    assert not unknown, f"The model has no matrix {unknown[0]!r}."
    size = packed_size(_EIGHT, answer, torch.float16)
    assert size.nbytes <= _BUDGET, f"It takes {size.nbytes / 1e9:.2f} GB; {_BUDGET / 1e9:.2f} are allowed."

    assert _bits(answer["lm_head.weight"]) >= 6, "The output layer was to have at least six bits."
    layers = range(_EIGHT.num_hidden_layers)
    values = [_bits(answer[f"layers.{layer}.self_attn.v_proj.weight"]) for layer in layers]
    rest = [_bits(answer[f"layers.{layer}.mlp.up_proj.weight"]) for layer in layers]
    assert min(values) > max(rest), "The values were to have more bits in every layer than what is widest."


def _bits(type: str) -> float:
    return quantize(torch.zeros(1, 4096), type).bits_per_weight


quiz = Quiz(
    [
        (
            "A file is called Q4_0. How many bits does one of its weights take?",
            ["4", "4.5", "4.5, and more where the mixture keeps 6 or 8 bits"],
            2,
            "Sixteen bits of scale for 32 codes are half a bit more; and the output layer of such a file has "
            "another type. In a small model it is a quarter of all weights.",
        ),
        (
            "GPTQ gives each weight an error that is larger than by rounding to nearest. Why would anybody "
            "want that?",
            [
                "Because larger errors average out better",
                "Because the errors of several weights cancel in the output on real inputs",
                "Because the scale becomes smaller",
            ],
            1,
            "What counts is the output, and inputs go together: errors of two weights can have opposite "
            "signs there.",
        ),
        (
            "What does the fold of AWQ change in a model that is not rounded?",
            ["Nothing but the last bits", "It loses a little", "It gains a little"],
            0,
            "Columns times c, and what feeds them divided by c: the product is the same.",
        ),
        (
            "The kernel multiplies codes of 4 bits by x in 8 bits. Which error does that add?",
            [
                "None: whole numbers are exact",
                "At most half a step of x in each group, times the sizes of the weights",
                "At most half a step of the weights",
            ],
            1,
            "The sum of whole numbers is exact; that x was rounded is not.",
        ),
        (
            "Weights of 4.5 bits are a seventh of those of 32. Why is decoding not seven times as fast?",
            [
                "Because unpacking costs as much as reading",
                "Because nibbles must be read twice",
                "Because attention, norms and Python take the time they took before",
            ],
            2,
            "Only the products shrink. What is left weighs the more, the smaller the model.",
        ),
    ]
)
