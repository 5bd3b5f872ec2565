"""The wind tunnel's instruments against exact values and numerical minimisation."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit, minimize_scalar

import minicpm_lite.training.wind_tunnel as wind_tunnel
from minicpm_lite import load_config
from minicpm_lite.config import ModelConfig, RopeScaling
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.scoring import context_only, next_token_loss
from minicpm_lite.training.memory import recompute_blocks
from minicpm_lite.training.optimizer import mup_groups
from minicpm_lite.training.wind_tunnel import (
    LossSurface,
    Sigmoid,
    batch_size_tokens,
    conditional_losses,
    coordinate_check,
    fit_loss_surface,
    fit_parabola,
    fit_power_law,
    fit_sigmoid,
    tokens_to_reach,
)


def shape(width: int, base: int | None = 24, **others) -> ModelConfig:
    return ModelConfig(
        hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=2,
        num_attention_heads=width // 12, vocab_size=64, scale_emb=12, scale_depth=1.4,
        dim_model_base=base, init_std=0.1, **others,
    )  # fmt: skip


# 1. µP


def test_the_groups_are_the_optimizer_s():
    assert wind_tunnel.mup_groups is mup_groups and "mup_groups" in wind_tunnel.__all__


WINDOW = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0))
CHECKED_WIDTHS = (24, 96, 384)


def growth(model_of, **options) -> dict[str, float]:
    """Exponent with which each activation grows with the width, after three updates."""
    sizes = []
    for width in CHECKED_WIDTHS:
        torch.manual_seed(0)
        sizes.append(coordinate_check(model_of(width), WINDOW, lr=0.02, updates=3, **options))
    return {
        name: float(np.polyfit(np.log(CHECKED_WIDTHS), np.log([size[name][-1] for size in sizes]), 1)[0])
        for name in sizes[0]
    }


def standard(width: int) -> Decoder:
    """The same weights as µP's at every width, but its logits are not divided."""
    muP = Decoder(shape(width))
    model = Decoder(shape(width, base=None))
    model.load_state_dict(muP.state_dict())
    return model


def test_activations_stay_flat_with_mup_and_grow_without():
    flat = growth(lambda width: Decoder(shape(width)))
    assert all(exponent < 0.15 for exponent in flat.values()), flat
    grown = growth(standard, parametrization="standard")
    assert grown["logits"] > 0.5 and grown["feed-forward"] > 0.5, grown


def test_half_of_the_rules_is_not_flat():
    rates_only = growth(standard)  # the logits are not divided; width_ratio is 1, so the rates neither
    assert rates_only["logits"] > 0.5
    multipliers_only = growth(lambda width: Decoder(shape(width)), parametrization="standard")
    assert max(multipliers_only.values()) > 0.3, "rates that are not divided must show"


def test_coordinate_check_counts_and_leaves_no_hooks():
    model = Decoder(shape(24))
    sizes = coordinate_check(model, WINDOW, 0.01, updates=2)
    assert set(sizes) == {"embedding", "attention", "feed-forward", "residual stream", "logits"}
    assert all(len(size) == 3 and min(size) > 0 for size in sizes.values())
    assert sizes["embedding"][0] != sizes["embedding"][1], "an update must move the table"
    assert not any(module._forward_hooks for module in model.modules())
    torch.manual_seed(1)
    fresh = Decoder(shape(24))
    before = fresh(WINDOW[:, :-1]).abs().mean().item()
    assert coordinate_check(fresh, WINDOW, 0.01, updates=1)["logits"][0] == pytest.approx(before)


def test_a_model_that_computes_blocks_again_has_the_same_sizes():
    """The second time, in the backward pass, nothing is noted."""
    kept, again = (Decoder(shape(24)) for _ in "ab")
    again.load_state_dict(kept.state_dict())
    recompute_blocks(again)
    assert coordinate_check(again, WINDOW, 0.01) == coordinate_check(kept, WINDOW, 0.01)


# 2. The batch law


def test_the_published_batches():
    expected = {2.5: 3.98e6, 3.0: 1.28e6, 3.34: 0.65e6, 4.0: 0.212e6}
    for loss, batch in expected.items():
        assert batch_size_tokens(loss) == pytest.approx(batch, rel=0.01)
    assert batch_size_tokens(2.0, coefficient=8, exponent=3) == 1


