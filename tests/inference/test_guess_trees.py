"""Shapes of guesses: what a chain draws, what a static tree holds, and EAGLE-2's tree by its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.inference.guess_trees import Chain, DynamicTree, Shape, StaticTree
from minicpm_lite.inference.speculative import Guesses
from minicpm_lite.language.sampling import Sampling, next_token_probabilities

GREEDY = Sampling()


class Table:
    """A draft whose scores follow the last two tokens alone, for any number of rows."""

    def __init__(self, rows: int, vocab: int = 6, seed: int = 0, scale: float = 1.5) -> None:
        random = torch.Generator().manual_seed(seed)
        self.scores = scale * torch.randn(rows, vocab + 1, vocab + 1, vocab, generator=random)
        self.texts: list[list[list[int]]] = []  # of each guess that was read, the path of each row
        self.reads: list[list[int]] = []

    def behind(self, row: int, path: list[int]) -> torch.Tensor:
        last, before = ([-1, -1, *path])[-1], ([-1, -1, *path])[-2]
        return self.scores[row, last + 1, before + 1]

    def first(self) -> torch.Tensor:
        return torch.stack([self.behind(row, []) for row in range(len(self.scores))])

    def read(self, tokens: torch.Tensor, parents: list[int]) -> torch.Tensor:
        known = len(self.texts)
        assert tokens.shape == (len(self.scores), len(parents)) and all(
            -1 <= each < known for each in parents
        )
        self.reads.append(list(parents))
        for place, parent in enumerate(parents):
            before = [[] for _ in self.scores] if parent < 0 else self.texts[parent]
            self.texts.append([path + [int(t)] for path, t in zip(before, tokens[:, place], strict=True)])
        rows = [
            [self.behind(row, text[row]) for text in self.texts[known:]] for row in range(len(self.scores))
        ]
        return torch.stack([torch.stack(row) for row in rows])


def paths(guesses: Guesses, row: int) -> list[tuple[int, ...]]:
    """For each guess of a row the tokens from the text to it."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(guesses.tokens[row].tolist(), guesses.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def naive_dynamic_tree(table: Table, depth: int, top_k: int, guesses: int) -> set[tuple[int, ...]]:
    """EAGLE-2 as it is told, for one row."""

    def children(path: tuple[int, ...], chance: float) -> list[tuple[float, tuple[int, ...]]]:
        law = table.behind(0, list(path)).softmax(-1)
        return [(chance * float(law[t]), (*path, t)) for t in law.argsort(descending=True)[:top_k].tolist()]

    level, everything = [(1.0, ())], []
    for _ in range(depth):
        found = [child for chance, path in level for child in children(path, chance)]
        everything += found
        level = sorted(found, reverse=True)[:top_k]
    return {path for _, path in sorted(everything, reverse=True)[:guesses]}


@settings(max_examples=40, deadline=None)
@given(depth=st.integers(1, 4), top_k=st.integers(1, 4), guesses=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_dynamic_tree_is_eagle_2s(depth, top_k, guesses, seed):
    table = Table(1, seed=seed)
    shape = DynamicTree(depth, top_k, guesses)
    found = shape.grow(table.first(), table.read, 99, GREEDY, None)
    assert set(paths(found, 0)) == naive_dynamic_tree(table, depth, top_k, guesses)
    assert all(parent < place for place, parent in enumerate(found.parents)) and found.drawn_from is None
    assert len(table.texts) == shape.reads == (depth - 1) * top_k and len(table.reads) == depth - 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), most=st.integers(1, 9))
