"""Mixture of experts of MiniCPM-MoE: each token visits the best few of many feed-forward networks.

    w = softmax(router(x));  keep the num_experts_per_token largest, rescaled to sum to 1
    y = sum_e w_e * expert_e(x)

Source: Hu et al. 2024, arXiv 2404.06395, section 7.3; released modelling code (softmax, then top-k, then
rescale).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import ModelConfig
from .decoder import FeedForward

__all__ = ["MixtureOfExperts"]


class MixtureOfExperts(nn.Module):
    """A router and ``num_experts`` feed-forward networks, of which each token uses a few."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts_per_token = config.mixture.num_experts_per_token
        self.gate = nn.Linear(config.hidden_size, config.mixture.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.mixture.num_experts))

    def forward(self, x: Float[Tensor, "batch tokens d"]) -> Float[Tensor, "batch tokens d"]:
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(dim=-1, dtype=torch.float32).topk(self.experts_per_token)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):  # one call for all tokens of an expert
            token, rank = (chosen == index).nonzero(as_tuple=True)
            out.index_add_(0, token, weights[token, rank, None] * expert(tokens[token]))
        return out.view_as(x)
