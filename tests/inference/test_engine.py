"""Each request gets the text that it gets alone, whatever comes and goes beside it, and all pages come back."""

import random
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from sparse_models import SMALL as SPARSE

from minicpm_lite.config import LatentAttentionConfig, MixtureConfig, ModelConfig, RopeScaling
from minicpm_lite.inference import engine, executors, paged
from minicpm_lite.inference.drafts import DecoderDraft, PromptLookup, Reading, frequent_draft
from minicpm_lite.inference.eagle import EagleDraft, EagleHead
from minicpm_lite.inference.engine import Engine, Request
from minicpm_lite.inference.executors import PagedExecutor
from minicpm_lite.inference.guess_trees import Chain, DynamicTree, StaticTree
from minicpm_lite.inference.packed import quantize_model
from minicpm_lite.inference.paged import PagePool
from minicpm_lite.inference.speculative import speculative_stream
from minicpm_lite.inference.speculative_costs import Adaptive, Costs
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.fast_decoding import fast_decoding
from minicpm_lite.language.generation import generate
from minicpm_lite.language.sampling import Sampling, choose

BASE = ModelConfig(
    16, 24, 2, 2, 23, num_key_value_heads=1, max_position_embeddings=64, init_std=0.4, scale_emb=4.0,
    eos_token_id=(22,),
)  # fmt: skip
KINDS = {
    "grouped": BASE,
    "latent": ModelConfig(**vars(BASE) | {
        "num_key_value_heads": 2, "head_dim": 8, "latent_attention": LatentAttentionConfig(8, 8, 4, 4, 8)}),
    "experts": ModelConfig(**vars(BASE) | {"mixture": MixtureConfig(4, 2)}),
    "four blocks": ModelConfig(**vars(BASE) | {"num_hidden_layers": 4}),
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
    """Prompts of which some begin alike, or have the same page behind another one; drawn and not."""
    luck = random.Random(seed)
    beginning = [luck.randrange(22) for _ in range(13)]
    pages = [[luck.randrange(22) for _ in range(4)] for _ in range(2)]
    found = []
    for number in range(count):
        own = [luck.randrange(22) for _ in range(luck.randint(1, 9))]
        alike = beginning[: luck.choice((0, 0, 5, 8, 13))]
        prompt = luck.choice((alike, sum(luck.choices(pages, k=3), []))) + own
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
    """Three things hold, whatever comes and goes: own text, all pages back, and nobody waits for ever.

    Who is called off, and in which step, is drawn before, so that an engine that serves nobody is not saved by
    requests that are called off while they wait.
    """
    luck = random.Random(seed)
    pages = luck.choice((8, 10, 20))
    executor = PagedExecutor(model(), pages, page_size=4, room=40)
    serving = Engine(executor, rows=luck.randint(1, 4), piece=luck.choice((1, 3, 8, 64)), draft=draft)
    numbers = [luck.randrange(len(POOL)) for _ in range(luck.randint(1, 6))]
    todo = [n for n in numbers if executor.pool.needed(Engine._most(POOL[n])) <= pages]
    # for each, after how many steps it comes, and, if it is called off, after how many more
    comes = sorted(luck.randint(0, 12) for _ in todo)
    ends = [luck.randint(0, 15) if luck.random() < 0.25 else None for _ in todo]
    # alone each would take a step for each token that is read or written; one after the other that is enough
    enough = 12 + sum(len(POOL[n].prompt) + POOL[n].max_new_tokens + 1 for n in todo)
    answers = []
    for step in range(enough):
        while len(answers) < len(todo) and comes[len(answers)] <= step:
            answers.append(serving.submit(POOL[todo[len(answers)]]))
        for answer, begin, end in zip(answers, comes, ends, strict=False):
            if end is not None and step == begin + end:
                serving.cancel(answer)
        serving.step()
        if len(answers) == len(todo) and serving.idle:
            break
    assert len(answers) == len(todo) and serving.idle, "somebody waits for ever"
    cancelled = 0
    for number, answer, end in zip(todo, answers, ends, strict=True):
        expected = text_alone(number)
        if answer.state == "cancelled":
            assert end is not None
            cancelled += 1
            assert answer.tokens == expected[: len(answer.tokens)]
        else:
            assert answer.state == "done" and answer.tokens == expected
    assert executor.pool.unused == pages and not executor.pool._texts
    return len(answers), cancelled


@pytest.mark.slow  # a thousand schedules
@pytest.mark.parametrize("part", range(4))
def test_whatever_comes_and_goes_each_request_gets_its_own_text(part, request):
    if part:  # shapes, whose checks take four times as long as the schedules, are those of the first part
        request.getfixturevalue("unchecked")
    counts = [check_schedule(seed) for seed in range(250 * part, 250 * (part + 1))]
    served, cancelled = map(sum, zip(*counts, strict=True))
    assert served > 600 and cancelled > 40


@cache
def head() -> EagleHead:
    torch.manual_seed(1)
    found = EagleHead(KINDS["four blocks"], torch.arange(20))
    for weight in found.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    return found


@pytest.mark.parametrize(
    ("kind", "draft"),
    [
        ("grouped", lambda: PromptLookup(guesses=3)),
        ("grouped", lambda: DecoderDraft(model("grouped"), Chain(3))),
        ("grouped", lambda: DecoderDraft(model("grouped"), DynamicTree(2, 2, 4))),
        ("four blocks", lambda: EagleDraft(head(), Chain(3))),
        ("four blocks", lambda: EagleDraft(head(), DynamicTree(3, 2, 6))),
        ("four blocks", lambda: Adaptive(EagleDraft(head(), Chain(2)), Costs((1.0, 1.1), 0.1), most=2)),
    ],
    ids=["lookup", "decoder", "tree", "eagle", "eagle's tree", "adaptive"],
)
def test_guesses_change_no_text(kind, draft):
    """Greedy ones token for token; drawn ones follow the same law and other luck."""
    greedy = [Request(r.prompt, r.max_new_tokens, user=r.user) for r in POOL[:20]]
    serving = Engine(PagedExecutor(model(kind), 40, 4, 40), rows=4, piece=5, draft=draft())
    answers = [serving.submit(request) for request in [*greedy, *POOL[:4]]]
    serving.run()
    assert [answer.tokens for answer in answers[:20]] == [alone(request, kind, 40) for request in greedy]
    assert all(answer.state == "done" for answer in answers)


@pytest.mark.parametrize("share", [True, False])
def test_an_engine_that_shares_nothing_reads_each_prompt_in_the_same_pieces(share):
    read = []

    class Watched(PagedExecutor):
        def prefill(self, text, tokens, after=()):
            read.append((len(text), len(tokens)))
            return super().prefill(text, tokens, after)

    serving = Engine(Watched(model("grouped"), 40, 4, 40), piece=5, share=share)
    for _ in range(2):
        serving.submit(Request((1, 2, 3, 4, 5, 6, 7, 8, 9), 3, stop_ids=()))
        serving.run()
    assert read == [(0, 5), (5, 4), *([(8, 1)] if share else [(0, 5), (5, 4)])]


DEAR_BESIDE_OTHERS = Costs((1.0,) * 8 + (2.0, 3.0), draft=0.0)


def test_a_text_guesses_less_where_others_share_its_calls():
    """And what it writes stays the same; it is told in each step, so it guesses again when they have gone."""
    read = []

    class Watched(PagedExecutor):
        def verify(self, texts, tokens, parents, after=()):
            read.append((len(texts), sum(map(len, tokens))))
            return super().verify(texts, tokens, parents, after)

    draft = Adaptive(
        DecoderDraft(model("grouped"), Chain(7)), DEAR_BESIDE_OTHERS, most=7, share=0.0, credit=0.0
    )
    serving = Engine(Watched(model("grouped"), 64, 4, 40), rows=8, draft=draft)
    requests = [Request(POOL[n].prompt[:2], 12, stop_ids=()) for n in range(8)]
    requests[0] = replace(requests[0], max_new_tokens=30)
    answers = [serving.submit(request) for request in requests]
    serving.run()
    assert [answer.tokens for answer in answers] == [alone(request, "grouped", 40) for request in requests]
    assert all(tokens <= 8 for texts, tokens in read), "more than eight cost more than they bring"
    assert max(tokens for texts, tokens in read if texts == 1) == 8


@pytest.mark.parametrize(
    ("kind", "draft"),
    [
        ("grouped", lambda: None),
        ("grouped", lambda: PromptLookup(guesses=6)),
        ("grouped", lambda: DecoderDraft(model("grouped"), Chain(4))),  # p is q, but for rounding
        ("four blocks", lambda: EagleDraft(head(), Chain(4))),
        ("four blocks", lambda: EagleDraft(head(), DynamicTree(3, 2, 6))),
        ("grouped", lambda: Adaptive(DecoderDraft(model("grouped"), Chain(4)), DEAR_BESIDE_OTHERS)),
    ],
    ids=["none", "lookup", "itself", "eagle", "eagle's tree", "adaptive"],
)
def test_a_drawn_text_does_not_depend_on_its_neighbours(kind, draft, unchecked):
    """Not on their room for guesses, nor on their number, nor on who has read its beginning before."""
    prompt = (1, 2, 3, 1, 2, 3, 1, 2)
    short = [Request((*prompt[: 2 + n], n), 1 + 3 * n, Sampling(0.7), stop_ids=(), seed=9) for n in range(5)]
    for seed in range(3):
        wanted, texts = Request(prompt, 24, Sampling(0.8), stop_ids=(), seed=seed, user="b"), []
        for neighbours in ([], short, [replace(wanted, seed=99), *short]):
            serving = Engine(PagedExecutor(model(kind), 64, 4, 40), piece=3, draft=draft())
            for each in neighbours:
                serving.submit(each)
            for _ in range(3 * len(neighbours)):
                serving.step()
            answer = serving.submit(wanted)
            serving.run()
            texts.append(answer.tokens)
        assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(("page_size", "room"), [(4, 30), (5, None), (24, None), (7, 61)])
def test_guesses_to_the_last_token_of_a_room_that_is_no_multiple_of_a_page(page_size, room, unchecked):
    """One text fills the room, while its neighbours have room for more guesses."""
    executor = PagedExecutor(model(), 400 // page_size, page_size, room)
    for length in range(executor.room - 20, executor.room - 4, 3):
        serving = Engine(executor, draft=PromptLookup(8))
        prompt = (*([1, 2, 3, 4, 5] * 20)[:length],)
        whole = Request(prompt, executor.room + 1 - length, stop_ids=())
        many = [whole, Request((7, 8, 7, 8, 7), 18, stop_ids=())]
        answers = [serving.submit(each) for each in many]
        serving.run()
        assert [answer.tokens for answer in answers] == [alone(each, room=executor.room) for each in many]


@pytest.mark.parametrize("piece", [1, 4, 64])
def test_eagle_guesses_in_the_engine_what_it_guesses_alone(piece, monkeypatch):
    guessed, propose = [], Reading.propose

    def noting(self, new, most):
        guesses = propose(self, new, most)
        guessed.append(guesses.tokens.tolist())
        return guesses

    monkeypatch.setattr(Reading, "propose", noting)
    target, draft, request = model("four blocks"), EagleDraft(head(), Chain(3)), Request((1, 2, 3, 4, 5), 20)
    ids, cache = torch.tensor([request.prompt]), KVCache(40)
    steps = speculative_stream(target, ids, 20, stop_ids=(), context=cache, draft=draft)
    written = torch.stack([*steps], dim=1)[0].tolist()
    guessed_alone = [*guessed]
    guessed.clear()
    serving = Engine(PagedExecutor(target, 40, 4, 40), piece=piece, draft=draft)
    answer = serving.submit(replace(request, stop_ids=()))
    serving.run()
    assert answer.tokens == written
    assert guessed[:12] == guessed_alone[:12], "Near the end the engine asks for no more than is left."


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind):
    serving = Engine(PagedExecutor(model(kind), 32, 4, 40), rows=3, piece=6)
    answers = [serving.submit(request) for request in POOL[:12]]
    serving.run()
    assert [answer.tokens for answer in answers] == [alone(request, kind, 40) for request in POOL[:12]]


def test_packed_weights_serve_too():
    torch.manual_seed(0)
    packed = quantize_model(Decoder(ModelConfig(32, 64, 2, 2, 23, init_std=0.3)).eval(), "Q8_0")
    serving = Engine(PagedExecutor(packed, 32, 4, 40), rows=3)
    answers = [serving.submit(Request((1, 2, 3, number), 6)) for number in range(4)]
    serving.run()
    for number, answer in enumerate(answers):
        written = generate(packed, torch.tensor([[1, 2, 3, number]]), 6)[0, 4:].tolist()
        assert answer.tokens == written


def test_a_beginning_is_read_once():
    prompt = (*range(20), 7)
    executor = PagedExecutor(model(), 32, 4, 40)
    serving, read = Engine(executor, rows=4), []
    prefill = executor.prefill
    executor.prefill = lambda text, tokens, after: read.append(len(tokens)) or prefill(text, tokens, after)
    for tail in (7, 8, 7):
        serving.submit(Request((*prompt[:20], tail), 2))
        serving.run()
    assert read == [21, 1, 1], "Five pages stay, and the last token is read to be answered."
    other = Request((21, *prompt[1:20], 7), 2)  # pages hold the same tokens behind another beginning
    answer = serving.submit(other)
    serving.run()
    assert read[-1] == 21 and answer.tokens == alone(other, room=40)


def test_what_another_model_made_of_a_beginning_is_not_read_on():
    """Trained, given other weights or another config: the next text is read whole; one at work goes on."""
    torch.manual_seed(3)
    own = Decoder(KINDS["dynamic"]).eval()
    serving, request = Engine(PagedExecutor(own, 40, 4, 40)), Request((*range(20), 7), 8, stop_ids=())

    def train():
        with torch.no_grad():
            for weight in own.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)

    def other_frequencies():
        own.config = replace(own.config, rope_theta=100.0)

    texts = set()
    for change in (lambda: None, train, lambda: own.load_state_dict(model().state_dict()), other_frequencies):
        at_work = serving.submit(Request(tuple(range(10)), 20, stop_ids=()))
        serving.step()
        change()
        for _ in range(2):  # the second one reads what the first has left
            answer = serving.submit(request)
            serving.run()
            wanted = generate(own, torch.tensor([request.prompt]), 8, stop_ids=(), context=KVCache(40))
            assert answer.tokens == wanted[0, 21:].tolist() and at_work.state == "done"
        texts.add(tuple(answer.tokens))
    assert len(texts) >= 3 and serving.executor.pool.unused == 40


