"""The decoder: equal to reference implementations, wrong variants told apart."""

from dataclasses import replace

import jaxtyping
import pytest
import torch
from small_models import FAMILIES, GROUPED, PLAIN, granite, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite import ModelConfig
from minicpm_lite.language import layers
from minicpm_lite.language.context import Context, KVCache, dense_attention
from minicpm_lite.language.decoder import Decoder

# Parity with transformers


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_equal_to_granite(name):
    model = make_model(PLAIN[name])
    ids = make_ids(model.config)
    reference = granite(model)(ids).logits
    assert_close(model(ids), reference, atol=1e-5, rtol=1e-5)
    cache = KVCache(17)
    in_pieces = torch.cat([model(piece, cache) for piece in ids.tensor_split([9, 10, 14], dim=1)], dim=1)
    assert_close(in_pieces, reference, atol=1e-5, rtol=1e-5)


def test_gradients_equal_granite():
    model = make_model(GROUPED)
    reference, ids = granite(model), make_ids(model.config)
    for each in (lambda: model(ids), lambda: reference(ids).logits):
        each().square().mean().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, theirs[f"model.{name}"].grad, atol=1e-5, rtol=1e-4, msg=name)


# Wrong decoders that people really write. Each must differ from the reference by far more than rounding.


def interleaved_rotary(x, cos, sin):
    cos, sin, even, odd = cos.chunk(2, -1)[1], sin.chunk(2, -1)[1], x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class ScaleByHeadDim(Context):
    def attend(self, layer, query, key, value):
        return dense_attention(query / query.shape[-1] ** 0.5, key, value)


class GroupsInTheWrongOrder(Context):
    def attend(self, layer, query, key, value):
        groups = query.shape[1] // key.shape[1]
        return dense_attention(query, key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1))


class NotCausal(Context):
    def attend(self, layer, query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


WRONG_MODEL = {
    "interleaved rotary": lambda m, patch: patch.setattr(layers, "apply_rotary", interleaved_rotary),
    "residual scale with 2L": lambda m, patch: [setattr(b, "residual_scale", 1.4 / 6**0.5) for b in m.layers],
    "no scale_emb": lambda m, patch: setattr(m, "config", replace(m.config, scale_emb=1.0)),
    "logits not divided": lambda m, patch: setattr(m, "config", replace(m.config, dim_model_base=None)),
    "other rope base": lambda m, patch: setattr(m, "config", replace(m.config, rope_theta=5_000.0)),
}
WRONG_CONTEXT = {
    "scale 1/head_dim": ScaleByHeadDim,
    "groups repeated, not interleaved": GroupsInTheWrongOrder,
    "not causal": NotCausal,
}


@pytest.mark.parametrize("name", [*WRONG_MODEL, *WRONG_CONTEXT])
@torch.no_grad()
def test_wrong_decoders_are_told_apart(name, monkeypatch):
    model = make_model(GROUPED)
    ids = make_ids(model.config)
    reference = granite(model)(ids).logits
    WRONG_MODEL.get(name, lambda model, patch: None)(model, monkeypatch)
    context = WRONG_CONTEXT.get(name, Context)()
    assert (model(ids, context) - reference).abs().max() > 1e-3


# What is computed


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_last_only_is_the_last_position(name):
    model = make_model(FAMILIES[name])
    ids = make_ids(model.config)
    assert_close(model(ids, last_only=True), model(ids)[:, -1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_later_tokens_change_nothing_before_them():
    model = make_model(GROUPED)
    ids = make_ids(model.config)
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % model.config.vocab_size
    assert_close(model(changed)[:, :10], model(ids)[:, :10], atol=0, rtol=0)
    assert not torch.allclose(model(changed)[:, 10:], model(ids)[:, 10:])


def test_initial_weights_follow_table_7():
    config = ModelConfig(256, 640, 2, 4, 500, tie_word_embeddings=False, dim_model_base=64, init_std=0.1)
    torch.manual_seed(0)
    model = Decoder(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert bool((parameter == 1).all())
        else:
            table = name.startswith(("embed_tokens", "lm_head"))
            assert parameter.std().item() == pytest.approx(0.1 if table else 0.05, rel=0.02)


def test_tied_tables_are_one_tensor():
    tied, untied = (Decoder(PLAIN[f"grouped, {kind}"]) for kind in ("tied", "untied"))
    assert tied.lm_head is None and [id(table) for table in tied.tables] == [id(tied.embed_tokens.weight)]
    assert len(untied.tables) == 2 and "lm_head.weight" not in tied.state_dict()


@torch.no_grad()
def test_a_tied_model_that_was_built_without_memory_is_still_tied():
    model = make_model(GROUPED)
    with torch.device("meta"):
        other = Decoder(model.config)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    ids = make_ids(model.config)
    assert_close(other(ids), model(ids), atol=0, rtol=0)


# What cannot be


@pytest.mark.parametrize("kind", [torch.float32, torch.int16, torch.bool])
def test_tokens_are_whole_numbers(kind, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a reader
    with pytest.raises(ValueError, match=f"ids is of type {kind}; expected whole numbers of 64 or 32 bits"):
        make_model(GROUPED)(torch.ones(1, 3).to(kind))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), "ids holds no token"),
        (lambda m: m.embed(torch.zeros(1, 0, dtype=torch.long)), "ids holds no token"),
        (
            lambda m: m(torch.zeros(1, 65, dtype=torch.long)),
            "65 tokens were given, but the model was made for 64",
        ),
        (
            lambda m: m(torch.zeros(1, 65, dtype=torch.long), KVCache(65)),
            "65 tokens were given, but the model was made for 64",
        ),
    ],
)
def test_impossible_lengths_get_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence), torch.no_grad():
        call(Decoder(GROUPED))


def test_one_text_without_a_batch_is_refused():
    with pytest.raises((ValueError, TypeError), match=r"expected \(batch, tokens\)|i64\[5\]"):
        Decoder(GROUPED)(torch.zeros(5, dtype=torch.long))  # the type check of the tests sees it first


def test_a_strange_token_id_is_refused():
    with pytest.raises(IndexError):
        Decoder(GROUPED)(torch.tensor([[99]]))
