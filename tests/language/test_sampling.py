"""Sampling: probabilities equal to the processors of transformers, and draws that follow them."""

import math
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_models import WRITER, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite.language.generation import generate
from minicpm_lite.language.sampling import Sampling, choose, next_token_probabilities

SETTINGS = [
    Sampling(1.0), Sampling(0.7), Sampling(1.5, top_k=5), Sampling(1.0, top_k=1), Sampling(1.0, top_k=300),
    Sampling(1.0, top_p=0.5), Sampling(0.3, top_p=0.9), Sampling(2.0, top_p=1.0), Sampling(1.0, top_p=1e-6),
    Sampling(0.8, top_k=20, top_p=0.8), Sampling(1.0, repetition_penalty=1.7),
    Sampling(0.8, top_k=20, top_p=0.8, repetition_penalty=0.9),
]  # fmt: skip


def some_logits(batch: int = 4) -> torch.Tensor:
    return 3 * torch.randn(batch, 300, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_probabilities_equal_the_processors_of_transformers(sampling):
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits, seen = some_logits(), make_ids(WRITER, 4, 12)
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p:
        steps.append(TopPLogitsWarper(sampling.top_p))
    expected = steps(seen, logits.clone()).softmax(-1)
    assert_close(next_token_probabilities(logits, sampling, seen), expected, atol=1e-6, rtol=1e-5)


# Every rule by hand: sort, count, add up


def by_hand(scores: list[float], top_k: int | None, top_p: float | None) -> list[float]:
    """Probabilities of numbers whose powers of two are exact; of equal ones the lowest id is the better."""
    best_first = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:top_k]
    weights = {token: Fraction(2) ** int(scores[token]) for token in best_first}
    whole, kept = sum(weights.values()), []
    for token in best_first:
        if top_p is not None and sum(weights[each] for each in kept) >= Fraction(top_p) * whole:
            break
        kept.append(token)
    total = sum(weights[each] for each in kept)
    return [float(weights[token] / total) if token in kept else 0.0 for token in range(len(scores))]


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.sampled_from([0.01, 0.3, 0.55, 0.77, 0.9, 0.99, 1.0]),
)
def test_what_may_be_drawn_is_what_counting_by_hand_leaves(rows, top_k, top_p):
    """With many ties, and sums that a limit is not close to."""
    for row in rows:
        kept = sorted((Fraction(2) ** each for each in row), reverse=True)[:top_k]
        sums = [float(each / sum(kept)) for each in accumulate(kept)]
        assume(top_p is None or all(abs(each - top_p) > 1e-6 for each in sums if each < 1))
    logits = torch.tensor(rows, dtype=torch.float32) * math.log(2)
    found = next_token_probabilities(logits, Sampling(1.0, top_k, top_p))
    expected = torch.tensor([by_hand(row, top_k, top_p) for row in rows])
    assert torch.equal(found > 0, expected > 0)
    assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("shares", "top_p", "kept"),
    [
        ([0.3, 0.1, 0.1, 0.5], 0.8, 2),
        ([0.25, 0.25, 0.25, 0.25], 0.5, 2),
        ([0.25, 0.25, 0.25, 0.25], 0.75, 3),
        ([0.5, 0.25, 0.125, 0.125], 0.75, 2),
        ([0.5, 0.25, 0.125, 0.125], 0.5, 1),
        ([0.5, 0.25, 0.125, 0.125], 0.50001, 2),
        ([0.5, 0.25, 0.125, 0.125], 0.875, 3),
    ],
)
def test_top_p_at_an_exact_sum_keeps_the_fewest(shares, top_p, kept):
    from transformers import TopPLogitsWarper

    logits = torch.tensor([shares]).log()
    found = next_token_probabilities(logits, Sampling(1.0, top_p=top_p))[0] > 0
    assert int(found.sum()) == kept == int(torch.isfinite(TopPLogitsWarper(top_p)(None, logits)).sum())
    assert found.nonzero()[:, 0].tolist() == sorted(
        sorted(range(4), key=lambda token: (-shares[token], token))[:kept]
    )