def test_angles_stay_with_their_text_whoever_is_opened_beside_it():
    """Its keys were turned with them, also where a neighbour's are of another config."""
    torch.manual_seed(3)
    own, texts = Decoder(BASE).eval(), []
    for neighbours in (0, 1):
        own.config = BASE
        serving = Engine(PagedExecutor(own, 40, 4, 40))
        answer = serving.submit(Request(tuple(range(12)), 20, stop_ids=()))
        for _ in range(4):
            serving.step()
        own.config = replace(BASE, rope_theta=20.0)
        stranger = Request((5, 6, 7), 15, stop_ids=())
        others = [serving.submit(stranger) for _ in range(neighbours)]
        serving.run()
        texts.append(answer.tokens)
        wanted = generate(own, torch.tensor([stranger.prompt]), 15, stop_ids=(), context=KVCache(40))
        assert [other.tokens for other in others] == [wanted[0, 3:].tolist()] * neighbours
    assert texts[0] == texts[1]


@pytest.mark.parametrize("read", [4, 9], ids=["in the prompt", "in the answer"])
@pytest.mark.parametrize("draft", [None, PromptLookup(2)], ids=["none", "lookup"])
def test_weights_that_were_exchanged_and_put_back_leave_nothing_behind(read, draft, unchecked):
    """As for an evaluation with averaged weights, while a text was read."""
    torch.manual_seed(3)
    own, other = Decoder(BASE).eval(), Decoder(BASE).eval().state_dict()
    weights = {name: weight.clone() for name, weight in own.state_dict().items()}
    serving, prompt = Engine(PagedExecutor(own, 40, 4, 48), piece=2, draft=draft), tuple(range(16))
    first = serving.submit(Request(prompt, 20, stop_ids=()))
    for _ in range(read):
        serving.step()
    own.load_state_dict(other)
    serving.run()
    own.load_state_dict(weights)
    request = Request((*prompt, *first.tokens), 8, stop_ids=())
    assert serving.executor.open(request.prompt, 43).shared == 0
    second = serving.submit(request)
    serving.run()
    wanted = generate(own, torch.tensor([request.prompt]), 8, stop_ids=(), context=KVCache(48))
    assert second.tokens == wanted[0, 36:].tolist()


