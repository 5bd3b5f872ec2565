"""Latent attention: both forms equal each other and transformers' MiniCPM3; the cache is as small as promised."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LATENT, make_ids, make_model
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from minicpm_lite import load_config
from minicpm_lite.config import LatentAttentionConfig, ModelConfig, RopeScaling
from minicpm_lite.language import latent_attention
from minicpm_lite.language.context import Context, KVCache, causal_mask, dense_attention
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.latent_attention import LatentAttention, absorbed_is_cheaper
from minicpm_lite.language.rotary import apply_rotary, rotary_angles, rotary_frequencies

LONGROPE = replace(
    LATENT,
    rope_scaling=RopeScaling(
        "longrope", 16, short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(1.0, 1.5, 2.5, 4.0)
    ),
)
FORMS = ["naive", "absorbed"]


def minicpm3(model: Decoder) -> torch.nn.Module:
    from transformers import MiniCPM3Config, MiniCPM3ForCausalLM

    config, latent = model.config, model.config.latent_attention
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {
            "rope_type": config.rope_scaling.rope_type,
            "original_max_position_embeddings": config.rope_scaling.original_max_position_embeddings,
            "short_factor": list(config.rope_scaling.short_factor),
            "long_factor": list(config.rope_scaling.long_factor),
        }
    reference = MiniCPM3ForCausalLM(
        MiniCPM3Config(
            hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=99, max_position_embeddings=64, rms_norm_eps=config.rms_norm_eps, scale_emb=12, scale_depth=1.4,
            dim_model_base=32, tie_word_embeddings=True, q_lora_rank=latent.q_lora_rank, kv_lora_rank=latent.kv_lora_rank,
            qk_nope_head_dim=latent.qk_nope_head_dim, qk_rope_head_dim=latent.qk_rope_head_dim,
            v_head_dim=latent.v_head_dim, rope_parameters=rope,
        )
    )  # fmt: skip
    weights = {f"model.{name}": w for name, w in model.state_dict().items() if name != "lm_head.weight"}
    reference.load_state_dict(weights | {"lm_head.weight": model.tables[-1]})
    return reference.eval()


def run_cached(model: Decoder, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    cache = KVCache(ids.shape[1])
    return torch.cat([model(piece, cache) for piece in ids.tensor_split(cuts, dim=1)], dim=1)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch) -> str:
    """Both forms, each where the library would have chosen the other, too."""
    monkeypatch.setattr(latent_attention, "absorbed_is_cheaper", lambda *_, **__: request.param == "absorbed")
    return request.param


def make_inputs(layer: LatentAttention, queries: int, keys: int, dtype: torch.dtype = torch.float32):
    sizes, generator = layer.sizes, torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        random(layer.heads, queries, sizes.qk_nope_head_dim),
        random(layer.heads, queries, sizes.qk_rope_head_dim),
        random(1, keys, sizes.kv_lora_rank + sizes.qk_rope_head_dim),
    )


# Both forms are one function.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (4, 9), (9, 9)])
@torch.no_grad()
def test_naive_equals_absorbed(queries, keys, dtype, tolerance):
    layer = make_model(LATENT).layers[0].self_attn.to(dtype)
    inputs = make_inputs(layer, queries, keys, dtype)
    padded = KVCache(keys, padding=torch.tensor([0, keys - 1]))
    padded.mask = padded.hide_padding(causal_mask(queries, keys, "cpu"))
    for context in (Context(), padded):
        absorbed, naive = layer.absorbed(*inputs, context), layer.naive(*inputs, context)
        assert_close(absorbed, naive, atol=tolerance, rtol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.builds(
        LatentAttentionConfig, st.just(5), st.integers(1, 9), st.integers(1, 9), st.sampled_from([2, 4]),
        st.integers(1, 15),  # values may be wider than keys
    ),
    heads=st.integers(1, 3),
    queries=st.integers(1, 6),
    earlier=st.integers(0, 5),
)  # fmt: skip
@torch.no_grad()
def test_naive_equals_absorbed_and_the_obvious_loop_for_all_sizes(sizes, heads, queries, earlier):
    torch.manual_seed(0)
    config = ModelConfig(12, 8, 1, heads, 9, head_dim=4, latent_attention=sizes)
    layer = LatentAttention(config, 0).double()
    inputs = make_inputs(layer, queries, queries + earlier, torch.float64)
    expected = obvious_loop(layer, *inputs)
    assert_close(layer.naive(*inputs, Context()), expected, atol=1e-12, rtol=1e-12)
    assert_close(layer.absorbed(*inputs, Context()), expected, atol=1e-12, rtol=1e-12)


def obvious_loop(layer, query, query_rotated, latent):
    """One product at a time, with the scale of a head that is nope + rope wide."""
    sizes = layer.sizes
    rank, nope, rope, v = (
        sizes.kv_lora_rank,
        sizes.qk_nope_head_dim,
        sizes.qk_rope_head_dim,
        sizes.v_head_dim,
    )
    batch, heads, queries, _ = query.shape
    out = torch.empty(batch, heads, queries, v, dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            expand = layer.kv_b_proj.weight[h * (nope + v) : (h + 1) * (nope + v)]
            for i in range(queries):
                scores, values = [], []
                for j in range(latent.shape[2] - queries + i + 1):
                    c, shared_key = latent[b, 0, j, :rank], latent[b, 0, j, rank:]
                    score = query[b, h, i] @ (expand[:nope] @ c) + query_rotated[b, h, i] @ shared_key
                    scores.append(score / (nope + rope) ** 0.5)
                    values.append(expand[nope:] @ c)
                out[b, h, i] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


def test_gradients_of_both_forms_are_equal(monkeypatch):
    gradients = {}
    for each in FORMS:
        monkeypatch.setattr(
            latent_attention, "absorbed_is_cheaper", lambda *_, each=each, **__: each == "absorbed"
        )
        model = make_model(LATENT).double()
        model(make_ids(LATENT)).square().mean().backward()
        gradients[each] = {name: p.grad for name, p in model.named_parameters()}
        assert not any(gradient is None for gradient in gradients[each].values())
    for name, gradient in gradients["naive"].items():
        assert_close(gradients["absorbed"][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_gradients_equal_minicpm3(form):
    model = make_model(LATENT)
    reference, ids = minicpm3(model), make_ids(LATENT)
    for each in (lambda: model(ids), lambda: reference(ids).logits):
        each().square().mean().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, theirs[f"model.{name}"].grad, atol=1e-5, rtol=1e-4, msg=name)


# Parity with transformers.


@pytest.mark.parametrize("config", [LATENT, LONGROPE], ids=["plain", "longrope"])
@pytest.mark.parametrize("tokens", [9, 33])  # up to the original context, and beyond it
@torch.no_grad()
def test_equal_to_minicpm3(config, tokens, form):
    model, ids = make_model(config), make_ids(LATENT, tokens=tokens)
    reference = minicpm3(model)(ids).logits
    assert_close(model(ids), reference, atol=1e-5, rtol=1e-5)
    assert_close(run_cached(model, ids, [4, 5, 8]), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [LATENT, LONGROPE], ids=["plain", "longrope"])
@torch.no_grad()
def test_cached_steps_equal_minicpm3_with_its_own_cache(config):
    from transformers import DynamicCache

    model, ids = make_model(config), make_ids(LATENT, tokens=9)
    reference, cache, theirs = minicpm3(model), KVCache(9), DynamicCache()
    for token in ids.split([3, 1, 1, 4], dim=1):
        assert_close(
            model(token, cache), reference(token, past_key_values=theirs).logits, atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_the_cache_holds_what_minicpm3_caches():
    from transformers import DynamicCache

    model, ids, cache, theirs = make_model(LATENT), make_ids(LATENT, tokens=9), KVCache(9), DynamicCache()
    model(ids, cache)
    minicpm3(model)(ids, past_key_values=theirs)
    for layer in range(3):
        (latent,) = cache._layers[layer]
        kept = theirs.layers[layer]
        assert_close(latent, torch.cat([kept.keys, kept.values], dim=-1), atol=1e-5, rtol=1e-5)


def small_latents() -> Decoder:
    """Latents so small that the norm's epsilon matters."""
    model = make_model(LATENT)
    for layer in model.layers:
        layer.self_attn.kv_a_proj_with_mqa.weight.data *= 5e-3
        layer.self_attn.q_a_proj.weight.data *= 5e-3
    return model


