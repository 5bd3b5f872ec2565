"""Speculative decoding: what is written is what the target alone would write, whatever a draft guesses."""

import copy
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from guessing import Told, chain, distance, exact_law, foreseen, near, tiny
from scipy.stats import chisquare
from small_models import TOKENIZER, WRITER, WRITERS, make_ids, make_model
from sparse_models import LEVELS
from sparse_models import MODEL as SPARSE_MODEL

from minicpm_lite.config import RopeScaling
from minicpm_lite.inference import speculative
from minicpm_lite.inference.drafts import DecoderDraft, PromptLookup
from minicpm_lite.inference.guess_trees import Chain, DynamicTree
from minicpm_lite.inference.sparse_attention import SparseCache
from minicpm_lite.inference.speculative import (
    Guesses,
    Stats,
    speculative_generate,
    speculative_stream,
    verify,
)
from minicpm_lite.language.chat import Chat, chatml
from minicpm_lite.language.context import Int8Cache, KVCache
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate, pad_left, stream
from minicpm_lite.language.sampling import Sampling, next_token_probabilities
from minicpm_lite.language.writing import generate_text, stream_text

fast = pytest.mark.usefixtures(
    "unchecked"
)  # shapes are checked in the other tests, and take half of the time
LAWS = {
    "plain": Sampling(1.0),
    "cool": Sampling(0.6, top_k=2),
    "nucleus": Sampling(1.3, top_p=0.85),
    "penalty": Sampling(0.9, repetition_penalty=1.8),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts(rows: int, seed: int = 0, longest: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    random = seeded(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=random).tolist()
    return pad_left([torch.randint(300, (n,), generator=random).tolist() for n in lengths], pad_id=17)


# Greedy: token for token


@fast
@pytest.mark.parametrize("name", WRITERS)
def test_greedy_equals_plain_generation_on_many_prompts(name):
    """Two hundred of them, in batches of rows that accept different numbers, with a chain and a tree."""
    model = make_model(WRITERS[name])
    small = near(model)
    for seed, shape in enumerate([Chain(3), DynamicTree(3, 2, 5)]):
        ids, padding = prompts(25, seed)
        wanted = generate(model, ids, 20, padding=padding)
        found, stats = speculative_generate(model, DecoderDraft(small, shape), ids, 20, padding=padding)
        assert torch.equal(found, wanted)
        assert 1.2 < stats.acceptance_length < 4 and len(set(stats.lengths)) > 2, "some, not all or none"


@fast
@pytest.mark.parametrize("name", WRITERS)
def test_greedy_equals_plain_generation_a_row_at_a_time(name):
    model = make_model(WRITERS[name])
    drafts = [
        DecoderDraft(near(model), Chain(4)),
        PromptLookup(),
        DecoderDraft(near(model), DynamicTree(4, 3, 9)),
    ]
    ids, padding = prompts(3, seed=7)
    for row, pad in zip(ids, padding.tolist(), strict=True):
        text = row[None, pad:]
        wanted = generate(model, text, 24)
        for draft in drafts:
            assert torch.equal(speculative_generate(model, draft, text, 24)[0], wanted)


@fast
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pads", [None, [0, 9, 3]])
def test_a_sparse_cache_takes_guesses(level, pads):
    torch.manual_seed(0)
    model = Decoder(SPARSE_MODEL).double().eval()
    ids = torch.randint(50, (3, 24), generator=seeded())
    padding = None if pads is None else torch.tensor(pads)

    def cache() -> SparseCache:
        return SparseCache(50, LEVELS[level], padding)

    wanted = generate(model, ids, 18, context=cache())
    for shape in (Chain(3), DynamicTree(3, 2, 5)):
        draft = DecoderDraft(near(model, 0.01), shape)
        found, stats = speculative_generate(model, draft, ids, 18, context=cache())
        assert torch.equal(found, wanted) and stats.acceptance_length > 1


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("longrope", 16, short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 4.0, 8.0)),
        RopeScaling("dynamic", 16, factor=2.0),
    ],
)
@pytest.mark.parametrize("new", [6, 7, 8, 12])
def test_frequencies_are_those_of_plain_generation(scaling, new):
    """They follow the room of the cache, which guesses must not change: here around the border of 16."""
    model = make_model(replace(WRITER, rope_scaling=scaling))
    ids = make_ids(WRITER, 2, 10)
    draft = DecoderDraft(near(model), Chain(6))
    assert torch.equal(speculative_generate(model, draft, ids, new)[0], generate(model, ids, new))