def test_what_was_kept_goes_when_its_room_is_needed():
    executor = PagedExecutor(model(), 8, 4, 32)
    serving = Engine(executor)
    for seed in range(6):
        request = Request(tuple(random.Random(seed).choices(range(22), k=19)), 5)
        answer = serving.submit(request)
        serving.run()
        assert answer.tokens == alone(request, room=32)
    assert executor.pool.unused == 8


def test_users_take_turns_and_nobody_is_overtaken():
    serving = Engine(PagedExecutor(model(), 12, 4, 40), rows=1)
    many = [serving.submit(Request((1, 2), 3, stop_ids=(), user="a")) for _ in range(3)]
    one = serving.submit(Request((3, 4), 3, stop_ids=(), user="b"))
    done = []
    while not serving.idle:
        done += [answer for answer in serving.step() if answer.state == "done"]
    assert done == [many[0], one, many[1], many[2]]
    # Whoever comes later waits for one request of the other at most.
    many = [serving.submit(Request((1, 2), 3, stop_ids=(), user="a")) for _ in range(4)]
    serving.step()
    one, done = serving.submit(Request((3, 4), 3, stop_ids=(), user="b")), []
    while not serving.idle:
        done += [answer for answer in serving.step() if answer.state == "done"]
    assert done == [many[0], many[1], one, many[2], many[3]]
    # One that waits for pages lets no smaller one of its user by.
    serving = Engine(PagedExecutor(model(), 10, 4, 40), rows=4)
    first = serving.submit(Request((1,) * 8, 12, stop_ids=()))
    large, small = serving.submit(Request((2,) * 20, 12, stop_ids=())), serving.submit(Request((3,), 2))
    serving.step()
    assert (first.state, large.state, small.state) == ("writing", "waiting", "waiting")
    serving.run()
    assert large.state == small.state == "done"


