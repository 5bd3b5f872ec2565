"""Each request gets the text that it gets alone, whatever comes and goes beside it, and all pages come back."""

import random
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from minicpm_lite.config import LatentAttentionConfig, MixtureConfig, ModelConfig, RopeScaling
from minicpm_lite.inference.drafts import DecoderDraft, PromptLookup
from minicpm_lite.inference.eagle import EagleDraft, EagleHead
from minicpm_lite.inference.engine import Engine, PagedExecutor, Request
from minicpm_lite.inference.guess_trees import Chain
from minicpm_lite.inference.packed import quantize_model
from minicpm_lite.inference.paged import PagedContext, PagePool
from minicpm_lite.language.context import KVCache, Tree
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate
from minicpm_lite.language.sampling import Sampling

BASE = ModelConfig(
    16, 24, 2, 2, 23, num_key_value_heads=1, max_position_embeddings=64, init_std=0.4, scale_emb=4.0,
    eos_token_id=(22,),
)  # fmt: skip
KINDS = {
    "grouped": BASE,
    "latent": ModelConfig(**vars(BASE) | {
        "num_key_value_heads": 2, "head_dim": 8, "latent_attention": LatentAttentionConfig(8, 8, 4, 4, 8)}),
    "experts": ModelConfig(**vars(BASE) | {"mixture": MixtureConfig(4, 2)}),
    "dynamic": ModelConfig(**vars(BASE) | {"rope_scaling": RopeScaling("dynamic", 16, 2.0)}),
}  # fmt: skip


@cache
def model(kind: str = "grouped") -> Decoder:
    torch.manual_seed(0)
    return Decoder(KINDS[kind]).eval()


def alone(request: Request, kind: str = "grouped", room: int = 64) -> list[int]:
    sampling = request.sampling
    ids = generate(
        model(kind), torch.tensor([request.prompt]), request.max_new_tokens, sampling.temperature,
        sampling.top_k, sampling.top_p, sampling.repetition_penalty, stop_ids=request.stop_ids,
        generator=torch.Generator().manual_seed(request.seed), context=KVCache(room),
    )  # fmt: skip
    written = ids[0, len(request.prompt) :].tolist()
    stops = model(kind).config.eos_token_id if request.stop_ids is None else request.stop_ids
    ends = [place for place, token in enumerate(written) if token in stops]
    return written[: ends[0] + 1] if ends else written


def requests(count: int, seed: int) -> list[Request]:
    """Prompts of which some begin alike, of several users, drawn and not."""
    luck = random.Random(seed)
    beginning = [luck.randrange(22) for _ in range(13)]
    found = []
    for number in range(count):
        own = [luck.randrange(22) for _ in range(luck.randint(1, 9))]
        prompt = beginning[: luck.choice((0, 0, 5, 8, 13))] + own
        sampling = luck.choice(
            (Sampling(), Sampling(1.0, top_k=9), Sampling(0.7, top_p=0.9, repetition_penalty=1.3))
        )
        found.append(
            Request(tuple(prompt), luck.randint(1, 12), sampling, seed=number, user=luck.choice("abc"))
        )
    return found


POOL = requests(60, 0)


@cache
def text_alone(number: int) -> list[int]:
    return alone(POOL[number], room=40)


def check_schedule(seed: int, draft=None) -> tuple[int, int]:
    luck = random.Random(seed)
    pages = luck.choice((8, 10, 20))
    executor = PagedExecutor(model(), pages, page_size=4, room=40)
    engine = Engine(executor, rows=luck.randint(1, 4), piece=luck.choice((1, 3, 8, 64)), draft=draft)
    todo = [luck.randrange(len(POOL)) for _ in range(luck.randint(1, 6))]
    answers, cancelled = [], 0
    while todo or not engine.idle:
        if todo and (engine.idle or luck.random() < 0.5):
            number = todo.pop()
            if executor.pool.needed(Engine._most(POOL[number])) <= pages:
                answers.append((number, engine.submit(POOL[number])))
        if answers and luck.random() < 0.08:
            engine.cancel(luck.choice(answers)[1])
        engine.step()
    for number, answer in answers:
        expected = text_alone(number)
        if answer.state == "cancelled":
            cancelled += 1
            assert answer.tokens == expected[: len(answer.tokens)]
        else:
            assert answer.state == "done" and answer.tokens == expected
    assert executor.pool.unused == pages and not any(executor.pool._users)
    return len(answers), cancelled


