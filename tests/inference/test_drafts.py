"""Drafts: lookups as by searching the text, decoders as without a cache, and frequent tokens alone."""

import copy
from dataclasses import replace

import pytest
import torch
from guessing import near
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import WRITER, WRITERS, Counted, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite.inference.drafts import DecoderDraft, PromptLookup, frequent_draft, rank_by_frequency
from minicpm_lite.inference.guess_trees import Chain, DynamicTree
from minicpm_lite.inference.speculative import Draft, Drafting, speculative_generate
from minicpm_lite.language.generation import generate, pad_left
from minicpm_lite.language.sampling import Sampling

GREEDY = Sampling()


# Prompt lookup


def looked_up(text: list[int], guesses: int, longest: int, shortest: int) -> list[int]:
    """By searching the text: behind the latest earlier occurrence of its longest possible end."""
    for size in range(longest, shortest - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                grown = list(text)
                for at in range(guesses):
                    grown.append(grown[end + at])
                return grown[len(text) :]
    return []


@settings(max_examples=80, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    cuts=st.lists(st.integers(1, 6), max_size=4),
    most=st.integers(1, 7),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)).map(sorted),
)
def test_a_lookup_finds_what_followed(text, cuts, most, sizes):
    """However the text comes in pieces."""
    draft = PromptLookup(5, longest=sizes[1], shortest=sizes[0])
    drafting, known = draft.begin(make_model(WRITER), 99, GREEDY, None), 0
    for cut in [*cuts, len(text)]:
        piece = text[known : known + cut]
        known += len(piece)
        if piece:
            found = drafting.propose([piece], most)
            assert found.tokens[0].tolist() == looked_up(text[:known], min(5, most), sizes[1], sizes[0])
            assert found.parents == (*range(-1, found.tokens.shape[1] - 1),)


def test_rows_with_fewer_guesses_and_rows_that_stop():
    drafting = PromptLookup(3).begin(make_model(WRITER), 99, GREEDY, None)
    found = drafting.propose([[1, 2, 3], [7, 8, 9, 7], [5, 5]], 8)
    assert found.tokens.tolist() == [[0, 0, 0], [8, 9, 7], [5, 5, 5]] and found.drawn_from is None
    drafting.select([1])
    assert drafting.propose([[8]], 8).tokens.tolist() == [[9, 7, 8]]
    none = drafting.propose([[4]], 8)
    assert none.tokens.shape == (1, 0) and none.parents == ()


def test_a_text_that_repeats_itself_is_written_in_few_calls():
    model = make_model(WRITERS["latent"])
    ids = make_ids(WRITER, 1, 9)
    found, stats = speculative_generate(model, PromptLookup(), ids, 60)
    assert torch.equal(found, generate(model, ids, 60)) and stats.calls < 45


# Decoders


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("shape", [Chain(3), DynamicTree(3, 2, 5)])
@torch.no_grad()
def test_a_decoders_guesses_are_what_it_makes_of_the_whole_text(name, shape):
    """Rows of different length that learn different numbers of tokens, and of which one stops."""
    model = make_model(WRITERS[name])
    texts = [make_ids(WRITER, 1, n)[0].tolist() for n in (9, 3, 6)]
    drafting = DecoderDraft(model, shape).begin(model, 60, GREEDY, None)
    new, random = [list(text) for text in texts], torch.Generator().manual_seed(0)
    for step in range(4):
        found = drafting.propose(new, 9)
        alone = [DecoderDraft(model, shape).begin(model, 60, GREEDY, None).propose([t], 9) for t in texts]
        if isinstance(shape, Chain):
            for row, single in zip(found.tokens, alone, strict=True):
                assert torch.equal(row, single.tokens[0])
        if len(texts) == 1:
            assert torch.equal(found.tokens, alone[0].tokens) and found.parents == alone[0].parents
        if step == 2:
            drafting.select([1])
            texts = [texts[1]]
        lengths = torch.randint(1, 12, (len(texts),), generator=random).tolist()
        new = [torch.randint(300, (n,), generator=random).tolist() for n in lengths]
        texts = [text + more for text, more in zip(texts, new, strict=True)]


def test_a_chain_reads_each_token_of_the_text_once_and_its_guesses():
    model = make_model(WRITER)
    drafting = DecoderDraft(model, Chain(4)).begin(model, 60, GREEDY, None)
    counted = Counted(model)
    drafting.propose([[1, 2, 3, 4, 5]], 9)
    assert counted.since() == 5 + 3
    drafting.propose([[6, 7]], 2)
    assert counted.since() == 2 + 1


def test_a_text_that_outgrows_the_draft_is_written_on_without_guesses():
    model, short = make_model(WRITER), make_model(WRITER)
    short.config = replace(WRITER, max_position_embeddings=30)
    ids = make_ids(WRITER, 2, 9)
    found, stats = speculative_generate(model, DecoderDraft(short, Chain(4)), ids, 50)
    assert torch.equal(found, generate(model, ids, 50))
    assert max(stats.lengths) == 5 and stats.lengths[-10:] == [1] * 10
    found, stats = speculative_generate(model, DecoderDraft(short, Chain(4)), make_ids(WRITER, 1, 40), 9)
    assert stats.proposed == 0


