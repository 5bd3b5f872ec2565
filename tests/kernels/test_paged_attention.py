"""The kernels for texts in pages: what PyTorch computes, and the same bits for a token in any company."""

import math

import pytest
import torch
from compiling import OTHER_PROCESSORS, for_another, in_place_of_ours, mistaken
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_models import LEVELS, configs

from minicpm_lite.config import SparseConfig
from minicpm_lite.inference.block_choice import levels, num_windows, window_means
from minicpm_lite.inference.sparse_attention import attend_tiles, kernel_sizes
from minicpm_lite.kernels import attention, build
from minicpm_lite.language.context import lineage

SIZES = (4, 16)


@pytest.fixture(autouse=True, scope="module")
def kernel_is_built() -> None:
    assert build.built("attention")


class Texts:
    """Texts in pages that lie anywhere, with new tokens behind them, and what an operator is given of these.

    Numbers of a text hang on the text alone, so that it can be put into other company.
    """

    def __init__(self, lengths, trees, size, kv_heads=2, group=3, dim=8, seed=0, names=None) -> None:
        self.size, self.lengths, self.trees = size, lengths, trees
        names = range(len(lengths)) if names is None else names
        new = max(map(len, trees))
        pages = [-(-(length + new) // size) for length in lengths]
        shuffled = torch.randperm(sum(pages) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
        shape = ((len(shuffled) * size + 1), kv_heads, dim)
        self.key, self.value = torch.full(shape, math.nan), torch.full(shape, math.nan)
        self.query = torch.randn(len(lengths), kv_heads * group, new, dim)
        self.positions = torch.zeros(len(lengths), new, dtype=torch.long)
        self.slots = torch.full((len(lengths), new), shape[0] - 1)  # where nobody reads
        self.among = torch.zeros(len(lengths), new, new, dtype=torch.bool)
        self.tables = torch.zeros(len(lengths), max(pages), dtype=torch.long)
        for row, (name, length, tree) in enumerate(zip(names, lengths, trees, strict=True)):
            own = torch.Generator().manual_seed(1000 + name)
            mine = [shuffled.pop() for _ in range(pages[row])]
            self.tables[row, : len(mine)] = torch.tensor(mine)
            places = torch.tensor([mine[at // size] * size + at % size for at in range(length + len(tree))])
            depths, sees = lineage(tree)
            self.positions[row, :] = length
            self.positions[row, : len(tree)] = length + torch.tensor(depths)
            self.slots[row, : len(tree)] = places[length:]
            self.among[row, : len(tree), : len(tree)] = sees
            for whole in (self.key, self.value):
                whole[places[:length]] = torch.randn(length, kv_heads, dim, generator=own)
            # a token behind a text is the same wherever it comes in a tree that has it
            for token, path in enumerate(paths(tree)):
                mind = torch.Generator().manual_seed(hash((name, path)) % 2**31)
                self.query[row, :, token] = torch.randn(kv_heads * group, dim, generator=mind)
                for whole in (self.key, self.value):
                    whole[places[length + token]] = torch.randn(kv_heads, dim, generator=mind)

    def given(self):
        lengths = torch.tensor(self.lengths)
        return self.tables, lengths, self.positions, self.slots, self.among, self.size

    def dense(self):
        return attention.paged_attention(self.query, self.key, self.value, *self.given())

    def sparse(self, config):
        return attention.sparse_paged_attention(
            self.query, self.key, self.value, self.means(config), *self.given(), kernel_sizes(config)
        )

    def means(self, config):
        """Of the windows of what is text, each with the slot in which it ends."""
        found = []
        for size, stride in levels(config):
            means = torch.full((len(self.key) // stride, *self.key.shape[1:]), math.nan)
            for row, length in enumerate(self.lengths):
                count = num_windows(length, size, stride)
                if count:
                    places = self.places(row)[:length]
                    ends = places[size - 1 :: stride][:count] // stride
                    means[ends] = window_means(self.key[places].transpose(0, 1)[None], size, stride)[
                        0
                    ].transpose(0, 1)
            found.append(means)
        return found

    def places(self, row):
        at = torch.arange(self.lengths[row] + len(self.trees[row]))
        return self.tables[row, at // self.size] * self.size + at % self.size

    def alone(self, row, token):
        """The text that a new token sees: query, keys and values of it, in one piece and in float64."""
        places = torch.cat([self.places(row)[: self.lengths[row]], self.slots[row][self.among[row, token]]])
        key, value = (whole[places].transpose(0, 1)[None].double() for whole in (self.key, self.value))
        return self.query[row : row + 1, :, token : token + 1].double(), key, value


def paths(tree):
    """Of each guess, which branches lead to it: a name that it keeps in other trees."""
    found, children = [], {}
    for parent in tree:
        before = () if parent < 0 else found[parent]
        number = children[before] = children.get(before, -1) + 1
        found.append((*before, number))
    return found


@st.composite
def trees(draw, most=12):
    size = draw(st.integers(1, most))
    return [draw(st.integers(-1, place - 1)) for place in range(size)]


@st.composite
def texts(draw, most=60):
    rows = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, most), min_size=rows, max_size=rows))
    kinds = draw(st.lists(trees(), min_size=rows, max_size=rows))
    group = draw(st.sampled_from([1, 2, 3, 5, 8, 16, 32]))
    size = draw(st.sampled_from(SIZES))
    return Texts(
        lengths, kinds, size, draw(st.sampled_from([1, 2])), group, draw(st.sampled_from([2, 8, 18]))
    )


def wrong_by(found, case, expect) -> float:
    """The largest difference from what a token takes from its text alone."""
    off = 0.0
    for row, tree in enumerate(case.trees):
        for token in range(len(tree)):
            expected = expect(*case.alone(row, token))
            gap = (found[row, :, token] - expected[0, :, 0]).abs().max().item()
            off = max(off, gap if gap == gap else math.inf)
    return off


def densely(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


@settings(max_examples=100, deadline=None)
@given(case=texts(), threads=st.sampled_from([1, 3]))
def test_it_is_what_pytorch_computes(case, threads):
    """What fills up the rows of smaller trees is no number, and harms nobody."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert wrong_by(case.dense(), case, densely) < 1e-5
    finally:
        torch.set_num_threads(before)


def sparsely(config):
    """By PyTorch, and None where the choice hangs on rounding."""

    def expect(query, key, value):
        means = [window_means(key, *level) for level in levels(config)]
        start = torch.tensor([0])
        found = attend_tiles(query, key, value, means, start, config)
        nudged = attend_tiles(query * (1 + 1e-5), key, value, means, start, config)
        return None if (found - nudged).abs().max() > 1e-3 else found

    return expect


def sparse_wrong_by(found, case, config) -> float:
    off, firm, every = 0.0, 0, 0
    for row, tree in enumerate(case.trees):
        for token in range(len(tree)):
            expected, every = sparsely(config)(*case.alone(row, token)), every + 1
            if expected is not None:
                firm += 1
                gap = (found[row, :, token] - expected[0, :, 0]).abs().max().item()
                off = max(off, gap if gap == gap else math.inf)
    assert firm > 0.5 * every
    return off


@settings(max_examples=100, deadline=None)
@given(case=texts(), config=configs(), threads=st.sampled_from([1, 3]))
def test_chosen_blocks_are_those_of_pytorch(case, config, threads):
    """Behind a text and among guesses, which make windows of their own."""
    stride = max(stride for _, stride in levels(config))
    case.size = stride * -(-case.size // stride)
    case = Texts(case.lengths, case.trees, case.size, case.key.shape[1],
                 case.query.shape[1] // case.key.shape[1], case.query.shape[3])  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert sparse_wrong_by(case.sparse(config), case, config) < 1e-4
    finally:
        torch.set_num_threads(before)


SPARSE = SparseConfig(8, 4, 1, 8, 16, 3, dense_len=0)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("group", [1, 3, 16])
def test_a_token_has_the_same_bits_in_any_company(kind, group):
    """Alone, beside others, with other guesses before and behind it, and with any number of threads."""

    def read(case):
        return case.dense() if kind == "dense" else case.sparse(SPARSE)

    tree = [-1, -1, 0, 0, 2, 4, 5, 6, 7, 1]  # 0 2 4 5 6 7 8 is a chain
    chain = [0, 2, 4, 5, 6, 7, 8]
    for length in (5, 16, 40, 300, 700):
        alone = read(Texts([length], [[-1, 0, 1, 2, 3, 4, 5]], 8, 2, group))
        beside = read(Texts([9, length, 90], [[-1, 0], tree, [-1]], 8, 2, group, seed=3, names=[7, 0, 8]))
        assert torch.equal(beside[1][:, chain], alone[0])
        for last in range(1, 4):
            few = read(Texts([length], [list(range(-1, last - 1))], 8, 2, group, seed=last))
            assert torch.equal(few[0], alone[0][:, :last])
        before = torch.get_num_threads()
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            again = read(Texts([length], [[-1, 0, 1, 2, 3, 4, 5]], 8, 2, group))
            torch.set_num_threads(before)
            assert torch.equal(again, alone)


def test_the_operators_tell_their_shape():
    case = Texts([9, 30], [[-1, 0, 0], [-1]], 8)
    turned = case.query.transpose(1, 2).contiguous().transpose(1, 2)  # as layers give it
    tensors = (turned, case.key.nan_to_num(), case.value.nan_to_num())
    torch.library.opcheck(torch.ops.minicpm_lite.paged_attention, (*tensors, *case.given()))
    means = [each.nan_to_num() for each in case.means(SPARSE)]
    sizes = (8, 4, 16, 1, 1, 3, 48, False, 0)
    given = (*tensors, means[0], means[0], *case.given(), *sizes)
    torch.library.opcheck(torch.ops.minicpm_lite.sparse_paged_attention, given)


CASES = [
    Texts([37, 5], [[-1, 0, 0, 2, 1, -1], [-1]], 8),
    Texts([700], [[-1, -1, 0, 1, 1]], 16, 1, 16, 16),
    Texts([90, 30, 61], [[-1, 0, 1, 0], [-1, -1], [-1, 0]], 8, 1, 5),
]


def tells_apart(operators) -> bool:
    """Whether operators give something else than PyTorch, or other bits in other company."""
    configs = [LEVELS["exact"], LEVELS["two levels"], SPARSE]
    with in_place_of_ours(operators):
        branch = [  # the second one, behind a guess or behind four, which reach into the next page
            Texts([14], [[*range(-1, guesses - 1), -1, *range(guesses, guesses + 4)]], 4).dense()[
                :, :, guesses:
            ]
            for guesses in (1, 4)
        ]
        return (
            any(wrong_by(case.dense(), case, densely) > 1e-5 for case in CASES)
            or not torch.equal(*branch)
            or any(
                sparse_wrong_by(case.sparse(each), case, each) > 1e-4 for case in CASES for each in configs
            )
        )


@pytest.mark.slow  # compiles for seconds
@OTHER_PROCESSORS
def test_other_processors_compute_the_same(flags):
    assert not tells_apart(for_another(flags))


MISTAKES = {
    "guesses see each other": ("if (!text.among[(first + i) * text.count + token])", "if (false)"),
    "guesses as they come": ("text.positions[one] < text.positions[other];", "one < other;"),
    "no correction": ("sum *= less;", ""),
    "one token more": ("std::min(size, text.length - page * size)", "std::min(size, text.length + 1 - page * size)"),
    "pages in a row": ("text.table[page] * size * text.apart : 0;", "page * size * text.apart : 0;"),
    "what fills up is a token": ("while (found < count && among[found * count + found]) found++;", "found = count;"),
    "a window where it begins": ("skip = (times * sizes.kernel_size - 1) / stride;", "skip = 0;"),
    "sums for means": ("to[d] /= size;", "to[d] /= 1;"),
    "keys for values": ("tail.values.push_back(text.value", "tail.values.push_back(text.key"),
    "the first row's pages": ("tables.const_data_ptr() + row * tables.size(1),", "tables.const_data_ptr(),"),
}  # fmt: skip


@pytest.mark.slow  # compiles for seconds
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_kernel_are_told_apart(name):
    assert tells_apart(mistaken(MISTAKES[name]))
