"""The decoder: equal to reference implementations, cached equal to uncached, wrong variants told apart."""

import math
from dataclasses import replace
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from minicpm_lite import ModelConfig, load_config
from minicpm_lite.deployment.checkpoints import save_pretrained
from minicpm_lite.language import decoder
from minicpm_lite.language.decoder import (
    Decoder,
    KVCache,
    RMSNorm,
    apply_rotary,
    dense_attention,
    fold_to_llama,
    rotary_angles,
    rotary_frequencies,
)

MULTIPLIERS = dict(scale_emb=12, scale_depth=1.4, dim_model_base=32, init_std=0.1)
CONFIGS = {
    "grouped, tied": ModelConfig(
        64, 160, 3, 4, 99, num_key_value_heads=2, max_position_embeddings=64, **MULTIPLIERS
    ),
    "grouped, untied": ModelConfig(
        64,
        160,
        3,
        4,
        99,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        **MULTIPLIERS,
    ),
    "multi-head, tied": ModelConfig(96, 256, 2, 6, 120, max_position_embeddings=64, **MULTIPLIERS),
    "multi-head, untied": ModelConfig(
        48,
        64,
        5,
        3,
        50,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        rope_theta=500.0,
        **MULTIPLIERS,
    ),
    "no multipliers": ModelConfig(
        64, 160, 3, 4, 99, num_key_value_heads=2, max_position_embeddings=64, init_std=0.1
    ),
}


def make_model(config: ModelConfig, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a norm that is not applied
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def make_ids(config: ModelConfig, batch: int = 2, tokens: int = 17) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))


def granite(model: Decoder) -> torch.nn.Module:
    """The same weights in transformers' Granite, which has all of MiniCPM's multipliers."""
    return opened_by_transformers(model, "granite")


def llama(model: Decoder) -> torch.nn.Module:
    return opened_by_transformers(model, "llama")


