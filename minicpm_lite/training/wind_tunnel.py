"""The wind tunnel: find out on small models what a large one needs."""

from torch import nn

from ..config import require_positive_number
from ..language.decoder import Decoder

__all__ = ["mup_groups"]


def mup_groups(model: Decoder, lr: float, weight_decay: float = 0.0) -> list[dict]:
    """Parameter groups for Adam or AdamW with the learning rates of Table 7.

    Args:
        model: its ``config.width_ratio`` is the width over the base width.
        lr: the rate at the base width.
        weight_decay: of the matrices; tables and norms are not decayed.

    Returns:
        Three groups, each with ``name``, ``params``, ``lr`` and ``weight_decay``: the matrices with the rate
        divided by the width ratio; the tables (embedding and output layer) and the norms with ``lr`` itself.

    Source: Hu et al. 2024, arXiv 2404.06395, appendix A.1, Table 7.
    """
    require_positive_number("lr", lr)
    if weight_decay != 0:
        require_positive_number("weight_decay", weight_decay)
    tables = {id(table) for table in model.tables}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "tables": [], "norms": []}
    for parameter in model.parameters():
        kind = "tables" if id(parameter) in tables else "matrices" if parameter.ndim >= 2 else "norms"
        groups[kind].append(parameter)
    rates = {"matrices": lr / model.config.width_ratio, "tables": lr, "norms": lr}
    decays = {"matrices": weight_decay, "tables": 0.0, "norms": 0.0}
    return [
        {"name": name, "params": parameters, "lr": rates[name], "weight_decay": decays[name]}
        for name, parameters in groups.items()
    ]