def test_l_is_the_loss_and_not_the_number_of_layers():
    """With layers for L the law asks for less than one token."""
    assert batch_size_tokens(load_config("minicpm-1.2b").num_hidden_layers) < 1
    assert batch_size_tokens(load_config("minicpm-2.4b").num_hidden_layers) < 1


def test_tokens_to_reach_lies_between_the_points():
    tokens, losses = [100, 200, 400], [6.0, 5.0, 4.0]
    assert tokens_to_reach(tokens, losses, 5.5) == 150
    assert tokens_to_reach(tokens, losses, 5.0) == 200
    assert tokens_to_reach(tokens, losses, 4.25) == 350
    assert tokens_to_reach([1, 2, 3, 4], [6, 4, 5, 3], 4.5) == 1.75, "the first time, not the last"
    assert tokens_to_reach(tokens, losses, 3.9) is None
    assert tokens_to_reach(tokens, losses, 6.0) is None


@given(
    at=st.floats(1e-3, 1e5),
    bend=st.floats(0.1, 10),
    value=st.floats(-5, 5, allow_subnormal=False),
    spread=st.floats(1.3, 4),
)
def test_a_parabola_is_found_again(at, bend, value, spread):
    x = at * spread ** np.array([-1.5, -0.5, 0.5, 1.5])
    fitted = fit_parabola(x, value + bend * np.log(x / at) ** 2)
    assert fitted.at == pytest.approx(at, rel=1e-6) and fitted.inside
    assert fitted.value == pytest.approx(value, abs=1e-6)
    assert fitted.curvature == pytest.approx(bend, rel=1e-6)
    assert fitted(at * math.e) == pytest.approx(value + bend, rel=1e-6, abs=1e-6)


@given(
    at=st.floats(1e-3, 1e5),
    spread=st.floats(1.3, 4),
    points=st.integers(3, 8),
    slope=st.sampled_from([0.0, 1.0, -0.3]),
    height=st.sampled_from([3.1, -7.0, 1 / 3, 2.345, 0.0]),
)
def test_a_straight_line_has_no_lowest_point(at, spread, points, slope, height):
    """Rounding bends it a little, up or down."""
    x = at * spread ** np.arange(points)
    with pytest.raises(ValueError, match="opens downwards, or is a straight line"):
        fit_parabola(x, height + slope * np.log(x))


def test_a_parabola_in_x_itself_is_another():
    """The logarithm matters: rates come in factors."""
    x = np.array([1.0, 2, 4, 8])
    y = np.log(x / 3) ** 2
    bend, slope, _ = np.polyfit(x, y, 2)
    assert abs(-slope / (2 * bend) - 3) > 0.5
    assert fit_parabola(x, y).at == pytest.approx(3)


def test_a_minimum_outside_of_what_was_measured_says_so():
    x = np.array([1.0, 2, 4])
    assert not fit_parabola(x, (np.log(x) + 1) ** 2).inside


@given(a=st.floats(1e-3, 1e10), b=st.floats(-8, 8, allow_subnormal=False).filter(lambda b: abs(b) > 0.1))
def test_a_power_law_is_found_again(a, b):
    x = np.array([2.0, 3, 4, 5])
    law = fit_power_law(x, a * x**b, draws=20)
    assert law.coefficient == pytest.approx(a, rel=1e-6) and law.exponent == pytest.approx(b, rel=1e-6)
    low, high = law.exponent_interval()
    assert low == pytest.approx(b, rel=1e-6) and high == pytest.approx(b, rel=1e-6)
    assert law(2.5) == pytest.approx(a * 2.5**b, rel=1e-6)


@pytest.mark.slow  # many fits
def test_the_band_of_a_power_law():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        x = np.exp(random.uniform(1, 2, 20))
        law = fit_power_law(x, 3 * x**-2 * np.exp(0.1 * random.standard_normal(20)), draws=200, seed=trial)
        low, high = law.exponent_interval()
        covered += low <= -2 <= high
        assert law.band(4.0)[0] < law(4.0) < law.band(4.0)[1]
        table = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
        one_by_one = [[law.band(float(each)) for each in row] for row in table]
        assert np.stack(law.band(table), -1) == pytest.approx(np.array(one_by_one))
        narrow = law.exponent_interval(0.5)
        assert low < narrow[0] < narrow[1] < high
    assert 85 <= covered <= 99


