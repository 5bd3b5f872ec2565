"""What a cache can do beside growing: trees of guesses, going back, splitting, fewer bits, features."""

import copy

import numpy as np
import pytest
import torch
from histories import History
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from minicpm_lite.config import LatentAttentionConfig, MixtureConfig, ModelConfig, RopeScaling
from minicpm_lite.language.context import Int8Cache, KVCache, Tree
from minicpm_lite.language.decoder import Decoder

SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=50,
    max_position_embeddings=40, scale_emb=4.0, scale_depth=1.4, dim_model_base=16, init_std=0.3,
)  # fmt: skip
LATENT = LatentAttentionConfig(24, 16, 8, 8, 8)
CONFIGS = {
    "grouped": ModelConfig(**SHAPE, num_key_value_heads=2),
    "multi-head": ModelConfig(**SHAPE),
    "latent": ModelConfig(**SHAPE, head_dim=16, latent_attention=LATENT),
    "experts": ModelConfig(**SHAPE, num_key_value_heads=2, mixture=MixtureConfig(4, 2)),
    "yarn": ModelConfig(**SHAPE, rope_scaling=RopeScaling("yarn", 10, factor=4.0)),
}
CLOSE = dict(atol=2e-5, rtol=1e-4)


def make_model(name: str = "grouped") -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIGS[name]).eval()