@pytest.mark.parametrize("k", range(1, 7))
def test_top_k_keeps_k_of_equal_scores_those_of_the_lowest_ids(k):
    scores = torch.tensor([[1.0, 3.0, 1.0, 1.0, 3.0, 0.0], [2.0] * 6])
    kept = next_token_probabilities(scores, Sampling(1.0, top_k=k)) > 0
    best = [1, 4, 0, 2, 3, 5]
    assert kept[0].nonzero()[:, 0].tolist() == sorted(best[:k])
    assert kept[1].nonzero()[:, 0].tolist() == list(range(k))


# Wrong samplers that people really write; each must be told apart from the right one.

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])


def rule(sampling: Sampling, seen=None) -> list[float]:
    return next_token_probabilities(LOGITS, sampling, seen)[0].tolist()


def test_top_p_keeps_the_token_that_crosses_the_line():
    plain = LOGITS.softmax(-1)[0]  # 0.600, 0.221, 0.134, 0.030, 0.004
    assert_close(
        torch.tensor(rule(Sampling(1.0, top_p=0.7))),
        torch.tensor([plain[0], plain[1], 0, 0, 0]) / plain[:2].sum(),
    )
    assert rule(Sampling(1.0, top_p=0.1)) == [1, 0, 0, 0, 0]  # the best token is never dropped


def test_the_penalty_lowers_positive_and_negative_scores():
    plain, penalised = (
        rule(Sampling(1.0)),
        rule(Sampling(1.0, repetition_penalty=2.0), torch.tensor([[0, 3]])),
    )
    changed = torch.tensor([[1.0, 1.0, 0.5, -2.0, -3.0]])  # dividing -1 by 2 would have raised it
    assert_close(torch.tensor(penalised), changed.softmax(-1)[0])
    assert penalised[3] < plain[3]


def test_padding_is_not_penalised_but_the_same_token_in_the_text_is():
    sampling, seen, padding = (
        Sampling(1.0, repetition_penalty=2.0),
        torch.tensor([[0, 0, 1], [0, 1, 0]]),
        torch.tensor([2, 1]),
    )
    both = next_token_probabilities(LOGITS.expand(2, -1), sampling, seen, padding)
    assert_close(both[0], torch.tensor([[2.0, 0.5, 0.5, -1, -3]]).softmax(-1)[0])
    assert_close(both[1], torch.tensor([[1.0, 0.5, 0.5, -1, -3]]).softmax(-1)[0])


def test_draws_follow_the_probabilities():
    """A chi-squared test of 4,000 draws at fixed seed: the 99.9 % quantile for 11 degrees of freedom is 31.3."""
    model, sampling = make_model(WRITER), Sampling(0.9, top_k=12)
    ids = make_ids(WRITER, 1, 5)
    with torch.no_grad():
        expected = next_token_probabilities(model(ids)[:, -1], sampling)[0] * 4000
    drawn = generate(
        model, ids.expand(4000, -1), 1, 0.9, top_k=12, generator=torch.Generator().manual_seed(0)
    )[:, -1]
    counts, possible = torch.bincount(drawn, minlength=300), expected > 0
    assert int(possible.sum()) == 12 and int(counts[~possible].sum()) == 0
    chi_squared = ((counts - expected) ** 2 / expected)[possible].sum()
    assert chi_squared < 31.3


# One token


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_a_choice_is_a_draw_from_the_probabilities(sampling):
    logits, seen = some_logits(), make_ids(WRITER, 4, 12)
    probabilities = next_token_probabilities(logits, sampling, seen)
    for seed in range(20):
        ours, theirs = (torch.Generator().manual_seed(seed) for _ in "ab")
        drawn = choose(logits, sampling, seen, generator=ours)
        assert torch.equal(drawn, torch.multinomial(probabilities, 1, generator=theirs)[:, 0])
        assert torch.equal(ours.get_state(), theirs.get_state())
        assert (probabilities.gather(1, drawn[:, None]) > 0).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), penalty=st.sampled_from([0.7, 1.0, 1.3, 5.0]), pad=st.integers(0, 11))