@pytest.mark.slow  # many fits
def test_points_of_one_run_are_drawn_together():
    """Ten copies of each point add no knowledge, so the band must not shrink."""
    random = np.random.default_rng(0)
    x = np.exp(random.uniform(1, 2, 8))
    y = x**-2 * np.exp(0.2 * random.standard_normal(8))
    width = np.ptp(fit_power_law(x, y).exponent_interval())
    copies, labels = np.tile(x, 10), np.tile(np.arange(8), 10)
    assert np.ptp(fit_power_law(copies, np.tile(y, 10), labels).exponent_interval()) == pytest.approx(width)
    assert np.ptp(fit_power_law(copies, np.tile(y, 10)).exponent_interval()) < width / 2
    assert fit_power_law(x, y, seed=1) == fit_power_law(x, y, seed=1) != fit_power_law(x, y, seed=2)


# 3. The loss surface

TRUE = LossSurface(C_N=20.0, alpha=0.35, C_D=200.0, beta=0.4, L0=2.0)
SIZES, TOKENS = np.repeat([3e4, 6e4, 1e5, 2e5, 4e5], 4), np.tile([2e5, 4e5, 9e5, 1.4e6], 5)


@settings(max_examples=10, deadline=None)
@given(
    alpha=st.floats(0.2, 0.8), beta=st.floats(0.2, 0.8), share=st.floats(0.2, 0.8), floor=st.floats(0.5, 3)
)
def test_a_surface_is_found_again(alpha, beta, share, floor):
    true = LossSurface(share * 1e5**alpha, alpha, (1 - share) * 5e5**beta, beta, floor)
    found = fit_loss_surface(SIZES, TOKENS, true(SIZES, TOKENS))
    np.testing.assert_allclose(found(SIZES, TOKENS), true(SIZES, TOKENS), rtol=1e-5)
    assert found(1.6e6, 1.4e6) == pytest.approx(true(1.6e6, 1.4e6), rel=1e-3)
    assert found.alpha == pytest.approx(alpha, rel=0.05) and found.beta == pytest.approx(beta, rel=0.05)


def test_scipy_curve_fit_from_nearby_ends_at_the_same_surface():
    """The paper's tool, given a start that is almost right."""
    noisy = TRUE(SIZES, TOKENS) + 0.01 * np.random.default_rng(1).standard_normal(len(SIZES))
    ours = fit_loss_surface(SIZES, TOKENS, noisy)
    theirs, _ = curve_fit(
        lambda at, *unknowns: LossSurface(*unknowns)(*at),
        np.stack([SIZES, TOKENS]),
        noisy,
        p0=[ours.C_N * 1.02, ours.alpha * 1.01, ours.C_D * 0.98, ours.beta * 0.99, ours.L0],
        max_nfev=2000,
        method="trf",
    )
    cost_ours, cost_theirs = (
        float(((surface(SIZES, TOKENS) - noisy) ** 2).sum()) for surface in (ours, LossSurface(*theirs))
    )
    assert cost_ours <= cost_theirs * (1 + 1e-6)
    assert LossSurface(*theirs)(1.6e6, 1.4e6) == pytest.approx(ours(1.6e6, 1.4e6), abs=0.01)


def test_noise_bends_the_prediction_little():
    noise = 0.005 * np.random.default_rng(0).standard_normal(len(SIZES))
    found = fit_loss_surface(SIZES, TOKENS, TRUE(SIZES, TOKENS) + noise)
    assert found(1.6e6, 1.4e6) == pytest.approx(TRUE(1.6e6, 1.4e6), abs=0.03)


def test_the_units_of_n_and_d_do_not_change_what_is_predicted():
    losses = TRUE(SIZES, TOKENS)
    ones, millions = fit_loss_surface(SIZES, TOKENS, losses), fit_loss_surface(
        SIZES / 1e6, TOKENS / 1e6, losses
    )  # fmt: skip
    assert millions(1.6, 1.4) == pytest.approx(ones(1.6e6, 1.4e6), rel=1e-6)
    assert pytest.approx(ones.C_N / 1e6**ones.alpha, rel=1e-3) == millions.C_N