def make_ids(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(50, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def branch(parents: list[int], place: int) -> list[int]:
    """The places from the text to a guess."""
    return ([] if parents[place] < 0 else branch(parents, parents[place])) + [place]


@st.composite
def trees(draw) -> list[int]:
    return [draw(st.integers(-1, place - 1)) for place in range(draw(st.integers(1, 9)))]


@pytest.mark.slow  # fifteen trees of each kind of model; the test below looks at one
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=15, deadline=None)
@given(parents=trees(), text=st.integers(1, 9))
@torch.no_grad()
def test_a_tree_equals_its_branches_fed_one_by_one(name, parents, text):
    model, ids, guesses = make_model(name), make_ids(2, text), make_ids(2, len(parents), seed=2)
    cache = KVCache(30)
    model(ids, cache)
    together = model(guesses, Tree(cache, parents))
    assert cache.length == text
    for place in range(len(parents)):
        path = branch(parents, place)
        alone = KVCache(30)  # of equal room, because some frequencies depend on it
        model(ids, alone)
        assert_close(together[:, place], model(guesses[:, path], alone)[:, -1], **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_tree_over_rows_of_different_length_equals_its_branches(name):
    model, parents, padding = make_model(name), [-1, -1, 0, 0, 2, 1], torch.tensor([0, 4])
    ids, guesses = make_ids(2, 6), make_ids(2, 6, seed=2)
    cache = KVCache(30, padding)
    model(ids, cache)
    together = model(guesses, Tree(cache, parents))
    for row, pad in enumerate(padding.tolist()):
        for place in range(len(parents)):
            alone = KVCache(30)
            model(ids[row : row + 1, pad:], alone)
            last = model(guesses[row : row + 1, branch(parents, place)], alone)[0, -1]
            assert_close(together[row, place], last, **CLOSE)


@torch.no_grad()
def test_wrong_trees_are_told_apart(monkeypatch):
    model, ids, guesses, parents = make_model(), make_ids(1, 5), make_ids(1, 4, seed=2), [-1, -1, 1, 1]

    def last_guess(change=lambda tree: None) -> torch.Tensor:
        cache = KVCache(20)
        model(ids, cache)
        tree = Tree(cache, parents)
        change(tree)
        return model(guesses, tree)[0, -1]

    def sees_siblings(tree):
        tree.ancestors[3, 2] = True

    def sees_all_before(tree):
        tree.ancestors = torch.ones(4, 4).tril().bool()

    def positions_of_a_chain(tree):
        tree.depths = torch.arange(4)

    for wrong in (sees_siblings, sees_all_before, positions_of_a_chain):
        assert (last_guess(wrong) - last_guess()).abs().max() > 1e-2, wrong.__name__


@pytest.mark.parametrize("kind", [KVCache, Int8Cache])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_take_makes_a_branch_part_of_the_text(name, kind):
    model, parents = make_model(name), [-1, 0, 0, 2, 1]
    ids, guesses, rest = make_ids(2, 5), make_ids(2, 5, seed=2), make_ids(2, 3, seed=3)
    cache, chain = kind(20), kind(20)
    for each in (cache, chain):
        model(ids, each)
    model(guesses, Tree(cache, parents))
    cache.take([0, 2, 3])
    model(guesses[:, [0, 2, 3]], chain)
    assert cache.length == chain.length == 8
    assert_close(model(rest, cache), model(rest, chain), atol=1e-3 if kind is Int8Cache else 2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["grouped", pytest.param("latent", marks=pytest.mark.slow)]
)  # by the same code
@settings(max_examples=20, deadline=None)
@given(chosen=st.lists(st.integers(-1, 4), min_size=3, max_size=3), pads=st.booleans())
@torch.no_grad()
def test_rows_may_take_branches_of_different_length(name, chosen, pads):
    """Each row then goes on as it would alone, also when it took nothing."""
    model, parents = make_model(name), [-1, 0, 0, 2, -1]
    padding = torch.tensor([0, 3, 1]) if pads else None
    ids, guesses, rest = make_ids(3, 5), make_ids(3, 5, seed=2), make_ids(3, 3, seed=3)
    cache = KVCache(25, padding)
    model(ids, cache)
    model(guesses, Tree(cache, parents))
    paths = [branch(parents, place) if place >= 0 else [] for place in chosen]
    cache.take(paths)
    after = model(rest, cache)
    for row, path in enumerate(paths):
        text = ids[row, 0 if padding is None else padding[row] :]
        alone = KVCache(25)
        model(torch.cat([text, guesses[row, path]])[None], alone)
        assert_close(after[row], model(rest[row : row + 1], alone)[0], **CLOSE)


@pytest.mark.parametrize(
    "path",
    [
        np.array([0, 2]),
        torch.tensor([0, 2]),
        [np.int64(0), torch.tensor(2)],
        np.array([[0, 2], [0, 2]]),
        torch.tensor([[0, 2], [0, 2]]),
        (np.array([0, 2]), [np.int64(0), 2]),
    ],
)
@torch.no_grad()
def test_a_branch_may_come_from_numpy_or_torch(path):
    model, ids, rest = make_model(), make_ids(2, 5), make_ids(2, 3, seed=3)
    cache, expected = KVCache(20), KVCache(20)
    for each, taken in ((cache, path), (expected, [0, 2])):
        model(ids, each)
        model(make_ids(2, 3, seed=2), Tree(each, [-1, 0, 0]))
        each.take(taken)
    assert cache.length == 7 and torch.equal(model(rest, cache), model(rest, expected))


@pytest.mark.parametrize("kind", [KVCache, Int8Cache])
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 3])])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_tree_that_grows_equals_one_that_is_fed_at_once(name, padding, kind):
    """And what is taken of it goes on; the cache has read the same tokens."""
    model, parents = make_model(name), [-1, 0, 0, 2, 1, -1, 5]
    ids, guesses, rest = make_ids(2, 6), make_ids(2, 7, seed=2), make_ids(2, 3, seed=3)
    grown, whole = kind(20, padding), kind(20, padding)
    for cache in (grown, whole):
        model(ids, cache)
    tree = Tree(grown, parents[:1])
    pieces = [model(guesses[:, :1], tree)]
    for first, last in ((1, 4), (4, 7)):
        tree.grow(parents[first:last])
        pieces.append(model(guesses[:, first:last], tree))
    close = dict(atol=1e-3, rtol=1e-3) if kind is Int8Cache else CLOSE
    assert_close(torch.cat(pieces, dim=1), model(guesses, Tree(whole, parents)), **close)
    assert grown.length == 6 and grown.guesses == tuple(parents)
    for cache in (grown, whole):
        cache.take([0, 2, 3])
    assert_close(model(rest, grown), model(rest, whole), **close)
    assert grown.has_read(torch.cat([ids, guesses[:, [0, 2, 3]], rest], dim=1))


@torch.no_grad()
def test_a_tree_may_grow_where_no_text_is():
    model, guesses, cache = make_model(), make_ids(2, 3), KVCache(20)
    tree = Tree(cache, [-1])
    model(guesses[:, :1], tree)
    tree.grow([0, 1])
    assert_close(model(guesses[:, 1:], tree), model(guesses)[:, 1:], **CLOSE)


