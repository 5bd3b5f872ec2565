"""Derivatives are exact on a quadratic, and watching a run does not change it."""

import copy
import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from minicpm_lite import ModelConfig
from minicpm_lite.config import MixtureConfig
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.scoring import next_token_loss
from minicpm_lite.training.curvature import (
    directional_curvature,
    directional_derivatives,
    watch_decay,
)
from minicpm_lite.training.objective import Objective, next_token
from minicpm_lite.training.processes import processes
from minicpm_lite.training.settings import Layout, TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

MODEL = ModelConfig(16, 40, 1, 2, 30, num_key_value_heads=1, max_position_embeddings=64)
CONFIG = TrainerConfig(batch_size=3, sequence_length=8)
TOKENS = torch.arange(400) * 7 // 3 % 30


def quadratic():
    """0.5 x'Ax + b'x at a point, with A, b and the point known."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    a, b = a + a.T, torch.randn(6, generator=generator, dtype=torch.float64)
    x = torch.randn(6, generator=generator, dtype=torch.float64)
    parts = [torch.nn.Parameter(x[:2].clone()), torch.nn.Parameter(x[2:].clone())]

    def loss():
        point = torch.cat(parts)
        return 0.5 * point @ a @ point + b @ point

    return a, b, x, parts, loss


@pytest.mark.parametrize("step", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_exact_on_a_quadratic_whatever_the_step_and_the_length(step, scale):
    a, b, x, parts, loss = quadratic()
    direction = torch.arange(1, 7).double()
    unit = direction / direction.norm()
    first, second = directional_derivatives(loss, parts, [scale * direction[:2], scale * direction[2:]], step)
    assert first == pytest.approx(((a @ x + b) @ unit).item(), rel=1e-9)
    assert second == pytest.approx((unit @ a @ unit).item(), rel=1e-8)
    assert torch.equal(torch.cat(parts).detach(), x), "the parameters are put back bit for bit"
    assert all(part.grad is None for part in parts)


def test_what_can_be_read_once_only_does_as_well():
    a, b, x, parts, loss = quadratic()
    direction = [torch.ones(2).double(), torch.ones(4).double()]
    expected = directional_derivatives(loss, parts, direction)
    assert directional_derivatives(loss, iter(parts), iter(direction)) == expected
    for wrong in (direction[:1], direction[::-1]):
        with pytest.raises(ValueError, match=r"There are 2 parameters, and the direction has \d tensors"):
            directional_derivatives(loss, parts, wrong)


def forward_difference(loss, parts, direction, step):
    with torch.no_grad():
        here = loss().item()
        for part, d in zip(parts, direction, strict=True):
            part += step * d
        there = loss().item()
        for part, d in zip(parts, direction, strict=True):
            part -= step * d
    return (there - here) / step, 0.0


def not_normalised(loss, parts, direction, step):
    length = math.sqrt(sum(d.square().sum().item() for d in direction))
    first, second = directional_derivatives(loss, parts, direction, step)
    return first * length, second * length**2


@pytest.mark.parametrize("wrong", [forward_difference, not_normalised])
def test_wrong_derivatives_miss_the_quadratic(wrong):
    a, b, x, parts, loss = quadratic()
    direction = torch.arange(1, 7).double()
    unit = direction / direction.norm()
    first, second = wrong(loss, parts, [direction[:2], direction[2:]], 0.1)
    exact = ((a @ x + b) @ unit).item(), (unit @ a @ unit).item()
    assert (first, second) != pytest.approx(exact, rel=1e-3)


def test_the_second_derivative_of_a_model_by_autograd_twice():
    """On a small network the difference agrees with a product of Hessian and direction."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    data, labels = torch.randn(16, 5).double(), torch.randint(3, (16,))
    parameters = list(net.parameters())
    direction = [torch.randn_like(p) for p in parameters]

    def loss():
        return F.cross_entropy(net(data), labels)

    gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
    along = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    twice = torch.autograd.grad(along, parameters)
    square = sum(d.square().sum() for d in direction)
    exact = (sum((h * d).sum() for h, d in zip(twice, direction, strict=True)) / square).item()
    first, second = directional_derivatives(loss, parameters, direction, step=1e-3)
    assert first == pytest.approx((along / square.sqrt()).item(), rel=1e-9)
    assert second == pytest.approx(exact, rel=1e-4)


