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
- The balance loss is taken in each layer and averaged over layers. transformers pools the tokens of all
  layers first, so that an overloaded expert in one layer is excused by an idle one of the same number in
  another. Both agree on one layer, and on layers that are loaded alike.
- In training an expert without tokens is called all the same, on none: its gradient is then zero and not
  missing, so every parameter has an optimiser state from the first update on.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import MixtureConfig, ModelConfig, require_positive_number
from .decoder import Decoder, FeedForward

__all__ = [
    "MixtureOfExperts",
    "balance_loss",
    "expert_load",
    "load_balance_loss",
    "num_active_parameters",
    "router_probabilities",
    "upcycle",
]


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
        probabilities = _probabilities(self.gate(tokens))
        weights, chosen = probabilities.topk(self.experts_per_token)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.training and torch.is_grad_enabled():
            self.balance_loss = load_balance_loss(probabilities, chosen)
        return self._visit(tokens, weights.to(x.dtype), chosen).view_as(x)

    @torch.compiler.disable  # how many tokens an expert gets is known only when they come
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


def _probabilities(router_logits: Tensor) -> Tensor:
    """Softmax over the experts, in float32 or better: rounding must not decide who is chosen."""
    return router_logits.softmax(dim=-1, dtype=torch.promote_types(router_logits.dtype, torch.float32))


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


def balance_loss(model: Decoder) -> Float[Tensor, ""]:
    """Mean over the layers of `load_balance_loss`, at the model's last forward pass in training mode.

    Raises:
        ValueError: the model has no experts, or has not run in training mode yet.
    """
    losses = [mixture.balance_loss for mixture in _mixtures(model)]
    if any(loss is None for loss in losses):
        raise ValueError(
            "The balance loss belongs to a forward pass in training mode, and there was none yet: call "
            "model.train() and then the model."
        )
    return torch.stack(losses).mean()


@torch.no_grad()
def router_probabilities(
    model: Decoder, ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "layers batch tokens experts"]:
    """What each layer's router gives each expert, before the best are taken; sums to 1 over the experts.

    Raises:
        ValueError: the model has no experts.
    """
    seen: list[Tensor] = []
    hooks = [
        mixture.gate.register_forward_hook(lambda gate, inputs, logits: seen.append(logits))
        for mixture in _mixtures(model)
    ]
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([_probabilities(logits).unflatten(0, ids.shape) for logits in seen])


def expert_load(model: Decoder, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "layers experts"]:
    """Share of the tokens that visit each expert, layer by layer; a row sums to ``num_experts_per_token``.

    With 8 experts and 2 visits an even load is 0.25 everywhere.

    Raises:
        ValueError: the model has no experts.
    """
    probabilities = router_probabilities(model, ids).flatten(1, 2)  # (layers, batch * tokens, experts)
    mixture = model.config.mixture
    chosen = probabilities.topk(mixture.num_experts_per_token).indices
    return F.one_hot(chosen, mixture.num_experts).sum(dim=2).float().mean(dim=1)


def num_active_parameters(model: Decoder, embeddings: bool = False) -> int:
    """Parameters that one token uses: those of the experts it does not visit are left out.

    Without experts this is ``model.num_parameters``. ``embeddings`` as there.

    >>> from minicpm_lite import load_config
    >>> with torch.device("meta"):
    ...     model = Decoder(load_config("minicpm-moe-8x2b"))
    >>> model.num_parameters(), num_active_parameters(model)
    (13590468864, 4035320064)
    """
    total = model.num_parameters(embeddings)
    if model.config.mixture is None:
        return total
    idle = model.config.mixture.num_experts - model.config.mixture.num_experts_per_token
    return total - idle * sum(
        parameter.numel() for mixture in _mixtures(model) for parameter in mixture.experts[0].parameters()
    )


@torch.no_grad()
def upcycle(model: Decoder, mixture: MixtureConfig, router_std: float = 0.1) -> Decoder:
    """A mixture of experts that starts as the dense model: sparse upcycling.

    Each feed-forward network is copied to every expert and everything else is copied once, so the logits are
    those of the dense model until the first update. Only the routers are new, drawn from a normal
    distribution by torch's global generator. Sources: Komatsuzaki et al. 2022, arXiv 2212.05055; Hu et al.
    2024, arXiv 2404.06395, section 7.3 (router variance 0.01).

    Args:
        model: a dense decoder; it is left as it is.
        mixture: how many experts, and how many of them a token visits.
        router_std: standard deviation of the routers' weights.

    Raises:
        ValueError: the model already has experts.
    """
    if model.config.mixture is not None:
        raise ValueError(
            f"This model already has {model.config.mixture.num_experts} experts in each layer; upcycling "
            "starts from a dense model."
        )
    require_positive_number("router_std", router_std)
    sparse = Decoder(replace(model.config, mixture=mixture), model.attention).to(model.embed_tokens.weight)
    weights = {}
    for name, weight in model.state_dict().items():
        before, is_feed_forward, after = name.partition(".mlp.")
        if is_feed_forward:
            weights |= {f"{before}.mlp.experts.{e}.{after}": weight for e in range(mixture.num_experts)}
        else:
            weights[name] = weight
    for name, weight in sparse.state_dict().items():
        if name.endswith(".mlp.gate.weight"):
            weights[name] = nn.init.normal_(weight, std=router_std)
    sparse.load_state_dict(weights)
    return sparse.train(model.training)


def _mixtures(model: Decoder) -> list[MixtureOfExperts]:
    if model.config.mixture is None:
        raise ValueError(
            "This model has one feed-forward network in each layer and no experts. Give ModelConfig a "
            "mixture, or make experts from it with upcycle."
        )
    return [layer.mlp for layer in model.layers]