@torch.no_grad()
def test_a_tree_grows_only_behind_its_own_guesses():
    model, cache = make_model(), KVCache(9)
    model(make_ids(1, 5), cache)
    tree = Tree(cache, [-1, 0])
    model(make_ids(1, 2), tree)
    tree.grow([1, 1])
    with pytest.raises(ValueError, match="The tree has 2 new guesses, and 1 tokens came"):
        model(make_ids(1, 1), tree)
    with pytest.raises(ValueError, match="The parent of guess 4 is 4; expected the place of an earlier"):
        tree.grow([4])
    model(make_ids(1, 2), tree)
    model(make_ids(1, 1), Tree(cache, [-1]))
    tree.grow([0])
    with pytest.raises(ValueError, match="no longer holds the guesses that this tree grew from"):
        model(make_ids(1, 1), tree)


@torch.no_grad()
def test_columns_that_no_row_needs_are_dropped():
    """Rows that take turns in being ahead need no more room than the longest of them."""
    model, cache, texts = make_model(), KVCache(11), [make_ids(1, 4)[0].tolist(), make_ids(1, 4)[0].tolist()]
    model(torch.tensor(texts), cache)
    for step in range(4):
        guesses = make_ids(2, 3, seed=step)
        model(guesses, Tree(cache, [-1, 0, 1]))
        taken = [2, 0] if step % 2 else [0, 2]
        cache.take([[*range(each)] for each in taken])
        texts = [text + row[:each] for text, row, each in zip(texts, guesses.tolist(), taken, strict=True)]
        assert cache.length == max(map(len, texts))
    rest = make_ids(2, 2)
    after = model(rest, cache)
    for text, row, new in zip(texts, after, rest, strict=True):
        assert_close(row[-1], model(torch.tensor([text + new.tolist()]))[0, -1], **CLOSE)


@torch.no_grad()
def test_impossible_trees_and_paths_get_a_sentence():
    model, cache = make_model(), KVCache(9)
    model(make_ids(1, 5), cache)
    with pytest.raises(ValueError, match="one guess at least"):
        Tree(cache, [])
    for parents in ([0], [-1, 2, 0], [-2]):
        with pytest.raises(ValueError, match="expected the place of an earlier guess"):
            Tree(cache, parents)
    with pytest.raises(ValueError, match="has 2 guesses, and 3 tokens came"):
        model(make_ids(1, 3), Tree(cache, [-1, 0]))
    with pytest.raises(ValueError, match="room for 9 tokens and would need 10"):
        model(make_ids(1, 5), Tree(cache, [-1] * 5))
    with pytest.raises(ValueError, match=r"expected a branch of the tree .* Its parents are \[\]"):
        cache.take([0])  # no tree was fed
    model(make_ids(1, 2), Tree(cache, [-1, 0]))
    for wrong in ([2], [-1], [1], [1, 0], [0, 0]):  # no such place, or no branch
        with pytest.raises(ValueError, match=r"expected a branch of the tree .* Its parents are \[-1, 0\]"):
            cache.take(wrong)
    with pytest.raises(ValueError, match="one for each of the 1 rows"):
        cache.take([[0], [1]])
    cache.take([0, 1])
    with pytest.raises(ValueError, match="expected a branch"):
        cache.take([0])  # it is text already


@torch.no_grad()
def test_only_a_tree_that_was_fed_last_and_to_its_end_is_taken_from():
    model, cache = make_model(), KVCache(60)
    model(make_ids(1, 5), cache)
    model(make_ids(1, 2), Tree(cache, [-1, 0]))
    cache.truncate(4)
    with pytest.raises(ValueError, match="expected a branch"):
        cache.take([0])
    with pytest.raises(ValueError, match="the model was made for 40"):
        model(make_ids(1, 37), Tree(cache, [*range(-1, 36)]))
    with pytest.raises(ValueError, match="expected a branch"):
        cache.take([0])


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=15, deadline=None)
@given(read=st.integers(1, 12), back=st.integers(0, 12), more=st.integers(1, 6))
@torch.no_grad()
def test_going_back_leaves_nothing_behind(name, read, back, more):
    model, ids = make_model(name), make_ids(2, read)
    back, rest = min(back, read), make_ids(2, more, seed=2)
    cache, fresh = KVCache(20), KVCache(20)
    model(ids, cache)
    cache.truncate(back)
    if back:
        model(ids[:, :back], fresh)
    assert_close(model(rest, cache), model(rest, fresh), **CLOSE)


MOVES = st.lists(
    st.tuples(st.just("feed"), st.integers(1, 3))
    | st.tuples(st.just("take"), st.lists(st.integers(0, 3), min_size=3, max_size=3))
    | st.tuples(st.just("back"), st.integers(0, 9))
    | st.tuples(st.just("select"), st.permutations(range(3))),
    max_size=9,
)