def test_curvature_of_a_parabola_and_a_circle():
    """y = x² has curvature 2 at its tip and 2/5^1.5 at x = 1; a circle of radius 2 has 1/2 everywhere."""
    assert directional_curvature(0.0, 2.0) == 2
    assert directional_curvature(2.0, 2.0) == pytest.approx(2 / 5**1.5)
    x = 0.5
    slope, bend = -x / math.sqrt(4 - x * x), -4 / (4 - x * x) ** 1.5
    assert directional_curvature(slope, bend) == pytest.approx(0.5)


def test_directions_that_have_none():
    _, _, _, parts, loss = quadratic()
    for broken in (0.0, math.nan):
        with pytest.raises(ValueError, match="expected a finite length above 0"):
            directional_derivatives(loss, parts, [torch.full_like(p, broken) for p in parts])
    with pytest.raises(ValueError, match="step"):
        directional_derivatives(loss, parts, [torch.ones_like(p) for p in parts], step=0.0)


def test_a_failing_loss_leaves_the_parameters():
    _, _, x, parts, _ = quadratic()
    calls = iter(range(9))

    def failing():
        if next(calls) == 1:
            raise RuntimeError("no more memory")
        return sum(p.sum() for p in parts)

    with pytest.raises(RuntimeError, match="no more memory"):
        directional_derivatives(failing, parts, [torch.ones_like(p) for p in parts])
    assert torch.equal(torch.cat(parts).detach(), x)


@pytest.mark.parametrize("layout", [Layout(), Layout(1)], ids=str)
def test_watching_changes_nothing_in_bfloat16_either(layout):
    """Derivatives are taken of the whole weights, while the run computes with rounded ones."""

    def run():
        torch.manual_seed(0)
        config = replace(CONFIG, precision="bfloat16")
        return Trainer(Decoder(MODEL), TOKENS, WSD(0.01, 1, 3, 20), config, layout=layout)

    watched, alone = run(), run()
    readings = list(watch_decay(watched, 9, every=4))
    alone.train(9, progress=False)
    assert watched.losses == alone.losses and [reading.step for reading in readings] == [4, 8]
    assert all(reading.first < 0 and 0 < reading.cosine < 1 for reading in readings), (
        "downhill, from where it was"
    )


def test_watching_changes_nothing_and_reads_what_it_says():
    """The updates are those of a run that nobody watched; a reading agrees with gradients taken by hand."""

    def run():
        torch.manual_seed(0)
        return Trainer(Decoder(MODEL), TOKENS, WSD(0.01, 1, 3, 20), CONFIG)

    watched, alone = run(), run()
    readings = list(watch_decay(watched, 23, every=5))
    alone.train(23, progress=False)
    assert watched.losses == alone.losses
    assert [reading.step for reading in readings] == [5, 10, 15, 20] and watched.step == 23

    by_hand = run()
    gradients = []
    for step in (8, 9):
        by_hand.train(step, progress=False)
        loss = next_token_loss(by_hand.model, by_hand.batches[step])
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, by_hand.model.parameters())])
        )
    before = torch.nn.utils.parameters_to_vector(by_hand.model.parameters()).detach()
    by_hand.train(10, progress=False)
    update = torch.nn.utils.parameters_to_vector(by_hand.model.parameters()).detach() - before
    reading = readings[1]
    assert reading.cosine == pytest.approx(F.cosine_similarity(*gradients, dim=0).item(), abs=1e-5)
    assert reading.grad_norm == pytest.approx(gradients[1].norm().item(), rel=1e-4)
    assert reading.lr == pytest.approx(by_hand.schedule(10))
    assert reading.first == pytest.approx((gradients[1] @ update / update.norm()).item(), rel=1e-3)
    assert reading.curvature == directional_curvature(reading.first, reading.second)