def opened_by_transformers(model: Decoder, family: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as folder:
        save_pretrained(model, f"{folder}/model", family)
        return AutoModelForCausalLM.from_pretrained(f"{folder}/model").eval()


def run_cached(model: Decoder, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Logits from feeding the ids in pieces, split at the cuts."""
    cache = KVCache(model.config.max_position_embeddings)
    return torch.cat([model(piece, cache) for piece in ids.tensor_split(cuts, dim=1)], dim=1)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equal_to_granite(name):
    model = make_model(CONFIGS[name])
    ids = make_ids(model.config)
    reference = granite(model)(ids).logits
    assert_close(model(ids), reference, atol=1e-5, rtol=1e-5)
    assert_close(run_cached(model, ids, [9, 10, 14]), reference, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cached_steps_equal_granite_with_its_own_cache():
    from transformers import DynamicCache

    model = make_model(CONFIGS["grouped, tied"])
    ids, reference = make_ids(model.config, tokens=8), granite(model)
    cache, theirs = KVCache(8), DynamicCache()
    for token in ids.split(1, dim=1):
        assert_close(
            model(token, cache), reference(token, past_key_values=theirs).logits, atol=1e-5, rtol=1e-5
        )


def test_gradients_equal_granite():
    model = make_model(CONFIGS["grouped, tied"])
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


def scale_by_head_dim(query, key, value, padding):
    return dense_attention(query / query.shape[-1] ** 0.5, key, value)


def groups_in_the_wrong_order(query, key, value, padding):
    groups = query.shape[1] // key.shape[1]
    return dense_attention(query, key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1))


def not_causal(query, key, value, padding):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


WRONG = {
    "interleaved rotary": lambda m, patch: patch.setattr(decoder, "apply_rotary", interleaved_rotary),
    "scale 1/head_dim": lambda m, patch: set_attention(m, scale_by_head_dim),
    "groups repeated, not interleaved": lambda m, patch: set_attention(m, groups_in_the_wrong_order),
    "not causal": lambda m, patch: set_attention(m, not_causal),
    "residual scale with 2L": lambda m, patch: [setattr(b, "residual_scale", 1.4 / 6**0.5) for b in m.layers],
    "no scale_emb": lambda m, patch: setattr(m, "config", replace(m.config, scale_emb=1.0)),
    "logits not divided": lambda m, patch: setattr(m, "config", replace(m.config, dim_model_base=None)),
    "other rope base": lambda m, patch: setattr(m, "config", replace(m.config, rope_theta=5_000.0)),
}


def set_attention(model, function):
    for block in model.layers:
        block.self_attn.attention = function


@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_wrong_decoders_are_told_apart(name, monkeypatch):
    model = make_model(CONFIGS["grouped, tied"])
    ids = make_ids(model.config)
    reference = granite(model)(ids).logits
    WRONG[name](model, monkeypatch)
    assert (model(ids) - reference).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_fold_to_llama(name):
    model = make_model(CONFIGS[name])
    ids = make_ids(model.config)
    folded = fold_to_llama(model)
    assert (folded.config.scale_emb, folded.config.residual_scale, folded.config.width_ratio) == (1, 1, 1)
    assert_close(folded(ids), model(ids), atol=2e-5, rtol=1e-5)
    assert_close(llama(folded)(ids).logits, model(ids), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_folding_keeps_attention_and_mode():
    torch.manual_seed(0)
    model = Decoder(CONFIGS["grouped, tied"], attention=not_causal).eval()
    folded, ids = fold_to_llama(model), make_ids(model.config)
    assert not folded.training
    assert_close(folded(ids), model(ids), atol=2e-5, rtol=1e-5)


def test_only_plain_decoders_fold():
    with pytest.raises(ValueError, match="latent attention"), torch.device("meta"):
        fold_to_llama(Decoder(load_config("minicpm3-4b")))


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 16), max_size=4, unique=True).map(sorted), batch=st.integers(1, 3))
@torch.no_grad()
def test_cached_equals_uncached_however_the_ids_are_cut(cuts, batch):
    model = make_model(CONFIGS["grouped, untied"])
    ids = make_ids(model.config, batch)
    assert_close(run_cached(model, ids, cuts), model(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_later_tokens_change_nothing_before_them():
    model = make_model(CONFIGS["grouped, tied"])
    ids = make_ids(model.config)
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % model.config.vocab_size
    assert_close(model(changed)[:, :10], model(ids)[:, :10], atol=0, rtol=0)
    assert not torch.allclose(model(changed)[:, 10:], model(ids)[:, 10:])


def test_rms_norm_of_a_vector_known_by_hand():
    norm = RMSNorm(2, eps=0.0)
    assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) / math.sqrt(12.5))


def test_rms_norm_keeps_its_statistics_in_float32():
    x = torch.full((4096,), 300.0, dtype=torch.bfloat16)  # the sum of squares has no place in 8 bits
    assert_close(RMSNorm(4096, eps=0.0).bfloat16()(x), torch.ones(4096, dtype=torch.bfloat16))


@settings(max_examples=50, deadline=None)
@given(position=st.integers(0, 30_000), shift=st.integers(0, 2_000), distance=st.integers(0, 200))
def test_rotated_products_depend_on_distance_only(position, shift, distance):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float32)

    def product(at):
        cos, sin = rotary_angles(torch.tensor([at, at + distance]), rotary_frequencies(16, 10_000.0))
        return (apply_rotary(k, cos[:1], sin[:1]) * apply_rotary(q, cos[1:], sin[1:])).sum()

    assert_close(product(position), product(position + shift), atol=2e-2, rtol=0)


def test_rotary_keeps_lengths_and_starts_at_the_identity():
    x = torch.randn(1, 2, 3, 8)
    turned = apply_rotary(x, *rotary_angles(torch.arange(3), rotary_frequencies(8, 10_000.0)))
    assert_close(turned[:, :, 0], x[:, :, 0])
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_rotary_of_a_pair_known_by_hand():
    cos, sin = rotary_angles(
        torch.tensor([1]), rotary_frequencies(4, 100.0)
    )  # pair 0 turns by 1, pair 1 by 100^(-1/2) = 0.1
    turned = apply_rotary(torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]]), cos, sin)
    expected = torch.tensor([math.cos(1), math.cos(0.1), math.sin(1), math.sin(0.1)])
    assert_close(turned.flatten(), expected)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (5, 5), (3, 8)])
def test_attention_equals_the_obvious_loop(queries, keys):
    heads, kv_heads, dim = 6, 2, 8
    q, k, v = (
        torch.randn(2, heads, queries, dim),
        torch.randn(2, kv_heads, keys, dim),
        torch.randn(2, kv_heads, keys, dim),
    )
    expected = torch.empty_like(q)
    for head in range(heads):
        for i in range(queries):
            seen = keys - queries + i + 1
            kv = head // (heads // kv_heads)
            scores = torch.einsum("bd,bsd->bs", q[:, head, i], k[:, kv, :seen]) / math.sqrt(dim)
            expected[:, head, i] = torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, kv, :seen])
    assert_close(dense_attention(q, k, v), expected, atol=1e-6, rtol=1e-5)


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
    tied, untied = (Decoder(CONFIGS[f"grouped, {kind}"]) for kind in ("tied", "untied"))
    assert tied.lm_head is None and [id(table) for table in tied.tables] == [id(tied.embed_tokens.weight)]
    assert len(untied.tables) == 2 and "lm_head.weight" not in tied.state_dict()


@torch.no_grad()
def test_a_tied_model_that_was_built_without_memory_is_still_tied():
    model = make_model(CONFIGS["grouped, tied"])
    with torch.device("meta"):
        other = Decoder(model.config)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    ids = make_ids(model.config)
    assert_close(other(ids), model(ids), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["grouped, tied", "multi-head, untied"])
@torch.no_grad()
def test_rows_padded_on_the_left_are_the_rows_alone(name):
    model = make_model(CONFIGS[name])
    ids, padding = make_ids(model.config, batch=3, tokens=12), torch.tensor([0, 5, 11])
    cache = KVCache(20, padding)
    padded = torch.cat([model(piece, cache) for piece in ids.split([11, 1], dim=1)], dim=1)
    cache = KVCache(20, padding)
    one_by_one = torch.cat([model(piece, cache) for piece in ids.tensor_split([6, 7, 8], dim=1)], dim=1)
    assert bool(padded.isfinite().all())
    for row, pad in enumerate(padding.tolist()):
        alone = model(ids[row : row + 1, pad:])
        assert_close(padded[row : row + 1, pad:], alone, atol=1e-5, rtol=1e-5)
        assert_close(one_by_one[row : row + 1, pad:], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cache_takes_the_promised_bytes():
    config = CONFIGS["grouped, tied"]
    cache = KVCache(32)
    Decoder(config)(make_ids(config, batch=1, tokens=3), cache)
    assert cache.length == 3
    assert (
        cache.nbytes == 32 * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), "ids holds no token"),
        (
            lambda m: m(torch.zeros(1, 65, dtype=torch.long)),
            "65 tokens were given, but the model was made for 64",
        ),
        (lambda m: m(torch.zeros(1, 5, dtype=torch.long), KVCache(4)), "room for 4 tokens and would need 5"),
        (lambda m: KVCache(0), "max_length is 0"),
    ],
)
def test_impossible_lengths_get_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(Decoder(CONFIGS["grouped, tied"]))


@torch.no_grad()
def test_a_cache_serves_one_batch_and_one_model():
    model, cache = Decoder(CONFIGS["grouped, tied"]), KVCache(8)
    model(torch.zeros(2, 1, dtype=torch.long), cache)
    with pytest.raises(
        ValueError, match=r"holds \(batch, heads, width\) of \(2, 2, 16\) and now gets \(1, 2, 16\)"
    ):
        model(torch.zeros(1, 1, dtype=torch.long), cache)
    with pytest.raises(ValueError, match=r"now gets \(2, 1, 16\)"):
        Decoder(CONFIGS["grouped, untied"])(torch.zeros(2, 1, dtype=torch.long), cache)


def test_a_cache_is_not_trained_through():
    with pytest.raises(ValueError, match="use torch.no_grad"):
        Decoder(CONFIGS["grouped, tied"])(torch.zeros(1, 1, dtype=torch.long), KVCache(8))


def test_a_cache_may_change_between_inference_mode_and_no_grad():
    model, cache, ids = make_model(CONFIGS["grouped, tied"]), KVCache(8), torch.arange(6)[None]
    with torch.inference_mode():
        first = model(ids[:, :4], cache)
    with torch.no_grad():
        assert_close(torch.cat([first, model(ids[:, 4:], cache)], dim=1), model(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_survives_a_call_that_failed():
    model, cache = make_model(CONFIGS["grouped, tied"]), KVCache(8)
    failing, calls = model.layers[2].mlp.forward, []
    model.layers[2].mlp.forward = lambda x: calls.append(x) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(torch.zeros(3, 2, dtype=torch.long), cache)
    model.layers[2].mlp.forward = failing
    ids = make_ids(model.config, batch=1, tokens=4)
    assert_close(model(ids, cache), model(ids), atol=1e-5, rtol=1e-5)


def test_a_strange_token_id_is_refused():
    with pytest.raises(IndexError):
        Decoder(CONFIGS["grouped, tied"])(torch.tensor([[99]]))


@torch.no_grad()
def test_a_cache_used_again_takes_the_frequencies_of_its_new_model():
    model, ids, cache = make_model(CONFIGS["grouped, tied"]), make_ids(CONFIGS["grouped, tied"]), KVCache(17)
    model(ids, cache)
    model.config, cache.length = replace(model.config, rope_theta=77.0), 0
    assert_close(model(ids, cache), model(ids), atol=1e-5, rtol=1e-5)


def test_padding_of_another_batch_is_refused():
    with pytest.raises(ValueError, match="padding of 2 rows, and ids has 3"), torch.no_grad():
        make_model(CONFIGS["grouped, tied"])(
            make_ids(CONFIGS["grouped, tied"], batch=3), KVCache(17, torch.tensor([0, 1]))
        )
