"""Mixtures are exact at every index; examples arrive whole, and only answers are predicted."""

import math
from fractions import Fraction
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minicpm_lite import ModelConfig
from minicpm_lite.data.corpora import TokenWindows, Windows, batch_of
from minicpm_lite.data.instructions import EncodedExample
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate
from minicpm_lite.training.trainer import Trainer, TrainerConfig, next_token_loss
from minicpm_lite.training.two_stage import (
    ConversationWindows,
    MixtureWindows,
    choice_accuracy,
    score_answers,
)
from minicpm_lite.training.wsd import WSD

MODEL = ModelConfig(16, 40, 1, 2, 30, num_key_value_heads=1, max_position_embeddings=64)
CONFIG = TrainerConfig(batch_size=3, sequence_length=8)


class Numbered:
    """Windows that say where they come from: source number, and index there."""

    length = 1

    def __init__(self, number: int, length: int = 1):
        self.number, self.length = number, length

    def __getitem__(self, index: int):
        return torch.tensor([self.number, index])

    def id_range(self):
        return self.number, self.number + 1

    def identity(self):
        return {"number": self.number}


def mixture(*stages, sources=None):
    names = sources or sorted({name for _, weights in stages for name in weights})
    return MixtureWindows({name: Numbered(i) for i, name in enumerate(names)}, stages)


# The mixture: within 1 of its share all along, each source in order, any index by look-up.


weights_of_sources = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


@given(weights=weights_of_sources)
def test_within_one_of_every_share_after_every_window(weights):
    total = sum(weights)
    data = mixture((0, {f"s{i}": weight for i, weight in enumerate(weights)}))
    seen = [0] * len(weights)
    for n in range(2 * total + 3):
        for count, weight in zip(seen, weights, strict=True):
            assert abs(count - Fraction(n * weight, total)) < 1
        assert list(data.counts(n).values()) == seen
        source, place = data[n].tolist()
        assert place == seen[source], "each source is read in its own order, without gap or repeat"
        seen[source] += 1
    assert [count for count in data.counts(total).values()] == [w for w in weights]


@given(
    first=weights_of_sources,
    second=weights_of_sources,
    third=weights_of_sources,
    switch=st.integers(1, 50),
    length=st.integers(1, 50),
)
def test_a_source_goes_on_from_one_stage_to_the_next(first, second, third, switch, length):
    names = [f"s{i}" for i in range(6)]
    stages = [dict(zip(names, weights, strict=False)) for weights in (first, second, third)]
    starts = [0, switch, switch + length]
    data = mixture(*zip(starts, stages, strict=True), sources=names)
    seen = [0] * 6
    at_start = []
    for n in range(switch + length + 30):
        if n in starts:
            at_start = list(seen)
        stage = max(i for i, start in enumerate(starts) if start <= n)
        share = {
            name: Fraction(weight, sum(stages[stage].values())) for name, weight in stages[stage].items()
        }
        for i, name in enumerate(names):
            assert abs(seen[i] - at_start[i] - (n - starts[stage]) * share.get(name, 0)) < 1
        source, place = data[n].tolist()
        assert place == seen[source] and (names[source], place) == data.locate(n)
        seen[source] += 1
        assert list(data.counts(n + 1).values()) == seen