class Centred(torch.nn.Module):
    """Keeps a mean that each pass in training mode moves, and takes it off."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        x = self.layer(x.to(self.layer.weight.dtype)).float()
        if self.training:
            self.mean = self.mean.lerp(x.detach().mean(0), 0.1)
        return x - self.mean


class Rows:
    def __getitem__(self, step):
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) + 1

    def identity(self):
        return {}


def _sizes(model, batch):
    loss = (model(batch) - 1).square().mean()
    return loss, loss.detach()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_watching_moves_no_buffers_and_reads_with_those_of_the_update(precision):
    def run():
        torch.manual_seed(0)
        config, objective = TrainerConfig(precision=precision), Objective("sizes", _sizes, len)
        return Trainer(Centred(), Rows(), WSD(0.05, 1, 20, 9), config, objective)

    watched, alone, by_hand = run(), run(), run()
    readings = list(watch_decay(watched, 17, every=5))
    alone.train(17, progress=False)
    assert watched.losses == alone.losses
    assert torch.equal(watched.model.mean, alone.model.mean)

    by_hand.train(9, progress=False)
    model, batch = copy.deepcopy(by_hand.model), by_hand.batches[9]
    by_hand.train(10, progress=False)
    parts = list(model.parameters())
    update = [p.detach() - start.detach() for p, start in zip(by_hand.model.parameters(), parts, strict=True)]

    def loss():
        return (functional_call(model, {"mean": model.mean.clone()}, batch) - 1).square().mean()

    reading = readings[1]
    assert (reading.first, reading.second) == directional_derivatives(loss, parts, update)


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_chance_is_that_of_the_update_and_goes_on_from_there(micro_batch):
    """Dropout: a reading by hand draws what the update drew, in each of its passes."""

    def run():
        torch.manual_seed(0)
        model, objective = nn.Sequential(Centred(), nn.Dropout(0.5)), Objective("sizes", _sizes, len)
        layout = Layout(micro_batch)
        return Trainer(model, Rows(), WSD(0.05, 1, 20, 9), TrainerConfig(), objective, layout)

    watched = run()
    readings = list(watch_decay(watched, 17, every=5))
    alone = run()
    alone.train(17, progress=False)
    assert watched.losses == alone.losses and len(set(alone.losses)) == 17
    by_hand = run()
    by_hand.train(9, progress=False)
    model, chance = copy.deepcopy(by_hand.model), torch.get_rng_state()
    passes, mean = by_hand.batches[9].split(micro_batch or 8), model[0].mean.clone()
    by_hand.train(10, progress=False)
    parts = list(model.parameters())
    update = [p.detach() - start.detach() for p, start in zip(by_hand.model.parameters(), parts, strict=True)]

    def loss():
        torch.set_rng_state(chance)
        model[0].mean = mean.clone()
        return sum((model(part) - 1).square().mean() for part in passes) / len(passes)

    reading, expected = readings[1], directional_derivatives(loss, parts, update)
    assert (reading.first, reading.second) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_a_reading_is_of_the_passes_of_the_update(micro_batch):
    """With experts each of them minimises its own balance loss, and their mean is not that of the whole."""
    torch.manual_seed(0)
    model = Decoder(replace(MODEL, init_std=0.2, mixture=MixtureConfig(4, 2, balance_loss_weight=1.0)))
    config = replace(CONFIG, max_grad_norm=1e9)  # so that nothing is clipped
    run = Trainer(model, TOKENS, WSD(0.003, 1, 9, 5), config, layout=Layout(micro_batch))
    alone = copy.deepcopy(run)
    reading = next(watch_decay(run, 4, every=4))
    alone.train(3, progress=False)
    before = [parameter.detach().clone() for parameter in alone.model.parameters()]
    alone.train(4, progress=False)
    update = [p.detach() - start for p, start in zip(alone.model.parameters(), before, strict=True)]
    length = torch.nn.utils.parameters_to_vector(update).norm()
    slope = sum((p.grad * part).sum() for p, part in zip(alone.model.parameters(), update, strict=True))
    assert reading.first == pytest.approx((slope / length).item(), rel=1e-4)


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_a_reading_holds_what_one_pass_needs(micro_batch):
    """However many passes make a step: what the others kept for their gradients is gone."""

    class Kept:
        """Something that a gradient needs."""

        def __init__(self, tensor) -> None:
            self.tensor = tensor
            kept.add(self)

    class Squashed(torch.nn.Sequential):
        def forward(self, x):
            found.append(len(kept))
            return super().forward(x)

    torch.manual_seed(0)
    kept, found = weakref.WeakSet(), []
    model = Squashed(torch.nn.Linear(4, 3), torch.nn.Tanh())
    objective = Objective("sizes", _sizes, len)
    run = Trainer(model, Rows(), WSD(0.05, 1, 20, 9), TrainerConfig(), objective, Layout(micro_batch))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda each: each.tensor):
        reading = next(watch_decay(run, 4, every=4))
    assert reading.first < 0 and len(found) == 7 * (8 // (micro_batch or 8) + (micro_batch == 3))
    assert set(found) == {0}


def test_a_pass_may_leave_a_parameter_out():
    """As it does an expert; its gradient is that of the others."""

    def one_side(model, batch):
        loss = model[int(batch.mean() > 1)](batch).square().mean()
        return loss, loss.detach()

    torch.manual_seed(0)
    sides = torch.nn.ModuleList(torch.nn.Linear(4, 1) for _ in range(2))
    run = Trainer(
        sides, Rows(), WSD(0.05, 1, 9, 9), TrainerConfig(), Objective("side", one_side, len), Layout(1)
    )
    reading = next(watch_decay(run, 2, every=2))
    assert math.isfinite(reading.first) and reading.second > 0


@pytest.mark.parametrize("form", ["linear", "sqrt"])
def test_an_update_at_a_rate_of_0_has_no_direction(form):
    torch.manual_seed(0)
    schedule = WSD(0.01, 1, 3, 4, form=form, final_ratio=0)
    before, last = watch_decay(Trainer(Decoder(MODEL), TOKENS, schedule, CONFIG), 8, every=4)
    assert before.first < 0 and before.curvature > 0
    assert last.lr == 0 and last.grad_norm > 0 and -1 <= last.cosine <= 1
    assert math.isnan(last.first) and math.isnan(last.second) and math.isnan(last.curvature)


def test_a_reading_takes_two_updates():
    torch.manual_seed(0)
    run = Trainer(Decoder(MODEL), TOKENS, WSD(0.01, 1, 3, 20), CONFIG)
    with pytest.raises(ValueError, match="every is 1; a reading takes two updates"):
        next(watch_decay(run, 10, every=1))


def test_a_cut_model_is_not_read():
    """Its parameters stand in no graph; what is gathered of them does."""
    torch.manual_seed(0)
    with processes():
        run = Trainer(Decoder(MODEL), TOKENS, WSD(0.01, 1, 3, 20), CONFIG, layout=Layout(sharded=True))
        with pytest.raises(ValueError, match=r"The model is cut over processes.*with Layout\(\)"):
            next(watch_decay(run, 6, every=3))
    assert run.step == 0


def test_a_loss_of_another_module_has_no_derivatives():
    def loss(model, batch):
        return next_token.loss(model if run.step < 3 else copy.deepcopy(model), batch)

    torch.manual_seed(0)
    objective = Objective("another's", loss, next_token.weight)
    run = Trainer(Decoder(MODEL), TOKENS, WSD(0.01, 1, 3, 20), CONFIG, objective)
    with pytest.raises(ValueError, match="loss of step 3 has no gradient for any weight of the Decoder"):
        next(watch_decay(run, 6, every=3))


def test_frozen_parameters_have_no_part_in_a_reading():
    torch.manual_seed(0)
    model = Decoder(MODEL)
    model.embed_tokens.requires_grad_(False)
    run = Trainer(model, TOKENS, WSD(0.01, 1, 3, 20), CONFIG)
    before = model.embed_tokens.weight.clone()
    assert [reading.first < 0 for reading in watch_decay(run, 6, every=3)] == [True, True]
    assert torch.equal(model.embed_tokens.weight, before)
