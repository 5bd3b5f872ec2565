"""Mixture of experts: equal to the loop over tokens that defines it, and to transformers' Mixtral."""

import ast
import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from minicpm_lite import load_config
from minicpm_lite.config import MixtureConfig, ModelConfig
from minicpm_lite.language.decoder import Decoder, KVCache
from minicpm_lite.language.moe import (
    MixtureOfExperts,
    balance_loss,
    expert_load,
    load_balance_loss,
    num_active_parameters,
    router_probabilities,
    upcycle,
)
from minicpm_lite.training.trainer import Trainer, TrainerConfig, next_token_loss, training_loss
from minicpm_lite.training.wsd import WSD

FIVE_EXPERTS = MixtureConfig(num_experts=5, num_experts_per_token=2)
CONFIG = ModelConfig(32, 48, 2, 4, 50, max_position_embeddings=64, init_std=0.3, mixture=FIVE_EXPERTS)
DENSE = replace(CONFIG, mixture=None, scale_emb=12, scale_depth=1.4, dim_model_base=16, init_std=0.1)


def make(config: ModelConfig, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(config).eval()


def make_ids(batch: int = 3, tokens: int = 11) -> torch.Tensor:
    return torch.randint(50, (batch, tokens), generator=torch.Generator().manual_seed(1))


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
    config = replace(CONFIG, mixture=MixtureConfig(num_experts, visits))
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
    model = make(replace(CONFIG, tie_word_embeddings=tied, num_key_value_heads=2, init_std=0.1))
    ids = make_ids()
    assert_close(model(ids), mixtral(model)(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cached_equals_uncached():
    model, ids = make(CONFIG), make_ids(2, 12)
    cache = KVCache(12)
    parts = [model(part, cache) for part in ids.split([5, 1, 1, 5], dim=1)]
    # logits reach 20 here and are sums of dozens of float32 products
    assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-4, rtol=1e-4)


def test_parameters_that_one_token_uses():
    with torch.device("meta"):
        sparse, dense = Decoder(load_config("minicpm-moe-8x2b")), Decoder(load_config("minicpm-2.4b"))
    one_expert = 40 * 3 * 2304 * 5760
    assert num_active_parameters(sparse) == dense.num_parameters() + one_expert + 40 * 8 * 2304
    assert num_active_parameters(sparse) == 4_035_320_064  # published: about 4B
    assert sparse.num_parameters() == 13_590_468_864  # published: 13.6B
    assert num_active_parameters(sparse, embeddings=True) == 4_035_320_064 + 122_753 * 2304
    assert num_active_parameters(dense) == dense.num_parameters()


def test_parameters_that_one_token_uses_are_those_with_a_gradient():
    model = make(replace(CONFIG, tie_word_embeddings=False))
    model(make_ids(1, 1)).square().sum().backward()
    used = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and p.grad.any())
    assert used == num_active_parameters(model) + model.lm_head.weight.numel()


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


def test_a_model_keeps_the_balance_loss_of_its_last_training_pass():
    model, ids = make(CONFIG), make_ids()
    layers = router_probabilities(model, ids).flatten(1, 2)
    with pytest.raises(ValueError, match="forward pass in training mode, and there was none yet"):
        model(ids), balance_loss(model)
    model.train()(ids)
    assert_close(balance_loss(model), (of(layers[0]) + of(layers[1])) / 2)
    balance_loss(model).backward()
    assert all(layer.mlp.gate.weight.grad.any() for layer in model.layers)
    twin = copy.deepcopy(model)  # a branch of a run
    assert twin.layers[0].mlp.balance_loss is None and model.layers[0].mlp.balance_loss is not None


def test_expert_load_counts_the_visits_of_the_forward_pass():
    model, ids = make(CONFIG), make_ids()
    counts = torch.zeros(2, 5)
    for layer, block in enumerate(model.layers):
        for index, expert in enumerate(block.mlp.experts):
            expert.register_forward_pre_hook(
                lambda expert, inputs, at=(layer, index): counts.__setitem__(at, len(inputs[0]))
            )
    load = expert_load(model, ids)
    assert_close(load, counts / ids.numel())
    assert_close(load.sum(1), torch.full((2,), 2.0))
    probabilities = router_probabilities(model, ids)
    assert probabilities.shape == (2, 3, 11, 5) and not probabilities.requires_grad
    assert_close(probabilities.sum(-1), torch.ones(2, 3, 11))
    assert not model.layers[0].mlp.gate._forward_hooks, "nothing is left on the model"


# Upcycling


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("visits", [1, 2, 5])
@torch.no_grad()
def test_upcycled_equals_dense(tied, visits):
    dense, ids = make(replace(DENSE, tie_word_embeddings=tied)), make_ids()
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    sparse = upcycle(dense, MixtureConfig(5, visits))
    assert sparse.config == replace(dense.config, mixture=MixtureConfig(5, visits))
    assert (sparse.lm_head is None) == tied and not sparse.training
    assert_close(sparse.double()(ids), dense.double()(ids), atol=1e-12, rtol=1e-6)
    dense.float()
    sparse.embed_tokens.weight.zero_(), sparse.layers[0].mlp.experts[0].up_proj.weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in dense.state_dict().items())
    assert sparse.layers[0].mlp.experts[1].up_proj.weight.any(), "experts share no memory"


