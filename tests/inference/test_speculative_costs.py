"""The cost model by counting, the best chain and tree by trying all, and a setting that is never slower."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from guessing import Told, chain, foreseen, near
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import WRITER, make_ids, make_model

from minicpm_lite.inference.drafts import DecoderDraft, PromptLookup
from minicpm_lite.inference.guess_trees import Chain, DynamicTree, StaticTree
from minicpm_lite.inference.speculative import speculative_generate
from minicpm_lite.inference.speculative_costs import (
    Adaptive,
    Costs,
    best_chain,
    best_tree,
    expected_length,
)
from minicpm_lite.language.generation import generate, pad_left
from minicpm_lite.language.sampling import Sampling

CHEAP = Costs((1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4), draft=0.05)
DEAR = Costs((1.0, 1.9, 2.8), draft=0.5)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("guesses", [0, 1, 4])
def test_the_expected_length_by_counting_all_outcomes(acceptance, guesses):
    expected = 0.0
    for outcome in product([True, False], repeat=guesses):
        chance = 1.0
        for accepted in outcome:
            chance *= acceptance if accepted else 1 - acceptance
        expected += chance * (1 + [*outcome, False].index(False))
    assert expected_length(acceptance, guesses) == pytest.approx(expected)


def test_calls_beyond_those_that_were_measured_go_on_as_the_last():
    assert [DEAR.call(tokens) for tokens in (1, 2, 3, 4, 6)] == pytest.approx([1.0, 1.9, 2.8, 3.7, 5.5])
    assert Costs((1.0, 2.0, 1.5), 0.0).call(9) == 1.5  # noise makes no call cheaper than a smaller one
    assert CHEAP.step(4, 2) == pytest.approx(1.2 + 0.1)


def test_the_best_chain():
    assert best_chain(CHEAP, 0.0, 8) == best_chain(DEAR, 0.7, 8) == 0
    assert best_chain(CHEAP, 1.0, 8) == 8
    lengths = [best_chain(CHEAP, acceptance / 20, 8) for acceptance in range(21)]
    assert lengths == sorted(lengths) and len(set(lengths)) > 4


@pytest.mark.parametrize("chances", [(0.6, 0.2), (0.4, 0.3, 0.2), (0.9,)])
@pytest.mark.parametrize("costs", [CHEAP, Costs((1.0, 1.0), 0.3), Costs((1.0, 1.2), 0.0)])
def test_the_best_tree_is_the_best_of_all(chances, costs):
    """Of all with up to four guesses."""

    def likely(path: tuple[int, ...]) -> float:
        return float(torch.tensor([chances[rank] for rank in path], dtype=torch.float64).prod())

    every = [path for depth in range(1, 5) for path in product(range(len(chances)), repeat=depth)]
    every.sort(key=likely, reverse=True)
    speeds = []
    for size in range(1, 5):
        for tree in combinations(every[:12], size):
            if all(len(path) == 1 or path[:-1] in tree for path in tree):
                length = 1 + sum(map(likely, tree))
                speeds.append(costs.speed(length, size, max(map(len, tree))))
    found = best_tree(costs, chances, 4)
    paths = []
    for parent, rank in zip(found.parents, found.ranks, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), rank))
    length = 1 + sum(map(likely, paths))
    assert costs.speed(length, len(paths), max(map(len, paths))) == pytest.approx(max(speeds))


def test_a_tree_that_does_not_pay_is_none():
    assert best_tree(DEAR, (0.3, 0.2), 5) is None
    assert best_tree(CHEAP, (0.9,), 3) == StaticTree((-1, 0, 1), (0, 0, 0))
    assert best_tree(CHEAP, iter((0.9,)), 3) == StaticTree((-1, 0, 1), (0, 0, 0))


# Adaptive


def accounts(setting: Adaptive, luck, steps: int) -> tuple[float, float, list[int]]:
    """What a text takes by the costs, what it takes plainly, and how many guesses each step made."""
    drafting = setting.begin(make_model(WRITER), 999, Sampling(), None)
    new, spent, plain, asked = [[1]], 0.0, 0.0, []
    for step in range(steps):
        guesses = drafting.propose(new, 99).tokens.shape[1]
        accepted = min(luck(step, guesses), guesses)
        new = [[1] * (accepted + 1)]
        spent += setting.costs.step(guesses, guesses)
        plain += (accepted + 1) * setting.costs.call(1)
        asked.append(guesses)
        assert spent <= plain * (1 + setting.share) + setting.credit * setting.costs.call(1) + 1e-9
    return spent, plain, asked


def test_costs_that_texts_share_are_those_of_all_their_tokens_in_one_call():
    shared = Costs((1.0, 1.2, 1.5, 1.9), draft=0.1).shared(3)
    assert shared.calls == pytest.approx((1.5, 2.7, 3.9, 5.1)) and shared.draft == pytest.approx(0.3)
    assert DEAR.shared(1) == DEAR


ANY = Told(lambda texts, most: chain([[0] * most]))


@settings(max_examples=60, deadline=None)
@given(
    lucks=st.lists(st.integers(0, 8), min_size=1, max_size=40),
    costs=st.sampled_from([CHEAP, DEAR, Costs((1.0, 1.0), 0.9)]),
    share=st.sampled_from([0.0, 0.02, 0.3]),
    credit=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_it_is_never_slower_than_the_allowance_says(lucks, costs, share, credit):
    """Whatever is accepted, and after every step."""
    setting = Adaptive(ANY, costs, share=share, credit=credit)
    accounts(setting, lambda step, guesses: lucks[step % len(lucks)], 80)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9)), min_size=1, max_size=80),
    costs=st.sampled_from([CHEAP, DEAR]),
)
def test_beside_others_it_is_never_slower_than_the_allowance_says(steps, costs):
    """Whatever is accepted and whoever comes and goes; with the calls that all share, and all do alike."""
    setting = Adaptive(ANY, costs)
    drafting, new = setting.begin(make_model(WRITER), 999, Sampling(), None), [[1]]
    spent = plain = dearest = 0.0
    for luck, texts in steps:
        drafting.reckon_with(texts)
        shared = costs.shared(texts)
        guesses = drafting.propose(new, 99).tokens.shape[1]
        new = [[1] * (min(luck, guesses) + 1)]
        spent += shared.step(guesses, guesses)
        plain += len(new[0]) * shared.call(1)
        dearest = max(dearest, shared.call(1))
        assert spent <= plain * (1 + setting.share) + setting.credit * dearest + 1e-9


def test_what_pays_for_one_text_may_not_pay_for_eight():
    """Calls of up to eight tokens cost the same, and beyond each token costs as much as such a call."""
    setting = Adaptive(ANY, Costs((1.0,) * 8 + (2.0, 3.0), draft=0.0), most=7)

    def guesses_at_last(texts: int) -> int:
        drafting, new = setting.begin(make_model(WRITER), 999, Sampling(), None), [[1]]
        for _ in range(100):
            drafting.reckon_with(texts)
            guesses = drafting.propose(new, 99).tokens.shape[1]
            new = [[1] * (guesses + 1)]
        return guesses

    assert [guesses_at_last(texts) for texts in (1, 2, 4, 8)] == [7, 3, 1, 0]


def test_it_guesses_much_where_that_pays_and_seldom_where_not():
    spent, plain, asked = accounts(Adaptive(ANY, CHEAP), lambda step, guesses: 8, 60)
    assert asked[-1] == 8 and plain / spent > 4
    spent, plain, asked = accounts(Adaptive(ANY, CHEAP), lambda step, guesses: 0, 400)
    assert spent < 1.03 * plain and 0 < sum(asked[200:]) < 100, "from time to time one is tried"
    assert sum(accounts(Adaptive(ANY, DEAR, share=0.0, credit=0.0), lambda step, guesses: 8, 60)[2]) == 0


def test_a_change_of_the_text_is_noticed():
    setting = Adaptive(ANY, CHEAP)
    asked = accounts(setting, lambda step, guesses: 0 if step < 60 else 8, 200)[2]
    assert max(asked[30:60]) <= 1 and min(asked[-20:]) == 8
    asked = accounts(setting, lambda step, guesses: 8 if step < 60 else 0, 200)[2]
    assert min(asked[40:60]) == 8 and max(asked[-20:]) <= 1


@pytest.mark.parametrize(
    "shape",
    [Chain(7), StaticTree((-1, -1, 0, 0, 1, 2), (0, 1, 0, 2, 0, 1)), DynamicTree(), DynamicTree(3, 3, 7)],
    ids=["chain", "static", "eagle's", "small"],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_no_draft_model_takes_more_than_the_allowance_says(shape, rows, monkeypatch, unchecked):
    """All its calls are counted, those of levels that nobody asked for and those that catch up, too."""
    config = replace(WRITER, max_position_embeddings=512)
    target, small, costs = make_model(config, 1), make_model(config, 2), Costs((1.0, 1.02), draft=0.2)
    calls, lengths = [], []
    states, read = small.states, target.read
    monkeypatch.setattr(small, "states", lambda *given: calls.append(1) or states(*given))
    monkeypatch.setattr(target, "read", lambda ids, *given: lengths.append(ids.shape[1]) or read(ids, *given))
    draft = Adaptive(DecoderDraft(small, shape), costs)
    speculative_generate(target, draft, make_ids(config, rows, 5), 240, stop_ids=())
    spent = sum(map(costs.call, lengths[1:])) + len(calls) * costs.draft
    plain = 239 * costs.call(1)
    assert spent <= plain * 1.02 + 2 + 1e-9
    assert len(calls) > 8, "It is asked from time to time."


@pytest.mark.parametrize("inner", [PromptLookup(), "decoder", "right"])
@pytest.mark.parametrize("costs", [CHEAP, DEAR])
def test_what_is_written_stays_the_same(inner, costs):
    model = make_model(WRITER)
    ids, padding = pad_left([make_ids(WRITER, 1, n)[0].tolist() for n in (9, 3, 6)])
    wanted = generate(model, ids, 40, padding=padding)
    if inner == "decoder":
        inner = DecoderDraft(near(model), Chain(8))
    elif inner == "right":
        rows = [row[pad:].tolist() for row, pad in zip(wanted, padding.tolist(), strict=True)]
        inner = foreseen(rows, lambda row, place: True, guesses=8)
    found, stats = speculative_generate(model, Adaptive(inner, costs), ids, 40, padding=padding)
    assert torch.equal(found, wanted)
    assert stats.calls <= 39


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Costs((1.0,), 0.1), "expected times of calls with 1, 2 and more tokens"),
        (lambda: Costs((1.0, -1.0), 0.1), "calls is -1.0"),
        (lambda: Costs((1.0, 1.0), -0.1), "draft is -0.1"),
        (lambda: best_chain(CHEAP, 1.5, 3), "acceptance is 1.5"),
        (lambda: best_chain(CHEAP, 1.5, 0), "acceptance is 1.5"),
        (lambda: best_chain(CHEAP, 0.5, -1), "most is -1"),
        (lambda: expected_length(-0.1, 3), "acceptance is -0.1"),
        (lambda: best_tree(CHEAP, iter((0.7, 0.7)), 3), "whose sum is at most 1"),
        (lambda: best_tree(CHEAP, (0.7, 0.7), 3), "whose sum is at most 1"),
        (lambda: best_tree(CHEAP, (), 3), "whose sum is at most 1"),
        (lambda: best_tree(CHEAP, (0.5,), 0), "most is 0"),
        (lambda: Adaptive(ANY, CHEAP, share=2.0), "share is 2.0"),
        (lambda: Adaptive(ANY, CHEAP, most=0), "most is 0"),
    ],
)
def test_what_cannot_be_gets_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