@torch.no_grad()
def test_inner_norms_have_their_own_epsilon():
    model, ids = small_latents(), make_ids(LATENT)
    reference = minicpm3(model)(ids).logits
    assert_close(model(ids), reference, atol=1e-5, rtol=1e-5)
    for layer in model.layers:  # the config's epsilon, as one would think
        layer.self_attn.kv_a_layernorm.eps = layer.self_attn.q_a_layernorm.eps = LATENT.rms_norm_eps
    assert (model(ids) - reference).abs().max() > 1e-3


# Wrong implementations that people really write. Each must differ from the reference by far more than rounding,
# in reading a text at once (naive) or token by token (absorbed), wherever the mistake can be made.


class Sees(Context):
    """Attention sees changed queries, keys and values."""

    def __init__(self, change):
        self.change = change

    def attend(self, layer, query, key, value):
        return dense_attention(*self.change(query, key, value), self.mask)


def set_everywhere(name, module):
    def mistake(model):
        for block in model.layers:
            setattr(block.self_attn, name, module)

    return mistake


def turn_all(q, k, v):
    """Rotary positions on the part without positions."""
    angles = rotary_angles(torch.arange(k.shape[2]), rotary_frequencies(16, 10_000.0))

    def turn(x):
        newest = [each[-x.shape[2] :] for each in angles]
        return torch.cat([apply_rotary(x[..., :16], *newest), x[..., 16:]], dim=-1)

    return turn(q), turn(k), v


