"""Windows: nothing is lost, nothing leaks, every step is reproducible, and an epoch sees every token once."""

import json
import shutil
import tracemalloc
import zlib
from collections import Counter
from dataclasses import dataclass, replace

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.data import windows as module
from minicpm_lite.data.shards import Shards, write_shards
from minicpm_lite.data.windows import Permutation, TokenWindows, Windows, batch_of
from minicpm_lite.language.scoring import context_only

# A stream in memory and in shards: the same guarantees.


@pytest.fixture(scope="module", params=["memory", "shards"])
def stream(request, tmp_path_factory):
    """Make a stream of tokens of either kind."""

    def make(tokens, shard=300):
        if request.param == "memory":
            return torch.as_tensor(tokens)
        folder = tmp_path_factory.mktemp("x") / "corpus"
        return write_shards(folder, [np.asarray(tokens)], 1000, shard_tokens=shard)

    return make


@pytest.mark.slow  # whole epochs
@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(20, 300),
    shard=st.integers(7, 400),
    batch=st.integers(1, 7),
    length=st.integers(1, 9),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 2**20),
)
def test_an_epoch_visits_every_window_once(stream, tokens, shard, batch, length, epoch, seed):
    windows, in_epoch = TokenWindows(stream(range(tokens), shard), length, seed), (tokens - length) // length
    steps = range(epoch * in_epoch // batch, -(-(epoch + 1) * in_epoch // batch))
    first = epoch * in_epoch - steps[0] * batch
    seen = torch.cat([batch_of(windows, step, batch) for step in steps])[first : first + in_epoch]
    assert seen.dtype == torch.long and seen.shape == (in_epoch, length + 1)
    assert bool((seen[:, 1:] == seen[:, :-1] + 1).all()), "a window is a stretch of the stream"
    predicted = seen[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted), "no token is predicted twice"
    assert len(predicted) >= tokens - 2 * length


def test_windows_follow_from_seed_and_index_alone(stream):
    tokens = stream(range(1000))
    windows = TokenWindows(tokens, 8, 0)
    late, early = windows[1000], windows[0]
    again = TokenWindows(tokens, 8, 0)
    assert torch.equal(again[0], early) and torch.equal(again[1000], late)
    assert not torch.equal(replace(windows, seed=1)[0], early)
    assert not torch.equal(windows[1], early)
    assert batch_of(windows, 3, 4).shape == (4, 9)


def test_epochs_differ_in_order_and_offset(stream):
    windows = TokenWindows(stream(range(1000)), 10, 0)
    firsts = [[int(windows[99 * epoch + i][0]) for i in range(99)] for epoch in range(4)]
    assert len({tuple(first) for first in firsts}) == 4
    assert len({min(first) % 10 for first in firsts}) > 1, "the windows begin at other offsets"


def test_steps_share_no_window(stream):
    windows = TokenWindows(stream(range(1000)), 8, 0)
    steps = torch.cat([batch_of(windows, step, 3) for step in range(4)])
    assert torch.equal(steps, torch.stack([windows[index] for index in range(12)]))


def test_marked_tokens_are_known_by_their_ids():
    ids = torch.arange(3, 100)
    marked = torch.where(ids % 3 == 0, context_only(ids), ids)
    assert TokenWindows(marked, 8, 0).id_range() == (3, 99)


def test_windows_know_what_they_hold(stream):
    windows = TokenWindows(stream(range(3, 100)), 8, 0)
    assert isinstance(windows, Windows)
    assert windows.id_range() == (3, 99)
    assert windows.identity() == TokenWindows(stream(range(3, 100)), 8, 0).identity()
    assert windows.identity() == json.loads(json.dumps(windows.identity()))
    for other in (replace(windows, tokens=stream(range(99, 2, -1))), replace(windows, length=4),
                  replace(windows, seed=1)):  # fmt: skip
        assert windows.identity() != other.identity()


def test_the_number_format_of_a_stream_in_memory_is_not_part_of_it():
    tokens = torch.arange(100)
    assert TokenWindows(tokens, 8, 0).identity() == TokenWindows(tokens.int(), 8, 0).identity()
    assert TokenWindows(tokens.int(), 8, 0)[0].dtype == torch.long


def test_what_a_folder_holds_is_its_identity_and_not_where_it_lies(tmp_path):
    write_shards(tmp_path / "a", [np.arange(500)], 1000)
    here = TokenWindows(Shards(tmp_path / "a"), 8, 0).identity()
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert TokenWindows(Shards(tmp_path / "b"), 8, 0).identity() == here
    assert "a" not in json.dumps(list(here.values()))


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        (lambda tokens: TokenWindows(tokens, 0, 0), ValueError, "length is 0"),
        (lambda tokens: TokenWindows(tokens, 8, 10**14), ValueError, "seed is 10+; expected a whole number"),
        (lambda tokens: TokenWindows(tokens, 8, -1), ValueError, "seed is -1; expected a whole number"),
        (
            lambda tokens: TokenWindows(tokens, 501, 0),
            ValueError,
            "holds 1000 tokens; windows of 501 need at least 1002",
        ),
        (lambda tokens: TokenWindows(tokens, 8, 0)[-1], IndexError, "index of the window is -1"),
        (lambda tokens: batch_of(TokenWindows(tokens, 8, 0), 0, 0), ValueError, "batch_size is 0"),
        (lambda tokens: batch_of(TokenWindows(tokens, 8, 0), -1, 2), ValueError, "The step is -1"),
    ],
)
def test_impossible_windows(stream, wrong, error, sentence):
    with pytest.raises(error, match=sentence):
        wrong(stream(range(1000)))


