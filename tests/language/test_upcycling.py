"""Models with experts: load and balance counted from the forward pass, upcycled equal to dense."""

import copy
from dataclasses import replace

import pytest
import torch
from small_models import DENSE, FIVE_EXPERTS, SPARSE, WithDropout, changed_inside, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite import load_config
from minicpm_lite.config import MixtureConfig
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.layers import replace_linears
from minicpm_lite.language.moe import load_balance_loss
from minicpm_lite.language.scoring import next_token_loss
from minicpm_lite.language.upcycling import (
    balance_loss,
    expert_load,
    num_active_parameters,
    router_probabilities,
    upcycle,
)

# Parameters


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
    model = make_model(replace(SPARSE, tie_word_embeddings=False))
    model(make_ids(SPARSE, 1, 1)).square().sum().backward()
    # a single token has nothing to choose from, so queries and keys get no gradient, or its rounding
    used = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "embed" not in name and (p.grad.any() or "q_proj" in name or "k_proj" in name)
    )
    assert used == num_active_parameters(model) + model.lm_head.weight.numel()


# Balance and load


def of(probabilities: torch.Tensor, visits: int = 2) -> torch.Tensor:
    return load_balance_loss(probabilities, probabilities.topk(visits).indices)


def test_a_model_keeps_the_balance_loss_of_its_last_training_pass():
    model, ids = make_model(SPARSE), make_ids(SPARSE, 3, 11)
    layers = router_probabilities(model, ids).flatten(1, 2)
    with pytest.raises(ValueError, match="forward pass in training mode, and there was none yet"):
        model(ids), balance_loss(model)
    model.train()(ids)
    assert_close(balance_loss(model), (of(layers[0]) + of(layers[1])) / 2)
    balance_loss(model).backward()
    assert all(layer.mlp.gate.weight.grad.any() for layer in model.layers)
    with torch.no_grad():
        model(ids[:, ::2]), router_probabilities(model, ids)
    last = router_probabilities(model, ids[:, ::2]).flatten(1, 2)
    assert_close(balance_loss(model), (of(last[0]) + of(last[1])) / 2)
    twin = copy.deepcopy(model)  # a branch of a run
    assert twin.layers[0].mlp.balance_loss is None and model.layers[0].mlp.balance_loss is not None


def test_expert_load_counts_the_visits_of_the_forward_pass():
    model, ids = make_model(SPARSE), make_ids(SPARSE, 3, 11)
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
    dense, ids = make_model(replace(DENSE, tie_word_embeddings=tied)), make_ids(SPARSE, 3, 11)
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
    dense, ids = make_model(DENSE), make_ids(SPARSE, 3, 11)
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
    routers = [
        upcycle(make_model(DENSE), FIVE_EXPERTS, router_std=2.0).layers[0].mlp.gate.weight for _ in "ab"
    ]
    assert torch.equal(*routers) and routers[0].std() > 1, "the global seed decides"


def test_the_first_gradient_of_an_upcycled_model():
    """The experts' gradients add up to the dense network's, and the text says nothing to the router yet."""
    dense, ids = make_model(DENSE).double(), make_ids(SPARSE, 3, 11)
    sparse = upcycle(dense, FIVE_EXPERTS)
    next_token_loss(dense, ids).backward(), next_token_loss(sparse, ids).backward()
    for block, split in zip(dense.layers, sparse.layers, strict=True):
        for name, weight in block.mlp.named_parameters():
            parts = [expert.get_parameter(name).grad for expert in split.mlp.experts]
            assert_close(sum(parts), weight.grad, atol=1e-12, rtol=1e-6)
        assert split.mlp.gate.weight.grad.abs().max() < 1e-10
        assert weight.grad.abs().max() > 1e-4


# What cannot be


@pytest.mark.parametrize(
    ("make_it", "sentence"),
    [
        (lambda: upcycle(make_model(SPARSE), FIVE_EXPERTS), "already has 5 experts in each layer"),
        (lambda: upcycle(make_model(DENSE), FIVE_EXPERTS, router_std=-0.1), "router_std is -0.1; expected"),
        (
            lambda: expert_load(make_model(DENSE), make_ids(SPARSE, 3, 11)),
            "no experts. Give ModelConfig a mixture",
        ),
        (
            lambda: upcycle(changed_inside(DENSE), FIVE_EXPERTS),
            "changed inside: layers.0.self_attn.q_proj is",
        ),
        (lambda: balance_loss(make_model(DENSE)), "no experts. Give ModelConfig a mixture"),
    ],
)
def test_impossible_mixtures(make_it, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_it()


def test_counting_the_load_leaves_the_balance_loss_of_the_last_step():
    model, ids = Decoder(SPARSE).train(), torch.arange(20).view(2, 10)
    model(ids)
    before = balance_loss(model)
    expert_load(model, ids.flip(1))
    assert balance_loss(model).requires_grad and torch.equal(balance_loss(model), before)


def test_the_load_of_a_model_in_training_is_that_of_one_that_is_not():
    """A router may have an adapter with dropout."""
    model, ids = make_model(SPARSE), make_ids(SPARSE, 3, 11)
    replace_linears(model, lambda name, linear: WithDropout(linear))
    found = router_probabilities(model.train(), ids), expert_load(model, ids)
    assert all(part.training for part in model.modules())
    assert_close(found, (router_probabilities(model.eval(), ids), expert_load(model, ids)), rtol=0, atol=0)
