"""Checks and quiz of the chapter on the wind tunnel."""

import math

import numpy as np

from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz
from ...training.wind_tunnel import LossSurface, batch_size_tokens, fit_loss_surface


@exercise(
    "loss for a batch",
    wrong=(
        lambda batch: 1.2110e9 / batch**6.2393,
        lambda batch: (batch / 1.2110e9) ** (1 / 6.2393),
        lambda batch: math.log(1.2110e9 / batch) / 6.2393,
        lambda batch: batch_size_tokens(batch),
        lambda batch: (1.2110e9 / batch) ** (1 / 6),
    ),
)
def loss_for(answer):
    """The law, solved for the loss."""
    assert same(answer(1.2110e9), 1), "At a loss of 1 the law gives its coefficient."
    for batch in (1e5, 4e6, 1.2e7):
        loss = answer(batch)
        assert loss > 1, (
            f"{batch:,.0f} tokens are fewer than the coefficient, so the loss must lie above 1. Small "
            "batches belong to early training, where the loss is high."
        )
        assert same(batch_size_tokens(float(loss)) / batch, 1, tolerance=1e-4), (
            f"Put your loss for {batch:,.0f} tokens back into the law: it must give these tokens again."
        )


@exercise(
    "attention scale",
    wrong=(
        lambda head_dim, base_head_dim: 1 / math.sqrt(head_dim),
        lambda head_dim, base_head_dim: 1 / head_dim,
        lambda head_dim, base_head_dim: base_head_dim / head_dim**1.5,
        lambda head_dim, base_head_dim: 8 / head_dim,
        lambda head_dim, base_head_dim: base_head_dim / head_dim,
        lambda head_dim, base_head_dim: math.isqrt(base_head_dim) / head_dim,
    ),
)
def attention_scale(answer):
    """1/head_dim, with the constant that makes the base equal."""
    for base in (64, 16, 100, 80):
        assert same(answer(base, base), 1 / math.sqrt(base)), (
            f"At the base nothing may change: with heads of {base} the factor is the usual 1/√{base}."
        )
    assert same(answer(128, 64), 1 / 16), (
        "Twice the head must halve the factor, since it follows 1/head_dim. With base 64 it goes from 1/8 "
        "to 1/16."
    )
    assert same(answer(96, 16), 1 / 24), (
        "Six times the head must have a sixth of the base's factor, and that of base 16 is 1/4. Does your "
        "answer use its second argument?"
    )
    assert same(answer(32, 64), 1 / 4), "A head half as wide as the base's has twice its factor."


def _tokens(surface, N, target):
    room = target - surface.L0 - surface.C_N / N**surface.alpha
    return (surface.C_D / room) ** (1 / surface.beta) if room > 0 else math.inf


def _ignores_size(surface, N, target):
    return (surface.C_D / (target - surface.L0)) ** (1 / surface.beta)


def _never_infinite(surface, N, target):
    room = target - surface.L0 - surface.C_N / N**surface.alpha
    return (surface.C_D / (abs(room) + 1e-15)) ** (1 / surface.beta)


def _square(surface, N, target):
    room = target - surface.L0 - surface.C_N / N**surface.alpha
    return (surface.C_D / room) ** 2 if room > 0 else math.inf


def _forgets_the_root(surface, N, target):
    room = target - surface.L0 - surface.C_N / N**surface.alpha
    return surface.C_D / room if room > 0 else math.inf


@exercise("tokens for a loss", wrong=(_ignores_size, _never_infinite, _square, _forgets_the_root))
def tokens_for(answer):
    """The surface, solved for D."""
    first = LossSurface(C_N=10.0, alpha=0.5, C_D=20.0, beta=0.5, L0=2.0)
    second = LossSurface(C_N=10.0, alpha=0.3, C_D=20.0, beta=0.4, L0=1.0)
    third = LossSurface(C_N=30.0, alpha=0.3, C_D=50.0, beta=0.35, L0=1.5)
    for surface, N, D in ((first, 100, 400), (first, 900, 400), (second, 1e6, 1e8), (third, 1e6, 1e7)):
        target = float(surface(N, D))
        assert same(answer(surface, N, target) / D, 1, tolerance=1e-4), (
            f"A model of {N:,.0f} parameters has the loss {target:.3f} after {D:,.0f} tokens. Asked for this "
            "loss, these tokens must come out. Does your answer use the coefficients and exponents of the "
            "surface it is given?"
        )
    for surface, N, target, why in (
        (first, 100, 2.5, "With `N = 100` the loss never falls below 2 + 10/√100 = 3, so never to 2.5."),
        (first, 100, 3.0, "With `N = 100` the loss comes as near to 3 as you like, but never there."),
        (second, 1e6, 0.5, "No model gets below the floor `L0`."),
    ):
        try:
            tokens = answer(surface, N, target)
        except ZeroDivisionError:
            raise AssertionError(f"{why} Your code divides by zero there.") from None
        assert tokens == math.inf, why