@pytest.mark.slow  # a thousand schedules
@pytest.mark.parametrize("part", range(4))
def test_whatever_comes_and_goes_each_request_gets_its_own_text(part):
    counts = [check_schedule(seed) for seed in range(250 * part, 250 * (part + 1))]
    served, cancelled = map(sum, zip(*counts, strict=True))
    assert served > 600 and cancelled > 40


@pytest.mark.parametrize(
    "draft", [PromptLookup(guesses=3), DecoderDraft(model("grouped"), Chain(3))], ids=["lookup", "decoder"]
)
def test_guesses_change_no_text(draft):
    """Greedy ones token for token; drawn ones follow the same law and other luck."""
    greedy = [Request(r.prompt, r.max_new_tokens, user=r.user) for r in POOL[:20]]
    engine = Engine(PagedExecutor(model(), 40, 4, 40), rows=4, piece=5, draft=draft)
    answers = [engine.submit(request) for request in [*greedy, *POOL[:4]]]
    engine.run()
    assert [answer.tokens for answer in answers[:20]] == [alone(request, room=40) for request in greedy]
    assert all(answer.state == "done" for answer in answers)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind):
    engine = Engine(PagedExecutor(model(kind), 32, 4, 40), rows=3, piece=6)
    answers = [engine.submit(request) for request in POOL[:12]]
    engine.run()
    assert [answer.tokens for answer in answers] == [alone(request, kind, 40) for request in POOL[:12]]


def test_packed_weights_serve_too():
    torch.manual_seed(0)
    packed = quantize_model(Decoder(ModelConfig(32, 64, 2, 2, 23, init_std=0.3)).eval(), "Q8_0")
    engine = Engine(PagedExecutor(packed, 32, 4, 40), rows=3)
    answers = [engine.submit(Request((1, 2, 3, number), 6)) for number in range(4)]
    engine.run()
    for number, answer in enumerate(answers):
        written = generate(packed, torch.tensor([[1, 2, 3, number]]), 6)[0, 4:].tolist()
        assert answer.tokens == written


def test_a_beginning_is_read_once():
    prompt = (*range(20), 7)
    executor = PagedExecutor(model(), 32, 4, 40)
    engine, read = Engine(executor, rows=4), []
    prefill = executor.prefill
    executor.prefill = lambda text, tokens: read.append(len(tokens)) or prefill(text, tokens)
    for tail in (7, 8, 7):
        engine.submit(Request((*prompt[:20], tail), 2))
        engine.run()
    assert read == [21, 1, 1], "Five pages stay, and the last token is read to be answered."
    other = Request((21, *prompt[1:20], 7), 2)  # pages hold the same tokens behind another beginning
    answer = engine.submit(other)
    engine.run()
    assert read[-1] == 21 and answer.tokens == alone(other, room=40)


def test_what_was_kept_goes_when_its_room_is_needed():
    executor = PagedExecutor(model(), 8, 4, 32)
    engine = Engine(executor)
    for seed in range(6):
        request = Request(tuple(random.Random(seed).choices(range(22), k=19)), 5)
        answer = engine.submit(request)
        engine.run()
        assert answer.tokens == alone(request, room=32)
    assert executor.pool.unused == 8


def test_users_take_turns_and_nobody_is_overtaken():
    engine = Engine(PagedExecutor(model(), 12, 4, 40), rows=1)
    many = [engine.submit(Request((1, 2), 3, stop_ids=(), user="a")) for _ in range(3)]
    one = engine.submit(Request((3, 4), 3, stop_ids=(), user="b"))
    done = []
    while not engine.idle:
        done += [answer for answer in engine.step() if answer.state == "done"]
    assert done == [many[0], one, many[1], many[2]]
    # One that waits for pages lets no smaller one of its user by.
    engine = Engine(PagedExecutor(model(), 10, 4, 40), rows=4)
    first = engine.submit(Request((1,) * 8, 12, stop_ids=()))
    large, small = engine.submit(Request((2,) * 20, 12, stop_ids=())), engine.submit(Request((3,), 2))
    engine.step()
    assert (first.state, large.state, small.state) == ("writing", "waiting", "waiting")
    engine.run()
    assert large.state == small.state == "done"


