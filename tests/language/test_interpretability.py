"""What is seen inside a decoder, against the formulas and against weights that are changed."""

import math

import pytest
import torch
from small_models import FAMILIES, GROUPED, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite.language.context import Context
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.interpretability import Watched, head_means, logits_by_depth, without_heads

SEVERAL = [(0, 0), (1, 1), (1, 2)]


def texts(model, rows=3, tokens=10):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=generator)


def headless(model, heads):
    """A copy whose output matrices have zeros for these heads."""
    copy = Decoder(model.config).eval()
    copy.load_state_dict(model.state_dict())
    for block, head in heads:
        out = copy.layers[block].self_attn.o_proj.weight.data
        out.unflatten(1, (model.config.num_attention_heads, -1))[:, head] = 0
    return copy


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_watched_model_says_what_it_says_unwatched(name):
    model = make_model(FAMILIES[name])
    ids, seen = make_ids(model.config), Watched()
    assert_close(model(ids, seen), model(ids), rtol=1e-4, atol=1e-5)
    assert sorted(seen.weights) == list(range(model.config.num_hidden_layers))
    for weights in seen.weights.values():
        assert weights.shape == (len(ids), model.config.num_attention_heads, *2 * ids.shape[1:])
        assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
        assert not weights.triu(1).any()


@torch.no_grad()
def test_noted_weights_are_those_of_queries_and_keys():
    model, seen = make_model(GROUPED), Watched()
    model(texts(model), seen)
    for block, weights in seen.weights.items():
        q, k = seen.queries[block], seen.keys[block]
        assert q.shape == k.shape
        group = model.config.num_attention_heads // model.config.num_key_value_heads
        assert torch.equal(k[:, 0], k[:, group - 1])  # shared
        row = (q[1, 2, 7] @ k[1, 2, :8].T / math.sqrt(q.shape[-1])).softmax(dim=0)
        assert_close(weights[1, 2, 7, :8], row)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_heads_that_bring_nothing_are_columns_of_zeros(name):
    model = make_model(FAMILIES[name])
    ids, before = make_ids(model.config), model(make_ids(model.config))
    for heads in ([(0, 1)], [(1, 0)], SEVERAL):
        with without_heads(model, heads):
            assert_close(model(ids), headless(model, heads)(ids))
    assert torch.equal(model(ids), before)


@torch.no_grad()
def test_the_mean_is_over_lanes_and_texts_and_takes_the_head_s_place():
    model = make_model(GROUPED)
    ids, heads = texts(model), model.config.num_attention_heads
    means, brought = head_means(model, ids), []
    output = model.layers[0].self_attn.o_proj

    def heard():
        hook = output.register_forward_pre_hook(lambda _, given: brought.append(given[0]))
        model(ids)
        hook.remove()

    with without_heads(model, [(0, 2)], means):
        heard()
    heard()
    replaced, plain = (each.unflatten(-1, (heads, -1)) for each in brought)
    assert means.shape == (model.config.num_hidden_layers, heads, plain.shape[-1])
    assert_close(means[0], plain.mean(dim=(0, 1)))
    others = [head for head in range(heads) if head != 2]
    assert_close(replaced[..., 2, :], means[0, 2].expand_as(plain[..., 2, :]))
    assert torch.equal(replaced[..., others, :], plain[..., others, :])


@torch.no_grad()
def test_a_head_that_brings_the_same_everywhere_costs_nothing_by_its_mean():
    model = make_model(GROUPED)
    ids = texts(model)
    model.layers[1].self_attn.v_proj.weight.zero_()  # both bring nothing, whatever they look at
    with without_heads(model, [(1, 0)], head_means(model, ids)):
        assert_close(model(ids), make_and_copy(model)(ids))


def make_and_copy(model):
    copy = Decoder(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def test_a_model_is_as_it_was_behind_an_error():
    model = make_model(GROUPED)
    ids = texts(model)
    before = model(ids)
    with pytest.raises(ZeroDivisionError), without_heads(model, SEVERAL):
        raise ZeroDivisionError
    assert torch.equal(model(ids), before)
    with torch.no_grad():
        head_means(model.train(), ids)
    assert model.training


@pytest.mark.parametrize("head", [(0, 99), (99, 0), (-1, 0), (0, -1)])
def test_a_head_that_is_none_is_refused(head):
    taken_out = without_heads(make_model(GROUPED), [head])
    with pytest.raises(ValueError, match="blocks of .* heads, both counted from 0"):
        taken_out.__enter__()


@pytest.mark.parametrize("name", FAMILIES)
def test_means_of_another_shape_are_refused(name, unchecked):
    """Of one block, of one head, of fewer blocks: each would be spread over the heads, or run out."""
    model = make_model(FAMILIES[name])
    means = head_means(model, texts(model))
    for wrong in (means[0], means[0, 0], means[:1], means[:, :1], means[..., :1], means[0, 0, 0]):
        taken_out = without_heads(model, [(0, 1)], wrong)
        with pytest.raises(ValueError, match="means has shape .*; expected those of all heads"):
            taken_out.__enter__()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_the_stream_says_at_each_depth(name):
    model = make_model(FAMILIES[name])
    ids = make_ids(model.config)
    logits, context = logits_by_depth(model, ids), Context()
    assert len(logits) == model.config.num_hidden_layers + 1
    assert_close(logits[-1], model(ids))
    assert_close(logits[0], model.logits(model.embed(ids)))
    after_one = model.states(model.embed(ids), context, after=[1])[0]
    assert_close(logits[1], model.logits(after_one))