def _cost(surface, flops, shrink):
    N, D = surface.optimal(flops)
    return 6 * (N / shrink) * _tokens(surface, N / shrink, surface(N, D)) / flops


def _tokens_only(surface, flops, shrink):
    N, D = surface.optimal(flops)
    return _tokens(surface, N / shrink, surface(N, D)) / D


def _large_model(surface, flops, shrink):
    return _cost(surface, flops, shrink) * shrink


@exercise(
    "overtraining",
    wrong=(
        lambda surface, flops, shrink: shrink,
        lambda surface, flops, shrink: 1.0,
        lambda surface, flops, shrink: _cost(surface, flops, shrink) * flops,
        _tokens_only,
        _large_model,
    ),
    unused=("flops",),  # at every optimum the two terms of the loss stand in the same ratio, beta to alpha
)
def overtraining(answer):
    """Same loss, smaller model, more tokens."""
    first = LossSurface(C_N=10.0, alpha=0.3, C_D=20.0, beta=0.4, L0=1.0)
    second = LossSurface(C_N=300.0, alpha=0.35, C_D=400.0, beta=0.37, L0=1.7)
    for surface, flops in ((first, 1e12), (first, 1e15), (second, 1e18)):
        assert same(answer(surface, flops, 1), 1, tolerance=1e-4), (
            "Not shrunk at all, it costs what it costs: the quotient is 1."
        )
        N, D = surface.optimal(flops)
        for shrink in (1.5, 2, 3):
            cost, small = answer(surface, flops, shrink), N / shrink
            assert cost >= 1, "The optimum is the cheapest way to its loss, so every other model costs more."
            assert same(float(surface(small, float(cost) * flops / (6 * small))), float(surface(N, D))), (
                f"The model is {shrink} times smaller. Trained with your FLOPs, which are 6 N D with the "
                "small N, it must have the loss of the optimum."
            )
    assert answer(first, 1e12, 100) == math.inf, (
        "A model a hundred times smaller never gets there: what too few parameters cost is more than the "
        "whole loss of the optimum."
    )


def _all_sizes(N, D, L):
    n, d, loss = map(np.asarray, (N, D, L))
    error = fit_loss_surface(n, d, loss)(n, d) - loss
    return [float(np.mean(error[n == size])) for size in sorted(set(n))[3:]]


def _leaves_one_out(N, D, L):
    n, d, loss = map(np.asarray, (N, D, L))
    errors = []
    for size in sorted(set(n))[3:]:
        here = n == size
        surface = fit_loss_surface(n[~here], d[~here], loss[~here])
        errors.append(float(np.mean(surface(n[here], d[here]) - loss[here])))
    return errors


def _smaller(n, sizes, number):
    return n < sizes[number]


def _forward(N, D, L, mean=np.mean, known=_smaller):
    n, d, loss = map(np.asarray, (N, D, L))
    sizes, errors = sorted(set(n)), []
    for number, size in enumerate(sizes[3:], start=3):
        below, here = known(n, sizes, number), n == size
        surface = fit_loss_surface(n[below], d[below], loss[below])
        errors.append(float(mean(surface(n[here], d[here]) - loss[here])))
    return errors


def _fitted_once(N, D, L):
    return _forward(N, D, L, known=lambda n, sizes, number: n < sizes[3])


def _three_below(N, D, L):
    return _forward(
        N, D, L, known=lambda n, sizes, number: _smaller(n, sizes, number) & (n >= sizes[number - 3])
    )


def _median(N, D, L):
    return _forward(N, D, L, mean=np.median)