def key_of_each_head_its_own(q, k, v):
    heads = [torch.cat([k[:, h, :, :16], k[:, h, :, 16:].roll(h, dims=-1)], dim=-1) for h in range(4)]
    return q, torch.stack(heads, dim=1), v


def rotated_part_first(model):
    for block in model.layers:
        weight = block.self_attn.q_b_proj.weight.data
        weight.copy_(weight.unflatten(0, (4, 24)).roll(-8, dims=1).flatten(0, 1))


def values_before_keys(model):
    for block in model.layers:
        weight = block.self_attn.kv_b_proj.weight.data
        weight.copy_(weight.unflatten(0, (4, 28)).roll(16, dims=1).flatten(0, 1))


def parts_over_heads(model):
    """All heads' keys, then all heads' values, instead of key and value head by head."""
    for block in model.layers:
        weight = block.self_attn.kv_b_proj.weight.data
        heads = weight.unflatten(0, (4, 28)).split([16, 12], dim=1)
        weight.copy_(torch.cat([part.flatten(0, 1) for part in heads]))


WRONG = {
    "scale of the joint width": ("absorbed", lambda q, k, v: (q * (24 / 28) ** 0.5, k, v)),
    "values with the rotated part": ("absorbed", lambda q, k, v: (q, k, v.roll(-8, dims=-1))),
    "scale without the rotated part": ("naive", lambda q, k, v: (q * (24 / 16) ** 0.5, k, v)),
    "nope part rotated": ("naive", turn_all),
    "a rotated key for each head": ("naive", key_of_each_head_its_own),
    "latent not normed": ("both", set_everywhere("kv_a_layernorm", torch.nn.Identity())),
    "query latent not normed": ("both", set_everywhere("q_a_layernorm", torch.nn.Identity())),
    "rotated part first": ("both", rotated_part_first),
    "values before keys": ("both", values_before_keys),
    "keys of all heads, then values": ("both", parts_over_heads),
}
CASES = [(name, form) for name, (where, _) in WRONG.items() for form in FORMS if where in (form, "both")]