def test_at_temperature_0_the_best_token_is_chosen_and_nothing_drawn(seed, penalty, pad):
    logits = 3 * torch.randn(2, 30, generator=torch.Generator().manual_seed(seed))
    seen, padding = make_ids(WRITER, 2, 12) % 30, torch.tensor([0, pad])
    generator = torch.Generator().manual_seed(0)
    before, everywhere = generator.get_state(), torch.random.get_rng_state()
    sampling = Sampling(repetition_penalty=penalty, top_k=3, top_p=0.1)  # which change no best token
    chosen = choose(logits, sampling, seen, padding, generator)
    for row, start in enumerate((0, pad)):
        scores = logits[row].clone()
        for token in set(seen[row, start:].tolist()):
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        assert chosen[row] == scores.argmax()
    assert torch.equal(next_token_probabilities(logits, sampling, seen, padding).argmax(-1), chosen)
    assert torch.equal(generator.get_state(), before) and torch.equal(
        torch.random.get_rng_state(), everywhere
    )


def test_a_choice_lowers_what_the_text_holds_and_not_what_pads_it():
    logits, seen = torch.tensor([[2.0, 1.5, 0.0]]).expand(2, -1), torch.tensor([[0, 0, 2], [0, 0, 2]])
    sampling, padding = Sampling(repetition_penalty=2.0), torch.tensor([0, 2])
    assert choose(logits, sampling, seen, padding).tolist() == [1, 0]
    assert choose(logits, sampling, seen).tolist() == [1, 1]


def test_without_a_generator_the_global_one_is_used():
    logits = some_logits()
    torch.manual_seed(5)
    drawn, after = choose(logits, Sampling(1.0)), torch.random.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.multinomial(logits.softmax(-1), 1)[:, 0])
    assert torch.equal(torch.random.get_rng_state(), after)


# Bad input


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Sampling(temperature=-0.5), "temperature is -0.5; expected 0"),
        (lambda: Sampling(temperature=float("nan")), "temperature is nan"),
        (lambda: Sampling(temperature=1e-40), "temperature is 1e-40; expected 0 .* from 1e-05 on"),
        (lambda: Sampling(temperature="0.9"), "temperature is '0.9'|temperature"),
        (lambda: Sampling(top_p="0.9"), "top_p is '0.9'; expected a probability|top_p"),
        (lambda: Sampling(repetition_penalty=1e-40), "repetition_penalty is 1e-40; expected 1"),
        (lambda: Sampling(top_k=True), "top_k is True"),
        (
            lambda: choose(torch.tensor([[0.0, math.nan]]), Sampling(1.0)),
            "No token can be drawn by these scores",
        ),
        (
            lambda: choose(torch.zeros(1, 3, device="meta"), Sampling(1.0), generator=torch.Generator()),
            r"generator draws on cpu and the scores are on meta; give torch.Generator\('meta'\)",
        ),
        (lambda: Sampling(top_k=0), "top_k is 0"),
        (lambda: Sampling(top_p=1.5), "top_p is 1.5; expected a probability"),
        (lambda: Sampling(top_p=0.0), "top_p is 0.0"),
        (lambda: Sampling(repetition_penalty=-1.0), "repetition_penalty is -1.0"),
        (
            lambda: next_token_probabilities(torch.zeros(1, 3), Sampling(repetition_penalty=1.2)),
            "penalty is 1.2; give the tokens so far as seen",
        ),
        (
            lambda: choose(torch.zeros(1, 3), Sampling(repetition_penalty=1.2)),
            "penalty is 1.2; give the tokens so far",
        ),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(
        (ValueError, TypeError), match=sentence
    ):  # the type check of the tests sees some first
        call()


@pytest.mark.parametrize("top_p", [1e-50, 1e-320, 1e-5])
def test_the_smallest_top_p_leaves_the_best_token(top_p):
    probabilities = next_token_probabilities(torch.tensor([[0.1, 2.0, 1.0]]), Sampling(1.0, top_p=top_p))
    assert probabilities.tolist() == [[0, 1, 0]]