def test_any_index_at_once():
    """Step ten million is a look-up; a replay would take minutes."""
    data = mixture((0, {"a": 0.7, "b": 0.2, "c": 0.1}))
    n = 10**15
    assert data.counts(n) == {"a": 7 * n // 10, "b": n // 5, "c": n // 10}
    name, place = data.locate(n)
    assert data.counts(n + 1)[name] == place + 1


def test_decimals_are_meant_as_written():
    """0.1 + 0.2 is not 0.3 in binary; the mixture is exact all the same."""
    data = mixture((0, {"a": 0.1, "b": 0.2, "c": 0.7}))
    assert data.identity()["stages"] == [[0, {"a": 1, "b": 2, "c": 7}]]
    assert mixture((0, {"a": 1e-3, "b": 0.999})).counts(1000) == {"a": 1, "b": 999}
    assert mixture((0, {"a": Fraction(1, 3), "b": Fraction(2, 3)})).counts(300) == {"a": 100, "b": 200}


def rounded_alone(weights, n):
    """Each count rounded on its own: the sum can be off."""
    return [math.floor(n * w / sum(weights) + 0.5) for w in weights]


def rounded_sums(weights, n):
    """Sums rounded, counts as their differences: a count can fall."""
    edges = [math.floor(n * w / sum(weights) + 0.5) for w in accumulate(weights)]
    return [b - a for a, b in pairwise([0, *edges])]


def at_random(weights, n):
    generator = torch.Generator().manual_seed(0)
    picks = torch.multinomial(torch.tensor(weights).double(), max(n, 1), True, generator=generator)[:n]
    return torch.bincount(picks, minlength=len(weights)).tolist()


def is_a_fair_sequence(counts, weights):
    """Counts add up, never fall, and stay within 1 of their shares."""
    before = [0] * len(weights)
    for n in range(1, sum(weights) + 1):
        now = counts(weights, n)
        if sum(now) != n or any(a > b for a, b in zip(before, now, strict=True)):
            return False
        if any(abs(c - Fraction(n * w, sum(weights))) >= 1 for c, w in zip(now, weights, strict=True)):
            return False
        before = now
    return True


CASES = ([1, 1, 1], [5, 3, 2], [22, 27, 1, 8, 30], [40, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("wrong", [rounded_alone, rounded_sums, at_random])
def test_wrong_mixtures_are_told_apart(wrong):
    assert not all(is_a_fair_sequence(wrong, weights) for weights in CASES)


@pytest.mark.parametrize("weights", CASES)
def test_ours_is_fair_where_the_wrong_ones_fail(weights):
    def ours(weights, n):
        return list(mixture((0, {f"s{i}": w for i, w in enumerate(weights)})).counts(n).values())

    assert is_a_fair_sequence(ours, weights)


@pytest.mark.parametrize(
    ("stages", "sources", "sentence"),
    [
        ([], ["a"], r"begin at the windows \[\]; expected 0"),
        ([(1, {"a": 1})], ["a"], r"begin at the windows \[1\]; expected 0"),
        ([(0, {"a": 1}), (0, {"a": 1})], ["a"], r"begin at the windows \[0, 0\]"),
        ([(0, {"a": -1, "b": 2})], ["a", "b"], "weight of 'a' is -1; expected a finite number, 0 or more"),
        ([(0, {"a": math.nan})], ["a"], "weight of 'a' is nan"),
        ([(0, {"a": math.inf})], ["a"], "weight of 'a' is inf"),
        ([(0, {"a": "1"})], ["a"], "weight of 'a' is '1'"),
        ([(0, {"a": 0})], ["a"], "at least one must be greater than 0"),
        ([(0, {})], ["a"], "at least one must be greater than 0"),
        ([(0, {"c": 1})], ["a", "b"], r"no source 'c' to weigh; the sources are \['a', 'b'\]"),
        ([(0, {"a": 0.1234567, "b": 1})], ["a", "b"], "repeat only after .* windows; round them"),
    ],
)
def test_impossible_mixtures_are_refused(stages, sources, sentence):
    with pytest.raises(ValueError, match=sentence):
        mixture(*stages, sources=sources)


def test_sources_that_cannot_be_mixed():
    with pytest.raises(ValueError, match="no source"):
        MixtureWindows({}, [(0, {})])
    with pytest.raises(ValueError, match=r"different length \(\{'a': 1, 'b': 2\}\)"):
        MixtureWindows({"a": Numbered(0), "b": Numbered(1, length=2)}, [(0, {"a": 1})])
    with pytest.raises(IndexError, match="index of the window is -1"):
        mixture((0, {"a": 1}))[-1]


def make_recipe(weight=0.5, seed=0):
    """Prose of small ids, conversations of large ones."""
    examples = [EncodedExample((20 + i % 5, 25), (15 + i % 5, 29)) for i in range(40)]
    return MixtureWindows(
        {
            "prose": TokenWindows(torch.arange(400) % 13, 8, seed),
            "chats": ConversationWindows(examples, 8, seed),
        },
        [(0, {"prose": 1}), (12, {"prose": 1 - weight, "chats": weight}), (24, {"chats": 1})],
    )


def test_is_windows():
    assert isinstance(make_recipe(), Windows) and isinstance(mixture((0, {"a": 1})), Windows)
    assert make_recipe().id_range() == (0, 29)
    assert make_recipe().length == 8


def test_a_run_over_all_stages_resumes_bit_for_bit(tmp_path):
    """Stopped in the middle of the mixed decay; the data are those of a run that was not stopped."""

    def run(data):
        torch.manual_seed(0)
        return Trainer(Decoder(MODEL), data, WSD(0.01, 1, 3, 4), CONFIG)

    whole = run(make_recipe())
    whole.train(10, progress=False)
    first = run(make_recipe())
    first.train(6, progress=False)
    first.save(tmp_path / "run")
    second = run(make_recipe())
    second.load(tmp_path / "run")
    second.train(10, progress=False)
    assert second.losses == whole.losses
    for mine, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="stages"):
        run(make_recipe(weight=0.25)).load(tmp_path / "run")
    with pytest.raises(ValueError, match="sources"):
        run(make_recipe(seed=1)).load(tmp_path / "run")


def test_a_branch_changes_stage_and_keeps_its_place():
    """Plain until the decay, mixed from there: the prose goes on where the stable stage stopped."""
    plain, mixed = make_recipe(0.0), make_recipe(0.5)
    assert all(torch.equal(plain[index], mixed[index]) for index in range(12))
    prose = [mixed.locate(index)[1] for index in range(24) if mixed.locate(index)[0] == "prose"]
    assert prose == list(range(18))
    chats = [mixed.locate(index)[1] for index in range(12, 40) if mixed.locate(index)[0] == "chats"]
    assert chats == list(range(22)), "SFT goes on where the decay's conversations stopped"


# Conversations: whole, once an epoch, answers alone predicted.

examples = st.lists(
    st.builds(
        EncodedExample,
        st.lists(st.integers(0, 29), min_size=1, max_size=5).map(tuple),
        st.lists(st.integers(0, 29), min_size=1, max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=30,
)


@given(examples=examples, length=st.integers(8, 20), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_each_example_whole_and_once_an_epoch(examples, length, seed, epoch):
    windows = ConversationWindows(examples, length, seed)
    count = len(windows.packed)
    found = []
    for index in range(epoch * count, (epoch + 1) * count):
        row = windows[index].tolist()
        assert len(row) == length + 1
        while row and row[-1] == ~0:
            row.pop()
        found += split_examples(row)
    assert sorted(found) == sorted((example.question, example.answer) for example in examples)


def split_examples(row):
    """Questions are negative, answers are not: each change from answer to question begins an example."""
    found = []
    while row:
        question = [~i for i in row[: next(k for k, i in enumerate(row) if i >= 0)]]
        rest = row[len(question) :]
        answer = rest[: next((k for k, i in enumerate(rest) if i < 0), len(rest))]
        found.append((tuple(question), tuple(answer)))
        row = rest[len(answer) :]
    return found


EXAMPLES = [
    EncodedExample((1, 2, 3), (4, 5)),
    EncodedExample((6,), (7, 8, 9)),
    EncodedExample((10, 11), (12,)),
]


def test_packing_by_hand():
    windows = ConversationWindows(EXAMPLES, 9, seed=0)
    rows = {
        tuple(split_examples([i for i in windows[k].tolist() if i != ~0])) for k in range(len(windows.packed))
    }
    assert sum(len(row) for row in rows) == 3
    assert windows.id_range()[1] == 12
    assert windows.predicted_share == pytest.approx(6 / (9 * len(windows.packed)))
    one = ConversationWindows(EXAMPLES[:1], 4, seed=0)
    assert one[0].tolist() == [~1, ~2, ~3, 4, 5] and one.predicted_share == 0.5
    assert one[7].tolist() == one[0].tolist()


def test_epochs_differ_and_seeds_differ():
    many = [EncodedExample((i % 20,), (i % 7, 20)) for i in range(200)]
    windows = ConversationWindows(many, 8, seed=0)
    count = len(windows.packed)
    first, second = (torch.stack([windows[e * count + i] for i in range(count)]) for e in (0, 1))
    assert not torch.equal(first, second)
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))
    other = ConversationWindows(many, 8, seed=1)
    assert windows.identity() != other.identity() != ConversationWindows(many[1:], 8, 1).identity()
    assert windows.identity() == ConversationWindows(many, 8, seed=0).identity()


def test_the_loss_is_that_of_the_answers_alone():
    """Equal to the cross entropy written out by hand; the padding and the questions' own losses are not in it."""
    torch.manual_seed(0)
    model = Decoder(MODEL)
    windows = ConversationWindows(EXAMPLES, 9, seed=0)
    batch = batch_of(windows, 0, len(windows.packed))
    ids = torch.where(batch < 0, ~batch, batch)
    log_p = model(ids[:, :-1]).log_softmax(-1)
    total, tokens = 0.0, 0
    for row in range(len(batch)):
        for place in range(1, 10):
            if batch[row, place] >= 0:
                total -= log_p[row, place - 1, ids[row, place]].item()
                tokens += 1
    assert tokens == 6
    assert next_token_loss(model, batch).item() == pytest.approx(total / tokens, rel=1e-5)
    wrong = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert wrong != pytest.approx(total / tokens, rel=1e-3), "a loss without the mask is another number"


def test_padding_changes_nothing():
    """An example scores the same alone, beside longer ones, and at the start of a window."""
    torch.manual_seed(0)
    model = Decoder(MODEL)
    together = score_answers(model, EXAMPLES)
    for place, example in enumerate(EXAMPLES):
        alone = score_answers(model, [example])
        assert alone.total_loss.item() == pytest.approx(together.total_loss[place].item(), rel=1e-5)
        row = torch.tensor([example.window])
        assert next_token_loss(model, row, "sum").item() == pytest.approx(alone.total_loss.item(), rel=1e-5)
    assert together.tokens.tolist() == [2, 3, 1]
    assert together.loss == pytest.approx(together.total_loss.sum().item() / 6)


@pytest.mark.parametrize(
    ("examples", "sentence"),
    [
        ([], "no example to put into windows"),
        ([EncodedExample((), (1,))], "Example 0 lacks a question or an answer"),
        ([EXAMPLES[0], EncodedExample((1,), ())], "Example 1 lacks a question or an answer"),
        ([EncodedExample((1,) * 5, (2,) * 5)], "Example 0 has 10 tokens; a window holds 9"),
    ],
)
def test_examples_that_fit_no_window(examples, sentence):
    with pytest.raises(ValueError, match=sentence):
        ConversationWindows(examples, 8, seed=0)


def test_conversations_count_from_zero():
    with pytest.raises(IndexError, match="index of the window is -1"):
        ConversationWindows(EXAMPLES, 9, 0)[-1]


# What a model makes of questions.


@pytest.fixture(scope="module")
def taught():
    """A model that has learned four answers by heart, one of them wrong."""
    torch.manual_seed(0)
    lesson = [EncodedExample((i, 9), (20 + i, 10 + i, 29)) for i in range(4)]
    run = Trainer(Decoder(MODEL), ConversationWindows(lesson, 8, 0), WSD(0.02, 5, 75, 20), CONFIG)
    run.train(progress=False)
    return run.model, lesson


def test_exact_means_greedy_decoding_gives_the_answer(taught):
    model, lesson = taught
    asked = [*lesson[:3], EncodedExample((3, 9), (23, 11, 29)), EncodedExample((5, 5), (1, 2, 3))]
    scores = score_answers(model, asked)
    assert scores.exact.tolist() == [True, True, True, False, False]
    assert scores.accuracy == 0.6
    for example, exact in zip(asked, scores.exact.tolist(), strict=True):
        written = generate(model, torch.tensor([example.question]), len(example.answer))[0]
        assert (tuple(written.tolist()[-len(example.answer) :]) == example.answer) == exact


def test_choices(taught):
    model, lesson = taught
    right = [[EncodedExample(e.question, o.answer) for o in (e, *lesson) if o is e or o != e] for e in lesson]
    right = [[row[0]] + [option for option in row[1:] if option.answer != row[0].answer] for row in right]
    assert choice_accuracy(model, right) == 1.0
    assert choice_accuracy(model, [row[::-1] for row in right]) == 0.0
    assert choice_accuracy(model, [[row[0], row[0]] for row in right]) == 0.0, "a tie is not right"
    with pytest.raises(ValueError, match=r"\[1\] answers; expected one number of answers for all, 2 or more"):
        choice_accuracy(model, [[lesson[0]]])
    with pytest.raises(ValueError, match=r"\[2, 4\] answers"):
        choice_accuracy(model, [right[0], right[1][:2]])
    with pytest.raises(ValueError, match="no example to score"):
        score_answers(model, [])


def test_scoring_leaves_the_model_in_its_mode(taught):
    model, lesson = taught
    for mode in (True, False):
        model.train(mode)
        score_answers(model, lesson)
        assert model.training is mode