def test_a_long_prompt_is_read_in_pieces_while_the_others_write():
    engine = Engine(PagedExecutor(model(), 40, 4, 60), rows=4, piece=5)
    short = engine.submit(Request((1, 2), 20, stop_ids=()))
    engine.step()
    engine.submit(Request((3,) * 25, 2))
    for _ in range(5):
        before = len(short.tokens)
        engine.step()
        assert len(short.tokens) == before + 1
    assert 0 < short.submitted < short.first < short.last


def test_scores_that_are_no_numbers_end_one_request_alone():
    executor = PagedExecutor(model(), 40, 4, 40)
    engine, decode = Engine(executor, rows=3), executor.decode

    def broken(texts, tokens):
        scores = decode(texts, tokens)
        scores[1] = torch.nan
        return scores

    answers = [engine.submit(request) for request in (Request((n, 2), 5, stop_ids=()) for n in range(3))]
    for _ in range(3):
        engine.step()
    executor.decode = broken
    engine.step()
    executor.decode = decode
    engine.run()
    assert [answer.state for answer in answers] == ["done", "failed", "done"]
    assert "finite numbers" in answers[1].why and executor.pool.unused == 40


@torch.no_grad()
def test_guesses_that_branch_are_what_they_are_in_a_cache():
    pool, texts, caches = PagePool(20, 4, 40), [], []
    for prompt in ([1, 2, 3, 4, 5, 6], [9, 8]):
        text, cache = pool.open(prompt, 20), KVCache(40)
        model()(torch.tensor([prompt]), PagedContext(pool, [text]))
        model()(torch.tensor([prompt]), cache)
        texts.append(text)
        caches.append(cache)
    guesses, parents, paths = torch.tensor([[3, 4, 5, 6], [7, 1, 2, 0]]), [-1, 0, 0, 2], [[0, 2, 3], [0]]
    context = PagedContext(pool, texts, parents)
    scores = model()(guesses, context)
    for row, (cache, path) in enumerate(zip(caches, paths, strict=True)):
        assert_close(scores[row], model()(guesses[row : row + 1], Tree(cache, parents))[0])
        cache.take(path)
    context.take(paths)
    after = model()(torch.tensor([[2], [3]]), PagedContext(pool, texts))
    for row, cache in enumerate(caches):
        assert_close(after[row], model()(torch.tensor([[2 + row]]), cache)[0])
    assert [len(text) for text in texts] == [10, 4]


def test_refusals():
    executor = PagedExecutor(model(), 8, 4)
    engine = Engine(executor)
    for request, why in (
        (Request((), 5), "The prompt holds 0 tokens; expected one at least"),
        (Request((1, 23), 5), "ids from 0 to 22"),
        (Request((1, 2), 40), "A text of 41 tokens does not fit: there are 8 pages of 4 tokens"),
        (Request((1, 2), 0), "max_new_tokens"),
        (Request((1, 2), 5, stop_ids=(99,)), "stop_ids"),
    ):
        with pytest.raises(ValueError, match=why):
            engine.submit(request)
    answer = engine.submit(Request((1, 2), 5))
    engine.run()
    assert answer.state == "done" and executor.pool.unused == 8
    for settings in ({"rows": 0}, {"piece": 0}):
        with pytest.raises(ValueError, match="expected a whole number of at least 1"):
            Engine(executor, **settings)
    with pytest.raises(ValueError, match="The draft has 29 token ids and the target has 23"):
        Engine(executor, draft=DecoderDraft(Decoder(ModelConfig(16, 24, 2, 2, 29)), Chain(2)))
    four = Decoder(ModelConfig(16, 24, 4, 2, 23))
    with pytest.raises(ValueError, match="shows no streams to drafts"):
        Engine(PagedExecutor(four, 8), draft=EagleDraft(EagleHead(four.config, torch.tensor([1])), Chain(2)))
    pool = PagePool(4, 4)
    with torch.no_grad():
        text = pool.open([1, 2], 6)
        model()(torch.tensor([[1, 2]]), PagedContext(pool, [text]))
        with pytest.raises(ValueError, match="A text has 2 pages of 4 tokens and would need room for 9"):
            model()(torch.tensor([[1] * 7]), PagedContext(pool, [text]))
        with pytest.raises(ValueError, match="2 rows of 1 tokens came; expected 1 texts"):
            model()(torch.tensor([[1], [2]]), PagedContext(pool, [text]))
        with pytest.raises(ValueError, match="filled by another model"):
            model("experts")(torch.tensor([[1]]), PagedContext(pool, [text]))
