"""Mixture of experts: equal to the loop over tokens that defines it, and to transformers' Mixtral."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SPARSE, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite.config import MixtureConfig
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.moe import MixtureOfExperts, load_balance_loss

# One layer


def token_by_token(
    mixture: MixtureOfExperts, x: torch.Tensor, softmax_first: bool = True, rescaled: bool = True
) -> torch.Tensor:
    """The definition, one token at a time; the flags give the two variants people write by mistake."""
    outputs, visits = [], mixture.experts_per_token
    for token in x.flatten(0, 1):
        scores = mixture.gate(token)
        if softmax_first:
            scores = scores.softmax(dim=-1)
        best = scores.argsort(descending=True)[:visits]
        weights = scores[best]
        if rescaled:
            weights = weights / weights.sum() if softmax_first else weights.softmax(dim=-1)
        outputs.append(
            sum(w * mixture.experts[e](token) for w, e in zip(weights, best.tolist(), strict=True))
        )
    return torch.stack(outputs).view_as(x)


def one_layer(num_experts: int = 5, visits: int = 2, seed: int = 0) -> MixtureOfExperts:
    """In float64, so that nothing but a wrong formula can make a difference of 1e-12."""
    torch.manual_seed(seed)
    config = replace(SPARSE, mixture=MixtureConfig(num_experts, visits))
    return Decoder(config).double().layers[0].mlp


@given(
    tokens=st.integers(1, 9), experts=st.integers(1, 6), visits=st.integers(1, 6), seed=st.integers(0, 999)
)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_equal_to_the_loop_over_tokens(tokens, experts, visits, seed):
    mixture = one_layer(experts, min(experts, visits), seed)
    x = torch.randn(2, tokens, 32, dtype=torch.float64)
    assert_close(mixture(x), token_by_token(mixture, x), atol=1e-12, rtol=1e-12)


def test_gradients_equal_those_of_the_loop():
    """Also where experts get no token: their gradient is zero, not missing."""
    mixture = one_layer()
    x = torch.randn(1, 2, 32, dtype=torch.float64, requires_grad=True)
    mixture.eval()(x).square().sum().backward()
    grouped = [p.grad.clone() for p in mixture.parameters()] + [x.grad.clone()]
    mixture.zero_grad(), x.grad.zero_()
    out = token_by_token(mixture, x)
    out.square().sum().backward()
    looped = [p.grad for p in mixture.parameters()] + [x.grad]
    idle = 0
    for mine, theirs in zip(grouped, looped, strict=True):
        idle += not mine.any()
        assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, atol=1e-10, rtol=1e-10)
    assert idle >= 3, "two tokens visit at most four of five experts"


@torch.no_grad()
def test_copies_of_one_network_are_that_network():
    mixture = one_layer()
    for expert in mixture.experts:
        expert.load_state_dict(mixture.experts[0].state_dict())
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    assert_close(mixture(x), mixture.experts[0](x), atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_only_the_chosen_experts_are_called_when_nothing_is_trained():
    mixture, called = one_layer(), []
    for index, expert in enumerate(mixture.experts):
        expert.register_forward_hook(lambda module, inputs, out, index=index: called.append(index))
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    mixture(x)
    assert called == sorted(mixture.gate(x)[0, 0].topk(2).indices.tolist())


@torch.no_grad()
@pytest.mark.parametrize("mistake", [dict(rescaled=False), dict(softmax_first=False, rescaled=False)])
def test_wrong_weights_are_told_apart(mistake):
    """Top-k without rescaling, and top-k of the raw scores."""
    mixture = one_layer()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    assert (mixture(x) - token_by_token(mixture, x, **mistake)).abs().max() > 1e-2


@torch.no_grad()
def test_softmax_over_the_chosen_scores_is_the_same():
    """Softmax, top-k, rescale equals top-k, softmax: the common denominator cancels."""
    mixture = one_layer()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    assert_close(mixture(x), token_by_token(mixture, x, softmax_first=False), atol=1e-12, rtol=1e-12)


# The whole model


def mixtral(model: Decoder) -> torch.nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = model.config
    reference = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
            num_local_experts=config.mixture.num_experts,
            num_experts_per_tok=config.mixture.num_experts_per_token,
            sliding_window=None,
            attn_implementation="eager",
        )
    ).eval()
    weights = {
        ("" if name.startswith("lm_head") else "model.") + name: weight
        for name, weight in model.state_dict().items()
        if ".experts." not in name
    }
    for layer, block in enumerate(model.layers):
        experts = block.mlp.experts
        name = f"model.layers.{layer}.mlp.experts."
        weights[name + "gate_up_proj"] = torch.stack(
            [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in experts]
        )
        weights[name + "down_proj"] = torch.stack([expert.down_proj.weight for expert in experts])
    weights.setdefault("lm_head.weight", model.embed_tokens.weight)
    reference.load_state_dict(weights)
    return reference


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_equal_to_mixtral(tied):
    model = make_model(replace(SPARSE, tie_word_embeddings=tied, num_key_value_heads=2, init_std=0.1))
    ids = make_ids(SPARSE, 3, 11)
    assert_close(model(ids), mixtral(model)(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cached_equals_uncached():
    model, ids = make_model(SPARSE), make_ids(SPARSE, 2, 12)
    cache = KVCache(12)
    parts = [model(part, cache) for part in ids.split([5, 1, 1, 5], dim=1)]
    # logits reach 20 here and are sums of dozens of float32 products
    assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-4, rtol=1e-4)


# Balance loss


def probabilities_of(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def transformers_balance_loss(*layers: torch.Tensor, visits: int) -> torch.Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(tuple(p.log() for p in layers), layers[0].shape[-1], visits)


def of(probabilities: torch.Tensor, visits: int = 2) -> torch.Tensor:
    return load_balance_loss(probabilities, probabilities.topk(visits).indices)


@given(
    tokens=st.integers(1, 40), experts=st.integers(2, 8), visits=st.integers(1, 2), seed=st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_balance_loss_equals_transformers(tokens, experts, visits, seed):
    probabilities = probabilities_of(tokens, experts, seed)
    assert_close(of(probabilities, visits), transformers_balance_loss(probabilities, visits=visits))


def test_transformers_pools_the_layers_and_misses_what_cancels():
    """One layer's crowded experts are the other's idle ones: pooled, the load looks even."""
    first = torch.tensor([[0.4, 0.4, 0.1, 0.1]]).expand(6, 4)
    second = first.flip(-1)
    assert_close(transformers_balance_loss(first, second, visits=2), torch.tensor(2.0))
    assert_close((of(first) + of(second)) / 2, torch.tensor(4 * 2 * 0.4))
    assert_close(transformers_balance_loss(first, second, visits=2), of(torch.cat([first, second])))
    assert_close(transformers_balance_loss(first, first, visits=2), (of(first) + of(first)) / 2)


def test_balance_loss_at_its_ends():
    even = torch.eye(4).repeat(3, 1)
    assert of(even, 1).item() == pytest.approx(1.0)
    assert of(torch.eye(4)[[1] * 12], 1).item() == pytest.approx(4.0)
    assert of(torch.full((5, 4), 0.25), 4).item() == pytest.approx(4.0), "all visit all"


def test_balance_loss_has_a_gradient_that_counts_have_not():
    """Counts alone can be looked at, but nothing can be learned from them."""
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(3), requires_grad=True)
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(2).indices
    shares = F.one_hot(chosen, 4).sum((0, 1)) / 20
    by_counts_only = 4 * (shares * shares / 2).sum()
    assert not by_counts_only.requires_grad
    assert by_counts_only != load_balance_loss(probabilities, chosen)
    load_balance_loss(probabilities, chosen).backward()
    (step,) = torch.autograd.grad(load_balance_loss(logits.softmax(-1), chosen), logits)
    assert_close(logits.grad, step)
    pushed = (logits - 10 * step).softmax(-1).mean(0) - probabilities.mean(0)
    assert pushed[shares.argmax()] < 0 < pushed[shares.argmin()], "the crowded expert loses probability"


# What cannot be


@pytest.mark.parametrize(
    ("make_it", "sentence"),
    [
        (lambda: MixtureConfig(2, 3), "visits 3 of 2 experts"),
        (lambda: MixtureConfig(8, 2, balance_loss_weight=-1), "balance_loss_weight is -1; expected a number"),
    ],
)
def test_impossible_mixtures(make_it, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_it()