@pytest.mark.parametrize("kind", [torch.int16, torch.int32, torch.int64])
def test_a_window_is_its_readers_own(stream, kind):
    tokens = stream(torch.arange(100, dtype=kind))
    windows, expected = TokenWindows(tokens, 8, 0), TokenWindows(stream(range(100)), 8, 0)
    for index in range(30):
        windows[index].fill_(7)
    assert all(torch.equal(windows[index], expected[index]) for index in range(30))


@pytest.mark.parametrize("tokens", [np.arange(100), [*range(100)]])
def test_a_stream_is_a_tensor_or_shards(tokens, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a reader
    with pytest.raises(TypeError, match="The stream is of type (ndarray|list); expected a tensor"):
        TokenWindows(tokens, 8, 0)


@pytest.mark.parametrize("kind", [torch.float32, torch.uint16, torch.bool])
def test_a_stream_is_of_whole_numbers(kind, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a reader
    with pytest.raises(ValueError, match=f"The stream is of type {kind}; expected int64"):
        TokenWindows(torch.ones(100).to(kind), 8, 0)


@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_whole_numbers_of_any_size_are_the_same_stream(kind):
    tokens = torch.arange(100)
    short, long = TokenWindows(tokens.to(kind), 8, 0), TokenWindows(tokens, 8, 0)
    assert short.identity() == long.identity() and short.id_range() == long.id_range()
    assert short[3].dtype == torch.int64 and torch.equal(short[3], long[3])


def test_a_folder_that_is_too_short_is_named(tmp_path):
    with pytest.raises(ValueError, match="short holds 10 tokens"):
        TokenWindows(write_shards(tmp_path / "short", [list(range(10))], 1000), 8, 0)


# What the first edition drew, its recorded runs read: both orders stay as they are, for good.

SQUARES = torch.arange(5000) ** 2 % 997


def checksum(windows: Windows, count: int) -> int:
    return zlib.crc32(torch.stack([windows[index] for index in range(count)]).numpy().tobytes())


@pytest.mark.parametrize(
    ("seed", "first_three_epochs", "window_million"),
    [
        (0, 392939422, [267, 967, 672, 379]),
        (1, 2571989185, [434, 231, 30, 828]),
        (7, 2577050734, [690, 3, 315, 629]),
    ],
)
def test_the_order_in_memory_is_that_of_the_first_edition(seed, first_three_epochs, window_million):
    windows = TokenWindows(SQUARES, 16, seed)
    assert checksum(windows, 1000) == first_three_epochs
    assert windows[10**6][:4].tolist() == window_million
    assert windows.identity() == {"tokens": 5000, "checksum": 956237161, "length": 16, "seed": seed}


@pytest.mark.parametrize(
    ("seed", "first_three_epochs", "window_million"),
    [
        (0, 2517643163, [909, 82, 254, 428]),
        (1, 1281019600, [939, 852, 767, 684]),
        (7, 500029614, [686, 187, 687, 192]),
    ],
)
def test_the_order_of_shards_is_that_of_the_first_edition(tmp_path, seed, first_three_epochs, window_million):
    windows = TokenWindows(write_shards(tmp_path / "x", [SQUARES], 1000, shard_tokens=1300), 16, seed)
    assert checksum(windows, 1000) == first_three_epochs
    assert windows[10**6][:4].tolist() == window_million
    assert windows.identity() == {"tokens": 5000, "checksum": 827557715, "vocab_size": 1000, "tokenizer": None,
                                  "length": 16, "seed": seed}  # fmt: skip


def test_the_permutation_is_that_of_the_first_edition():
    orders = [[Permutation(size, key)[i] for i in range(size)] for size, key in ((1, 0), (10, 1), (13, 77))]
    assert orders == [
        [0], [4, 8, 7, 1, 6, 3, 9, 5, 2, 0], [0, 4, 10, 5, 1, 2, 6, 9, 12, 3, 11, 8, 7]
    ]  # fmt: skip


# The permutation. Each property is a function, so that wrong permutations can be held against it.


def visits_each_once(make, sizes=range(1, 70)) -> bool:
    return all(
        sorted(make(size, key)[i] for i in range(size)) == list(range(size))
        for size in sizes
        for key in (0, 1, 77)
    )


def puts_each_anywhere(make, size=11, keys=1500) -> bool:
    """Chi-square of (position, number) over many keys, against the 1e-6 quantile for that many cells."""
    counts = np.zeros((size, size))
    for key in range(keys):
        shuffled = make(size, key)
        for position in range(size):
            counts[position, shuffled[position]] += 1
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
    freedom = (size - 1) ** 2
    return chi_square < freedom + 4.9 * (2 * freedom) ** 0.5


def neighbours_are_independent(make, size=101, keys=2000) -> bool:
    """The second step of a walk through a random order equals the first one time in ``size``."""
    equal = sum(
        (p[1] - p[0]) % size == (p[2] - p[1]) % size for p in (make(size, key) for key in range(keys))
    )
    return equal < 3 * keys / size


@dataclass(frozen=True)
class Hashed:  # a hash, reduced: random, but numbers meet
    size: int
    key: int

    def __getitem__(self, position):
        return module._hash(self.key, position) % self.size


@dataclass(frozen=True)
class Affine(Hashed):  # a stride: each once, but not random
    def __getitem__(self, position):
        stride = next(s for s in range(self.key % self.size + 1, 10**9) if np.gcd(s, self.size) == 1)
        return (position * stride + self.key) % self.size


class Clamped(Permutation):  # the grid's extra cells are cut off instead of walked over
    def __getitem__(self, position):
        return min(self._shuffled(position), self.size - 1)


class FewRounds(Permutation):  # rows shifted once, columns never
    def _shuffled(self, number):
        rows, columns = self._grid
        row, column = divmod(number, columns)
        return (row + module._hash(self.key, column)) % rows * columns + column


@pytest.mark.slow  # thousands of permutations; that one visits each once has a quick test below
def test_the_permutation_is_one_and_looks_random():
    assert visits_each_once(Permutation)
    assert puts_each_anywhere(Permutation)
    assert neighbours_are_independent(Permutation)


@pytest.mark.parametrize(
    ("wrong", "test"),
    [
        (Hashed, visits_each_once),
        (Clamped, visits_each_once),
        (Affine, neighbours_are_independent),
        (FewRounds, puts_each_anywhere),
    ],
)
def test_wrong_permutations_are_noticed(wrong, test):
    assert not test(wrong)


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 800), key=st.integers(0, 2**64 - 1))
def test_any_permutation_visits_each_once(size, key):
    assert visits_each_once(lambda size, _: Permutation(size, key), [size])


