"""Right answers in another style than the chapter's are accepted."""

import copy

import pytest
import torch

from minicpm_lite.exercises.inference import ternary as check
from minicpm_lite.inference.ternary import TernaryLinear, make_ternary
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.parameters import count_parameters


def codes_by_comparing(weight, group):
    """Signs of what lies beyond the dead zone, in whole numbers and float64."""
    rows, columns = weight.shape
    sizes = weight.double().abs().reshape(rows, columns // group, group)
    scale = torch.clamp(sizes.sum(-1) / group, min=1e-5)
    outside = (sizes > scale[:, :, None] / 2).reshape(rows, columns)
    return (weight.sign() * outside).to(torch.int8), scale


def codes_of_repeated_scales(weight, group):
    """The scales as wide as the matrix; a list of two."""
    scale = torch.stack([part.abs().mean(1) for part in weight.split(group, dim=1)], dim=1).clamp_min(1e-5)
    return [(weight / scale.repeat_interleave(group, dim=1)).clamp(-1, 1).round(), scale]


def byte_by_its_number(byte):
    """The number of base 3 that it was made of, by a division."""
    number = byte * 243 // 256
    return tuple(number // place % 3 - 1 for place in (81, 27, 9, 3, 1))


def byte_that_is_never_masked(byte):
    codes = []
    for _ in range(5):
        byte = 3 * byte
        codes.append((byte >> 8) - 1)
    return codes


def byte_in_a_tensor(byte):
    left, codes = torch.tensor(byte), torch.zeros(5, dtype=torch.int8)
    for place in range(5):
        left = left * 3
        codes[place] = (left >> 8) - 1
        left = left & 255
    return codes


def weight_in_whole_steps(latent):
    """What cancels is added first; the codes by comparing, the least scale by a maximum."""
    scale = torch.maximum(latent.detach().abs().mean(1), torch.tensor(1e-5))[:, None]
    codes = (latent > scale / 2).float() - (latent < -scale / 2).float()
    return (latent - latent.detach()) + scale * codes


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latent):
        scale = latent.abs().mean(1, keepdim=True)
        return scale * latent.sign() * (latent.abs() > scale / 2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def weight_of_the_library(latent):
    linear = torch.nn.Linear(latent.shape[1], latent.shape[0], bias=False)
    layer = TernaryLinear(linear)
    del layer.latent
    layer.latent = latent
    return layer.weight


def megabytes_matrix_by_matrix(config, group, table_bits):
    with torch.device("meta"):
        model = Decoder(config)
    total = 0.0
    for name, p in model.named_parameters():
        bits = 32 if p.ndim == 1 else table_bits if name in ("embed_tokens.weight", "lm_head.weight") else 0
        total += p.numel() * bits if bits else p.numel() * 2 + p.numel() // group * 16
    return torch.tensor(total / 8 / 1e6, dtype=torch.float64)


def megabytes_in_single_precision(config, group, table_bits):
    return megabytes_matrix_by_matrix(config, group, table_bits).float()


def megabytes_with_norms_among_the_matrices(config, group, table_bits):
    count = count_parameters(config)
    norms = config.hidden_size * (1 + 2 * config.num_hidden_layers)
    return (count.others * (2 + 16 / group) + count.tables * table_bits + norms * 32) / 8e6


def fork_in_a_list(trainer, schedule, group):
    runs = [trainer.branch(schedule=schedule) for _ in range(2)]
    make_ternary(runs[1].model, group)
    return runs


def fork_of_a_branch(trainer, schedule, group):
    first = trainer.branch(schedule)
    second = first.branch(schedule)
    make_ternary(second.model, group=group)
    return first, second


def one_twice(trainer, schedule, group):
    run = trainer.branch(schedule)
    make_ternary(run.model, group)
    return run, run


def both_ternary(trainer, schedule, group):
    runs = trainer.branch(schedule), trainer.branch(schedule)
    for run in runs:
        make_ternary(run.model, group)
    return runs


def scale_by_trying_each(weights):
    best = None
    sizes = sorted(weights.abs().tolist(), reverse=True)
    for count in range(1, len(sizes) + 1):
        scale = sum(sizes[:count]) / count
        error = sum((size - scale) ** 2 for size in sizes[:count]) + sum(size**2 for size in sizes[count:])
        if best is None or error < best[0]:
            best = error, scale
    return best[1]


def scale_in_turn_from_many_starts(weights):
    def error(scale):
        return (weights - scale * (weights / scale).round().clamp(-1, 1)).square().sum()

    found = []
    for start in torch.linspace(0.05, 1, 60, dtype=weights.dtype) * weights.abs().max():
        scale = start
        for _ in range(100):
            kept = weights.abs() > scale / 2
            scale = weights[kept].abs().mean()
        found.append(scale)
    return min(found, key=error)


def _ternary(latent, least=1e-5):
    latent = latent.detach()
    scale = latent.abs().mean(1, keepdim=True).clamp(min=least)
    return (latent / scale).round().clamp(-1, 1) * scale


def codes_cut_off(weight, group):
    grouped = weight.unflatten(1, (-1, group))
    scale = grouped.abs().mean(2, keepdim=True).clamp(min=1e-5)
    return (grouped / scale).int().clamp(-1, 1).flatten(1), scale[..., 0]


def scale_plus_the_least(weight, group):
    grouped = weight.unflatten(1, (-1, group))
    scale = grouped.abs().mean(2, keepdim=True) + 1e-5
    return (grouped / scale).round().clamp(-1, 1).flatten(1), scale[..., 0]


def weight_as_it_was_with(scale_of, rounding):
    def weight(latent):
        kept = latent.detach()
        scale = scale_of(kept)
        return rounding(kept / scale).clamp(-1, 1) * scale + (latent - kept)

    return weight


def of_rows(latent):
    return latent.abs().mean(1, keepdim=True).clamp(min=1e-5)


def of_the_matrix(latent):
    return latent.abs().mean()


def scale_of_a_grid(weights):
    grid = torch.linspace(0, 1, 2001, dtype=weights.dtype)[1:, None] * weights.abs().max()
    errors = (weights - grid * (weights / grid).round().clamp(-1, 1)).square().sum(1)
    return grid[errors.argmin(), 0]


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.codes_and_scales, codes_by_comparing),
        (check.read_byte, byte_by_its_number),
        (check.read_byte, byte_in_a_tensor),
        (check.mended_weight, Straight.apply),
        (check.mended_weight, weight_in_whole_steps),
        (check.mended_weight, weight_of_the_library),
        (check.forecast_zeros, torch.tensor(0.25)),
        (check.forecast_zeros, 1 / 4),
        (check.ternary_megabytes, megabytes_matrix_by_matrix),
        (check.ternary_megabytes, megabytes_in_single_precision),
        (check.fork, fork_in_a_list),
        (check.fork, fork_of_a_branch),
        (check.best_scale, scale_by_trying_each),
        (check.best_scale, lambda weights: torch.tensor(scale_by_trying_each(weights.float()))),
        (check.best_scale, scale_in_turn_from_many_starts),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


@pytest.mark.parametrize(
    ("exercise", "answer", "idea"),
    [
        (check.codes_and_scales, codes_of_repeated_scales, "a loop"),
        (check.read_byte, lambda byte: [0] * 4, "five codes"),
        (check.read_byte, byte_that_is_never_masked, "keep only the rest"),
        (check.ternary_megabytes, megabytes_with_norms_among_the_matrices, "counted twice"),
        (check.read_byte, lambda byte: [code + 1 for code in byte_by_its_number(byte)], "the digits"),
        (
            check.codes_and_scales,
            codes_cut_off,
            "cut w / scale off",
        ),
        (check.forecast_zeros, 25, "not per cent"),
        (check.mended_weight, weight_as_it_was_with(of_the_matrix, torch.round), "The scale is the mean of"),
        (check.mended_weight, weight_as_it_was_with(of_rows, torch.trunc), "The quotient is cut off"),
        (check.mended_weight, weight_as_it_was_with(of_the_matrix, torch.trunc), "Two faults"),
        (
            check.ternary_megabytes,
            lambda *task: megabytes_matrix_by_matrix(*task) * 1e6 / 2**20,
            "2^20",
        ),
        (check.ternary_megabytes, lambda *task: megabytes_matrix_by_matrix(*task) * 1e6, "in bytes"),
        (
            check.mended_weight,
            lambda latent: 2 * of_rows(latent.detach()) * latent.detach().sign(),
            "The wrong weights are 0",
        ),
        (
            check.mended_weight,
            lambda latent: (
                latent + (_ternary(latent) - latent).detach()  # as it is mostly printed
            ),
            "only almost",
        ),
        (check.mended_weight, lambda latent: _ternary(latent, 0) + (latent - latent.detach()), "0 / 0"),
        (check.codes_and_scales, scale_plus_the_least, "nothing is added"),
        (check.best_scale, scale_of_a_grid, "as one of a grid"),
        (check.fork, lambda trainer, schedule, group: copy.copy(trainer), "Return two `Trainer`s"),
        (check.fork, one_twice, "one model"),
        (check.fork, both_ternary, "Both runs are ternary"),
        (check.fork, lambda *task: fork_in_a_list(*task)[::-1], "The order"),
        (check.fork, lambda *task: [run.model for run in fork_in_a_list(*task)], "themselves"),
        (check.best_scale, lambda weights: weights.abs().mean(), "squared error"),
    ],
)
def test_what_is_missed_is_said(exercise, answer, idea):
    verdict = exercise.judge(answer)
    assert verdict.state == "wrong" and any(each in verdict.message for each in idea.split("|"))
