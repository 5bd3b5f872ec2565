"""Mixture of experts: equal to the loop over tokens that defines it."""

import pytest
import torch
from torch.testing import assert_close

from minicpm_lite.config import MixtureConfig, ModelConfig
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.moe import MixtureOfExperts

CONFIG = ModelConfig(
    32, 48, 2, 4, 50, init_std=0.3, mixture=MixtureConfig(num_experts=5, num_experts_per_token=2)
)


def token_by_token(mixture: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for index in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])):
        token = x[tuple(index)]
        probabilities = mixture.gate(token).softmax(-1)
        best = probabilities.argsort(descending=True)[:2]
        out[tuple(index)] = sum(
            probabilities[e] / probabilities[best].sum() * mixture.experts[e](token) for e in best.tolist()
        )
    return out


@torch.no_grad()
def test_equal_to_the_loop_over_tokens():
    torch.manual_seed(0)
    mixture = Decoder(CONFIG).layers[0].mlp
    x = torch.randn(3, 7, 32)
    assert_close(mixture(x), token_by_token(mixture, x), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_copies_of_one_network_are_that_network():
    torch.manual_seed(0)
    mixture = Decoder(CONFIG).layers[0].mlp
    for expert in mixture.experts:
        expert.load_state_dict(mixture.experts[0].state_dict())
    x = torch.randn(2, 5, 32)
    assert_close(mixture(x), mixture.experts[0](x), atol=1e-6, rtol=1e-5)


def test_more_visits_than_experts_are_refused():
    with pytest.raises(ValueError, match="visits 3 of 2 experts"):
        ModelConfig(32, 48, 2, 4, 50, mixture=MixtureConfig(num_experts=2, num_experts_per_token=3))