@fast
@pytest.mark.parametrize("settings", [dict(repetition_penalty=1.3), dict(top_k=3), dict(top_p=0.5)])
def test_greedy_with_the_other_settings(settings):
    model, (ids, padding) = make_model(WRITER), prompts(6)
    wanted = generate(model, ids, 20, padding=padding, **settings)
    for draft in (DecoderDraft(near(model), Chain(4)), PromptLookup()):
        assert torch.equal(
            speculative_generate(model, draft, ids, 20, padding=padding, **settings)[0], wanted
        )


def test_greedy_draws_nothing():
    model, before = make_model(WRITER), torch.random.get_rng_state()
    speculative_generate(model, DecoderDraft(near(model), Chain(4)), make_ids(WRITER, 2, 5), 12)
    assert torch.equal(torch.random.get_rng_state(), before)


# Drafts that are right, wrong, or now this and now that


@pytest.mark.parametrize("rows", [1, 3])
def test_a_draft_that_is_always_right(rows):
    model, ids = make_model(WRITER), make_ids(WRITER, rows, 6)
    wanted = generate(model, ids, 17)
    draft = foreseen(wanted.tolist(), lambda row, place: True)
    found, stats = speculative_generate(model, draft, ids, 17)
    assert torch.equal(found, wanted)
    # 1 by the prompt, then 4 a call
    assert (stats.calls, stats.proposed, stats.accepted) == (4, 12 * rows, 12 * rows)
    assert stats.lengths == [4] * 4 * rows and stats.acceptance_length == 4


@pytest.mark.parametrize("rows", [1, 3])
def test_a_draft_that_is_always_wrong(rows):
    model, ids = make_model(WRITER), make_ids(WRITER, rows, 6)
    wanted = generate(model, ids, 17)
    found, stats = speculative_generate(model, foreseen(wanted.tolist(), lambda row, place: False), ids, 17)
    assert torch.equal(found, wanted)
    # guesses fit into the room of plain generation: 3, but 2, 1 and none in the end
    assert (stats.calls, stats.proposed, stats.accepted) == (16, (13 * 3 + 3) * rows, 0)
    assert stats.acceptance_length == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_draft_that_is_now_right_and_now_wrong(seed):
    """Each row has its own luck; the longest row stops first, or last."""
    model, (ids, padding) = make_model(WRITER), prompts(5, seed)
    wanted = generate(model, ids, 20, padding=padding)
    texts = [row[pad:].tolist() for row, pad in zip(wanted, padding.tolist(), strict=True)]
    lucky = torch.rand(5, 40, generator=seeded(seed)) < torch.tensor([0.1, 0.9, 0.5, 1.0, 0.7])[:, None]
    draft = foreseen(texts, lambda row, place: bool(lucky[row, place]))
    found, stats = speculative_generate(model, draft, ids, 20, padding=padding)
    assert torch.equal(found, wanted)
    assert sum(stats.lengths) == 5 * 19 and max(stats.lengths) == 4 and min(stats.lengths) == 1


def test_guesses_without_a_parent_and_trees_of_any_shape():
    """Several guesses for one place, deep ones, the right one in any place, and some twice."""
    model, ids = make_model(WRITER), make_ids(WRITER, 2, 6)
    wanted, random = generate(model, ids, 17), seeded()

    def propose(texts, most):
        size = min(most, 7)
        parents = [
            int(torch.randint(-1, place, (), generator=random)) if place else -1 for place in range(size)
        ]
        depths = []
        for parent in parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        rows = []
        for text in texts:
            coming = [*next(w for w in wanted.tolist() if w[: len(text)] == text)[len(text) :], *[0] * 7]
            rows.append([coming[d] if torch.rand((), generator=random) < 0.6 else 5 for d in depths])
        return Guesses(torch.tensor(rows), tuple(parents))

    found, stats = speculative_generate(model, Told(propose), ids, 17)
    assert torch.equal(found, wanted) and 0 < stats.accepted < stats.proposed


# Sampled: the law, by counting every sequence of chances