@pytest.mark.slow  # eighty histories; each move has a quick test of its own
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 2, 1])])
@settings(max_examples=40, deadline=None)
@given(moves=MOVES)
@example(moves=[("feed", 3), ("take", [1, 3, 0]), ("back", 0)])
@example(moves=[("feed", 1), ("take", [0, 3, 3]), ("back", 2)])
@example(moves=[("take", [0, 1, 0]), ("back", 1)])
@torch.no_grad()
def test_after_any_moves_each_row_goes_on_as_its_own_text(padding, moves):
    """Rows of a cache against texts alone."""
    model, cache = make_model(), KVCache(99, padding)
    history = History(model, cache, padding)
    history.feed(3)
    for kind, how in moves:
        if kind == "back":
            history.back(min(how, cache.length))
        else:
            getattr(history, kind)(how)
    logits = history.feed(4)
    for text, mine in zip(history.texts, logits, strict=True):
        assert_close(mine[-1], model(torch.tensor([text]))[0, -1], **CLOSE)


@torch.no_grad()
def test_a_cache_has_the_rows_that_it_read():
    model, cache = make_model(), KVCache(8)
    for move in (lambda: cache.take([0]), lambda: cache.select([0])):
        with pytest.raises(ValueError, match="has read nothing yet"):
            move()
    model(make_ids(2, 3), cache)
    for rows in ([2], [0, -1], []):
        with pytest.raises(ValueError, match="expected some of 0 to 1, the rows that the cache holds"):
            cache.select(rows)


def test_a_cache_cannot_go_back_to_what_it_never_held():
    cache = KVCache(8)
    for length in (1, -1):
        with pytest.raises(ValueError, match=f"cannot go back to {length} tokens; it holds 0"):
            cache.truncate(length)


@pytest.mark.parametrize("kind", [KVCache, Int8Cache])
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 3])])
@torch.no_grad()
def test_selected_rows_go_on_as_the_rows_they_come_from(kind, padding):
    model, ids, rows = make_model(), make_ids(2, 7), [1, 0, 1, 1]
    cache, other = kind(16, padding), kind(16, None if padding is None else padding[rows])
    model(ids, cache)
    cache.select(rows)
    model(ids[rows], other)
    rest = make_ids(4, 2, seed=2)
    assert_close(model(rest, cache), model(rest, other), **CLOSE)
    assert cache.nbytes == other.nbytes


@pytest.mark.parametrize(
    "kind", [torch.tensor, np.array, tuple, lambda rows: [torch.tensor(r) for r in rows]]
)
@torch.no_grad()
def test_rows_and_parents_may_be_what_a_search_has_in_hand(kind):
    """A tensor of them, which as an index would mean another thing."""
    model, ids = make_model(), make_ids(3, 4)
    caches = KVCache(16), KVCache(16)
    for cache, rows, parents in zip(
        caches, ([2, 0, 2], kind([2, 0, 2])), ([-1, 0], kind([-1, 0])), strict=True
    ):
        model(ids, cache)
        cache.select(rows)
        model(make_ids(3, 2, seed=2), Tree(cache, parents))
        cache.take([0, 1])
    rest = make_ids(3, 2, seed=3)
    assert torch.equal(model(rest, caches[0]), model(rest, caches[1]))


@pytest.mark.parametrize("kind", [KVCache, Int8Cache])
def test_a_cache_moves_in_inference_mode_and_goes_on_outside(kind):
    model, ids, cache = make_model(), make_ids(1, 6), kind(12)
    with torch.inference_mode():
        model(ids, cache)
        cache.select([0, 0])
        model(make_ids(2, 3), Tree(cache, [-1, 0, 0]))
        cache.take([0, 2])
    with torch.no_grad():
        assert bool(model(make_ids(2, 2), cache).isfinite().all())


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way():
    model, ids, cache = make_model(), make_ids(1, 6), KVCache(12)
    model(ids, cache)
    fork = copy.deepcopy(cache)
    first = model(make_ids(1, 3, seed=2), cache)
    model(make_ids(1, 4, seed=3), fork)
    cache.truncate(6)
    assert torch.equal(model(make_ids(1, 3, seed=2), cache), first)


# Fewer bits.


