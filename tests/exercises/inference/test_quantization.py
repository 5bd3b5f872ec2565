"""Checks of the chapter on quantisation accept right answers in other styles, and name what is missed."""

import math

import numpy as np
import pytest
import torch

from minicpm_lite.exercises.inference import quantization as check
from minicpm_lite.inference.mixtures import mixture


def round_in_numpy(weights, group, bits):
    top = 2 ** (bits - 1) - 1
    parts = weights.numpy().astype(np.float64).reshape(-1, group)
    step = np.abs(parts).max(1, keepdims=True) / top
    codes = np.rint(np.divide(parts, step, out=np.zeros_like(parts), where=step > 0))
    return (codes * step).reshape(weights.shape)


def read_by_numbers(block):
    step = float(np.frombuffer(bytes(block[:2].tolist()), np.float16)[0])
    raw = block[2:].tolist()
    return torch.tensor([step * (byte % 16 - 8) for byte in raw] + [step * (byte // 16 - 8) for byte in raw])


def gptq_by_inverse(weights, hessian, step):
    """The inverse of what remains, shrunk column by column, as the first papers had it."""
    w, inverse = weights.double().clone(), torch.linalg.inv(hessian.double())
    for j in range(len(w)):
        mark = step * (w[j] / step).round().clamp(-8, 7)
        w[j:] = w[j:] + (mark - w[j]) * inverse[0] / inverse[0, 0]
        w[j] = mark
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return w.float()


def product_in_numpy(block, x):
    raw, x = block.numpy(), x.numpy()
    step, low, high = raw[:2].view(np.float16)[0], raw[2:] % 16, raw[2:] // 16
    codes = np.concatenate([low, high]).astype(np.int64) - 8
    largest = np.abs(x).max()
    rounded = np.rint(x * (127 / largest)).astype(np.int64) if largest else np.zeros(32, np.int64)
    return float(step) * float(largest) / 127 * int(codes @ rounded)


def by_sets(weight, block, bits):
    return all(len(set(part)) <= 2**bits for row in weight.tolist() for part in _parts(row, block))


def _parts(row, block):
    return (row[at : at + block] for at in range(0, len(row), block))


EIGHT = check._EIGHT


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.round_groups, round_in_numpy),
        (check.read_q4_0, read_by_numbers),
        (check.forecast, 0.086),
        (check.forecast, torch.tensor(2.39 / 8 / math.sqrt(12))),
        (check.gptq_row, gptq_by_inverse),
        (check.block_product, product_in_numpy),
        (check.was_rounded, by_sets),
        (
            check.my_mixture,
            {name: "Q8_0" if "v_proj" in name else type for name, type in mixture("Q4_0", EIGHT).items()},
        ),
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
        (check.gptq_row, lambda w, h, step: (w / step).round().clamp(-8, 7) * step, "makes up for"),
        (check.my_mixture, mixture("Q6_K", EIGHT), "GB"),
    ],
)
def test_wrong_answers_are_told_why(exercise, answer, words):
    verdict = exercise.judge(answer)
    assert verdict.state == "wrong"
    assert words in verdict.message
