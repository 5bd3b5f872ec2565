"""Mixture of experts of MiniCPM-MoE: each token visits the best few of many feed-forward networks.

    p = softmax(router(x));  w = the num_experts_per_token largest, rescaled to sum to 1
    y = sum_e w_e * expert_e(x)
    balance loss = num_experts * sum_e (share of tokens that visit e) * (mean of p_e)

Source: Hu et al. 2024, arXiv 2404.06395, section 7.3 (8 experts, top 2, sparse upcycling, balance loss times
0.01); released modelling code (softmax, then top-k, then rescale).

Choices, and the traps behind them:

- Tokens are sorted by expert once, so each expert is called once, on a contiguous slice. There is no loop
  over tokens. That step depends on the data, so it is left out of compiled graphs; the rest is compiled.
- Rescaling is what makes copies of one network equal to that network, and so upcycling exact.
- With one visit a token the rescaled weight is 1 whatever the router says, and the loss has no gradient for
  it: it learns the balance alone. (Switch Transformers, of one visit, multiply by p itself.)
- The balance loss is taken in each layer and averaged over layers. transformers pools the tokens of all
  layers first, so that an overloaded expert in one layer is excused by an idle one of the same number in
  another. Both agree on one layer, and on layers that are loaded alike.
- All tokens of a call count for the balance, also padding behind a short conversation, as in transformers
  where no mask is given. It visits the experts that its token visits, so pack conversations tightly.
- In training an expert without tokens is called all the same, on none: its gradient is then zero and not
  missing, so every parameter has an optimiser state from the first update on.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import ModelConfig
from .layers import FeedForward

__all__ = ["MixtureOfExperts", "load_balance_loss"]


class MixtureOfExperts(nn.Module):
    """A router and ``num_experts`` feed-forward networks, of which each token uses a few.

    Attributes:
        gate: the router, one row for each expert.
        experts: the feed-forward networks.
        balance_loss: `load_balance_loss` of the last forward pass in training mode; None before the first.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts_per_token = config.mixture.num_experts_per_token
        self.gate = nn.Linear(config.hidden_size, config.mixture.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.mixture.num_experts))
        self.balance_loss: Tensor | None = None

    def forward(self, x: Float[Tensor, "batch tokens d"]) -> Float[Tensor, "batch tokens d"]:
        tokens = x.flatten(0, 1)  # (batch * tokens, d)
        probabilities = self.probabilities(tokens)
        weights, chosen = probabilities.topk(self.experts_per_token)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.training:
            self.balance_loss = load_balance_loss(probabilities, chosen)
        return self._visit(tokens, weights.to(x.dtype), chosen).view_as(x)

    def probabilities(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch experts"]:
        """The router's softmax, in float32 or better: rounding must not decide who is chosen."""
        logits = self.gate(x)
        return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    # `torch.compiler.disable`, which imports the compiler, a second, only when something is compiled
    @torch._disable_dynamo  # how many tokens an expert gets is known only when they come
    def _visit(
        self,
        tokens: Float[Tensor, "tokens d"],
        weights: Float[Tensor, "tokens visits"],
        chosen: Int[Tensor, "tokens visits"],
    ) -> Float[Tensor, "tokens d"]:
        """The weighted sum of the chosen experts' outputs, for each token."""
        by_expert = chosen.flatten().argsort(stable=True)  # visits, those of expert 0 first
        visitor = by_expert // self.experts_per_token  # the token of each visit
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        slices = tokens.index_select(0, visitor).split(counts)
        outputs = torch.cat(
            [
                expert(part) if len(part) or torch.is_grad_enabled() else part
                for expert, part in zip(self.experts, slices, strict=True)
            ]
        )
        weighted = (outputs * weights.flatten()[by_expert, None]).to(tokens.dtype)
        return torch.zeros_like(tokens).index_add_(0, visitor, weighted)

    def __getstate__(self) -> dict:
        # the balance loss hangs on a graph, which no copy can take along
        return super().__getstate__() | {"balance_loss": None}


def load_balance_loss(
    probabilities: Float[Tensor, "tokens experts"], chosen: Int[Tensor, "tokens visits"]
) -> Float[Tensor, ""]:
    """How unevenly a router spreads its tokens: ``visits`` if evenly, up to ``experts`` if all go to one.

    num_experts * sum_e (share of tokens that visit e) * (mean probability of e). The shares are counts and
    have no gradient; the mean probabilities have one, and it is largest for the experts with the most tokens.
    Source: Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6, with several visits for each token.

    Args:
        probabilities: the router's softmax over all experts.
        chosen: the experts that each token visits.

    >>> even = torch.full((4, 4), 0.25)
    >>> load_balance_loss(even, torch.tensor([[0], [1], [2], [3]])).item()
    1.0
    >>> load_balance_loss(torch.eye(4)[[2, 2, 2, 2]], torch.full((4, 1), 2)).item()
    4.0
    """
    tokens, experts = probabilities.shape
    shares = F.one_hot(chosen, experts).sum(dim=(0, 1)) / tokens
    return experts * (shares * probabilities.mean(dim=0)).sum()
