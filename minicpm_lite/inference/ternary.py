"""Ternary weights (BitCPM): each is -1, 0 or 1 times a scale that a group shares, and training knows it.

    s = mean |W| of a group, but at least a little
    ternary(W) = s * clamp(round(W / s), -1, 1)         0 where |W| is below half the mean
    forward:   y = ternary(W) x
    backward:  the gradient goes to W as if ternary(W) were W (straight-through)

Rounding a trained model to three values destroys it; a model that is trained with rounded weights, from the
start or from a checkpoint, learns to do with them. The weights that it learns (``latent``) are in float32 and
are thrown away at the end.

    make_ternary(model, group)  ->  Trainer …  ->  pack_ternary(model, "TQ2_0")

Sources: Ma et al. 2024, "BitNet b1.58", arXiv 2402.17764, one group a matrix; BitCPM-CANN report, section
3.2, groups and the scale from statistics, not learned; MiniCPM4 report, arXiv 2506.07900, section 3.3: from a
checkpoint, activations stay as they are.

Choices, and the traps behind them:

- The scale is not left out: without it a layer would have another size than the one it started from. Nor is
  the threshold a constant of the matrix's largest weight; it is half the mean of the group.
- The scale is rounded to float16 while training, as it will be stored. So packing changes no bit of the
  weights. What a packed layer computes is another matter: `kernels.linear` rounds its inputs to 8 bits for
  TQ2_0, as for all that it knows; TQ1_0, which it does not know, is unpacked and computes as before.
- With ``precision="bfloat16"`` training sees the latent weights rounded. What is packed is made of the whole
  ones: one code in some thousands differs, and the scale by up to 0.3 %.
- TQ1_0 and TQ2_0 hold one scale for 256 weights of a row. A group of a row, of a whole matrix, or of a
  multiple of 256 columns fits them without loss; groups of 32 or 64, with which models train a little better,
  do not.
- log2(3) = 1.58 bits is what three values need. TQ1_0 stores 1.69 bits a weight, TQ2_0 2.06, and tables and
  norms come on top: see `minicpm_lite.inference.packed.true_bits`.
- The layer's ``weight`` is what multiplies, as `replace_linears` asks; what is trained is ``latent``.
- Routers and output layers stay as they are.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..language.decoder import Decoder
from ..language.fast_decoding import FewRowsLinear
from ..language.layers import replace_linears
from .packed import freeze, put_packed, require_plain_layer
from .quantization import dequantize, quantize

__all__ = ["TernaryLinear", "make_ternary", "pack_ternary", "ternarize", "ternary_product"]

Group = int | Literal["row", "matrix"]
_SMALLEST = 1e-5  # of a scale; float16 holds it to 1%


def ternarize(
    weight: Float[Tensor, "rows columns"], group: Group = "row"
) -> tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows groups"]]:
    """The codes -1, 0 and 1 of a matrix, and the scale of each group.

    Args:
        weight: the matrix.
        group: how many columns of a row share a scale; "row" for all of them, "matrix" for one in all.

    Returns:
        The codes, as whole numbers of 8 bits; the scales, those of a row's groups in their order, each a
        float16 in float32.

    Raises:
        ValueError: rows that do not divide into such groups.

    >>> codes, scale = ternarize(torch.tensor([[0.5, -0.1, 0.2, -1.2]]))
    >>> codes.tolist(), scale.item()
    ([[1, 0, 0, -1]], 0.5)
    """
    rows, columns = weight.shape
    width = columns if isinstance(group, str) else group
    if isinstance(group, bool) or (
        group not in ("row", "matrix") and not (isinstance(group, int) and group > 0 and columns % group == 0)
    ):
        raise ValueError(
            f'group is {group!r}; expected a divisor of the {columns} columns, "row", or "matrix".'
        )
    grouped = weight.float().unflatten(1, (-1, width))  # (rows, groups, columns of a group)
    scale = grouped.abs().mean(dim=(0, 1, 2) if group == "matrix" else 2, keepdim=True)
    scale = scale.clamp(min=_SMALLEST).to(torch.float16).float()
    codes = (grouped / scale).round().clamp(-1, 1).to(torch.int8)
    return codes.flatten(1), scale.expand(rows, -1, 1)[..., 0]


def ternary_product(
    x: Float[Tensor, "*batch columns"],
    codes: Int[Tensor, "rows columns"],
    scale: Float[Tensor, "rows groups"],
) -> Float[Tensor, "*batch rows"]:
    """A product with a ternary matrix that adds and subtracts inputs: one multiplication for each group.

    It shows what such a product is, and is slow: a processor multiplies as fast as it adds.
    """
    out = []
    for row, scales in zip(codes.unflatten(1, (scale.shape[1], -1)), scale, strict=True):
        total = torch.zeros_like(x[..., 0])
        for inputs, signs, s in zip(x.unflatten(-1, row.shape).unbind(-2), row, scales, strict=True):
            added, subtracted = inputs[..., signs == 1], inputs[..., signs == -1]
            total = total + s * (added.sum(-1) - subtracted.sum(-1))
        out.append(total)
    return torch.stack(out, dim=-1)


class TernaryLinear(nn.Module):
    """A linear layer that computes with ternary weights and trains those behind them.

    Args:
        linear: whose weights it takes over; without a bias.
        group: as in `ternarize`.

    Raises:
        ValueError: it is no plain linear layer, has a bias, or rows that do not divide into such groups.

    Attributes:
        latent: what is trained.
    """

    def __init__(self, linear: nn.Linear, group: Group = "row") -> None:
        super().__init__()
        require_plain_layer("The layer", linear, kinds=(nn.Linear, FewRowsLinear))
        ternarize(linear.weight[:1].detach(), group)  # which refuses a group that does not fit
        self.in_features, self.out_features, self.group = linear.in_features, linear.out_features, group
        self.latent = linear.weight

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """The ternary matrix that multiplies; its gradient goes to ``latent`` as it is."""
        latent = self.latent.detach()
        codes, scale = ternarize(latent, self.group)
        ternary = (codes.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1).to(latent.dtype)
        return ternary + (self.latent - latent)  # plus 0, which has the gradient

    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.group!r}"


def make_ternary(model: Decoder, group: Group = "row") -> Decoder:
    """Let the linear layers of a decoder's blocks compute with ternary weights, in the model itself.

    A `minicpm_lite.training.trainer.Trainer` trains it as any other decoder: from the start, or from what it
    was.

    Raises:
        ValueError: a layer whose rows do not divide into such groups, or that computes with more than its
            weight, such as an adapter, or is ternary or packed already. Nothing is changed then.
    """

    def change(name: str, linear: nn.Module) -> nn.Module:
        if name.endswith("mlp.gate") or name == "lm_head":
            return linear
        try:
            return TernaryLinear(linear, group)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    replace_linears(model, change)
    return model


@torch.no_grad()
def pack_ternary(model: Decoder, type: Literal["TQ1_0", "TQ2_0"] = "TQ2_0") -> Decoder:
    """Pack the ternary layers of a decoder, in the model itself; not a bit of their weights changes.

    Scores change a little with TQ2_0, whose kernel rounds its inputs to 8 bits, and not with TQ1_0. Tables,
    output layer and norms stay as they are; `quantize_model` packs tables.

    Raises:
        ValueError: a layer that the type cannot hold exactly: groups within a block of 256 that have several
            scales, or rows that are no multiple of 256. Nothing is packed then.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TernaryLinear)}
    packed = {}
    for name, layer in layers.items():
        try:
            packed[name] = quantize(layer.weight, type)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if not torch.equal(dequantize(packed[name]), layer.weight.float()):
            raise ValueError(
                f"{name} has a scale for each group of {layer.group!r}, and {type} one for 256. Train "
                'with groups that are a multiple of 256, "row" or "matrix".'
            )
    for name, quantized in packed.items():
        put_packed(model, f"{name}.weight", quantized)
    return freeze(model).eval()