@pytest.mark.parametrize(("name", "form"), CASES, indirect=["form"])
@torch.no_grad()
def test_wrong_variants_are_told_apart(name, form):
    model, ids = make_model(LATENT), make_ids(LATENT)
    reference = minicpm3(model)(ids).logits
    assert_close(model(ids), reference, atol=1e-5, rtol=1e-5)
    where, mistake = WRONG[name]
    if where == "both":
        mistake(model)
        context = Context()
    else:
        context = Sees(mistake)
    assert (model(ids, context) - reference).abs().max() > 1e-3


# The cache.


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 16), max_size=4, unique=True).map(sorted), batch=st.integers(1, 3))
@torch.no_grad()
def test_cached_equals_uncached_however_the_ids_are_cut(cuts, batch):
    model, ids = make_model(LATENT), make_ids(LATENT, batch)
    assert_close(run_cached(model, ids, cuts), model(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_padded_on_the_left_are_the_rows_alone(form):
    model, ids, padding = make_model(LATENT), make_ids(LATENT, 3, 12), torch.tensor([0, 5, 11])
    for cuts in ([11], [6, 7, 8]):
        cache = KVCache(20, padding)
        padded = torch.cat([model(piece, cache) for piece in ids.tensor_split(cuts, dim=1)], dim=1)
        assert bool(padded.isfinite().all())
        for row, pad in enumerate(padding.tolist()):
            assert_close(padded[row : row + 1, pad:], model(ids[row : row + 1, pad:]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_later_tokens_change_nothing_before_them(form):
    model, ids = make_model(LATENT), make_ids(LATENT)
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 99
    assert_close(model(changed)[:, :10], model(ids)[:, :10], atol=0, rtol=0)
    assert not torch.allclose(model(changed)[:, 10:], model(ids)[:, 10:])


@torch.no_grad()
def test_cache_bytes_of_the_released_model():
    config = load_config("minicpm3-4b")
    with torch.device("meta"):  # shapes without memory
        model, cache = Decoder(config).bfloat16(), KVCache(32_768)
        model(torch.zeros(1, 3, dtype=torch.long), cache)
    assert cache.nbytes == 32_768 * (256 + 32) * 62 * 2


# When which form is cheaper.


class Products(Context):
    """The products alone; fused kernels hide them from the counter. One key head serves all query heads."""

    def attend(self, layer, query, key, value):
        if key.shape[1] == 1:
            query = query.flatten(1, 2)[:, None]
        return ((query @ key.mT) @ value).reshape(2, 4, -1, value.shape[-1])


@pytest.mark.parametrize("sizes", [(9, 16, 8, 4, 8), (9, 5, 8, 4, 8), (9, 12, 16, 4, 16)])
@torch.no_grad()
def test_the_cheaper_form_is_the_one_with_fewer_flops(sizes):
    config = ModelConfig(12, 8, 1, 4, 9, head_dim=4, latent_attention=LatentAttentionConfig(*sizes))
    layer = LatentAttention(config, 0)
    answers = set()
    for keys in (3, 10, 50):
        for queries in range(1, keys + 1):
            counts = {}
            for each in FORMS:
                with FlopCounterMode(display=False) as counter:
                    getattr(layer, each)(*make_inputs(layer, queries, keys), Products())
                counts[each] = counter.get_total_flops()
            answer = absorbed_is_cheaper(layer.sizes, queries, keys)
            assert answer == (counts["absorbed"] < counts["naive"]), (queries, keys, counts)
            answers.add(answer)
    assert True in answers


@torch.no_grad()
def test_forward_takes_the_cheaper_form(monkeypatch):
    model, taken = make_model(LATENT), []
    layer = model.layers[0].self_attn
    for each in FORMS:
        right = getattr(layer, each)
        monkeypatch.setattr(
            layer, each, lambda *inputs, each=each, right=right: taken.append(each) or right(*inputs)
        )
    cache, ids = KVCache(40), make_ids(LATENT, 1, 40)
    for piece in ids.split([30, 4, 1, 5], dim=1):
        model(piece, cache)
    assert taken == ["naive", "absorbed", "absorbed", "absorbed"]