def law_of_plain_generation(model: Decoder, ids: torch.Tensor, new: int, sampling: Sampling) -> dict:
    law = {}
    for tokens in product(range(model.config.vocab_size), repeat=new):
        text, chance = ids, 1.0
        for token in tokens:
            with torch.no_grad():
                chance *= float(next_token_probabilities(model(text)[:, -1], sampling, text)[0, token])
            text = torch.cat([text, torch.tensor([[token]])], dim=1)
        law[tokens] = chance
    return law


def law_of_guessing(model, draft, ids, new, sampling) -> dict:
    """The cache has room for all guesses, to the last token."""

    def run() -> tuple[int, ...]:
        return tuple(
            map(int, speculative_stream(model, ids, new, sampling, context=KVCache(12), draft=draft))
        )

    return exact_law(run)


def two_for_each_place(texts, most) -> Guesses:
    tokens = torch.tensor([[2, 0, 1, 1, 0][:most]])
    return Guesses(tokens, (-1, -1, 0, 0, 1)[:most])


DRAFTS = {
    "drawn": lambda: DecoderDraft(tiny(seed=1), Chain(2)),
    "chosen": lambda: Told(two_for_each_place),
    "EAGLE-2": lambda: DecoderDraft(tiny(seed=1), DynamicTree(2, 2, 3)),
}


@fast
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("name", LAWS)
def test_the_law_of_what_is_written_is_exactly_the_targets(name, draft):
    model, ids = tiny(), torch.tensor([[1]])
    wanted = law_of_plain_generation(model, ids, 3, LAWS[name])
    found = law_of_guessing(model, DRAFTS[draft](), ids, 3, LAWS[name])
    assert sum(found.values()) == pytest.approx(1, abs=1e-9)
    assert distance(wanted, found) < 1e-9


@fast
def test_a_larger_vocabulary_by_a_chi_square_test():
    """Of two thousand samples; the second token is the first that may be a guess."""
    model, ids, sampling = make_model(WRITER), make_ids(WRITER, 1, 6), Sampling(1.0, top_p=0.9)
    with torch.no_grad():
        first = next_token_probabilities(model(ids)[:, -1], sampling)[0]
        pairs = torch.cat([ids.expand(300, -1), torch.arange(300)[:, None]], dim=1)
        second = first @ next_token_probabilities(model(pairs)[:, -1], sampling)
    draft = DecoderDraft(near(model, 0.05), Chain(2))
    settings = dict(temperature=1.0, top_p=0.9, samples=2000, generator=seeded())
    found, stats = speculative_generate(model, draft, ids, 3, **settings)
    assert 1.2 < stats.acceptance_length < 2
    often = second * 2000 >= 5
    counts = torch.bincount(found[:, 7], minlength=300).double()
    observed = [*counts[often].tolist(), float(counts[~often].sum())]
    expected = torch.cat([second[often], second[~often].sum()[None]]).double()
    assert chisquare(observed, (expected / expected.sum() * 2000).numpy()).pvalue > 1e-3


# Rules that look right, and are not


def wrong_verify(change: str):
    """The rule with one mistake."""

    def rule(logits, tokens, parents, drawn_from=None, sampling=Sampling(), seen=None, generator=None):
        if change == "penalty forgotten":
            sampling = replace(sampling, repetition_penalty=1.0)
        if change == "temperature forgotten":
            sampling = replace(sampling, temperature=1.0)
        if change == "filters forgotten":
            sampling = replace(sampling, top_k=None, top_p=None)
        path = []
        while True:
            place = path[-1] if path else -1
            before = None if seen is None else torch.cat([seen, tokens[path]])[None]
            if change == "penalty without the guesses" and seen is not None:
                before = seen[None]
            law = first = next_token_probabilities(logits[None, place + 1], sampling, before)[0]
            for guess in (guess for guess, parent in enumerate(parents) if parent == place):
                token, drawn = int(tokens[guess]), None if drawn_from is None else drawn_from[guess]
                if change == "the draft's best is good enough" and drawn is not None:
                    accepted = token == int(drawn.argmax()) or speculative._accepts(
                        law, token, drawn, sampling, None
                    )
                elif change == "q is not asked":
                    accepted = speculative._accepts(law, token, None, sampling, None)
                elif change == "p and q exchanged" and drawn is not None:
                    accepted = speculative._accepts(drawn, token, law, sampling, None)
                elif change == "later guesses meet p":
                    accepted = speculative._accepts(first, token, drawn, sampling, None)
                elif change == "the target's best alone":
                    accepted = token == int(law.argmax())
                else:
                    accepted = speculative._accepts(law, token, drawn, sampling, None)
                if accepted:
                    path.append(guess)
                    break
                if change == "no residual":
                    continue
                if change == "residual not divided" and drawn is None:
                    law = law.clone()
                    law[token] = 0
                elif change == "the guess alone taken out":
                    law = speculative._residual(law, token, None)
                else:
                    law = speculative._residual(law, token, drawn)
            else:
                if change == "bonus from the place before" and path:
                    law = next_token_probabilities(logits[None, [-1, *path][-2] + 1], sampling, before)[0]
                return path, speculative._draw(law, sampling, None)

    return rule