@pytest.mark.parametrize("flops", [1e10, 1e14, 1e20])
def test_the_optimum_is_that_of_numerical_minimisation(flops):
    N, D = TRUE.optimal(flops)
    assert pytest.approx(flops) == 6 * N * D
    found = minimize_scalar(
        lambda log_n: TRUE(math.exp(log_n), flops / 6 / math.exp(log_n)),
        bounds=(math.log(N) - 5, math.log(N) + 5),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert pytest.approx(math.exp(found.x), rel=1e-4) == N
    assert pytest.approx(TRUE.K**2 * (flops / 6) ** TRUE.eta) == N / D


def test_the_published_averages_and_why_192_is_no_constant():
    """alpha 0.29, beta 0.23, K² 0.01, N and D in billions."""
    C_D = 1.0
    C_N = 0.01 ** ((0.29 + 0.23) / 2) * 0.23 * C_D / 0.29
    published = LossSurface(C_N, 0.29, C_D, 0.23, 1.0)
    assert pytest.approx(0.01) == published.K**2
    assert published.eta == pytest.approx(-0.115, abs=0.001)  # printed as -0.10
    ratios = {}
    for N in (0.1, 1.9, 100.0):
        flops = 6 * (N / published.K) ** ((0.29 + 0.23) / 0.23)
        at, tokens = published.optimal(flops)
        assert at == pytest.approx(N)
        ratios[N] = tokens / at
    assert pytest.approx(192, rel=0.01) == 0.01**-1 * (1.9 * 364) ** 0.10
    assert ratios[0.1] < ratios[1.9] / 1.5 and ratios[100.0] > 1.5 * ratios[1.9]


# 4. ScalingBench


def test_conditional_losses_count_the_answer_alone():
    torch.manual_seed(0)
    model = Decoder(shape(24))
    contexts, answers = torch.randint(64, (3, 5)), torch.randint(64, (3, 4))
    losses = conditional_losses(model, contexts, answers)
    for context, answer, loss in zip(contexts, answers, losses, strict=True):
        ids, expected = context.tolist(), 0.0
        for token in answer.tolist():
            expected -= model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token].item() / 4
            ids.append(token)
        assert loss.item() == pytest.approx(expected, abs=1e-5)
    unread = torch.cat([context_only(contexts), answers], dim=1)  # the trainer's way to say the same
    assert losses.mean().item() == pytest.approx(next_token_loss(model, unread).item(), abs=1e-5)
    assert not losses.requires_grad


def test_shorter_answers_are_padded_and_what_carries_a_mark_is_not_marked_again():
    torch.manual_seed(0)
    model = Decoder(shape(24))
    contexts, answers = torch.randint(64, (3, 5)), torch.randint(64, (3, 4))
    alone = conditional_losses(model, contexts, answers[:, :2])
    padded = torch.cat([answers[:, :2], context_only(answers[:, 2:])], dim=1)
    torch.testing.assert_close(conditional_losses(model, contexts, padded), alone)
    with pytest.raises(ValueError, match="tokens of the contexts carry the mark"):
        conditional_losses(model, context_only(contexts), answers)
    with pytest.raises(ValueError, match="An answer holds no token that is predicted"):
        conditional_losses(model, contexts, context_only(answers))


@pytest.mark.parametrize("kind", [None, "dynamic", "longrope"])
def test_an_answer_has_its_loss_whatever_it_is_padded_and_asked_beside(kind):
    """Also where the rotary frequencies follow the length of the text: on both sides of its border."""
    factors = dict(short_factor=(1.0,) * 6, long_factor=(1.0, 2.0, 3.0, 9.0, 9.0, 9.0))
    scaling = kind and RopeScaling(kind, 8, **({"factor": 2.0} if kind == "dynamic" else factors))
    torch.manual_seed(0)
    model = Decoder(shape(24, rope_scaling=scaling))
    contexts, answers = torch.randint(64, (12, 5)), torch.randint(64, (12, 9))
    sizes = [1, 9, 3, 4, 5, 2, 4, 3, 9, 5, 1, 8]
    alone = [
        conditional_losses(model, contexts[[row]], answers[[row], :size]).item()
        for row, size in enumerate(sizes)
    ]
    behind = torch.arange(9) >= torch.tensor(sizes)[:, None]
    padded = torch.where(behind, context_only(answers), answers)
    assert conditional_losses(model, contexts, padded).tolist() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("flat", ["N", "D"])