@torch.no_grad()
def test_a_new_network_among_the_experts_is_told_apart():
    """The mistake: experts, or one of them, drawn anew instead of copied."""
    dense, ids = make(DENSE), make_ids()
    sparse = upcycle(dense, FIVE_EXPERTS)
    fresh = Decoder(sparse.config)
    for layer, new in zip(sparse.layers, fresh.layers, strict=True):
        layer.mlp.experts[3].load_state_dict(new.mlp.experts[3].state_dict())
    assert (sparse(ids) - dense(ids)).abs().max() > 1e-2


@torch.no_grad()
def test_routers_are_drawn_with_the_given_deviation():
    wide = replace(DENSE, hidden_size=512)
    torch.manual_seed(0)
    for layer in upcycle(Decoder(wide), MixtureConfig(8, 2)).layers:
        assert layer.mlp.gate.weight.std().item() == pytest.approx(0.1, rel=0.05)  # 4,096 draws: 1.1 %
    routers = [upcycle(make(DENSE), FIVE_EXPERTS, router_std=2.0).layers[0].mlp.gate.weight for _ in "ab"]
    assert torch.equal(*routers) and routers[0].std() > 1, "the global seed decides"


def test_the_first_gradient_of_an_upcycled_model():
    """The experts' gradients add up to the dense network's, and the text says nothing to the router yet."""
    dense, ids = make(DENSE).double(), make_ids()
    sparse = upcycle(dense, FIVE_EXPERTS)
    next_token_loss(dense, ids).backward(), next_token_loss(sparse, ids).backward()
    for block, split in zip(dense.layers, sparse.layers, strict=True):
        for name, weight in block.mlp.named_parameters():
            parts = [expert.get_parameter(name).grad for expert in split.mlp.experts]
            assert_close(sum(parts), weight.grad, atol=1e-12, rtol=1e-6)
        assert split.mlp.gate.weight.grad.abs().max() < 1e-10
        assert weight.grad.abs().max() > 1e-4


# Training