@pytest.mark.parametrize("leaves", [0, 1])
def test_rows_that_leave_a_draft_of_shorter_context(leaves, unchecked):
    """The columns of a row that has left count for the draft until no row needs them."""
    model, short = make_model(WRITER, 1), make_model(replace(WRITER, max_position_embeddings=32), 2)
    ids, padding = pad_left(
        [row[:size].tolist() for row, size in zip(make_ids(WRITER), (12, 5), strict=True)]
    )
    plain = generate(model, ids, 40, stop_ids=(), padding=padding)[:, 12:]
    for step in range(2, 14, 3):
        stop = [int(plain[leaves, step])]
        wanted = generate(model, ids, 40, stop_ids=stop, padding=padding)
        found, _ = speculative_generate(
            model, DecoderDraft(short, Chain(3)), ids, 40, stop_ids=stop, padding=padding
        )
        assert torch.equal(found, wanted)


def test_a_draft_in_training_mode_guesses_as_one_that_is_not():
    model, ids = make_model(WRITER), make_ids(WRITER, 1, 6)
    draft = DecoderDraft(near(model).train(), Chain(3))
    stats = speculative_generate(model, draft, ids, 20)[1]
    assert draft.model.training
    draft.model.eval()
    assert speculative_generate(model, draft, ids, 20)[1].lengths == stats.lengths


def test_drafts_are_what_the_protocols_say():
    model = make_model(WRITER)
    for draft in (PromptLookup(), DecoderDraft(model, Chain(2))):
        assert isinstance(draft, Draft) and isinstance(draft.begin(model, 9, GREEDY, None), Drafting)


# FR-Spec


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_frequent_tokens_have_the_scores_of_the_whole_layer(tied):
    model = make_model(replace(WRITER, tie_word_embeddings=tied))
    before, vocabulary = copy.deepcopy(model.state_dict()), torch.tensor([7, 0, 299, 41])
    draft = frequent_draft(model, vocabulary, Chain(2))
    ids = make_ids(WRITER, 2, 6)
    assert_close(draft.model(ids), model(ids)[..., vocabulary])
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert draft.model.embed_tokens.weight is model.embed_tokens.weight


@pytest.mark.parametrize("shape", [Chain(3), DynamicTree(3, 2, 5)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_frequent_tokens_are_guessed_and_the_text_stays(shape, temperature):
    model, ids, vocabulary = make_model(WRITER), make_ids(WRITER, 3, 6), torch.arange(299, 0, -2)
    draft = frequent_draft(near(model), vocabulary, shape)
    sampling = Sampling(temperature)
    found = draft.begin(model, 60, sampling, None).propose(ids.tolist(), 9)
    assert set(found.tokens.flatten().tolist()) <= set(vocabulary.tolist())
    if found.drawn_from is not None:
        assert found.drawn_from.shape == (3, 3, 300) and not found.drawn_from[..., ::2].any()
        assert_close(found.drawn_from.sum(-1), torch.ones(3, 3))
        assert bool((found.drawn_from.gather(2, found.tokens[..., None]) > 0).all())
    if temperature == 0:
        text, stats = speculative_generate(model, draft, ids, 30)
        whole = speculative_generate(model, DecoderDraft(near(model), shape), ids, 30)[1]
        assert torch.equal(text, generate(model, ids, 30))
        assert 1 < stats.acceptance_length < whole.acceptance_length


def test_a_ranking_counts():
    tokens = torch.tensor([5, 5, 5, 2, 2, 0, 9])
    assert rank_by_frequency(tokens, 11).tolist() == [5, 2, 0, 9, 1, 3, 4, 6, 7, 8, 10]
    assert rank_by_frequency(tokens, 11, first=[10, 4]).tolist()[:4] == [4, 10, 5, 2]


@pytest.mark.parametrize(
    ("tokens", "first", "why"),
    [([1, 11], [], "tokens holds ids from 1 to 11"), ([1], [3, -1], "first holds ids from -1 to 3")],
)
def test_a_ranking_of_ids_that_a_vocabulary_lacks_is_refused(tokens, first, why):
    with pytest.raises(ValueError, match=f"{why}, and the vocabulary has whole numbers from 0 to 10"):
        rank_by_frequency(torch.tensor(tokens), 11, first)


@pytest.mark.parametrize("vocabulary", [[], [3, 3], [300], [-1]])
def test_an_impossible_vocabulary_gets_a_sentence(vocabulary):
    ids = torch.tensor(vocabulary, dtype=torch.long)
    with pytest.raises(
        ValueError, match="expected some of those that the model has, 0 to 299, as whole numbers"
    ):
        frequent_draft(make_model(WRITER), ids, Chain(2))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [(dict(guesses=0), "guesses is 0"), (dict(longest=0), "longest is 0"), (dict(shortest=4), "swap them")],
)
def test_an_impossible_lookup_gets_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        PromptLookup(**settings)


def test_padding_is_not_guessed_from():
    """Of a padded batch each row's guesses are those that it gets alone."""
    model = make_model(WRITER)
    ids, padding = pad_left([[5, 6, 5], [1, 2, 3, 1, 2]], pad_id=5)
    found, _ = speculative_generate(model, PromptLookup(), ids, 12, padding=padding)
    assert torch.equal(found, generate(model, ids, 12, padding=padding))


def test_a_corpus_may_be_a_batch_or_empty(unchecked):
    ids = torch.tensor([[3, 1, 3], [1, 1, 2]])
    assert torch.equal(rank_by_frequency(ids, 5), rank_by_frequency(ids.flatten(), 5))
    assert rank_by_frequency(torch.tensor([]), 3, first=[2]).tolist() == [2, 0, 1]
