"""Mixtures are exact at every index, whatever the names and the order of their sources, and go on elsewhere."""

import json
import math
import shutil
import zlib
from contextlib import chdir
from fractions import Fraction
from itertools import accumulate, pairwise, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.data.conversations import ConversationWindows, EncodedExample
from minicpm_lite.data.mixtures import MixtureWindows, going_on, noted_tokenizers, require_one_tokenizer
from minicpm_lite.data.shards import Shards, write_shards
from minicpm_lite.data.windows import TokenWindows, Windows


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


class Cut(Numbered):
    """Windows that say who made their tokens."""

    def __init__(self, number: int, tokenizer: int | None):
        super().__init__(number)
        self.tokenizer = tokenizer

    def identity(self):
        return super().identity() | {"tokenizer": self.tokenizer}


def test_a_mixture_within_a_mixture_hides_no_tokenizer():
    seven, eight, unnoted = ({"tokenizer": each} for each in (7, 8, None))
    inner = {"sources": [seven, {"sources": [unnoted, eight], "stages": []}], "stages": []}
    assert noted_tokenizers(inner) == [7, 8] and noted_tokenizers({}) == noted_tokenizers(unnoted) == []
    assert noted_tokenizers({"sources": 3, "tokenizer": 7} | {"sources": [5, seven]}) == [7]
    for first, other in ((inner, seven), (seven, {"sources": [{"sources": [eight]}]})):
        with pytest.raises(ValueError, match="were cut with different tokenizers"):
            require_one_tokenizer({"a": first, "b": other})
    require_one_tokenizer({"a": {"sources": [{"sources": [seven, unnoted]}]}, "b": seven})


def test_one_model_knows_one_tokenizer():
    sources = {"a": Cut(0, 7), "b": Cut(1, None), "c": Cut(2, 7), "d": Numbered(3), "e": Cut(4, 8)}
    known = {name: source for name, source in sources.items() if name != "e"}
    data = MixtureWindows(known, [(0, dict.fromkeys(known, 1))])
    with pytest.raises(
        ValueError, match="^a and e were cut with different tokenizers; one model knows one.$"
    ):
        MixtureWindows(sources, [(0, {"a": 1})])
    going_on(data.identity(), 4, {"b": sources["b"]}, {"b": 1})
    for others in ({"e": sources["e"]}, {"b": sources["b"], "e": sources["e"]}):
        with pytest.raises(ValueError, match="^e and what was read before were cut with different"):
            going_on(data.identity(), 4, others, {"e": 1})


# The mixture: within 1 of its share all along, each source in order, any index by look-up.


weights_of_sources = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


@pytest.mark.slow  # every window of long mixtures
@settings(deadline=None)
@given(weights=weights_of_sources)
def test_within_one_of_every_share_after_every_window(weights):
    total = sum(weights)
    data = mixture((0, {f"s{i}": weight for i, weight in enumerate(weights)}))
    seen = [0] * len(weights)
    for n in range(2 * total + 3):
        for count, weight in zip(seen, weights, strict=True):
            assert abs(count * total - n * weight) < total
        assert list(data.counts(n).values()) == seen
        source, place = data[n].tolist()
        assert place == seen[source], "each source is read in its own order, without gap or repeat"
        seen[source] += 1
    assert [count for count in data.counts(total).values()] == [w for w in weights]


@settings(deadline=None)
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
    assert data.identity()["stages"] == [[0, [1, 2, 7]]]
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
        ([(0, {"a": True})], ["a"], "weight of 'a' is True"),
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


def test_is_windows():
    data = mixture((0, {"a": 1}))
    assert isinstance(data, Windows)
    assert data.id_range() == (0, 1) and data.length == 1


# Order and spelling decide nothing.


def drawn(data, count=60):
    """What is read: contents of the sources, not their names."""
    return [data[index].tolist() for index in range(count)]


several = st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)