WRONG = {  # with the draft and the settings by which it shows
    "the draft's best is good enough": ("drawn", "cool"),
    "q is not asked": ("drawn", "cool"),
    "p and q exchanged": ("drawn", "cool"),
    "the guess alone taken out": ("drawn", "cool"),
    "no residual": ("chosen", "plain"),
    "residual not divided": ("chosen", "plain"),
    "later guesses meet p": ("chosen", "plain"),
    "the target's best alone": ("chosen", "plain"),
    "bonus from the place before": ("chosen", "plain"),
    "penalty forgotten": ("chosen", "penalty"),
    "penalty without the guesses": ("chosen", "penalty"),
    "temperature forgotten": ("chosen", "cool"),
    "filters forgotten": ("chosen", "cool"),
}


@fast
@pytest.mark.parametrize("change", [None, *WRONG])
def test_wrong_rules_have_another_law(change, monkeypatch):
    draft, name = WRONG.get(change, ("chosen", "penalty"))
    model, ids = tiny(), torch.tensor([[1]])
    wanted = law_of_plain_generation(model, ids, 3, LAWS[name])
    monkeypatch.setattr(speculative, "verify", wrong_verify(change))
    found = law_of_guessing(model, DRAFTS[draft](), ids, 3, LAWS[name])
    assert (distance(wanted, found) < 1e-9) == (change is None)
    assert change is None or distance(wanted, found) > 1e-3


@pytest.mark.parametrize("mistake", ["one short", "one too many", "the first branch"])
def test_a_cache_that_goes_back_wrongly_is_told_apart(mistake, monkeypatch):
    """The right guess stands behind a wrong one, so that a branch is not the first tokens that were fed."""
    model, ids = make_model(WRITER), make_ids(WRITER, 1, 6)
    wanted, take = generate(model, ids, 13), KVCache.take

    def wrong(self, paths):
        (path,) = paths
        self.guesses = (*range(-1, len(self.guesses) - 1),)  # so that any path is a branch
        if mistake == "one short":
            path = path[:-1]
        elif mistake == "one too many" and len(path) < len(self.guesses):
            path = [*path, path[-1] + 1]
        monkeypatch.setattr(self, "_is_branch", lambda path: True)
        take(self, [[*range(len(path))] if mistake == "the first branch" else path])

    right = wanted[0].tolist()
    tree = Told(lambda texts, most: Guesses(torch.tensor([[5, (right + [5])[len(texts[0])]]]), (-1, -1)))

    def found() -> list[int]:
        return [int(each) for each in speculative_stream(model, ids, 13, context=KVCache(40), draft=tree)]

    assert found() == right[6:]
    monkeypatch.setattr(KVCache, "take", wrong)
    assert found() != right[6:]


# The same interface: stops, streams, texts, chats


@pytest.mark.parametrize("seed", range(3))
def test_stop_ids_end_rows_as_in_plain_generation(seed):
    """Also where a guess that is accepted is one, and what comes behind it is accepted, too."""
    model, (ids, padding) = make_model(WRITER), prompts(6, seed)
    free = generate(model, ids, 20, padding=padding)
    stop = [int(free[row, ids.shape[1] + place]) for row, place in ((0, 4), (1, 9), (2, 0), (3, 13))]
    wanted = generate(model, ids, 20, stop_ids=stop, padding=padding)
    texts = [row[pad:].tolist() for row, pad in zip(free, padding.tolist(), strict=True)]
    for draft in (foreseen(texts, lambda row, place: True, guesses=5), PromptLookup()):
        found, stats = speculative_generate(model, draft, ids, 20, stop_ids=stop, padding=padding)
        assert torch.equal(found, wanted)
    model.config = replace(WRITER, eos_token_id=tuple(dict.fromkeys(stop)))
    own = speculative_generate(model, PromptLookup(), ids, 20, padding=padding)[0]
    assert torch.equal(own, generate(model, ids, 20, padding=padding))
    model.config = WRITER