def test_a_huge_permutation_needs_no_table():
    size = 10**12 // 4096
    tracemalloc.start()
    shuffled = Permutation(size, key=5)
    seen = [shuffled[position] for position in range(100)]
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()
    seen += [shuffled[position] for position in range(100, 2000)]
    assert len(set(seen)) == len(seen)
    assert Counter(number * 4 // size for number in seen).most_common()[-1][1] > 430, "spread over it all"


def test_positions_outside_are_refused():
    for position in (-1, 10):
        with pytest.raises(IndexError, match=f"The position is {position}; .* 0 to 9"):
            Permutation(10, 0)[position]
    with pytest.raises(ValueError, match="size is 0"):
        Permutation(0, 0)


@pytest.mark.parametrize("shape", [(1, 100), (100, 1), ()])
def test_a_stream_has_one_dimension(shape, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a reader
    with pytest.raises(ValueError, match="expected one dimension, the tokens: tokens.flatten"):
        TokenWindows(torch.zeros(shape, dtype=torch.long), 16, 0)


def test_an_index_may_be_a_number_of_numpy(unchecked):
    windows = TokenWindows(torch.arange(100), 8, seed=0)
    assert torch.equal(windows[np.int64(3)], windows[3])


def test_many_sequences_draw_each_epoch_once(monkeypatch):
    """Each keeps its own; a limit for all together made a mixture of many draw one for each window."""
    drawn = []
    make = module._drawn_epoch
    monkeypatch.setattr(module, "_drawn_epoch", lambda *given: drawn.append(given) or make(*given))
    sequences = [TokenWindows(torch.arange(100 + n), length=4, seed=0) for n in range(40)]
    for index in range(5):
        for each in sequences:
            each[index]
    assert len(drawn) == 40


def test_two_epochs_are_kept(monkeypatch):
    windows, drawn = TokenWindows(torch.arange(41), length=4, seed=0), []
    make = module._drawn_epoch
    monkeypatch.setattr(module, "_drawn_epoch", lambda *given: drawn.append(given[-1]) or make(*given))
    for index in (0, 9, 8, 10, 18, 17, 0):
        windows[index]
    assert drawn == [0, 1, 2, 0]
