"""Checks and quiz of the chapter on quantisation."""

from collections.abc import Mapping
from statistics import mean, median

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


def _between(
    weights, group, bits, marks=0, by_row=False, rounded=torch.round, symmetric=False, smallest=0.0,
    shift=True, guarded=True,
):  # fmt: skip
    parts = weights.double().reshape(*weights.shape[:-1], -1, weights.shape[-1] if by_row else group)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    if symmetric:
        high = parts.abs().amax(-1, keepdim=True)
        low = -high
    step = ((high - low) / (2**bits - 1 + marks)).clamp(min=smallest)
    codes = rounded((parts - low) / (torch.where(step > 0, step, 1) if guarded else step))
    return (codes * step + (low if shift else 0)).reshape(weights.shape).to(weights.dtype)


def _with_zero_point(weights, group, bits):
    """The first mark is the multiple of the step that is nearest to the least weight, so that 0 is a mark."""
    parts = weights.double().unflatten(-1, (-1, group))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, 1)
    first = (low / step).round()
    codes = ((parts / step).round() - first).clamp(0, 2**bits - 1)
    return ((codes + first) * step).flatten(-2).to(weights.dtype)


@exercise(
    "round between",
    wrong=(
        lambda weights, group, bits: _between(weights, group, bits, by_row=True),
        lambda weights, group, bits: _between(weights, group, 4),
        lambda weights, group, bits: _between(weights, 4, bits),
        lambda weights, group, bits: _between(weights, group, bits, marks=1),  # one mark too many
        lambda weights, group, bits: _between(weights, group, bits, marks=-1),
        lambda weights, group, bits: _between(weights, group, bits, symmetric=True),
        lambda weights, group, bits: _between(weights, group, bits, rounded=torch.floor),
        lambda weights, group, bits: _between(weights, group, bits, rounded=torch.ceil),
        lambda weights, group, bits: _between(weights, group, bits, shift=False),
        lambda weights, group, bits: _between(weights, group, bits).reshape(-1, group),
        lambda weights, group, bits: _between(weights, group, bits, guarded=False),
        lambda weights, group, bits: _between(weights, group, bits, smallest=1e-3),
        lambda weights, group, bits: _between(weights, group, bits, smallest=1e-8),
        _with_zero_point,
        lambda weights, group, bits: weights,
    ),
    without=("a loop", "quantize", "dequantize"),
)
def round_between(answer):
    """Each group has its own first mark and its own step, so all of its codes are used."""
    by_hand = torch.tensor([[0.1, 1.6, 0.45, 0.8]])
    got = answer(by_hand.clone(), 4, 2)
    assert not same(got, _with_zero_point(by_hand, 4, 2)), (
        "These marks are whole multiples of the step, as with a zero point that is a whole number. Many "
        "formats do so, to have a mark at 0; here the first mark is the least weight itself, 0.1."
    )
    assert same(got, [[0.1, 1.6, 0.6, 0.6]]), (
        "By hand: 0.1, 1.6, 0.45 and 0.8 in one group with 2 bits. The marks are 0.1, 0.6, 1.1 and 1.6, for "
        "the step is (1.6 - 0.1) / 3; so 0.45 and 0.8 go to 0.6."
    )
    for seed, (group, bits) in enumerate(((4, 3), (16, 4), (8, 8), (32, 2))):
        weights = _drawn(seed, 3, 64) + 0.5 * seed
        got = answer(weights.clone(), group, bits)
        assert tuple(getattr(got, "shape", ())) == (3, 64), (
            "The result is a tensor with the shape of the weights."
        )
        assert same(got, _between(weights, group, bits), 1e-5), (
            f"Groups of {group} with {bits} bits have {2**bits} marks, the first at the least weight of the "
            "group and the last at its largest. How many steps lie between them?"
        )
    weights = _drawn(5, 2, 3, 16)
    assert same(answer(weights.clone(), 8, 4), _between(weights, 8, 4), 1e-5), (
        "With three dimensions it comes out otherwise: only the last one is cut into groups."
    )
    weights = _drawn(9, 1, 16) * 1e-9
    assert same(answer(weights.clone() * 1.0, 8, 4) * 1e9, _between(weights, 8, 4) * 1e9, 1e-4), (
        "These weights are about a billionth, and are to be rounded as exactly as others: a least size for "
        "the step, put there against a division by zero, is a mistake for them."
    )
    weights = torch.cat([torch.full((1, 8), 0.75), torch.zeros(1, 8), _drawn(9, 1, 8)], dim=1)
    assert same(answer(weights.clone(), 8, 4), _between(weights, 8, 4), 1e-5), (
        "In a group whose weights are all equal the step is 0. They stay as they are, and no NaN."
    )


