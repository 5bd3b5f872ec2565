"""Checks and quiz of the chapter on experts."""

import math
from collections.abc import Mapping

import torch

from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz
from ...language.moe import load_balance_loss


def _best_first(scores, visits):
    return sorted(range(len(scores)), key=lambda expert: -scores[expert])[:visits]


def _not_rescaled(scores, visits):
    p = torch.tensor(scores).softmax(0).tolist()
    return {expert: p[expert] for expert in _best_first(scores, visits)}


def _not_softmaxed(scores, visits):
    chosen = _best_first(scores, visits)
    return {expert: scores[expert] / sum(scores[each] for each in chosen) for expert in chosen}


def _all_experts(scores, visits):
    return dict(enumerate(torch.tensor(scores).softmax(0).tolist()))


def _softmaxed_twice(scores, visits):
    chosen = _best_first(scores, visits)
    p = torch.tensor(scores).softmax(0)[chosen].softmax(0)
    return dict(zip(chosen, p.tolist(), strict=True))


def _worst(scores, visits):
    chosen = _best_first([-score for score in scores], visits)
    total = sum(math.exp(scores[expert]) for expert in chosen)
    return {expert: math.exp(scores[expert]) / total for expert in chosen}


def _equal_shares(scores, visits):
    return dict.fromkeys(_best_first(scores, visits), 1 / visits)


@exercise(
    "route",
    wrong=(_not_rescaled, _not_softmaxed, _all_experts, _softmaxed_twice, _worst, _equal_shares),
)
def route(answer):
    """Softmax, the largest few, rescaled to sum to 1."""
    for scores, visits, weights, why in (
        ([0.0, 1.0, 0.0, 1.0], 2, {1: 0.5, 3: 0.5}, "Two equal scores share the answer. Did you rescale?"),
        (
            [0.0, math.log(3), -5.0],
            2,
            {0: 0.25, 1: 0.75},
            "exp(log 3) is 3 and exp(0) is 1: among these two, the weights are as 3 to 1.",
        ),
        ([2.0, -1.0], 1, {0: 1.0}, "With a single visit there is nobody to share with."),
        (
            [-3.0, -1.0, -2.0],
            3,
            {0: 0.0900306, 1: 0.6652410, 2: 0.2447285},
            "Scores may be negative, weights may not. Visit all, and they are the softmax itself.",
        ),
        (
            [1.0, 2.0, 3.0, 4.0],
            3,
            {1: 0.0900306, 2: 0.2447285, 3: 0.6652410},
            "The number of visits is an argument, here three.",
        ),
    ):
        got = answer(list(scores), visits)
        assert isinstance(got, Mapping), "Expected a dictionary: each visited expert, and its weight."
        found = {int(expert): float(weight) for expert, weight in got.items()}
        assert found.keys() == weights.keys(), (
            f"With the scores {scores} and {visits} visits, only those with the largest scores are visited."
        )
        assert same(sum(found.values()), 1), "The weights of the visits add up to 1: rescale them."
        assert same(found, weights), f"With the scores {scores} and {visits} visits: {why}"


@exercise(
    "active",
    wrong=(
        lambda shared, d, d_ff, L, M, K: shared + L * K * 3 * d * d_ff,
        lambda shared, d, d_ff, L, M, K: shared + L * (M * d + M * 3 * d * d_ff),
        lambda shared, d, d_ff, L, M, K: shared + L * K * (d + 3 * d * d_ff),
        lambda shared, d, d_ff, L, M, K: shared + M * d + L * K * 3 * d * d_ff,
        lambda shared, d, d_ff, L, M, K: shared + L * (M * d + K * 2 * d * d_ff),
        lambda shared, d, d_ff, L, M, K: L * (shared + M * d + K * 3 * d * d_ff),
    ),
)
def active(answer):
    """Shared, and in each layer the whole router and K experts."""
    assert same(answer(100, 2, 3, 1, 4, 1), 126), (
        "100 shared, a router of 4 rows of 2, and one expert of 3 matrices with 6 entries. Each token is "
        "compared with all rows of the router."
    )
    assert same(answer(0, 2, 3, 5, 4, 2), 220), "Five layers, each with a router of 8 and two experts of 18."
    assert same(answer(7, 2, 3, 5, 4, 2), 227), (
        "`shared` are the parameters of all layers together, so they are counted once."
    )
    assert same(answer(100, 2, 3, 1, 6, 1), 130), "Two experts more: two rows more in the router."
    assert same(answer(849_533_184, 2304, 5760, 40, 8, 2) / 4_035_320_064, 1, tolerance=1e-9), (
        "MiniCPM-MoE-8x2B must come out at 4,035,320,064."
    )
    assert same(answer(0, 1, 1, 1, 3, 3), 12), "Where all experts are visited, all parameters are used."


def _simulated(n, M, K, rounds=200):
    generator = torch.Generator().manual_seed(0)
    p = torch.ones(n, M)
    seen = [len(torch.multinomial(p, K, generator=generator).unique()) if n else 0 for _ in range(rounds)]
    return sum(seen) / rounds


