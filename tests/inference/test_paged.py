"""Pages hold what a cache holds, for texts of different length, branches of guesses too."""

import pytest
import torch
from torch.testing import assert_close

from minicpm_lite.config import ModelConfig
from minicpm_lite.inference.paged import PagedContext, PagePool
from minicpm_lite.language.context import KVCache, Tree
from minicpm_lite.language.decoder import Decoder

CONFIG = ModelConfig(16, 24, 2, 2, 23, num_key_value_heads=1, max_position_embeddings=64, init_std=0.4)


def make_model(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(CONFIG).eval()


@torch.no_grad()
def test_refusals():
    model, pool = make_model(), PagePool(4, 4)
    text = pool.open([1, 2], 6)
    model(torch.tensor([[1, 2]]), PagedContext(pool, [text]))
    with pytest.raises(ValueError, match="A text has 2 pages of 4 tokens and would need room for 9"):
        model(torch.tensor([[1] * 7]), PagedContext(pool, [text]))
    with pytest.raises(ValueError, match="2 rows came; expected one for each of 1 texts"):
        model(torch.tensor([[1], [2]]), PagedContext(pool, [text]))
    with pytest.raises(ValueError, match=r"1 rows of 3 tokens came; expected one row, of \[2\] guesses of 1"):
        model(torch.tensor([[1, 2, 3]]), PagedContext(pool, [text], [[-1, 0]]))
    with pytest.raises(ValueError, match="The parent of guess 1 is 1; expected the place of an earlier"):
        model(torch.tensor([[1, 2]]), PagedContext(pool, [text], [[-1, 1]]))
    with pytest.raises(ValueError, match="filled by another model"):
        make_model(1)(torch.tensor([[1]]), PagedContext(pool, [text]))
    with pytest.raises(ValueError, match="A text of 17 tokens does not fit: there are 4 pages of 4 tokens"):
        pool.open([1], 17)
    assert pool.open([1], 16) is None, "There will be room for it later."
    for given in ({"pages": 0}, {"page_size": 0}, {"room": 0}):
        with pytest.raises(ValueError, match="expected a whole number of at least 1"):
            PagePool(**{"pages": 4} | given)


@torch.no_grad()
def test_texts_of_different_length_in_one_call():
    model, pool, prompts = make_model(), PagePool(20, 4, 40), [[1, 2, 3, 4, 5, 6, 7], [9], [5, 5, 5, 5]]
    texts, caches = [pool.open(prompt, 20) for prompt in prompts], [KVCache(40) for _ in prompts]
    for prompt, text, cache in zip(prompts, texts, caches, strict=True):
        assert_close(
            model(torch.tensor([prompt]), PagedContext(pool, [text])), model(torch.tensor([prompt]), cache)
        )
    for new in ([[1], [2], [3]], [[4, 5], [6, 7], [8, 9]]):
        found = model(torch.tensor(new), PagedContext(pool, texts))
        for row, cache in enumerate(caches):
            assert_close(found[row : row + 1], model(torch.tensor([new[row]]), cache))


@torch.no_grad()
def test_numbers_that_are_none_stay_with_their_text():
    model, pool = make_model(), PagePool(20, 4, 40)
    bad, good = pool.open([1, 2, 3], 9), pool.open([4, 5], 9)
    for text, ids in ((bad, [1, 2, 3]), (good, [4, 5])):
        model(torch.tensor([ids]), PagedContext(pool, [text]))
    for kept in pool._layers.values():
        for whole in kept:
            whole[pool.slots(bad, 0, 3)] = torch.nan
    scores = model(torch.tensor([[1], [2]]), PagedContext(pool, [bad, good]))
    assert scores[0].isnan().all() and scores[1].isfinite().all()


@torch.no_grad()
def test_trees_of_different_size_in_one_call():
    """A text whose pages are full is checked beside one that has many guesses, and nothing of it changes."""
    model, pool = make_model(), PagePool(20, 4, 40)
    full, roomy, cache = pool.open([1, 2, 3], 4), pool.open([4, 5], 12), KVCache(40)
    for text, ids in ((full, [1, 2, 3]), (roomy, [4, 5])):
        model(torch.tensor([ids]), PagedContext(pool, [text]))
    model(torch.tensor([[1, 2, 3]]), cache)
    context = PagedContext(pool, [full, roomy], [[-1], [-1, 0, 0, 2]])
    scores = model(torch.tensor([[6, 7, 8, 9, 1]]), context)
    assert context.reach == 6 and scores.isfinite().all()
    assert_close(scores[0, :1], model(torch.tensor([[6]]), cache)[0])
    context.take([[0], [0, 2, 3]])
    assert (full.tokens, roomy.tokens) == ([1, 2, 3, 6], [4, 5, 7, 9, 1])


def test_pages_are_lent_and_come_back():
    pool = PagePool(6, 4, 24)
    first = pool.open([1, 2, 3], 8)
    assert (len(first.pages), pool.unused) == (2, 4)
    second = pool.open([1, 2, 3], 16)
    assert pool.unused == 0 and pool.open([7], 1) is None
    pool.close(first)
    pool.close(first)
    assert pool.unused == 2
    pool.close(second)
    assert pool.unused == 6 and pool.nbytes == 0


def test_a_text_that_nobody_holds_gives_its_pages_back():
    pool = PagePool(6, 4, 24)
    text = pool.open([1, 2, 3], 24)
    assert pool.unused == 0
    del text
    assert pool.unused == 6


@torch.no_grad()
def test_guesses_that_branch_are_what_they_are_in_a_cache():
    model, pool, texts, caches = make_model(), PagePool(20, 4, 40), [], []
    for prompt in ([1, 2, 3, 4, 5, 6], [9, 8]):
        pool.forget()  # so that each text has angles of its own
        text, cache = pool.open(prompt, 20), KVCache(40)
        model(torch.tensor([prompt]), PagedContext(pool, [text]))
        model(torch.tensor([prompt]), cache)
        texts.append(text)
        caches.append(cache)
    guesses, paths = torch.tensor([[3, 4, 5, 6, 7, 1, 2]]), [[0, 2, 3], [1]]
    trees = [[-1, 0, 0, 2], [-1, -1, 0]]
    context = PagedContext(pool, texts, trees)
    each = guesses.split([4, 3], dim=1)
    scores = model(guesses, context)[0].split([4, 3])
    for row, (cache, path) in enumerate(zip(caches, paths, strict=True)):
        assert_close(scores[row], model(each[row], Tree(cache, trees[row]))[0])
        cache.take(path)
    context.take(paths)
    after = model(torch.tensor([[2], [3]]), PagedContext(pool, texts))
    for row, cache in enumerate(caches):
        assert_close(after[row], model(torch.tensor([[2 + row]]), cache)[0])
    assert [len(text) for text in texts] == [10, 4]