def _q4_0_values(
    block, pairs=False, swapped=False, offset=8, sign=True, start=2, order="<", without_sign=False
):
    data = torch.as_tensor(block, dtype=torch.uint8)
    scale = data[:2].flip(0) if order == ">" else data[:2]
    scale = scale.contiguous().view(torch.float16).float()
    scale = scale if sign else scale.abs()
    low, high = (data[start:] & 15).float(), (data[start:] >> 4).float()
    if swapped:
        low, high = high, low
    codes = torch.stack([low, high], 1).flatten() if pairs else torch.cat([low, high])
    return scale * ((codes - offset) % 256 if without_sign else codes - offset)


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
        lambda block: _q4_0_values(block, without_sign=True),  # subtracted in uint8
        lambda block: _q4_0_values(block, pairs=True, without_sign=True),
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
        for pairs in (False, True):
            assert not same(ratio, _q4_0_values(packed.data[0], pairs=pairs, without_sign=True)), (
                "Bytes of the type uint8 have no sign: in them 3 - 8 is 251. Make the codes floats, or int8, "
                "before 8 is subtracted."
            )
        assert same(ratio.sort().values, expected.sort().values), (
            "These are not the values that were stored, in whatever order. In the figure of a block: what is "
            "taken from a stored code before it is multiplied, and what is the sign of the scale?"
            if sign > 0
            else "Where the largest weight was positive these were right, and here, where it is negative, "
            "they are not: the scale is stored with its sign, which is now another."
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
    assert not same(answer, 0.299 / 2, tolerance=0.005), (
        "That is half the step, the largest error. Most are smaller: what is the root of their mean square?"
    )
    assert not same(answer, 0.299**2 / 12, tolerance=0.0003), (
        "That is the mean of the square. Asked is its root, which is a size like that of a weight."
    )
    assert not same(answer, 0.299 / 4, tolerance=0.0005), (
        "That is the mean size of an error. In the root of the mean square large errors count more."
    )
    assert not same(answer, 2.39 / 7 / 12**0.5, tolerance=0.0005), (
        "That is the step over √12, as it should be, but of another step: the largest weight over 7. In Q4_0 "
        "it has the code -8."
    )
    assert abs(float(answer) / _NORMAL_32 - 1) < 0.05, (
        "Not yet. Two numbers decide: how far two marks are apart, if the largest weight has the code -8; "
        "and how errors are spread between two marks. The hints say more."
    )


def _gptq_row(
    weights, hessian, step, lowest=-8, highest=7, factor=None, sign=-1, order="falling", sort_back=True
):
    w, h = weights.clone().double(), hessian.double()
    found = torch.zeros_like(w)
    order = {
        "falling": h.diagonal().argsort(descending=True).tolist(),
        "rising": h.diagonal().argsort().tolist(),
        "as they stand": list(range(len(w))),
        "largest weight first": w.abs().argsort(descending=True).tolist(),
        "longest row of H first": h.norm(dim=1).argsort(descending=True).tolist(),
        "largest row of H first": h.abs().sum(1).argsort(descending=True).tolist(),
        "largest sum of H first": h.sum(1).argsort(descending=True).tolist(),
    }[order]
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
    return (found if sort_back else found[order]).to(weights.dtype)


def _beside_unsorted(weights, hessian, step, rows=False, columns=False):
    """The weights are sorted, and the hessian is not, or on one side only."""
    order = hessian.diagonal().argsort(descending=True)
    h = hessian[order] if rows else hessian
    h = h[:, order] if columns else h
    found = torch.empty_like(weights)
    found[order] = _gptq_row(weights[order], h, step, order="as they stand")
    return found


def _changes_its_input(weights, hessian, step):
    weights.copy_(_gptq_row(weights, hessian, step))
    return weights


def _damped(hessian):
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))