def test_stats_count_what_was_written_and_no_more():
    """The third of four guesses ends the text: two are accepted as text, the third as its end."""
    model, ids = make_model(WRITER), make_ids(WRITER, 1, 6)
    free = generate(model, ids, 20)
    new = free[0, 6:].tolist()
    stop = next(token for token in new[3:] if new.index(token) == 3)  # the first token is the prompt's
    found, stats = speculative_generate(
        model, foreseen(free.tolist(), lambda row, place: True, guesses=4), ids, 20, stop_ids=[stop]
    )
    assert found.tolist() == [free[0, :10].tolist()]
    assert (stats.calls, stats.proposed, stats.accepted, stats.lengths) == (1, 4, 3, [3])
    assert stats.draft_seconds > 0 and stats.target_seconds > 0


def test_a_stream_yields_what_the_plain_one_yields():
    model, (ids, padding) = make_model(WRITER), prompts(3)
    plain = [token.tolist() for token in stream(model, ids, 15, padding=padding)]
    found = []
    for token in speculative_stream(
        model, ids, 15, padding=padding, draft=DecoderDraft(near(model), Chain(4))
    ):
        found.append(token.tolist())
        token += 1  # whoever gets it may change it
        model.train()  # and the model
    assert found == plain
    model.eval()


@pytest.mark.parametrize("settings", [Sampling(), Sampling(0.8, top_k=40, repetition_penalty=1.2)])
def test_samples_share_the_prefill(settings):
    model, (ids, padding) = make_model(WRITER), prompts(2)
    steps = speculative_stream(
        model, ids, 9, settings, padding=padding, generator=seeded(), samples=3, draft=PromptLookup()
    )
    rows = torch.stack(list(steps), dim=1)
    assert rows.shape == (6, 9)
    if settings.temperature == 0:
        wanted = generate(model, ids, 9, padding=padding, samples=3)
        assert torch.equal(rows, wanted[:, ids.shape[1] :])


@fast
@pytest.mark.parametrize("stop", [[], ["e"], [" ", "q"]])
def test_texts_and_their_stop_strings(stop):
    model = make_model(WRITER)
    guessed = partial(speculative_stream, draft=DecoderDraft(near(model), Chain(4)))
    texts = ["It is a truth", "a single man", "wife"]
    for text in texts:
        plain = [*stream_text(model, TOKENIZER, text, 20, stop=stop)]
        assert [*stream_text(model, TOKENIZER, text, 20, stop=stop, stream=guessed)] == plain
    assert generate_text(model, TOKENIZER, texts, 20, stop=stop, stream=guessed) == generate_text(
        model, TOKENIZER, texts, 20, stop=stop
    )


def test_a_chat_goes_on_and_does_not_read_its_past_again():
    model = make_model(replace(WRITER, max_position_embeddings=400))
    plain = Chat(model, TOKENIZER, chatml, room=400)
    guessed = Chat(
        model, TOKENIZER, chatml, room=400, stream=partial(speculative_stream, draft=PromptLookup())
    )
    for question in ("Who?", "And what is a wife?"):
        answers = ["".join(chat.answer(question, 12)) for chat in (plain, guessed)]
        assert answers[0] == answers[1]
    assert guessed._cache.length == plain._cache.length


@pytest.mark.parametrize("kind", [KVCache, Int8Cache])
def test_a_cache_that_was_handed_in_holds_the_text_but_for_its_last_token(kind):
    model, ids = make_model(WRITER), make_ids(WRITER, 1, 9)
    plain = KVCache(18)
    wanted = generate(model, ids, 10, context=plain)
    context = kind(18)
    with torch.no_grad():
        model(ids[:, :5], context)
    draft = foreseen(wanted.tolist(), lambda row, place: place % 4 > 0)
    found, _ = speculative_generate(model, draft, ids, 10, context=context)
    if kind is KVCache:
        assert torch.equal(found, wanted)
    assert context.length == 18 and context.has_read(found) and context.guesses == ()


