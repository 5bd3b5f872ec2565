"""On pages, queries choose what they choose in a cache: each text is what it is alone."""

import random
from functools import cache

import pytest
import torch
from sparse_models import LEVELS, SMALL, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite.config import LatentAttentionConfig, ModelConfig, SparseConfig
from minicpm_lite.inference import sparse_pages
from minicpm_lite.inference.drafts import DecoderDraft, PromptLookup
from minicpm_lite.inference.engine import Engine, Request
from minicpm_lite.inference.executors import PagedExecutor
from minicpm_lite.inference.guess_trees import Chain, DynamicTree
from minicpm_lite.inference.paged import PagePool
from minicpm_lite.inference.sparse_attention import SparseCache
from minicpm_lite.inference.sparse_pages import SparsePagedContext, SparsePagePool
from minicpm_lite.language.context import Tree
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate

CLOSE = dict(atol=1e-9, rtol=1e-9)
model = cache(make_model)


@pytest.mark.parametrize("page_size", [8, 16])
@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_texts_of_different_length_with_guesses_between(level, page_size):
    config, luck = LEVELS[level], random.Random(0)
    pool = SparsePagePool(config, 60, page_size, 150)
    prompts = [make_ids(1, length, seed=length) for length in (3, 40, 70)]
    texts = [pool.open(prompt[0].tolist(), 140) for prompt in prompts]
    caches = [SparseCache(150, config) for _ in prompts]
    for prompt, text, alone in zip(prompts, texts, caches, strict=True):
        for piece in prompt.split(29, dim=1):
            found = model()(piece, SparsePagedContext(pool, [text]))
            assert_close(found, model()(piece, alone), **CLOSE)
    for step in range(12):
        new = make_ids(3, 5, seed=step)
        if step % 2:
            new = new[:, : 1 + step % 3]
            found = model()(new, pool.context(texts))
            for row, alone in enumerate(caches):
                assert_close(found[row], model()(new[row : row + 1], alone)[0], **CLOSE)
            continue
        counts = luck.sample(range(1, 6), 3)
        trees = [[luck.randrange(-1, place) for place in range(count)] for count in counts]
        new = new.flatten()[: sum(counts)].split(counts)
        context = pool.context(texts, trees)
        found, paths = model()(torch.cat(new)[None], context)[0].split(counts), []
        for row, (alone, parents) in enumerate(zip(caches, trees, strict=True)):
            assert_close(found[row], model()(new[row][None], Tree(alone, parents))[0], **CLOSE)
            path, place = [], luck.randrange(counts[row])
            while place >= 0:
                path.insert(0, place)
                place = parents[place]
            paths.append(path)
            alone.take(path)
        context.take(paths)
    assert pool.nbytes > PagePool.nbytes.fget(pool)


def texts(count: int) -> list[Request]:
    luck = random.Random(1)
    beginning = [luck.randrange(50) for _ in range(40)]
    return [
        Request(
            (*beginning[: luck.choice((0, 9, 24, 40))], *luck.choices(range(50), k=luck.randint(1, 30))),
            luck.randint(1, 25),
            stop_ids=(),
            user=luck.choice("ab"),
        )
        for _ in range(count)
    ]


REQUESTS = texts(30)


@cache
def alone(number: int, level: str = "exact") -> list[int]:
    request = REQUESTS[number]
    ids, room = torch.tensor([request.prompt]), SparseCache(120, LEVELS[level])
    return generate(model(), ids, request.max_new_tokens, stop_ids=(), context=room)[
        0, ids.shape[1] :
    ].tolist()


def check_schedule(seed: int, level: str = "exact", draft=None) -> None:
    luck = random.Random(seed)
    executor = PagedExecutor(model(), luck.choice((13, 20)), 8, 104, sparse=LEVELS[level])
    serving = Engine(executor, rows=luck.randint(1, 4), piece=luck.choice((5, 16, 64)), draft=draft)
    todo, answers = [luck.randrange(len(REQUESTS)) for _ in range(5)], []
    while todo or not serving.idle:
        if todo and (serving.idle or luck.random() < 0.3):
            answers.append((todo[-1], serving.submit(REQUESTS[todo.pop()])))
        serving.step()
    for number, answer in answers:
        assert answer.tokens == alone(number, level)
    assert executor.pool.unused == executor.pool.pages


@pytest.mark.parametrize(
    "draft",
    [None, PromptLookup(4), DecoderDraft(model(), Chain(3)), DecoderDraft(model(), DynamicTree(2, 2, 5))],
    ids=["none", "lookup", "decoder", "tree"],
)
@pytest.mark.parametrize("level", LEVELS)
def test_schedules(level, draft):
    for seed in range(2):
        check_schedule(seed, level, draft)


@torch.no_grad()
def test_a_call_reads_no_more_than_the_means_and_what_is_chosen(monkeypatch):
    copied, columns = [], SparsePagedContext._columns
    monkeypatch.setattr(
        SparsePagedContext, "_columns",
        lambda self, whole, column: copied.append(column.shape[-1]) or columns(self, whole, column),
    )  # fmt: skip
    pool = SparsePagePool(SMALL, 30, 8)
    text = pool.open([], 150)
    for piece in make_ids(1, 140).split(4, dim=1):
        model()(piece, pool.context([text]))
    copied.clear()
    monkeypatch.setattr(SparsePagedContext, "gather", lambda *given: pytest.fail("All was copied together."))
    model()(make_ids(1, 1), pool.context([text]))
    assert set(copied) == {SMALL.num_blocks * SMALL.block_size}


def no_means_of_guesses(patch):
    patch.setattr(SparsePagePool, "average_all", lambda *given: None)


def means_of_pages_alone(patch):
    """Windows that begin in the page before are left out, as if pages were texts of their own."""
    average = SparsePagePool.average
    patch.setattr(
        SparsePagePool, "average",
        lambda pool, layer, text, before, after: average(
            pool, layer, text, before, after if after % pool.page_size else before),
    )  # fmt: skip


def all_guesses_are_seen(patch):
    right = sparse_pages.chosen_columns
    patch.setattr(
        sparse_pages, "chosen_columns",
        lambda *given: right(*given[:-1], None if given[-1] is None else torch.ones_like(given[-1])),
    )  # fmt: skip


@pytest.mark.parametrize(
    "mistake",
    [no_means_of_guesses, means_of_pages_alone, all_guesses_are_seen],
    ids=lambda each: each.__name__,
)
def test_wrong_pages_are_found(mistake, monkeypatch):
    for number in range(len(REQUESTS)):
        alone(number)
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(20):
            check_schedule(seed, draft=DecoderDraft(model(), DynamicTree(2, 2, 5)))


def test_refusals():
    with pytest.raises(ValueError, match="page_size is 24; expected a multiple of 16 tokens"):
        SparsePagePool(SparseConfig(), 8, 24)
    with pytest.raises(ValueError, match="page_size is 16; expected a multiple of 64 tokens"):
        SparsePagePool(SparseConfig(coarse_topk=128), 8, 16)
    latent = Decoder(
        ModelConfig(16, 24, 2, 2, 23, head_dim=8, latent_attention=LatentAttentionConfig(8, 8, 4, 4, 8))
    ).eval()
    executor = PagedExecutor(latent, 8, 16, sparse=SparseConfig())
    with pytest.raises(ValueError, match="latent attention, whose heads share no keys"):
        executor.prefill(executor.open([1, 2], 4), [1, 2])