def _by_raw_inverse(weights, hessian, step):
    """Rows of the inverse of the whole hessian, where the factor's, or those of what is left, are meant."""
    order = hessian.diagonal().argsort(descending=True)
    w, inverse = weights.double()[order], torch.linalg.inv(hessian.double()[order][:, order])
    for j in range(len(w)):
        mark = step * (w[j] / step).round().clamp(-8, 7)
        w[j:] = w[j:] + (mark - w[j]) * inverse[j, j:] / inverse[j, j]
    found = torch.empty_like(w)
    found[order] = w
    return found.to(weights.dtype)


def _sorted_twice(weights, hessian, step):
    """Put back by the order itself, which is not its own inverse."""
    order = hessian.diagonal().argsort(descending=True)
    return _gptq_row(weights, hessian, step)[order][order]


_UNSORTED = (
    "The weights are sorted and H is not: its first row and its first column must be those of the weight "
    "that goes first. Sort both: hessian[order][:, order]."
)
_OTHER_ORDERS = (
    "rising",
    "largest weight first",
    "longest row of H first",
    "largest row of H first",
    "largest sum of H first",
)
_OF_ORDER = (
    "Each step is right, and the weights have their turns in another order. What counts is the diagonal of H "
    "alone, the square of each input, and not the rest of a row of H, nor the weight: the largest goes first."
)
_GPTQ_TOLD = (  # what is often missed, and the words for it
    (_beside_unsorted, _UNSORTED),
    (lambda weights, hessian, step: _beside_unsorted(weights, hessian, step, rows=True), _UNSORTED),
    (lambda weights, hessian, step: _beside_unsorted(weights, hessian, step, columns=True), _UNSORTED),
    (
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, order="as they stand"),
        "These are the columns in the order in which they stand. The one whose input is largest, by the "
        "diagonal of H, goes first.",
    ),
    (
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, sort_back=False),
        "The values are right, and stand in the order in which they were rounded: value i belongs to place "
        "order[i].",
    ),
    (
        _sorted_twice,
        "The values are right, and were sorted twice: found[order] = w puts value i back to place order[i], "
        "w[order] sorts once more.",
    ),
    (
        _by_raw_inverse,
        "These are rows of the inverse of the whole H. They are right for the first weight alone: after each "
        "step the inverse is that of H without the weights that are fixed, and its rows are in the factor U.",
    ),
    (
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, factor="diagonal"),
        "Each free weight moves as if it were the only one. They move together: two whose inputs are alike "
        "would mend the same error twice.",
    ),
    *(
        (
            lambda weights, hessian, step, order=order: _gptq_row(weights, hessian, step, order=order),
            _OF_ORDER,
        )
        for order in _OTHER_ORDERS
    ),
)


def _gptq_asked(answer, weights, hessian, step):
    """The row that comes back, its type, and whether what was given is as it was."""
    given = weights.clone(), hessian.clone()
    got = answer(*given, step)
    return got, str(getattr(got, "dtype", "")), torch.equal(given[0], weights), torch.equal(given[1], hessian)