@exercise(
    "expected touched",
    wrong=(
        lambda n, M, K: min(M, n * K),
        lambda n, M, K: M * (1 - (1 - 1 / M) ** (n * K)),
        lambda n, M, K: M * (1 - K / M) ** n,
        lambda n, M, K: K + (n - 1) * K * (1 - K / M),
        _simulated,
    ),
)
def expected_touched(answer):
    """Each expert is missed by all tokens with (1 - K/M)^n."""
    assert same(answer(1, 8, 2), 2), "One token visits exactly two different experts."
    assert same(answer(2, 2, 1), 1.5), (
        "Two tokens, two experts, one visit: the same expert half of the time, else both."
    )
    assert same(answer(2, 8, 2), 3.5), (
        "With what probability does one token miss a given expert? Both must miss it for it not to be read."
    )
    assert same(answer(3, 5, 5), 5), "All visit all."
    assert same(answer(3, 6, 2), 6 * (1 - 8 / 27)), (
        "A third token can miss what two have missed. Does your answer hold for more than two, and exactly?"
    )
    assert same(answer(0, 8, 2), 0), "Without a token no expert is read."


def _push(p, visits, share=None):
    tokens, experts = p.shape
    counts = torch.bincount(p.topk(visits).indices.flatten(), minlength=experts)
    return (experts * (counts if share is None else share(counts)) / tokens**2).expand_as(p)


@exercise(
    "push",
    wrong=(
        lambda p, visits: (p.shape[1] * p.mean(0) / len(p)).expand_as(p),
        lambda p, visits: torch.zeros_like(p).scatter(1, p.topk(visits).indices, p.shape[1] / len(p)),
        lambda p, visits: _push(p, 1),
        lambda p, visits: torch.zeros_like(p),
        lambda p, visits: _push(p, visits) * len(p),
        lambda p, visits: _push(p, visits) / p.shape[1],
        lambda p, visits: _push(p, visits)[0],
        lambda p, visits: _push(p, visits) / visits,
    ),
    without=("backward", "autograd", "grad", "requires_grad_"),
)
def push(answer):
    """M * phi_j / tokens, the same for each token."""
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    got = torch.as_tensor(answer(p.clone(), 1))
    assert got.shape == p.shape, "One number for each token and expert: the shape of p."
    assert same(got[3], got[0]), "The counts belong to the batch, so every token is pushed alike."
    assert same(got.sum(), 2), (
        "All entries together are M times K, here 2: a mean divides a sum by the number of tokens."
    )
    assert same(got[0], [0.375, 0.125]), (
        "Three of four tokens visit expert 0, so that is its share. What else stands before `p` in the loss?"
    )
    generator = torch.Generator().manual_seed(0)
    for tokens, experts, visits in ((30, 6, 2), (17, 4, 3), (1, 3, 1)):
        p = torch.randn(tokens, experts, generator=generator).softmax(-1).requires_grad_()
        load_balance_loss(p, p.topk(visits).indices).backward()
        assert same(answer(p.detach().clone(), visits), p.grad), (
            f"{tokens} tokens, {experts} experts, visits: {visits}. A token counts for each of its experts."
        )


def _crowd(tokens):
    return torch.tensor([[0.45, 0.45, 0.05, 0.05]]).repeat(tokens, 1)


@exercise(
    "fooled",
    wrong=(
        lambda tokens: (_crowd(tokens), _crowd(tokens)),
        lambda tokens: (torch.full((tokens, 4), 0.25), torch.full((tokens, 4), 0.25)),
        lambda tokens: (_crowd(tokens), _crowd(tokens)[:, [0, 2, 1, 3]]),
        lambda tokens: (_crowd(8), _crowd(8).flip(-1)),
        lambda tokens: (2 * _crowd(tokens), 2 * _crowd(tokens).flip(-1)),
    ),
)
def fooled(answer):
    """One layer's crowded experts are the other's idle ones."""
    for tokens in (6, 9, 40):
        layers = [torch.as_tensor(p).double() for p in answer(tokens)]
        assert len(layers) == 2, f"Expected the probabilities of two layers; yours are {len(layers)}."
        for p in layers:
            assert p.shape == (tokens, 4), (
                f"Asked for {tokens} tokens: each layer needs a row for each of them, and four experts."
            )
            assert (p >= 0).all() and same(p.sum(-1), [1] * tokens), (
                "The probabilities of a token are not negative and sum to 1."
            )
            assert load_balance_loss(p, p.topk(2).indices) > 3, (
                "A layer by itself must be crowded: send all of its tokens to the same two experts, with "
                "nearly all of the probability."
            )
        both = torch.cat(layers)
        pooled = load_balance_loss(both, both.topk(2).indices).item()
        assert same(pooled, 2, tolerance=0.005), (
            f"Pooled it is {pooled:.2f}, not 2. Which experts does the first layer leave idle?"
        )


quiz = Quiz(
    [
        (
            "Right after upcycling, with another random router, the logits are",
            ["the same", "a little different", "those of a random model"],
            0,
            "All experts are the same network and the weights sum to 1, so it does not matter who is asked.",
        ),
        (
            "Which loss moves the router in the first update after upcycling?",
            ["the loss on text", "both", "the balance loss"],
            2,
            "Where all experts answer alike, the text has no opinion on who should be asked.",
        ),
        (
            "One text is decoded. Compared with the 2.4B, the 8x2B reads",
            ["as much for a token", "somewhat more for a token", "five times as much for a token"],
            1,
            "Two experts instead of one network, and the shared rest. All eight must lie in memory, though.",
        ),
        (
            "Sixteen texts are decoded together. In each layer they read",
            ["two experts", "sixteen experts", "nearly all eight"],
            2,
            "Each token brings its own two, and only an expert that all sixteen miss is not read.",
        ),
        (
            "The load of a layer with 8 experts and 2 visits is perfectly even. Its balance loss is",
            ["1", "2", "8"],
            1,
            "K, whatever the probabilities are. The reverse does not hold: an undecided router has about 2 "
            "as well, however uneven the load.",
        ),
    ]
)