def test_a_surface_that_is_flat_has_no_optimum(flat):
    losses = 2 + 1 / (TOKENS if flat == "N" else SIZES) ** 0.3
    surface = fit_loss_surface(SIZES, TOKENS, losses)
    for asked in (lambda: surface.K, lambda: surface.eta, lambda: surface.optimal(1e18)):
        with pytest.raises(ValueError, match="it has no optimum"):
            asked()


def test_a_model_that_is_broken_has_no_conditional_losses():
    model = Decoder(shape(24))
    model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="The loss of an answer is no finite number"):
        conditional_losses(model, WINDOW[:, :4], WINDOW[:, 4:7])


def test_a_model_that_is_in_training_is_scored_as_one_that_is_not():
    model = Decoder(shape(24))
    model.norm = torch.nn.Sequential(model.norm, torch.nn.Dropout(0.5))
    contexts, answers = WINDOW[:, :4], WINDOW[:, 4:7]
    found = conditional_losses(model.train(), contexts, answers)
    assert model.training and torch.equal(found, conditional_losses(model.eval(), contexts, answers))


@pytest.mark.slow  # many fits
@settings(deadline=None)
@given(middle=st.floats(3.5, 5), slope=st.floats(0.5, 6), chance=st.sampled_from([0.0, 0.25, 0.5]))
def test_a_sigmoid_is_found_again_and_inverted(middle, slope, chance):
    true = Sigmoid(middle, slope, chance)
    losses = middle + np.array([-1.5, -0.7, -0.1, 0.4, 1.2]) / slope
    found = fit_sigmoid(losses, true.predict(losses), chance)
    assert found.midpoint == pytest.approx(middle, rel=1e-3) and found.slope == pytest.approx(slope, rel=1e-3)
    assert true.predict(middle) == pytest.approx((1 + chance) / 2)
    for loss in losses:
        assert true.inverse(float(true.predict(loss))) == pytest.approx(loss, rel=1e-6)
    assert true.predict(0.1) > true.predict(9.0), "accuracy falls with the loss"


def test_a_sigmoid_that_forgets_chance_is_off():
    losses = np.linspace(3, 5, 6)
    accuracy = Sigmoid(3.5, 3.0, 0.25).predict(losses)
    wrong = fit_sigmoid(losses, accuracy, chance=0.0)
    assert abs(wrong.predict(6.0) - 0.25) > 0.1
    assert fit_sigmoid(losses, accuracy, 0.25).predict(6.0) == pytest.approx(0.25, abs=0.01)