class Logged(PagedExecutor):
    """Notes whose requests begin; a prompt is its user's number."""

    def open(self, prompt, most, share=True):
        text = super().open(prompt, most, share)
        if text is not None:
            self.log.append(("begins", prompt[0]))
        return text


def most_before(log: list[tuple[str, int]]) -> int:
    """How many requests of another user begin while somebody's first one waits, at most."""
    most, waiting, passed = 0, Counter(), Counter()
    for what, user in log:
        if what == "comes":
            waiting[user] += 1
            if waiting[user] > 1:
                continue
        else:
            waiting[user] -= 1
            passed.update((other, user) for other in waiting if waiting[other] and other != user)
            most = max([most, *passed.values()])
        for pair in [*passed]:
            if pair[0] == user:
                del passed[pair]
    return most


@pytest.mark.parametrize("seed", range(5))
def test_one_request_of_each_other_user_begins_before_somebodys_first(seed):
    luck, executor = random.Random(seed), Logged(model(), 40, 4, 40)
    executor.log = []
    serving = Engine(executor, rows=luck.randint(1, 3))
    for _ in range(150):
        for user in luck.choices(range(4), (8, 1, 1, 1), k=luck.randint(0, 2)):
            executor.log.append(("comes", user))
            serving.submit(Request((user,), luck.randint(1, 4), user=str(user)))
        serving.step()
    serving.run()
    assert executor.log.count(("begins", 0)) > 50 and most_before(executor.log) == 1