def test_rows_share_the_shape_with_the_best_mean(seed, most):
    """All of one shape, each with its own tokens; what is kept has the highest mean chance, with its parents."""
    table = Table(3, seed=seed)
    found = DynamicTree(3, 3, 7).grow(table.first(), table.read, most, GREEDY, None)
    assert found.tokens.shape == (3, min(most, 7)) and len(found.parents) == min(most, 7)
    means = []
    for place in range(len(found.parents)):
        chances = []
        for row in range(3):
            path, chance = paths(found, row)[place], 1.0
            for at, token in enumerate(path):
                chance *= float(table.behind(row, list(path[:at])).softmax(-1)[token])
            chances.append(chance)
        means.append(sum(chances) / 3)
    assert all(
        parent < 0 or means[parent] >= means[place] - 1e-7 for place, parent in enumerate(found.parents)
    )
    fewer = DynamicTree(3, 3, 7).grow(table.first(), Table(3, seed=seed).read, max(most - 1, 1), GREEDY, None)
    assert {*paths(fewer, 0)} <= {*paths(found, 0)}, "what there is no room for is the least probable"


def test_a_certain_draft_keeps_parents_before_children():
    """All chances are 1, and every order by them alone is as good."""
    table = Table(1, scale=1e4)
    found = DynamicTree(4, 2, 4).grow(table.first(), table.read, 9, GREEDY, None)
    assert found.parents == (-1, 0, 1, 2)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7, top_k=4), Sampling(1.0, repetition_penalty=1.5)])
def test_a_chain_is_drawn_as_the_target_draws(sampling):
    table = Table(2)
    found = Chain(3).grow(table.first(), table.read, 9, sampling, torch.Generator().manual_seed(0))
    assert found.parents == (-1, 0, 1) and table.reads == [[-1], [0]]
    plain = Sampling(sampling.temperature, sampling.top_k, sampling.top_p)
    for row in range(2):
        for place, token in enumerate(found.tokens[row].tolist()):
            scores = table.behind(row, found.tokens[row, :place].tolist())
            law = next_token_probabilities(scores[None], plain)[0]
            assert law[token] > 0
            if sampling.temperature:
                torch.testing.assert_close(found.drawn_from[row, place], law)
            else:
                assert token == int(scores.argmax()) and found.drawn_from is None


def test_a_static_tree_holds_the_tokens_of_its_ranks():
    table, shape = Table(2), StaticTree((-1, -1, 0, 0, 2, 1), (0, 2, 0, 1, 0, 3))
    found = shape.grow(table.first(), table.read, 9, GREEDY, None)
    assert found.parents == shape.parents and table.reads == [[-1, -1], [0]] and shape.reads == 3
    for row in range(2):
        for path, rank in zip(paths(found, row), shape.ranks, strict=True):
            order = table.behind(row, list(path[:-1])).argsort(descending=True).tolist()
            assert path[-1] == order[rank]


def test_a_rank_beyond_the_tokens_of_the_draft_is_refused():
    """Also where there is room for the earlier guesses alone."""
    table = Table(2)
    tokens = table.first().shape[-1]
    StaticTree((-1, -1), (0, tokens - 1)).grow(table.first(), table.read, 9, GREEDY, None)
    for most in (1, 9):
        with pytest.raises(ValueError, match=f"guesses {tokens} tokens, so there is no rank {tokens}"):
            StaticTree((-1, -1), (0, tokens)).grow(table.first(), table.read, most, GREEDY, None)


@pytest.mark.parametrize("shape", [Chain(5), StaticTree((-1, -1, 0, 2), (0, 1, 0, 0)), DynamicTree(3, 2, 5)])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_than_there_is_room_for(shape, most):
    table = Table(2)
    assert isinstance(shape, Shape)
    found = shape.grow(table.first(), table.read, most, GREEDY, None)
    assert found.tokens.shape == (2, most) and len(found.parents) == most


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Chain(0), "guesses is 0"),
        (lambda: DynamicTree(depth=0), "depth is 0"),
        (lambda: DynamicTree(top_k=0), "top_k is 0"),
        (lambda: StaticTree((), ()), "expected for each guess the place of"),
        (lambda: StaticTree((-1, 1), (0, 0)), "expected for each guess"),
        (lambda: StaticTree((-1,), (0, 1)), "expected for each guess"),
        (lambda: StaticTree((-1, -1), (0, 0)), "no two of them the same"),
        (lambda: StaticTree((-1,), (-1,)), "a rank from 0"),
    ],
)
def test_impossible_shapes_get_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
