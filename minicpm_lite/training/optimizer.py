"""AdamW for any module: which parameters it moves, at which rate, and which of them are decayed.

    matrices    weight decay; with µP the rate is divided by the width ratio of the decoder they belong to
    tables      embeddings and output layers: no decay, the rate itself
    norms       all that is a vector or a number: no decay, the rate itself

Source of the rates: Hu et al. 2024, "MiniCPM", arXiv 2404.06395, appendix A.1, Table 7.

Choices, and the traps behind them:

- Frozen parameters (``requires_grad=False``) are in no group: they have no moments, and weight decay must not
  move them.
- A module may hold decoders of different width, or matrices that belong to none (a vision tower). Each matrix
  follows its own decoder; without one its ratio is 1.
- A group knows its part of the schedule's rate, ``lr_ratio``. So a run goes on under a schedule with another
  peak, and the groups keep their ratios.
"""

from torch import nn
from torch.optim import AdamW

from ..config import require_positive_number
from ..language.decoder import Decoder
from .settings import TrainerConfig

__all__ = ["adamw", "mup_groups", "parameter_groups"]

_KINDS = ("matrices", "tables", "norms")


def adamw(model: nn.Module, config: TrainerConfig, peak_lr: float) -> AdamW:
    """The optimiser of a run.

    Raises:
        ValueError: every parameter is frozen.
    """
    return AdamW(parameter_groups(model, config, peak_lr), betas=config.betas, fused=True)


def parameter_groups(model: nn.Module, config: TrainerConfig, peak_lr: float) -> list[dict]:
    """Parameter groups for an optimiser: matrices with weight decay; tables and norms without.

    Each group's own ``lr`` is its peak: the schedule's, or what µP makes of it. ``lr_ratio`` is the one over
    the other.

    Raises:
        ValueError: every parameter is frozen.
    """
    groups = mup_groups(model, peak_lr, config.weight_decay)
    if config.parametrization == "standard":
        groups = [group | {"lr": peak_lr} for group in groups]
    return [group | {"lr_ratio": group["lr"] / peak_lr} for group in groups]


def mup_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict]:
    """Parameter groups for Adam or AdamW with the learning rates of Table 7.

    Args:
        model: any module; frozen parameters are left out.
        lr: the rate at the base width.
        weight_decay: of the matrices; tables and norms are not decayed.

    Returns:
        For a decoder three groups, each with ``name``, ``params``, ``lr`` and ``weight_decay``: the matrices
        with the rate divided by ``config.width_ratio``, the width over the base width; the tables (embedding
        and output layer) and the norms with ``lr`` itself. Another module has a group of matrices for each
        width ratio in it.

    Raises:
        ValueError: every parameter is frozen.

    Source: Hu et al. 2024, arXiv 2404.06395, appendix A.1, Table 7.
    """
    require_positive_number("lr", lr)
    if weight_decay != 0:
        require_positive_number("weight_decay", weight_decay)
    tables, ratios = set(), {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tables.add(module.weight)
        if isinstance(module, Decoder):
            tables.update(module.tables)
            ratios |= dict.fromkeys(module.parameters(), module.config.width_ratio)
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        kind = "tables" if parameter in tables else "matrices" if parameter.ndim >= 2 else "norms"
        ratio = ratios.get(parameter, 1.0) if kind == "matrices" else 1.0
        groups.setdefault((kind, ratio), []).append(parameter)
    if not groups:
        raise ValueError(
            "There is nothing to train: every parameter of the model is frozen (requires_grad is False)."
        )
    return [
        {
            "name": kind,
            "params": parameters,
            "lr": lr / ratio,
            "weight_decay": weight_decay if kind == "matrices" else 0.0,
        }
        for (kind, ratio), parameters in sorted(groups.items(), key=lambda group: _KINDS.index(group[0][0]))
    ]