@exercise(
    "GPTQ in order",
    wrong=(
        lambda weights, hessian, step: step * (weights / step).round().clamp(-8, 7),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, sign=1),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, factor="diagonal"),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, factor="own"),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, lowest=-1000, highest=1000),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, lowest=-7),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, order="as they stand"),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, order="rising"),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, order="largest weight first"),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, order="longest row of H first"),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, order="largest row of H first"),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, order="largest sum of H first"),
        lambda weights, hessian, step: _gptq_row(weights, hessian, step, sort_back=False),
        lambda weights, hessian, step: _gptq_row(weights, torch.eye(len(weights)), step),
        lambda weights, hessian, step: _gptq_row(weights, _damped(hessian), step),
        _by_raw_inverse,
        lambda weights, hessian, step: _gptq_row(weights, hessian, 1.0),
        lambda weights, hessian, step: _gptq_row(weights.double(), hessian, step),
        _beside_unsorted,
        lambda weights, hessian, step: _beside_unsorted(weights, hessian, step, rows=True),
        lambda weights, hessian, step: _beside_unsorted(weights, hessian, step, columns=True),
        _changes_its_input,
    ),
    without=("gptq",),
    ask=_gptq_asked,
)
def gptq_row(answer):
    """Who counts most is rounded first, when all the others are still free to mend what that did."""
    two = torch.tensor([0.4, 1.4]), torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    got, dtype, weights_stay, hessian_stays = answer(*two, 1.0)
    assert not same(got, [0.0, 1.0]), (
        "The row (0.4, 1.4), and H with 1, 1 and 1, 2: (0, 1) is what rounding to nearest gives. The "
        "second weight goes from 1.4 to 1, so the outputs lack 0.4 where both inputs are 1. The first one "
        "makes up for it by rising by 0.4; whoever lowers it has the sign the wrong way."
    )
    assert same(got, [1.0, 1.0]), (
        "The example of the text with its two weights exchanged: the second has the larger entry on the "
        "diagonal, 2, so it goes first, from 1.4 to 1. The first makes up for it: 0.4 becomes 0.8, and then "
        "1. The row comes back in the order in which it was given."
    )
    nearly = torch.tensor([1.4, 0.102]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    assert same(answer(*nearly, 1.0)[0], [1.0, 1.0]), (
        "No damping is wanted: the row (1.4, 0.102), with the H of the text. The first goes to 1, the "
        "second moves by 0.4 to 0.502 and so to 1. With one per cent more on the diagonal of H it would stay "
        "below a half."
    )
    assert weights_stay and hessian_stays, (
        "The weights that were given, or the hessian, have changed; work on a copy."
    )
    assert dtype == "torch.float32", (
        "The weights were float32, and the row that came back is "
        f"{dtype.removeprefix('torch.') or 'no tensor'}."
    )
    assert same(answer(torch.tensor([1.4, 0.4]), torch.eye(2), 1.0)[0], [1.0, 0.0]), (
        "If inputs have nothing in common, no weight can mend another, and each is rounded to its nearest."
    )
    assert same(answer(torch.tensor([2.6]), torch.eye(1), 1.0)[0], [3.0]), (
        "A single weight has nobody to help it."
    )
    got = answer(torch.tensor([3.0, -3.0, 0.1]), torch.eye(3), 0.25)[0]
    assert same(got, [1.75, -2.0, 0.0]), (
        "Codes end at -8 and 7. With a step of 0.25 they reach from -2 to 1.75, so 3 becomes 1.75 and "
        "-3 becomes -2. What is cut off is an error like any other."
    )
    looked = []  # (what came back, what should have, what was given)
    for seed, step in enumerate((0.25, 0.4, 0.3, 0.2)):
        weights, x = _drawn(seed, 6), _drawn(seed + 50, 9, 6) @ _drawn(seed + 70, 6, 6)
        hessian = x.T @ x + 0.05 * torch.eye(6)
        got, expected = answer(weights, hessian, step)[0], _gptq_row(weights, hessian, step)
        assert tuple(getattr(got, "shape", ())) == (6,), "Six weights were given, and six come back."
        looked.append((got, expected, (weights, hessian, step)))
    right = all(same(got, expected, 1e-4) for got, expected, _ in looked)
    for bad, told in _GPTQ_TOLD:
        assert right or not all(same(got, bad(*given), 1e-4) for got, _, given in looked), told
    for got, expected, (weights, hessian, step) in looked:
        first = int(hessian.diagonal().argmax())
        assert same(got[first], expected[first], 1e-4), (
            f"The largest on the diagonal of H is that of weight {first}: nobody has changed it when it "
            f"is rounded to the nearest multiple of {step}, with a code from -8 to 7. Here it is "
            f"{weights[first]:.3f}."
        )
    assert right, (
        "With six weights one comes out otherwise. All weights that are still free move together: the "
        "change of them that makes the error least solves H_rest · change = -(column j of H) · error, "
        "where the rest are those whose turn has not come. (Whoever sorts the weights sorts H, too, by "
        "rows and by columns.)"
    )


def _dot(
    codes, step, least, x, levels=127, exact=False, minimum="rounded", added=False, rounded=torch.round,
    in_a_byte=False,
):  # fmt: skip
    q, x = torch.as_tensor(codes).double(), x.double()
    size = x.abs().max().item() / levels
    p = x if exact else x * 0 if size == 0 else rounded(x / size)
    unit = 1.0 if exact else size
    of_minimum = {"rounded": unit * p.sum(), "exact": x.sum(), "none": 0.0, "count": 32.0, "codes": q.sum()}
    products = (q * p + 128) % 256 - 128 if in_a_byte else q * p
    product = step * unit * float(products.sum())
    return product + (1 if added else -1) * least * float(of_minimum[minimum])


@exercise(
    "product with a minimum",
    wrong=(
        lambda codes, step, least, x: _dot(codes, step, least, x, exact=True),
        lambda codes, step, least, x: _dot(codes, step, least, x, minimum="exact"),
        lambda codes, step, least, x: _dot(codes, step, least, x, minimum="none"),
        lambda codes, step, least, x: _dot(codes, step, least, x, minimum="count"),
        lambda codes, step, least, x: _dot(codes, step, least, x, minimum="codes"),
        lambda codes, step, least, x: _dot(codes, step, least, x, added=True),
        lambda codes, step, least, x: _dot(codes, step, least, x, levels=128),
        lambda codes, step, least, x: _dot(codes, step, least, x, levels=7),
        lambda codes, step, least, x: _dot(codes, step, least, x, rounded=torch.trunc),
        lambda codes, step, least, x: _dot(codes, step * step, least, x),
        lambda codes, step, least, x: torch.full((2,), _dot(codes, step, least, x)),
        lambda codes, step, least, x: _dot(codes, step, least, x, in_a_byte=True),
    ),
    without=("linear", "dequantize", "reference"),
)
def group_product(answer):
    """One sum of products of codes and one of codes of x: both whole, whatever type of number holds them."""
    by_hand = torch.zeros(32, dtype=torch.uint8), torch.zeros(32)
    by_hand[0][0], by_hand[0][1], by_hand[1][0], by_hand[1][1] = 5, 2, 1.27, 0.5
    got = _number(answer(by_hand[0].clone(), 0.5, 1.0, by_hand[1].clone()))
    assert not abs(got + 0.655) < 1e-4, (
        "Codes are bytes, and so is what a byte times a byte gives: 5 times 127 is 635, which has no room "
        "there and became 123. Make the codes int32, or floats, before they are multiplied."
    )
    assert abs(got - 1.905) < 1e-4, (
        "By hand: codes 5 and 2, step 0.5, minimum 1, so weights 1.5 and 0; x is 1.27 and 0.5, so its codes "
        "are 127 and 50, with a step of 0.01. The product is 1.905."
    )
    for seed in range(4):
        codes = torch.randint(0, 16, (32,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        x, step, least = _drawn(seed + 10, 32) * 10.0 ** (seed - 1), 0.1 + 0.05 * seed, 0.7 + 0.4 * seed
        got = _number(answer(codes.clone(), step, least, x.clone()))
        expected, size = _dot(codes, step, least, x), x.abs().max().item()
        exact, without = _dot(codes, step, least, x, exact=True), _dot(codes, step, least, x, minimum="none")
        close = 1e-4 * max(1e-3, size)
        assert not abs(got - exact) < close, (
            "That is the product with x as it is. The kernel rounds x to 8 bits first, to multiples of its "
            "largest size / 127, and both sums are of those."
        )
        assert not abs(got - without) < close, (
            "That is the sum of products alone. Each weight is step · code less the minimum: what do 32 "
            "minima take away?"
        )
        assert not abs(got - _dot(codes, step, least, x, minimum="exact")) < close, (
            "Nearly: the minimum is multiplied by the sum of x as it was, and the kernel knows only x as it "
            "was rounded."
        )
        assert not abs(got - _dot(codes, step, least, x, levels=128)) < close, (
            "The step of x is its largest size / 128 here. Codes of x go from -127 to 127, so it is / 127."
        )
        assert not abs(got - _dot(codes, step, least, x, rounded=torch.trunc)) < close, (
            "The codes of x are cut off here, as int() does and .to(torch.int32). They are the nearest "
            "whole numbers: round first."
        )
        assert abs(got - expected) < close, (
            f"The kernel gives {expected:.5f}, yours {got:.5f}. Codes of x, the sum of the 32 products, the "
            "sum of the codes of x; then the first times step and step of x, less the second times minimum "
            "and step of x."
        )
    codes = torch.arange(32, dtype=torch.uint8) % 16
    assert _number(answer(codes, 0.5, 1.0, torch.zeros(32))) == 0, "An x of zeros gives 0, and no NaN."


def _number(found):
    assert not isinstance(found, str) and getattr(found, "ndim", 0) == 0, (
        "The product of one group is one number, a float or a tensor without dimensions."
    )
    return float(found)


def _was_rounded(weight, block=32, bits=4, per=max, equal=True, whole=False, spare=0):
    rows = weight.reshape(-1, weight.numel() if whole else block)
    counts = [len(set(row.tolist())) for row in rows]
    most = per(counts)
    return most <= 2**bits + spare if equal else most < 2**bits


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
        lambda weight, block, bits: _was_rounded(weight, block, bits, spare=1),
        lambda weight, block, bits: _was_rounded((weight / 1e-3).round(), block, bits),
        lambda weight, block, bits: _was_rounded((weight / 1e-5).round(), block, bits),
        lambda weight, block, bits: _was_rounded(weight.flatten()[:block], block, bits),
        lambda weight, block, bits: _was_rounded(weight.flatten()[-block:], block, bits),
        lambda weight, block, bits: _was_rounded(weight.flatten()[: 100 * block], block, bits),
        lambda weight, block, bits: _was_rounded(weight[:, :block], block, bits),
        lambda weight, block, bits: _was_rounded(weight, block, bits, per=mean),
        lambda weight, block, bits: _was_rounded(weight, block, bits, per=median),
        lambda weight, block, bits: _was_rounded(weight.T, block, bits),
    ),
)
def was_rounded(answer):
    """Ask it before you compare methods on such weights. A no proves little: columns scaled later hide it."""
    clean = _drawn(0, 4, 128)
    assert not answer(clean.clone(), 32, 4), "Normal numbers: 32 different ones in each block of 32."
    values = torch.arange(16.0).repeat(64, 8)
    assert answer(values.clone(), 32, 4), (
        "Sixteen values are what 4 bits can say: a block may hold up to 2**bits of them, and 2**bits itself."
    )
    along = values + 100 * (torch.arange(128) // 32)
    assert answer(along.clone(), 32, 4), (
        "Each block may have sixteen values of its own: these four blocks of a row have, and the matrix as a "
        "whole holds 64. Count in each block, not in the whole matrix or row."
    )
    assert answer(along + 1000 * torch.arange(64.0)[:, None], 32, 4), (
        "Each block of a row holds sixteen values, and each row others: a block are neighbours in a row, and "
        "these were counted down the columns, or across rows."
    )
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
    assert not answer((torch.arange(32.0) % 17).repeat(2, 4), 32, 4), (
        "Seventeen values are one more than 4 bits can say: 2**bits is the most that a block may hold."
    )
    assert not answer(1e-6 * _drawn(7, 4, 128), 32, 4), (
        "These weights are about a millionth, and all different: count values as they are, and not what is "
        "left of them at some tolerance."
    )
    one = torch.zeros(120, 128)
    one[90, 32:64] = torch.arange(32.0)
    assert not answer(one, 32, 4), (
        "One block of 480 holds 32 values, and all the others a single one. That one was not rounded: each "
        "block must be within the limit, and neither a mean nor the first hundred tell."
    )
    half = torch.cat([torch.zeros(2, 128), _drawn(6, 2, 128)])
    assert not answer(half.clone(), 32, 4), (
        "Some blocks have few values and others have many: that was not rounded."
    )
    shifted = dequantize(quantize(_drawn(8, 4, 128), "INT4_G32")) * 1e-3
    assert answer(shifted.clone(), 32, 4), "Small weights are weights, too: compare them as they are."


_BUDGET = 4.75e9  # bytes
_EIGHT = load_config("minicpm4-8b")
_Q6, _SMALL = mixture("Q6_K", _EIGHT), mixture("Q4_0", _EIGHT)
_WITH_VALUES = {name: "Q6_K" if "v_proj" in name else type for name, type in _SMALL.items()}


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
        _WITH_VALUES | {"embed_tokens.weight": "TQ2_0"},
        _WITH_VALUES | {"layers.3.mlp.down_proj.weight": "TQ1_0"},
        {name: "Q8_0" if "v_proj" in name else type for name, type in _SMALL.items()},
        {name: "Q5_0" if "v_proj" in name else type for name, type in _SMALL.items()},
        _WITH_VALUES | {"layers.3.self_attn.v_proj.weight": "Q4_K"},
        _WITH_VALUES | {"layers.3.mlp.up_proj.weight": "Q6_K"},
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
    coarse = [name for name, type in answer.items() if _bits(type) < 4]
    assert not coarse, f"No matrix was to have less than four bits; {coarse[0]} is {answer[coarse[0]]}."
    assert _bits(answer["lm_head.weight"]) >= 6, "The output layer was to have at least six bits."
    layers = range(_EIGHT.num_hidden_layers)
    for layer in layers:
        name = f"layers.{layer}.self_attn.v_proj.weight"
        assert answer[name] == "Q6_K", (
            f"The values of every layer were to be in Q6_K; {name} is {answer[name]}."
        )
    rest = {name: type for name, type in answer.items() if "up_proj" in name and _bits(type) >= _bits("Q6_K")}
    assert not rest, f"No up_proj was to have as many bits as the values; {min(rest)} is {rest[min(rest)]}."


def _bits(type: str) -> float:
    return quantize(torch.zeros(1, 4096), type).bits_per_weight


quiz = Quiz(
    [
        (
            "A file is called Q4_0. How many bits does one of its weights take?",
            ["4", "4.5", "4.5, and more where the mixture keeps 6 or 8 bits"],
            2,
            "Sixteen bits of scale for 32 codes are half a bit more; and the output layer of such a file has "
            "another type. In SmolLM2 it is a fifth of all weights.",
        ),
        (
            "GPTQ moves weights further than rounding to nearest does, on average. Why would anybody want "
            "that?",
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
            "All matrices of SmolLM2 are packed in 4.5 bits. Where does most of a token's time go now?",
            [
                "Into reading the packed weights",
                "Into unpacking nibbles and multiplying",
                "Into all that is no product with a matrix",
            ],
            2,
            "Attention, norms, and the many small operations between them take the time they took before; "
            "they weigh the more, the smaller the model.",
        ),
    ]
)