TOKENS = (torch.arange(3000) * 7 // 3) % 50
SCHEDULE = WSD(peak_lr=0.01, warmup_steps=2, stable_steps=10, decay_steps=3)
TRAINER = TrainerConfig(batch_size=4, sequence_length=16)


def trained(weight: float, until: int, config: TrainerConfig = TRAINER) -> Trainer:
    mixture = replace(FIVE_EXPERTS, balance_loss_weight=weight)
    run = Trainer(upcycle(make(DENSE), mixture, router_std=1.0), TOKENS, SCHEDULE, config)
    run.train(until, progress=False)
    return run


def test_the_trainer_adds_the_balance_loss_and_does_not_report_it():
    window = TOKENS[None, :17]
    model = upcycle(make(DENSE), FIVE_EXPERTS).train()
    minimised, reported = training_loss(model, window)
    assert reported == next_token_loss(model, window)
    assert_close(minimised, reported + 0.01 * balance_loss(model))
    model.config = replace(model.config, mixture=replace(FIVE_EXPERTS, balance_loss_weight=0))
    assert training_loss(model, window)[0] == reported
    dense = make(DENSE)
    assert training_loss(dense, window)[0] == next_token_loss(dense, window)

    without, heavy = trained(0, 12), trained(10.0, 12)
    assert without.losses[0] == heavy.losses[0], "what is reported is the next-token loss alone"
    assert without.losses[1:] != heavy.losses[1:]
    for run in (without, heavy):
        run.model.train()(TOKENS[:320].view(5, 64))
    assert balance_loss(heavy.model) < balance_loss(without.model) - 0.02
    heavy.model.layers[0].mlp.balance_loss = None
    heavy.evaluate(TOKENS[:100])
    assert heavy.model.layers[0].mlp.balance_loss is None, "evaluation neither computes nor adds it"


def test_a_mixture_resumes_bit_for_bit_and_branches(tmp_path):
    whole = trained(0.01, 8)
    trained(0.01, 3).save(tmp_path / "run.safetensors")
    resumed = trained(0.01, 0)
    resumed.load(tmp_path / "run.safetensors")
    branch = resumed.branch(SCHEDULE)
    for run in (resumed, branch):
        run.train(8, progress=False)
        assert run.losses == whole.losses
        for mine, theirs in zip(run.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_bfloat16_trains_experts_like_float32():
    """Router and sums stay in float32; the experts' products round to three digits."""
    half = trained(0.01, 4, replace(TRAINER, precision="bfloat16"))
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert half.losses == pytest.approx(trained(0.01, 4).losses, rel=0.02)


COMPILED = """
import sys
sys.path[:0] = {path!r}
from test_moe import TRAINER, replace, trained
run = trained(0.5, 6, replace(TRAINER, compile=True))
print([run.losses, run.grad_norms])
"""


@pytest.mark.slow  # about 20 s: the compiler starts; in a process without the shape checks, which it cannot compile
def test_compiled_training_equals_eager():
    script = COMPILED.format(path=[os.path.dirname(__file__)])
    printed = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    losses, norms = ast.literal_eval(printed)
    eager = trained(0.5, 6)
    assert losses == pytest.approx(eager.losses, abs=1e-4)
    assert norms == pytest.approx(eager.grad_norms, rel=1e-3)


# What cannot be


@pytest.mark.parametrize(
    ("make_it", "sentence"),
    [
        (lambda: MixtureConfig(2, 3), "visits 3 of 2 experts"),
        (lambda: MixtureConfig(8, 2, balance_loss_weight=-1), "balance_loss_weight is -1; expected a number"),
        (lambda: upcycle(make(CONFIG), FIVE_EXPERTS), "already has 5 experts in each layer"),
        (lambda: upcycle(make(DENSE), FIVE_EXPERTS, router_std=-0.1), "router_std is -0.1; expected"),
        (lambda: expert_load(make(DENSE), make_ids()), "no experts. Give ModelConfig a mixture"),
        (lambda: balance_loss(make(DENSE)), "no experts. Give ModelConfig a mixture"),
    ],
)
def test_impossible_mixtures(make_it, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_it()


def test_counting_the_load_leaves_the_balance_loss_of_the_last_step():
    model, ids = Decoder(CONFIG).train(), torch.arange(20).view(2, 10)
    model(ids)
    before = balance_loss(model)
    expert_load(model, ids.flip(1))
    assert balance_loss(model).requires_grad and torch.equal(balance_loss(model), before)