@exercise(
    "forward errors",
    wrong=(
        _fitted_once,
        _three_below,
        _median,
        lambda N, D, L: _forward(N, D, L, known=lambda n, sizes, number: n <= sizes[number]),
        lambda N, D, L: _forward(N, D, L, known=lambda n, sizes, number: _smaller(n, sizes, min(number, 5))),
        lambda N, D, L: _forward(N, L, L),
        lambda N, D, L: [0.0] * (len(set(N)) - 3),
        lambda N, D, L: [-error for error in _forward(N, D, L)],
        lambda N, D, L: _forward(N, D, L, mean=lambda errors: errors[-1]),
        lambda N, D, L: _forward(N, D, L)[::-1],
        _all_sizes,
        _leaves_one_out,
    ),
)
def forward_errors(answer):
    """Each size is predicted from smaller ones alone."""
    surface = LossSurface(C_N=20.0, alpha=0.35, C_D=200.0, beta=0.4, L0=2.0)
    sizes, tokens = np.array([3e4, 6e4, 1e5, 2e5, 4e5]), np.array([2e5, 4e5, 9e5, 1.4e6])
    N, D = np.repeat(sizes, 4), np.tile(tokens, 5)
    L = surface(N, D)
    exact = answer(N, D, L)
    assert len(exact) == 2, "Five sizes: the fourth and the fifth can be predicted, no others."
    assert same(exact, [0, 0], tolerance=1e-3), "Losses from an exact surface are predicted exactly."
    bent = L + np.where(sizes[-1] == N, [0.2, 0.4, 0.6, 0.8] * 5, 0)
    found = answer(N, D, bent)
    assert same(found[1], -0.5, tolerance=1e-2), (
        "The largest size lies above its surface, by 0.5 in the mean over its points. Predicted minus "
        "measured is -0.5, if none of them is in the fit."
    )
    assert same(found[0], 0, tolerance=1e-3), (
        "Only the largest size was changed. The fourth must not feel it: whoever predicts it knows smaller "
        "sizes alone."
    )
    other = LossSurface(C_N=8.0, alpha=0.2, C_D=90.0, beta=0.3, L0=1.0)
    N, D = np.repeat(sizes[::-1][1:], 3), np.tile(2 * tokens[1:], 4)
    assert same(answer(list(N), list(D), list(other(N, D) - 0.1 * (N == 2e5))), [0.1], tolerance=1e-2), (
        "Four sizes, given the largest first, as lists: one can be predicted. The order of the points "
        "decides nothing."
    )
    rng = np.random.default_rng(0)
    N = np.repeat([3e4, 6e4, 1e5, 2e5, 4e5, 6e5, 1e6], 4)
    D = np.tile(tokens, 7) * np.sqrt(N / N[0])
    L = surface(N, D) + rng.normal(0, 0.1, len(N))
    found = answer(N, D, L)
    for mistaken, hint in (
        (
            _fitted_once,
            "The surface is fitted once, to the three smallest sizes. Each size needs a fit anew.",
        ),
        (_three_below, "Only the three sizes just below are in the fit. *All* smaller sizes are known."),
        (_median, "You took the median of a size's errors. The mean was asked for."),
    ):
        assert not same(found, mistaken(N, D, L), tolerance=1e-3), hint
    assert same(found, _forward(N, D, L), tolerance=1e-3), (
        "Seven sizes, each trained on other numbers of tokens, with losses that lie on no surface: each from "
        "the fourth on is predicted at its own N and D, by a fit to all points of smaller sizes."
    )


quiz = Quiz(
    [
        (
            "A model becomes four times as wide. Under µP the rate of its embedding table…",
            ["is divided by 4", "stays", "is divided by 2"],
            1,
            "Rows of the table are looked up, not summed over: its rate does not depend on the width.",
        ),
        (
            "The batch law is asked for MiniCPM-2.4B. What do you put in for L?",
            ["40, its layers", "the loss it is expected to reach, about 2.5", "its context length"],
            1,
            "With 40 the law would ask for less than one token.",
        ),
        (
            "Why does the surface need only one stable run for each size?",
            [
                "short decays branch off it, one for each D",
                "a stable checkpoint is as good as a decayed one",
                "D does not matter",
            ],
            0,
            "That is what WSD is for: each further D costs only its decay.",
        ),
        (
            "You bootstrap 48 points that come from 4 runs. What do you draw?",
            ["points", "runs", "both, one after the other"],
            1,
            "Points of one run share its luck. Only runs are independent.",
        ),
    ]
)
