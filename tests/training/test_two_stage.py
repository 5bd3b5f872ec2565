"""Mixtures are exact at every index, examples arrive whole and masked, curvature is exact on a quadratic."""

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
from minicpm_lite.data.instructions import (
    TASKS,
    EncodedExample,
    encode_example,
    load_instruction_corpus,
    load_instructions,
)
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate
from minicpm_lite.training.trainer import Trainer, TrainerConfig, next_token_loss
from minicpm_lite.training.two_stage import (
    ConversationWindows,
    MixtureWindows,
    choice_accuracy,
    directional_curvature,
    directional_derivatives,
    score_answers,
    watch_decay,
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


# Derivatives along a direction: exact on a quadratic.


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


def test_watching_changes_nothing_and_reads_what_it_says():
    """The updates are those of a run that nobody watched; a reading agrees with gradients taken by hand."""

    def run():
        torch.manual_seed(0)
        return Trainer(Decoder(MODEL), make_recipe(), WSD(0.01, 1, 3, 20), CONFIG)

    watched, alone = run(), run()
    readings = list(watch_decay(watched, 23, every=5))
    alone.train(23, progress=False)
    assert watched.losses == alone.losses
    assert [reading.step for reading in readings] == [5, 10, 15, 20] and watched.step == 23

    by_hand = run()
    gradients = []
    for step in (8, 9):
        by_hand.train(step, progress=False)
        window = batch_of(by_hand.windows, step, CONFIG.batch_size)
        loss = next_token_loss(by_hand.model, window)
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


def test_a_reading_takes_two_updates():
    torch.manual_seed(0)
    run = Trainer(Decoder(MODEL), make_recipe(), WSD(0.01, 1, 3, 20), CONFIG)
    with pytest.raises(ValueError, match="every is 1; a reading takes two updates"):
        next(watch_decay(run, 10, every=1))


# The instructions.


@pytest.fixture(scope="module")
def corpus():
    return load_instruction_corpus()


def test_nothing_held_out_is_learned():
    train, held_out = load_instructions()
    assert {example.task for example in train} == {example.task for example in held_out} == set(TASKS)
    learned = {(example.task, example.question.lower()) for example in train}
    assert not learned & {(example.task, example.question.lower()) for example in held_out}
    swapped = {(e.task, " or ".join(reversed(e.question[len("larger of ") :].split(" or "))))
               for e in train if e.task == "larger"}  # fmt: skip
    assert not swapped & {(e.task, e.question[len("larger of ") :]) for e in held_out if e.task == "larger"}


def test_answers_are_right():
    train, held_out = load_instructions()
    for example in [*train[:2000], *held_out]:
        digits = example.question.replace(" ", "")
        if example.task == "sum":
            assert int(example.answer.replace(" ", "")) == sum(map(int, digits.split("plus")))
        if example.task == "larger":
            assert int(example.answer.replace(" ", "")) == max(
                map(int, digits[len("largerof") :].split("or"))
            )
    novels = {e.answer for e in train if e.task == "novel"}
    assert novels == {"Emma", "Mansfield", "Northanger", "Persuasion", "Pride", "Sense"}
    named = {"Darcy": "Pride", "Knightley": "Emma", "Wentworth": "Persuasion", "Tilney": "Northanger"}
    for name, novel in named.items():
        told = [e.answer for e in train if e.task == "novel" and name in e.question]
        assert told and set(told) == {novel}


def test_equal_in_every_process():
    """Held-out parts follow from the text alone, not from Python's hash seed."""
    train, held_out = load_instructions()
    assert [sum(example.task == task for example in train) for task in TASKS] == [
        4000,
        4000,
        15_000,
        15_000,
        15_000,
    ]
    assert [sum(example.task == task for example in held_out) for task in TASKS] == [500, 217, 200, 500, 25]
    assert held_out[0].question.startswith("I think it just randomly matches")


@pytest.mark.slow  # learns two vocabularies from four and eight million characters
def test_the_prose_is_that_of_the_other_chapters(corpus):
    from minicpm_lite.data.corpora import load_corpus

    other = load_corpus()
    for mine, theirs in ((corpus.prose, other.train), (corpus.prose_held_out, other.validation)):
        assert corpus.tokenizer.decode(mine.tolist()) == other.tokenizer.decode(theirs.tolist())


@pytest.mark.slow  # learns two vocabularies from four and eight million characters
def test_encoded_examples_read_back(corpus):
    example = next(e for e in load_instructions()[1] if e.task == "sum")
    encoded = encode_example(corpus.tokenizer, example)
    text = corpus.tokenizer.decode([*encoded.question, *encoded.answer])
    assert text == f"<用户>{example.question}<AI> {example.answer}\n"
    assert encoded.window[: len(encoded.question)] == [~i for i in encoded.question]
    marks = [corpus.tokenizer.token_to_id(mark) for mark in ("<用户>", "<AI>")]
    assert [encoded.question[0], encoded.question[-1]] == marks and corpus.tokenizer.get_vocab_size() == 1024
    assert max(len(e.window) for e in corpus.train) <= 129