@pytest.mark.parametrize("name", ["grouped", "latent"])
@torch.no_grad()
def test_caches_of_fewer_bits_are_smaller_and_off_by_what_rounding_explains(name):
    model, ids = make_model(name), make_ids(2, 20)
    whole = {"32": KVCache(24), "16": KVCache(24, dtype=torch.bfloat16), "8": Int8Cache(24)}
    errors = {}
    exact = model(ids)
    for bits, cache in whole.items():
        logits = torch.cat([model(part, cache) for part in ids.split([15, 1, 1, 3], dim=1)], dim=1)
        errors[bits] = ((logits - exact).norm() / exact.norm()).item()
    assert errors["32"] < 1e-6 < errors["16"] < 0.01 and 1e-6 < errors["8"] < 0.02, errors
    assert whole["16"].nbytes * 2 == whole["32"].nbytes
    width = 16 + 8 if name == "latent" else 8
    assert whole["8"].nbytes * 4 * width == whole["32"].nbytes * (width + 4)  # and a scale for each vector


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 2e-7), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
@torch.no_grad()
def test_eight_bits_are_off_by_half_a_step_at_most(dtype, rounding):
    """And by what the model's own type rounds; signs stay, and the largest entry is exact."""
    new = torch.randn(40, 3, 6, 16) * torch.logspace(-4, 3, 6)[:, None]
    new[0, 0, 0] = 0.0
    new = new.to(dtype)
    (kept,) = Int8Cache(6).keep(0, new)
    assert kept.dtype == dtype
    exact, off = new.double(), (kept.double() - new.double()).abs()
    step = exact.abs().amax(-1, keepdim=True) / 127
    assert bool((off <= 0.5001 * step + rounding * exact.abs() + 1e-7).all())
    largest = exact.abs().argmax(-1, keepdim=True)
    assert_close(kept.gather(-1, largest), new.gather(-1, largest))


@torch.no_grad()
def test_a_cache_of_another_type_gives_back_the_type_of_the_model():
    model = make_model().bfloat16()
    for cache in (KVCache(8, dtype=torch.float16), KVCache(8, dtype=torch.float32), Int8Cache(8)):
        for kept in [cache.keep(0, torch.ones(1, 2, 3, 8, dtype=torch.bfloat16))[0]]:
            assert kept.dtype == torch.bfloat16
        cache = type(cache)(8) if isinstance(cache, Int8Cache) else KVCache(8, dtype=cache.dtype)
        assert bool(model(make_ids(1, 4), cache).isfinite().all())


# What stands between.


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_three_parts_make_the_whole(name):
    model, ids = make_model(name), make_ids(2, 9)
    assert torch.equal(model.logits(model.states(model.embed(ids))[-1]), model(ids))


@torch.no_grad()
def test_the_residual_stream_can_be_read_anywhere():
    model, ids = make_model(), make_ids(2, 9)
    expected, x = [], model.embed(ids)
    hooks = [block.register_forward_hook(lambda b, i, out: expected.append(out)) for block in model.layers]
    *read, last = model.states(x, after=(3, 0, 1, 2))
    for hook in hooks:
        hook.remove()
    for stream, wanted in zip(read, [expected[2], x, *expected[:2]], strict=True):
        assert torch.equal(stream, wanted)
    assert torch.equal(last, expected[2])
    assert len(model.states(x, after=iter([1, 2]))) == 3
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match="expected numbers of blocks from 0 to 3"):
            model.states(x, after=[wrong])


@pytest.mark.parametrize("name", ["grouped", "latent"])
@torch.no_grad()
def test_features_take_the_place_of_embeddings(name):
    """As images will: what follows sees them, what stands before does not; a cache reads them in pieces."""
    model, ids = make_model(name), make_ids(1, 12)
    features = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(2))
    x = model.embed(ids)
    x[:, 3:7] = features
    logits = model.logits(model.states(x)[-1])
    plain = model(ids)
    assert torch.equal(logits[:, :3], plain[:, :3])
    assert (logits[:, 3:] - plain[:, 3:]).abs().max() > 0.1
    cache = KVCache(12)
    parts = [model.states(part, cache)[-1] for part in x.split([5, 6, 1], dim=1)]
    assert_close(model.logits(torch.cat(parts, dim=1)), logits, **CLOSE)


def test_features_are_trained_through():
    model, ids = make_model(), make_ids(2, 8)
    features = torch.randn(2, 3, 32, requires_grad=True)
    x = model.embed(ids).index_copy(1, torch.tensor([2, 3, 4]), features)
    model.logits(model.states(x)[-1]).square().mean().backward()
    assert features.grad.abs().min() > 0 and model.layers[0].self_attn.q_proj.weight.grad is not None