@settings(deadline=None)
@given(first=several, second=several, switch=st.integers(1, 30), order=st.permutations(range(3)))
def test_neither_names_nor_their_order_decide_what_is_read(first, second, switch, order):
    """Every way to write the same mixture draws the same windows and has the same identity."""

    def written(order, names):
        sources = {names[i]: Numbered(i) for i in order}
        stages = [
            (0, {names[i]: first[i] for i in order}),
            (switch, {names[i]: second[i] for i in order[::-1]}),
        ]
        return MixtureWindows(sources, stages)

    plain, other = written(range(3), "abc"), written(order, ["./z", "y/", "/x"])
    assert drawn(plain) == drawn(other)
    assert plain.identity() == other.identity() == json.loads(json.dumps(plain.identity()))


FOLDERS = ("web", "books", "chats")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Three folders of shards, with links to them and copies of them."""
    home = tmp_path_factory.mktemp("corpora")
    (home / "elsewhere").mkdir()
    for number, name in enumerate(FOLDERS):
        tokens = torch.randint(0, 50, (200,), generator=torch.Generator().manual_seed(number))
        write_shards(home / name, [tokens], 50, shard_tokens=90)
        (home / f"link-to-{name}").symlink_to(name)
        (home / "elsewhere" / name).symlink_to(home / name)
        shutil.copytree(home / name, home / "elsewhere" / f"copy-of-{name}")
    return home


@st.composite
def spelt(draw, name):
    """One of the ways to write a folder, as seen from the folder where all are."""
    place = draw(
        st.sampled_from([name, f"link-to-{name}", f"elsewhere/{name}", f"elsewhere/copy-of-{name}"])
        | st.sampled_from([f"elsewhere/../{name}", f"web/../{name}", f"./././{name}", f"elsewhere/./{name}"])
    )
    before = draw(
        st.sampled_from(["", "./", "../{home}/", "{parent}/{home}/", "{parent}/{home}/elsewhere/../"])
    )
    return before + place + draw(st.sampled_from(["", "/", "//", "/."]))


spellings = st.tuples(*map(spelt, FOLDERS))
weights_of_folders = st.just([1, 1, 1]) | st.lists(st.sampled_from([1, 2, 0.5, 0.3]), min_size=3, max_size=3)


def read(names, weights, order=range(3), factor=1):
    sources = {names[i]: TokenWindows(Shards(names[i], 50), length=8, seed=0) for i in order}
    return MixtureWindows(sources, [(0, {names[i]: weights[i] * factor for i in order[::-1]})])


@pytest.mark.slow  # many folders; one of them is looked at by the tests beside it
@settings(deadline=None, max_examples=60)
@given(
    names=spellings,
    weights=weights_of_folders,
    order=st.permutations(range(3)),
    factor=st.sampled_from([1, 4]),
)
def test_no_order_or_spelling_of_folders_decides_what_is_read(corpora, names, weights, order, factor):
    """Relative, absolute, through links, with a slash behind, a copy; also where equal weights tie."""
    names = [name.format(parent=corpora.parent, home=corpora.name) for name in names]
    with chdir(corpora):
        plain, other = read(FOLDERS, weights), read(names, weights, order, factor)
        assert drawn(plain) == drawn(other)
        assert plain.identity() == other.identity()


@settings(deadline=None, max_examples=60)
@given(names=st.lists(spelt("web"), min_size=2, max_size=2, unique=True), order=st.permutations(range(3)))
def test_one_folder_in_two_spellings_is_refused(corpora, names, order):
    names = [name.format(parent=corpora.parent, home=corpora.name) for name in (*names, "books")]
    with chdir(corpora), pytest.raises(ValueError, match="hold the same windows; give them once"):
        read(names, [1, 1, 1], order)


class ByPosition(MixtureWindows):  # ties in the order in which the sources are given
    @property
    def _by_content(self):
        return list(self.sources)


class ByName(MixtureWindows):  # ties in the order of the names
    @property
    def _by_content(self):
        return sorted(self.sources)


def is_read_alike(make) -> bool:
    """Three equal weights have three equal deadlines; the names and their order change, the contents do not."""
    contents = {
        tuple(data[index][0].item() for index in range(3))
        for order in permutations(range(3))
        for names in ("abc", "cab")
        for data in [make({names[i]: Numbered(i) for i in order}, [(0, dict.fromkeys(names, 1))])]
    }
    return len(contents) == 1


def test_ties_by_position_or_name_are_told_apart():
    assert is_read_alike(MixtureWindows)
    assert not is_read_alike(ByPosition)
    assert not is_read_alike(ByName)


def test_identity_tells_mixtures_apart():
    def made(stages, numbers="01"):
        return MixtureWindows({name: Numbered(int(name)) for name in numbers}, stages).identity()

    plain = made([(0, {"0": 1, "1": 1})])
    assert plain == made([(0, {"1": 7, "0": 7})], "10")
    others = [
        made([(0, {"0": 1, "1": 2})]),
        made([(0, {"0": 1, "1": 1}), (5, {"0": 1})]),
        made([(0, {"0": 1, "2": 1})], "02"),
        made([(0, {"0": 1, "1": 1})], "012"),
    ]
    assert all(plain != other for other in others)


def test_the_same_windows_twice_are_refused():
    """One folder under two names would be read with the sum of both weights, each window twice."""
    with pytest.raises(ValueError, match="sources 'a' and './a' hold the same windows; give them once"):
        MixtureWindows({"a": Numbered(0), "b": Numbered(1), "./a": Numbered(0)}, [(0, {"a": 1, "b": 1})])
    within = MixtureWindows({"web": mixture((0, {"a": 1, "b": 1}))}, [(0, {"web": 1})])  # which holds 0 and 1
    for other in (Numbered(1), mixture((0, {"c": 1, "b": 1}), sources="bc")):
        with pytest.raises(
            ValueError, match="sources 'all' and 'other' hold the same windows; give them once"
        ):
            MixtureWindows({"all": within, "other": other}, [(0, {"all": 1})])
    MixtureWindows({"all": within, "other": Numbered(2)}, [(0, {"all": 1, "other": 1})])
    tokens = torch.arange(100)
    with pytest.raises(ValueError, match="hold the same windows"):
        MixtureWindows(
            {"a": TokenWindows(tokens, 8, 0), "b": TokenWindows(tokens.clone(), 8, 0)}, [(0, {"a": 1})]
        )


def test_what_was_given_can_be_read_once_only():
    weights = {"a": 1, "b": 1}
    sources = {name: Numbered(number) for number, name in enumerate(weights)}
    data = MixtureWindows(sources, iter([(0, {"a": 1}), (4, weights)]))
    expected = drawn(mixture((0, {"a": 1}), (4, {"a": 1, "b": 1})))
    sources.clear()
    weights["a"] = 5
    assert drawn(data) == expected, "later changes to what was given do not act"


# What the first edition drew, the chapters and their recorded runs read.

SQUARES = torch.arange(5000) ** 2 % 997
EXAMPLES = [EncodedExample((20 + i % 5, 25), (15 + i % 5, 29, *range(i % 4))) for i in range(40)]


def checksum(windows: Windows, count: int) -> int:
    return zlib.crc32(torch.stack([windows[index] for index in range(count)]).numpy().tobytes())


@pytest.mark.parametrize(
    ("seed", "weight", "all_stages"),
    [(0, 0.0, 4149299978), (0, 0.5, 210165258), (1, 0.0, 1932486395), (1, 0.5, 4222424866)],
)
@pytest.mark.parametrize("names", [("prose", "instructions"), ("instructions", "prose")])
def test_the_recipe_of_two_stages_is_that_of_the_first_edition(seed, weight, all_stages, names):
    sources = {
        "prose": TokenWindows(SQUARES, 16, seed),
        "instructions": ConversationWindows(EXAMPLES, 16, seed),
    }
    data = MixtureWindows(
        {name: sources[name] for name in names},
        [
            (0, {"prose": 1}),
            (120, {"prose": 1 - weight, "instructions": weight}),
            (240, {"instructions": 1}),
        ],
    )
    assert checksum(data, 360) == all_stages


def test_the_anneal_with_candidates_is_that_of_the_first_edition():
    default, candidate = TokenWindows(SQUARES, 16, 0), TokenWindows(SQUARES.flip(0), 16, 0)
    for sources in (
        {"default": default, "candidate": candidate},
        {"candidate": candidate, "default": default},
    ):
        data = MixtureWindows(sources, [(0, {"default": 1}), (100, {"default": 1 - 0.3, "candidate": 0.3})])
        assert checksum(data, 400) == 4163665504
        assert data.counts(400) == {"default": 310, "candidate": 90}


def test_the_mixtures_shown_in_the_chapter_are_those_of_the_first_edition():
    data = mixture((0, {"a": 3, "b": 2, "c": 1}))
    assert "".join(data.locate(index)[0] for index in range(12)) == "ababacababac"
    staged = mixture((0, {"a": 1}), (4, {"a": 0.5, "b": 0.5}), (10, {"b": 1}))
    assert [f"{name}{place}" for name, place in map(staged.locate, range(13))] == [
        "a0", "a1", "a2", "a3", "a4", "b0", "a5", "b1", "a6", "b2", "b3", "b4", "b5"
    ]  # fmt: skip
    shown = {
        0.1: "pppppppppqpppppppppqpppppppppqpppppppppqpppppppp",
        0.3: "ppqppqpppqppqppqpppqppqppqpppqppqppqpppqppqppqpp",
        0.5: "pqpqpqpqpqpqpqpqpqpqpqpqpqpqpqpqpqpqpqpqpqpqpqpq",
        0.6: "qpqpqqpqpqqpqpqqpqpqqpqpqqpqpqqpqpqqpqpqqpqpqqpq",
        0.75: "qqpqqqpqqqpqqqpqqqpqqqpqqqpqqqpqqqpqqqpqqqpqqqpq",
    }
    for weight, expected in shown.items():
        data = mixture((0, {"p": Fraction(str(1 - weight)).limit_denominator(100), "q": weight}))
        assert "".join(data.locate(index)[0] for index in range(48)) == expected


# A run that goes on from another one.


def rest_of(read, name_of):
    """By hand: how many windows of each number were read."""
    counts = {number: sum(each == number for each, _ in read) for number in name_of}
    return {name_of[number]: count for number, count in counts.items()}


@pytest.mark.slow  # many mixtures, window by window
@settings(deadline=None)
@given(
    stable=several,
    decay=several,
    start=st.integers(1, 40),
    names=st.permutations(["a", "./a/", "/b"]),
)
def test_each_source_goes_on_where_the_other_run_left_it(stable, decay, start, names):
    """Under other names, in another order: no window twice, none left out."""
    old = MixtureWindows(
        {f"old {i}": Numbered(i) for i in range(3)}, [(0, {f"old {i}": w for i, w in enumerate(stable)})]
    )
    text = json.loads(json.dumps(old.identity()))
    new = going_on(
        text, start, {names[i]: Numbered(i) for i in (2, 0, 1)}, {names[i]: decay[i] for i in (1, 2, 0)}
    )
    assert drawn(new, start) == drawn(old, start), "the past is the same, too"
    read = rest_of(drawn(old, start), dict(enumerate(names)))
    for index in range(start, start + 30):
        name, place = new.locate(index)
        assert place == read[name]
        read[name] += 1


def test_going_on_from_one_sequence_with_another_beside():
    new = going_on(Numbered(0).identity(), 10, {"x": Numbered(1), "y": Numbered(0)}, {"x": 1, "y": 1})
    assert drawn(new, 14)[10:] == [[0, 10], [1, 0], [0, 11], [1, 1]]
    assert new.identity()["stages"] == [[0, [1, 0]], [10, [1, 1]]]


def test_going_on_without_what_was_read():
    """A folder that is given no more counts as read; a new one begins at its first window."""
    old = mixture((0, {"a": 1, "b": 1}))
    new = going_on(old.identity(), 11, {"b": Numbered(1), "c": Numbered(2)}, {"b": 2, "c": 1})
    assert [new.locate(index) for index in range(11, 17)] == [
        ("b", 5), ("b", 6), ("c", 0), ("b", 7), ("b", 8), ("c", 1)
    ]  # fmt: skip
    assert new.id_range() == (1, 3) and new.length == 1, "what is not given widens no range"
    with pytest.raises(ValueError, match="Window 2 of this source was read by an earlier run"):
        new[4]
    whole = mixture((0, {"a": 1, "b": 1}), (11, {"b": 2, "c": 1}), sources=["a", "b", "c"])
    assert new.identity() == whole.identity()


def test_a_mixture_goes_on_as_the_whole_that_it_is():
    """Whether it was a run's whole text or one of its sources."""
    run = mixture((0, {"a": 1, "b": 1}))
    within = MixtureWindows({"mix": run, "c": Numbered(2)}, [(0, {"mix": 2, "c": 1})])
    for text, places in (
        (run, (("run", 6), ("new", 0), ("run", 7))),
        (within, (("run", 4), ("new", 0), ("run", 5))),
    ):
        new = going_on(text.identity(), 6, {"run": run, "new": Numbered(5)}, {"run": 1, "new": 1})
        assert [new.locate(index) for index in range(6, 9)] == [*places]
        assert sum(new.counts(6).values()) == 6
        again = going_on(new.identity(), 8, {"run": run, "new": Numbered(5)}, {"run": 1})
        assert again.locate(8) == ("run", places[-1][1])


