"""Models with experts: how evenly they are loaded, what a token uses, and how a dense model becomes one.

    balance_loss(model)          mean over the layers, to be added to the loss
    router_probabilities, expert_load, num_active_parameters
    upcycle(model, mixture)      every expert starts as a copy of the dense feed-forward network

Source: Hu et al. 2024, arXiv 2404.06395, section 7.3; Komatsuzaki et al. 2022, arXiv 2212.05055. The layer
itself, with its choices and traps, is in `moe`.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import MixtureConfig, require_positive_number
from .decoder import Decoder, require_plain
from .moe import MixtureOfExperts
from .scoring import evaluating

__all__ = ["balance_loss", "expert_load", "num_active_parameters", "router_probabilities", "upcycle"]


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
        mixture.register_forward_pre_hook(lambda each, inputs: seen.append(each.probabilities(*inputs)))
        for mixture in _mixtures(model)
    ]
    try:
        with evaluating(model):
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


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
        ValueError: the model already has experts, or was changed inside.
    """
    if model.config.mixture is not None:
        raise ValueError(
            f"This model already has {model.config.mixture.num_experts} experts in each layer; upcycling "
            "starts from a dense model."
        )
    require_positive_number("router_std", router_std)
    require_plain(model)
    sparse = Decoder(replace(model.config, mixture=mixture)).to(model.embed_tokens.weight)
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