@fast
def test_the_room_of_plain_generation_is_enough():
    """Also where rows take turns in being ahead, and to the last token that the model was made for."""
    model, (ids, padding) = make_model(WRITER), prompts(4, longest=30)
    new = 97 - ids.shape[1]
    wanted = generate(model, ids, new, padding=padding)
    texts = [row[pad:].tolist() for row, pad in zip(wanted, padding.tolist(), strict=True)]
    for draft in (
        foreseen(texts, lambda row, place: (place // 8 + row) % 2 == 0, guesses=6),
        DecoderDraft(near(model), DynamicTree(3, 3, 8)),
    ):
        found, _ = speculative_generate(model, draft, ids, new, padding=padding)
        assert torch.equal(found, wanted)


def test_stats_go_on():
    model, ids, stats = make_model(WRITER), make_ids(WRITER, 1, 6), Stats()
    for _ in range(2):
        list(speculative_stream(model, ids, 9, draft=PromptLookup(), stats=stats))
    assert sum(stats.lengths) == 16 and stats.calls == len(stats.lengths)
    assert Stats().acceptance_length == 0


def test_verify_finds_the_longest_branch_wherever_it_stands():
    logits = torch.eye(5)[[1, 0, 2, 3, 4]]  # behind the text 1, behind guess 1 (a 1) a 2, behind that a 3 ...
    assert verify(logits, torch.tensor([4, 1, 2, 2]), (-1, -1, 1, 0)) == ([1, 2], 3)


# What cannot be


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m, i: speculative_generate(m, DecoderDraft(make_model(replace(WRITER, vocab_size=301)), Chain(4)), i, 5),
         "The draft has 301 token ids and the target has 300.*Give a draft of the same vocabulary"),
        (lambda m, i: speculative_generate(m, Told(lambda texts, most: chain([[0] * 30] * 2)), i, 9),
         "The cache has room for 13 tokens and would need 36"),
        (lambda m, i: speculative_generate(m, PromptLookup(), i, 9, context=KVCache(12)),
         "room for 12 tokens; this text and its answer need 13"),
        (lambda m, i: speculative_generate(m, PromptLookup(), i, 0), "max_new_tokens is 0"),
        (lambda m, i: speculative_generate(m, PromptLookup(), i, 99), "the model was made to read 96"),
        (lambda m, i: speculative_generate(m, PromptLookup(), i, 5, stop_ids=[300]), "stop_ids is"),
        (lambda m, i: speculative_generate(m, PromptLookup(), i, 5, top_p=2.0), "top_p is 2.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_gets_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(make_model(WRITER), make_ids(WRITER, 2, 5))


def test_scores_that_are_not_finite_are_refused():
    model, ids = make_model(WRITER), make_ids(WRITER, 1, 6)
    steps = speculative_stream(model, ids, 8, draft=PromptLookup())
    next(steps)
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="scores after token 6 are finite numbers. Are the weights"):
        list(steps)


def test_a_text_goes_on_in_no_cache_that_was_used_for_another():
    model, ids, cache = make_model(WRITER), make_ids(WRITER, 1, 9), KVCache(40)
    steps = speculative_stream(model, ids, 8, context=cache, draft=PromptLookup())
    next(steps)
    cache.truncate(4)
    with pytest.raises(RuntimeError, match="gone back or moved its rows since the step before"):
        list(steps)


def test_a_draft_stays_as_it_is():
    """What it knows of a text is not in it: two texts may be written in turn."""
    model, ids = make_model(WRITER), make_ids(WRITER, 2, 9)
    draft = DecoderDraft(near(model), Chain(4))
    before = copy.deepcopy(draft.model.state_dict())
    alone = [generate(model, row[None], 9)[0, 9:].tolist() for row in ids]
    streams = [speculative_stream(model, row[None], 9, draft=draft) for row in ids]
    assert [[int(a), int(b)] for a, b in zip(*streams, strict=True)] == [
        list(pair) for pair in zip(*alone, strict=True)
    ]
    assert all(torch.equal(before[name], weight) for name, weight in draft.model.state_dict().items())