def test_what_was_read_in_another_mixture_is_not_read_again():
    run, other = mixture((0, {"a": 1, "b": 1})), mixture((0, {"a": 1, "b": 3}))
    within = MixtureWindows({"mix": run, "c": Numbered(2)}, [(0, {"mix": 2, "c": 1})])
    for text, sources in (
        (run, {"mix": other, "c": Numbered(2)}),
        (run, {"mix": mixture((0, {"a": 1}), sources=["a"]), "c": Numbered(2)}),
        (within, {"a": Numbered(0), "c": Numbered(2)}),
        (within, {"mix": other, "c": Numbered(2)}),
        (Numbered(0), {"mix": run}),
    ):
        name = next(iter(sources))
        with pytest.raises(
            ValueError, match=f"The source '{name}' holds windows that were read before in another"
        ):
            going_on(text.identity(), 6, sources, dict.fromkeys(sources, 1))
    new = going_on(run.identity(), 6, {"a": Numbered(0), "c": Numbered(2)}, {"a": 1, "c": 1})
    assert [new.locate(index) for index in (6, 7)] == [("a", 3), ("c", 0)], "by themselves as they were"


def test_going_on_twice():
    """Of a run that went on itself, the stages before the start are the past."""
    old = mixture((0, {"a": 1}), (4, {"a": 1, "b": 1}), (20, {"b": 1}))
    new = going_on(old.identity(), 10, {"a": Numbered(0), "b": Numbered(1)}, {"a": 1})
    assert new.identity()["stages"] == [[0, [1, 0]], [4, [1, 1]], [10, [1, 0]]]
    assert new.locate(10) == ("a", 7)


def test_going_on_from_the_start_is_a_mixture_of_its_own():
    new = going_on(Numbered(0).identity(), 0, {"a": Numbered(0), "b": Numbered(1)}, {"b": 1})
    assert new.identity() == mixture((0, {"b": 1}), sources=["a", "b"]).identity()
    with pytest.raises(ValueError, match="The sources 'a' and 'b' hold the same windows"):
        going_on(Numbered(0).identity(), 5, {"a": Numbered(0), "b": Numbered(0)}, {"b": 1})