def test_a_long_prompt_is_read_in_pieces_while_the_others_write():
    serving = Engine(PagedExecutor(model(), 40, 4, 60), rows=4, piece=5)
    short = serving.submit(Request((1, 2), 20, stop_ids=()))
    serving.step()
    serving.submit(Request((3,) * 25, 2))
    for _ in range(5):
        before = len(short.tokens)
        serving.step()
        assert len(short.tokens) == before + 1
    assert 0 < short.submitted < short.first < short.last


def test_scores_that_are_no_numbers_end_one_request_alone():
    executor = PagedExecutor(model(), 40, 4, 40)
    serving, decode = Engine(executor, rows=3), executor.decode

    def broken(texts, tokens, after):
        scores, streams = decode(texts, tokens, after)
        scores[1] = torch.nan
        return scores, streams

    answers = [serving.submit(request) for request in (Request((n, 2), 5, stop_ids=()) for n in range(3))]
    for _ in range(3):
        serving.step()
    executor.decode = broken
    serving.step()
    executor.decode = decode
    serving.run()
    assert [answer.state for answer in answers] == ["done", "failed", "done"]
    assert "finite numbers" in answers[1].why and executor.pool.unused == 40


def test_scores_of_a_draft_that_are_no_numbers_end_one_request_alone(unchecked):
    torch.manual_seed(5)
    broken = Decoder(replace(BASE, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        broken.embed_tokens.weight[7] = torch.nan  # of one prompt
    many = [Request((number, 2, 3), 6, Sampling(1.0), stop_ids=()) for number in (7, 1)]
    guessed = torch.tensor([token for token in range(23) if token != 7])
    for shape in (Chain(2), StaticTree((-1, -1, 0), (0, 1, 0)), DynamicTree(2, 2, 4)):
        serving = Engine(PagedExecutor(model(), 20, 4), draft=frequent_draft(broken, guessed, shape))
        bad, good = map(serving.submit, many)
        serving.run()
        assert bad.state == "failed" and re.match(r"Not all scores of the draft \(Decoder\)", bad.why)
        assert good.state == "done" and 7 not in good.tokens
        assert serving.executor.pool.unused == 20


def broken_off(work, after: int) -> int:
    """Do some work, broken off before a line of the engine or its pages; and how many lines were begun."""
    begun, files, before = 0, {each.__file__ for each in (engine, executors, paged)}, sys.gettrace()

    def each_line(frame, event, _):
        nonlocal begun
        if frame.f_code.co_filename not in files:
            return None
        begun += event == "line"
        if begun == after:
            sys.settrace(None)
            raise KeyboardInterrupt
        return each_line

    sys.settrace(each_line)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return begun


@pytest.mark.parametrize("draft", [None, PromptLookup(3)], ids=["none", "lookup"])
def test_a_step_that_is_broken_off_makes_no_text_wrong_and_loses_no_page(draft, unchecked):
    many = [Request((1, 2, 3, 1, 2, 3, end), 7, stop_ids=()) for end in (1, 4, 1)]
    wanted = [alone(request) for request in many]

    def start():
        serving = Engine(PagedExecutor(model(), 12, 4), rows=2, piece=4, draft=draft)
        return serving, [serving.submit(request) for request in many]

    lines, failed = broken_off(start()[0].run, -1), 0
    for after in range(1, lines, lines // 70):
        serving, answers = start()
        broken_off(serving.run, after)
        serving.run()
        for answer, tokens in zip(answers, wanted, strict=True):
            assert answer.tokens == tokens[: len(answer.tokens)]
            assert answer.tokens == tokens if answer.state == "done" else "broken off" in answer.why
        failed += sum(answer.state == "failed" for answer in answers)
        again = [serving.submit(request) for request in many]
        serving.run()
        assert [answer.tokens for answer in again] == wanted
        assert serving.idle and serving.executor.pool.unused == 12
    assert failed > 70, "Those that were at work fail, and are not served half."


def test_errors_of_an_executor_end_what_was_at_work_and_are_told(unchecked):
    executor = PagedExecutor(model(), 12, 4)
    serving, decode = Engine(executor, rows=1), executor.decode
    first, second = (serving.submit(Request((1, 2), 4, stop_ids=())) for _ in range(2))

    def no_memory(*given):
        decode(*given)
        raise MemoryError("It is full.")

    executor.decode = no_memory
    with pytest.raises(MemoryError, match="It is full"):
        serving.run()
    executor.decode = decode
    serving.run()
    assert (first.state, second.state) == ("failed", "done") and "A step was broken off" in first.why
    assert first.tokens == second.tokens[:1] and executor.pool.unused == 12


def test_a_run_that_can_never_begin_ends_with_a_sentence(unchecked):
    executor = PagedExecutor(model(), 5, 4)
    first, second = Engine(executor), Engine(executor)
    request = Request((1, 2, 3), 12, stop_ids=())
    left, answer = first.submit(request), second.submit(request)
    first.step()
    second.step()  # which waits, for the first may go on between two steps
    with pytest.raises(RuntimeError, match="Texts of another engine have them"):
        second.run()
    first.close()
    second.run()
    assert left.state == "cancelled" and answer.tokens == alone(request) and first.idle
    third = Engine(executor)
    third.submit(request)
    third.step()
    del third  # and its texts with it
    answer = second.submit(request)
    second.run()
    assert answer.state == "done" and executor.pool.unused == 5


def test_whoever_reads_an_answer_may_take_its_tokens_out(unchecked):
    request, taken = Request((1, 2, 3, 1, 2), 12, stop_ids=()), []
    for draft in (None, PromptLookup(3)):
        serving = Engine(PagedExecutor(model(), 8, 4), draft=draft)
        answer = serving.submit(request)
        while not serving.idle:
            assert serving.step() == [answer]
            taken += answer.tokens
            answer.tokens.clear()
    assert taken == alone(request) * 2


@pytest.mark.parametrize("kind", [tuple, list, iter, dict.fromkeys])
def test_a_request_is_what_it_was_when_it_was_made(kind, unchecked):
    """However its ids were given, and whatever becomes of what they were given in."""
    wanted = Request((1, 2, 3, 4), 20, stop_ids=())
    stops = [alone(wanted)[4]]
    wanted = replace(wanted, stop_ids=tuple(stops))
    prompt = [1, 2, 3, 4]
    given = prompt if kind is list else kind(prompt)
    request = Request(given, 20, stop_ids=stops if kind is list else kind(stops))
    assert request == wanted and hash(request) == hash(wanted)
    serving = Engine(PagedExecutor(model(), 16, 4))
    answer = serving.submit(request)
    prompt.append(9)
    stops.clear()
    serving.step()
    prompt += [5] * 70
    serving.run()
    assert answer.tokens == alone(wanted) and len(answer.tokens) <= 5


def test_refusals(unchecked):
    executor = PagedExecutor(model(), 8, 4)
    serving = Engine(executor)
    for request, why in (
        (Request((), 5), "The prompt holds no tokens; expected one at least"),
        (Request((1, 23), 5), "whole numbers from 0 to 22, the ids of this model"),
        (Request((1, 2), 40), "A text of 41 tokens does not fit: there are 8 pages of 4 tokens"),
        (Request((1, 2), 0), "max_new_tokens"),
        (Request((1, 2), 5, stop_ids=(99,)), "stop_ids"),
        (Request((1, 2), 5, None), "sampling is None; expected how to choose"),
        (Request((1, 2), 5, 0.8), "sampling is 0.8; expected how to choose"),
        *(
            (Request((1, 2), 5, seed=seed), "seed is .*; expected a whole number from 0")
            for seed in ("a", None, 1.5, -1, 1 << 70)
        ),
        (Request((1, 2), 5, user=["a"]), "user is .*; expected a name"),
    ):
        with pytest.raises(ValueError, match=why):
            serving.submit(request)
    answer = serving.submit(Request((1, 2), 5))
    serving.run()
    assert answer.state == "done" and executor.pool.unused == 8
    for settings in ({"rows": 0}, {"piece": 0}):
        with pytest.raises(ValueError, match="expected a whole number of at least 1"):
            Engine(executor, **settings)
    with pytest.raises(ValueError, match="The draft has 29 token ids and the target has 23"):
        Engine(executor, draft=DecoderDraft(Decoder(ModelConfig(16, 24, 2, 2, 29)), Chain(2)))


def pages_are_kept(patch):
    kept = []
    patch.setattr(PagePool, "close", lambda pool, text: kept.append(text))


def known_before_they_are_read(patch):
    """Pages of a prompt that is read in pieces are shared before their keys are there."""
    opened = PagePool.open

    def wrong(pool, tokens, *given):
        text = opened(pool, tokens, *given)
        if text is not None and len(tokens) > pool.page_size and not text.shared:
            pool.extend(text, tokens[: pool.page_size])
        return text

    patch.setattr(PagePool, "open", wrong)


def one_generator_for_all(patch):
    shared = torch.Generator().manual_seed(0)
    patch.setattr(engine, "choose", lambda *given: choose(*given[:-1], shared))


def pages_are_known_by_their_tokens_alone(patch):
    patch.setattr(PagePool, "_key", lambda pool, before, tokens: tuple(tokens))


def nobody_begins(patch):
    patch.setattr(PagePool, "open", lambda pool, *given: None)


def long_ones_never_begin(patch):
    """What a scheduler does that always finds somebody smaller."""
    opened = PagePool.open
    patch.setattr(
        PagePool,
        "open",
        lambda pool, tokens, most, *given: None if most > 16 else opened(pool, tokens, most, *given),
    )


def only_three_are_served(patch):
    begin = Engine._begin

    def wrong(serving):
        serving.begun = getattr(serving, "begun", 0)
        if serving.begun < 3:
            before = len(serving._jobs)
            begin(serving)
            serving.begun += len(serving._jobs) - before

    patch.setattr(Engine, "_begin", wrong)


@pytest.mark.parametrize(
    "mistake",
    [
        pages_are_kept,
        known_before_they_are_read,
        pages_are_known_by_their_tokens_alone,
        one_generator_for_all,
        nobody_begins,
        long_ones_never_begin,
        only_three_are_served,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_wrong_engines_are_found(mistake, monkeypatch):
    for number in range(len(POOL)):
        text_alone(number)
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(60):
            check_schedule(seed)


@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)])
@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("open_text", [False, True])
def test_a_model_of_another_type_is_served_on(types, sparse, open_text, unchecked):
    """What it had made goes with it; texts that begin afterwards are those of the model as it is."""
    torch.manual_seed(3)
    own = Decoder(BASE).eval().to(types[0])
    serving = Engine(PagedExecutor(own, 40, 4, 48, sparse), piece=5)
    prompt = tuple(range(12))
    first = serving.submit(Request(prompt, 8, stop_ids=()))
    if open_text:
        for _ in range(5):
            serving.step()
    else:
        serving.run()
    own.to(types[1])
    serving.run()
    assert first.state == "done" and len(first.tokens) == 8
    second = serving.submit(Request(prompt, 8, stop_ids=()))
    serving.run()
    fresh = Engine(PagedExecutor(own, 40, 4, 48, sparse), piece=5)
    again = fresh.submit(Request(prompt, 8, stop_ids=()))
    fresh.run()
    assert second.tokens == again.tokens


@pytest.mark.parametrize("prompt", [np.array([1, 2, 3]), torch.tensor([1, 2, 3]), iter([1, 2, 3])])
def test_prompts_may_be_arrays(prompt, unchecked):
    request = Request(prompt, 3, stop_ids=())
    serving = Engine(PagedExecutor(model(), 8, 4))
    answer = serving.submit(request)
    serving.run()
    assert answer.tokens == alone(Request((1, 2, 3), 3, stop_ids=()))


def test_prompts_hold_ids(unchecked):
    serving = Engine(PagedExecutor(model(), 8, 4))
    with pytest.raises(
        ValueError, match="The prompt holds 1.5, of type float; expected whole numbers from 0"
    ):
        serving.submit(Request((1, 1.5), 3))
    with pytest.raises(ValueError, match="The prompt holds 99, of type int; expected whole numbers from 0"):
        serving.submit(Request((1, 99), 3))
    with pytest.raises(ValueError, match="The prompt holds no tokens"):
        serving.submit(Request((), 3))


@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
def test_an_engine_works_on_in_any_mode(sparse, types, unchecked):
    """What was taken in inference mode is written outside of it, and the other way round."""
    torch.manual_seed(3)
    own = Decoder(BASE).eval()
    serving = Engine(PagedExecutor(own, 40, 4, 48, sparse))
    request, found = Request(tuple(range(12)), 6, stop_ids=()), []
    for inside in (True, False, True):
        own.to(types[inside])
        with torch.inference_mode(inside):
            found.append(serving.submit(request))
            serving.run()
    assert [answer.state for answer in found] == ["done"] * 3
    assert found[0].tokens == found[2].tokens


@pytest.mark.parametrize("prompt", [None, 5])
def test_a_request_without_a_prompt_is_none(prompt, unchecked):
    with pytest.raises(
        ValueError, match=f"The prompt is {prompt}; expected token ids, such as a list of them."
    ):
        Request(prompt, 3)


def test_packed_experts_have_their_own_text_in_company_with_kernels_for_all_layers(unchecked):
    """Their router stays PyTorch's, whose last bit hangs on the number of rows."""
    torch.manual_seed(0)
    config = ModelConfig(256, 256, 2, 4, 64, mixture=MixtureConfig(8, 2), init_std=0.05)
    own = fast_decoding(quantize_model(Decoder(config).eval(), "Q4_K_M"))
    asked = [Request(tuple(torch.randint(64, (n,)).tolist()), 24, stop_ids=()) for n in (5, 9, 14, 20, 11, 7)]
    found = []
    for groups in ([asked], [[request] for request in asked]):
        answers = []
        for group in groups:
            serving = Engine(PagedExecutor(own, 100), piece=1000, share=False)
            answers += [serving.submit(request) for request in group]
            serving.run()
        found.append([answer.tokens for answer in answers])
    assert found[0] == found[1]
