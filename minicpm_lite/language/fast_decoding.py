"""A decoder for decoding on a CPU: the same weights, multiplied by kernels that read them once.

    fast = fast_decoding(model)         shares every weight with the model, which stays as it is
    generate(fast, ids, 100)

A step of decoding multiplies one row, or a few guesses or rows of a batch, by every matrix. The time it takes
is that of reading the matrices, if they are read once; PyTorch's layer reads them several times for 2 to 16
rows (see `minicpm_lite.kernels`).

Choices, and the traps behind them:

- A copy, since a decoder that was changed inside is none that `save_pretrained` writes. It costs no memory:
  what the model learns later, the copy knows.
- A tied output layer is the embedding table, and a fifth of SmolLM2-135M's weights. In the copy it is a layer
  that holds the table, ``lm_head``.
- Where a gradient is wanted, the layers are PyTorch's. So the copy can be trained, as slowly as the model.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .. import kernels
from .decoder import Decoder
from .layers import replace_linears

__all__ = ["FewRowsLinear", "fast_decoding"]


class FewRowsLinear(nn.Linear):
    """A linear layer without a bias that multiplies few rows by `kernels.linear`.

    Args:
        weight: float32, shared with whoever has it.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch outputs"]:
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return F.linear(x, self.weight)
        return kernels.linear(x, self.weight, "F32")

    @staticmethod
    def side_by_side(
        x: Float[Tensor, "*batch d"], layers: Sequence["FewRowsLinear"]
    ) -> tuple[Float[Tensor, "*batch _outputs"], ...]:
        """What each of some such layers makes of one input."""
        return kernels.linears(x, [layer.weight for layer in layers], "F32")


def fast_decoding(model: Decoder) -> Decoder:
    """A copy that shares the model's weights and whose linear layers are made for few rows.

    Layers that are no plain linear ones, or have a bias, stay as they are.

    Raises:
        ValueError: the weights are not float32 on a CPU.
    """
    table = model.embed_tokens.weight
    if table.dtype != torch.float32 or table.device.type != "cpu":
        raise ValueError(
            f"The weights are {table.dtype} on {table.device}; the kernels multiply float32 on a CPU. Give "
            "model.float().cpu(), or decode with the model as it is."
        )
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    fast = copy.deepcopy(model, shared)
    replace_linears(fast, lambda name, linear: FewRowsLinear(linear.weight) if _is_plain(linear) else linear)
    if fast.lm_head is None:
        fast.lm_head = FewRowsLinear(fast.embed_tokens.weight)
    return fast


def _is_plain(linear: nn.Module) -> bool:
    return type(linear) is nn.Linear and linear.bias is None