# Bad input


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: coordinate_check(Decoder(shape(24)), WINDOW, 0.1, 0), "updates is 0"),
        (lambda: coordinate_check(Decoder(shape(24)), WINDOW, 0.1, 1, "muP"), "choose mup or standard"),
        (lambda: batch_size_tokens(0), "loss is 0"),
        (lambda: tokens_to_reach([1, 2], [3], 2), "There are 2 tokens, 1 losses; each point needs one"),
        (lambda: tokens_to_reach([4, 1, 3], [2, 5, 3], 2.5), "expected a curve in order"),
        (lambda: conditional_losses(Decoder(shape(24)), WINDOW[:, :0], WINDOW), "The contexts hold no token"),
        (lambda: fit_parabola([1, 2], [3, 4]), "at least 3 different x; there are 2"),
        (lambda: fit_parabola([1, 1, 2], [3, 3, 4]), "at least 3 different x; there are 2"),
        (lambda: fit_parabola([1, 2, 3], [3, 4, 3]), "opens downwards"),
        (lambda: fit_power_law([1, 2, 3], [1, 2, 3], draws=0).band(1), "without bootstrap samples"),
        (lambda: LossSurface(0, 1, 0, 1, 1).K, "does not fall with both N and D"),
        (lambda: fit_parabola([0, 2, 3], [3, 4, 3]), "x must be a row of finite numbers above 0"),
        (lambda: fit_power_law([1, 2], [3, 4]), "needs 3 points with different x; there are 2"),
        (lambda: fit_power_law([2, 2, 2], [3, 4, 5]), "needs 3 points with different x"),
        (lambda: fit_power_law([1, 2, 3], [1, -1, 2]), "y must be a row of finite numbers above 0"),
        (lambda: fit_power_law([1, 2, 3], [1, 2, 3], "ab"), "There are 3 x, 2 groups"),
        (lambda: fit_power_law([1, 2, 3], [1, 2, 3], ["a", math.nan, "b"]), "A group is nan, which is equal to no"),
        (lambda: fit_power_law([1, 2, 3], [1, 2, 3], list(np.full(3, np.nan))), "A group is nan, which is equal"),
        (lambda: fit_power_law([1, 2, 3], [1, 2, 3], "aaa"), "All points are of the group 'a'"),
        (lambda: fit_power_law([1, 2, 3], [1, 2, 3]).band(1, 95), "confidence is 95; expected a part"),
        (lambda: fit_loss_surface([1, 2, 3], [1, 2, 3], [3, 2, 1]), "3 points with 3 different N"),
        (lambda: fit_loss_surface([1] * 6, range(1, 7), [3] * 6), "6 points with 1 different N"),
        (lambda: fit_loss_surface(SIZES, TOKENS, [math.nan] * 20), "L must be a row of finite numbers"),
        (lambda: TRUE.optimal(-1), "flops is -1"),
        (lambda: LossSurface(0, 1, 1, 1, 1).optimal(9), "does not fall with both N and D"),
        (lambda: fit_sigmoid([3, 4], [0.5, 0.4]), "at least 3 different losses; there are 2"),
        (lambda: fit_sigmoid([1, 2, 3, 4], [0.1, 0.4, 0.6, 0.9]), "Accuracy does not fall with the loss"),
        (lambda: fit_sigmoid([1, 2, 3, 4], [0.5] * 4), "Accuracy does not fall with the loss"),
        (lambda: fit_sigmoid([1, 2, 3], [0.25, 0.3, 0.4], chance=0.25), "Accuracy does not fall with the"),
        (lambda: fit_sigmoid([1, 2, 3, 4], [0.25] * 4, chance=0.25), "Accuracy does not fall with the"),
        (lambda: fit_sigmoid([1, 2, 3, 4], [0.24, 0.26, 0.26, 0.24], 0.25), "Accuracy does not fall with"),
        (lambda: fit_sigmoid([1, 2, 3, 4], [0.2, 0.21, 0.22, 0.23], 0.25), "Accuracy does not fall with the"),
        (lambda: fit_sigmoid([1, 2, 3, 4], [1.0] * 4), "Accuracy does not fall with the loss"),
        (lambda: fit_sigmoid([1, 2, 3, 4], [1, 1, 0, 0]), "0 lie where accuracy falls, so nothing says how"),
        (lambda: fit_sigmoid([1, 2, 3, 4, 5], [1, 1, 0.5, 0, 0]), "1 lie where accuracy falls, so nothing says"),
        (lambda: fit_sigmoid([1, 2, 3, 4, 5], [1, 1, 0.7, 0, 0]), "lie where accuracy falls, so nothing says"),
        (lambda: fit_sigmoid([1, 1.0001, 1.0002, 4], [1, 0.9, 0.1, 0]), "falls in a jump, steeper than any"),
        (lambda: LossSurface(0.0, 0.3, 1.0, 0.3, 1.0).eta, "it has no optimum"),
        (lambda: tokens_to_reach([1, 2], [3, 2], math.nan), "target is nan; expected a number greater than 0"),
        (lambda: fit_sigmoid([3, 4, 5], [50, 40, 30]), "give parts, not per cent"),
        (lambda: fit_sigmoid([3, 4, 5], [0.5, 0.4, 0.3], chance=1), "expected 0 <= chance < ceiling <= 1"),
        (lambda: Sigmoid(3, 1, 0.25).inverse(0.2), "runs between 0.25 and 1.0"),
    ],
)  # fmt: skip
def test_bad_input_gives_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        call()


def test_the_trainer_does_not_pull_in_scipy():
    """It would be felt in every command that trains: the instruments read the trainer's parts, not the reverse."""
    folder = Path(wind_tunnel.__file__).parent
    for path in folder.glob("*.py"):
        imported = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom | ast.Import)
            for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
        }
        assert "wind_tunnel" not in imported, path
        assert "scipy.optimize" not in imported or path.stem == "wind_tunnel", path
