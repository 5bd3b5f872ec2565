"""Checks of the chapter on quantisation accept right answers in other styles, and name what is missed."""

import math

import numpy as np
import pytest
import torch

from minicpm_lite.exercises.inference import quantization as check
from minicpm_lite.inference.mixtures import mixture


def between_in_numpy(weights, group, bits):
    parts = weights.numpy().astype(np.float64).reshape(-1, group)
    low, high = parts.min(1, keepdims=True), parts.max(1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    codes = np.rint(np.divide(parts - low, step, out=np.zeros_like(parts), where=step > 0))
    return (low + codes * step).reshape(weights.shape)


def between_with_zero_point(weights, group, bits):
    parts = weights.unflatten(-1, (-1, group))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    codes = ((parts / step).round() + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * step).flatten(-2)


def read_by_numbers(block):
    step = float(np.frombuffer(bytes(block[:2].tolist()), np.float16)[0])
    raw = block[2:].tolist()
    return torch.tensor([step * (byte % 16 - 8) for byte in raw] + [step * (byte // 16 - 8) for byte in raw])


def gptq_by_inverse(weights, hessian, step):
    """Sorted first; then the inverse of what remains, shrunk column by column, as the first papers had it."""
    order = hessian.diagonal().argsort(descending=True)
    w, inverse = weights.double()[order], torch.linalg.inv(hessian.double()[order][:, order])
    for j in range(len(w)):
        mark = step * (w[j] / step).round().clamp(-8, 7)
        w[j:] = w[j:] + (mark - w[j]) * inverse[0] / inverse[0, 0]
        w[j] = mark
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return w[order.argsort()].float()


def product_in_numpy(codes, step, least, x):
    codes, x = codes.numpy().astype(np.int64), x.numpy()
    largest = np.abs(x).max()
    rounded = np.rint(x * (127 / largest)).astype(np.int64) if largest else np.zeros(32, np.int64)
    return float(largest) / 127 * (step * int(codes @ rounded) - least * int(rounded.sum()))


def product_as_tensor(codes, step, least, x):
    unit = x.abs().max() / 127
    p = (x / unit).nan_to_num(0.0).round()
    return step * unit * (codes.float() * p).sum() - least * unit * p.sum()


def read_in_bytes(block):
    step = block[:2].view(torch.float16).float()
    return step * (torch.cat([block[2:] & 15, block[2:] >> 4]) - 8)


def gptq_by_factor(weights, hessian, step, ends=(-8, 7), both=True, back=True):
    order = hessian.diagonal().argsort(descending=True)
    w, h = weights.double()[order], hessian.double()
    factor = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order] if both else h), upper=True)
    for j in range(len(w)):
        mark = (w[j] / step).round().clamp(*ends) * step
        w[j:] += (mark - w[j]) * factor[j, j:] / factor[j, j]
    found = w.clone()
    if back:
        found[order] = w
    return found.to(weights.dtype)


def product_in_bytes(codes, step, least, x):
    unit = float(x.abs().max()) / 127
    p = (x / (unit or 1)).round().to(torch.int8)
    return unit * (step * int((codes.to(torch.int8) * p).sum()) - least * int(p.sum()))


def product_by(codes, step, least, x, levels=127, whole=torch.round):
    unit = float(x.abs().max()) / levels
    p = whole(x / (unit or 1)).int()
    return unit * (step * int((codes.int() * p).sum()) - least * int(p.sum()))


def mean_count(weight, block):
    return np.mean([len(set(part)) for row in weight.tolist() for part in _parts(row, block)])


def by_sets(weight, block, bits):
    return all(len(set(part)) <= 2**bits for row in weight.tolist() for part in _parts(row, block))


def by_sorting(weight, block, bits):
    parts = np.sort(weight.numpy().reshape(-1, block), axis=1)
    return bool(((np.diff(parts, axis=1) != 0).sum(1) < 2**bits).all())


def most_values(parts):
    return max(len(torch.unique(part)) for part in parts)


def _parts(row, block):
    return (row[at : at + block] for at in range(0, len(row), block))


EIGHT = check._EIGHT


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.round_between, between_in_numpy),
        (check.read_q4_0, read_by_numbers),
        (check.forecast, 0.086),
        (check.forecast, torch.tensor(2.39 / 8 / math.sqrt(12))),
        (check.gptq_row, gptq_by_inverse),
        (check.group_product, product_in_numpy),
        (check.group_product, product_as_tensor),
        (check.was_rounded, by_sets),
        (check.was_rounded, by_sorting),
        (check.gptq_row, gptq_by_factor),
        (
            check.my_mixture,
            {name: "Q6_K" if "v_proj" in name else type for name, type in mixture("Q4_0", EIGHT).items()},
        ),
        (check.my_mixture, check._WITH_VALUES | {"layers.3.mlp.up_proj.weight": "Q5_0"}),
    ],
)
def test_other_styles_are_right(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


@pytest.mark.parametrize(
    ("exercise", "answer", "words"),
    [
        (check.read_q4_0, lambda block: read_by_numbers(block).view(2, 16).T.flatten(), "share a byte"),
        (check.forecast, 0.299, "That is the step"),
        (check.read_q4_0, read_in_bytes, "3 - 8 is 251"),
        (check.gptq_row, lambda w, h, step: (w / step).round().clamp(-8, 7) * step, "makes up for"),
        (check.gptq_row, lambda w, h, step: gptq_by_factor(w, h, step, ends=(-99, 99)), "Codes end at"),
        (check.gptq_row, lambda w, h, step: check._gptq_row(w, h, step, sign=1), "the sign the wrong way"),
        (check.gptq_row, lambda w, h, step: gptq_by_factor(w, check._damped(h), step), "No damping"),
        (check.gptq_row, check._by_raw_inverse, "in the factor U"),
        (check.gptq_row, check._sorted_twice, "sorted twice"),
        (check.forecast, 0.299 / 2, "half the step"),
        (check.forecast, 0.299**2 / 12, "Asked is its root"),
        (check.forecast, 0.299 / 4, "mean size"),
        (check.forecast, 2.39 / 7 / math.sqrt(12), "of another step"),
        (check.forecast, 0.17, "The hints say more"),
        (check.was_rounded, lambda w, block, bits: check._was_rounded(w, block, bits, spare=1), "Seventeen"),
        (
            check.was_rounded,
            lambda w, block, bits: check._was_rounded((w / 1e-3).round(), block, bits),
            "tolerance",
        ),
        (check.gptq_row, lambda w, h, step: gptq_by_factor(w, h, step, both=False), "Sort both"),
        (check.gptq_row, lambda w, h, step: gptq_by_factor(w, h, step, back=False), "place order[i]"),
        (check.gptq_row, lambda w, h, step: w.copy_(gptq_by_inverse(w, h, step)), "work on a copy"),
        (check.gptq_row, lambda w, h, step: gptq_by_inverse(w, h, step).double(), "float64"),
        (check.round_between, lambda w, group, bits: w, "By hand"),
        (check.round_between, between_with_zero_point, "zero point"),
        (check.group_product, lambda codes, step, least, x: step * float(codes.float() @ x), "By hand"),
        (check.group_product, product_in_bytes, "has no room"),
        (check.group_product, lambda *given: product_by(*given, levels=128), "so it is / 127"),
        (check.group_product, lambda *given: product_by(*given, whole=torch.trunc), "round first"),
        (check.was_rounded, lambda w, block, bits: mean_count(w, block) <= 2**bits, "neither a mean"),
        (
            check.was_rounded,
            lambda w, block, bits: by_sets(w.reshape(-1, block)[:100], block, bits),
            "hundred",
        ),
        (
            check.was_rounded,
            lambda w, block, bits: most_values(w.reshape(-1, block)) < 2**bits,
            "2**bits itself",
        ),
        (
            check.was_rounded,
            lambda w, block, bits: len(torch.unique(w)) <= 2**bits,
            "not in the whole matrix",
        ),
        (check.was_rounded, lambda w, block, bits: most_values(w) <= 2**bits, "not in the whole matrix"),
        (
            check.was_rounded,
            lambda w, block, bits: most_values(w.T.reshape(-1, block)) <= 2**bits,
            "down the columns",
        ),
        (
            check.gptq_row,
            lambda w, h, step: check._gptq_row(w, h, step, order="longest row of H first"),
            "in another order",
        ),
        (check.gptq_row, lambda w, h, step: check._gptq_row(w, h, step, order="rising"), "with its two"),
        (
            check.gptq_row,
            lambda w, h, step: check._gptq_row(w, h, step, order="largest sum of H first"),
            "in another order",
        ),
        (check.read_q4_0, lambda block: check._q4_0_values(block, offset=7.5), "figure of a block"),
        (
            check.my_mixture,
            {name: "Q8_0" if "v_proj" in name else type for name, type in mixture("Q4_0", EIGHT).items()},
            "in Q6_K",
        ),
        (check.my_mixture, check._WITH_VALUES | {"layers.3.mlp.up_proj.weight": "Q6_K"}, "No up_proj"),
        (check.my_mixture, mixture("Q6_K", EIGHT), "GB"),
        (check.my_mixture, check._WITH_VALUES | {"embed_tokens.weight": "TQ2_0"}, "less than four bits"),
    ],
)
def test_wrong_answers_are_told_why(exercise, answer, words):
    verdict = exercise.judge(answer)
    assert verdict.state == "wrong"
    assert words in verdict.message
