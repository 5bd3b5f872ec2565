"""AWQ and smoothing: before rounding, make columns larger that matter, and what feeds them smaller.

    W x = (W diag(s)) (diag(1/s) x)          and 1/s goes into whatever made x: a norm, or a linear layer's
    rows

Not a bit of the function changes, but rounding does: a column that is multiplied by s before and divided
after has an error of about 1/s, as long as the scale of its group stays. So columns get the precision that
their inputs ask for. Two ways to choose s:

    AWQ         s = mean|x|^a                      a from 0 to 1, by the error of the rounded layers on a text
    smoothing   s = max|x|^a / max|w|^(1 - a)      a fixed, so that inputs and weights share what is large

Sources: Lin et al. 2023, "AWQ", arXiv 2306.00978; Xiao et al. 2022, "SmoothQuant", arXiv 2211.10438.
MiniCPM4's S-GPTQ (report, arXiv 2506.07900, section 4.1.2) is scaling of this kind, then GPTQ: here
`awq_model`, then `gptq_model`.

Where a block can be folded (`seams`), for each kind of layer that there is:

    norm         -> all linear layers that read it, a router of experts too, which is not rounded but must
    follow up_proj      -> down_proj, in each expert; the gate is only multiplied, so up_proj alone carries
    the scale v_proj       -> o_proj: attention takes sums of values, whatever their scale; a head that serves
    a group of
                    queries has one scale for all of them
    kv_b_proj    -> o_proj, in latent attention: the rows that make values

Trap: queries and keys cannot carry a scale of columns to each other here, because positions rotate them
    between.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import require_probability
from ..language.decoder import Decoder, require_plain
from ..language.latent_attention import LatentAttention
from ..language.moe import MixtureOfExperts
from .block_formats import inverse_of
from .calibration import Statistics, walk_blocks
from .packed import resolve_types
from .quantization import dequantize, quantize

__all__ = ["Seam", "awq_model", "awq_scale", "fold", "seams", "smooth_model", "smoothing_scale"]

_SMALLEST = 1e-4  # of a scale: a column that a text never used must not be divided by 0
_STEPS = 20  # of AWQ's search


@dataclass(frozen=True)
class Seam:
    """A place where a scale of columns can be moved.

    Attributes:
        producer: the name of the norm or linear layer whose outputs become the columns.
        consumers: the names of the linear layers that read them.
        rows: for each column the row of a linear producer that it comes from; None for a norm.
    """

    producer: str
    consumers: tuple[str, ...]
    rows: Int[Tensor, " columns"] | None = None


def seams(block: nn.Module) -> list[Seam]:
    """Where a scale can be moved within a block of a decoder; each linear layer but those is a consumer
    once."""
    found = _attention_seams(block.self_attn)
    if isinstance(block.mlp, MixtureOfExperts):
        experts = [f"mlp.experts.{number}" for number in range(len(block.mlp.experts))]
        readers = ("mlp.gate", *(f"{at}.{name}" for at in experts for name in ("gate_proj", "up_proj")))
    else:
        experts, readers = ["mlp"], ("mlp.gate_proj", "mlp.up_proj")
    found.append(Seam("post_attention_layernorm", readers))
    for at in experts:
        width = block.get_submodule(f"{at}.down_proj").in_features
        found.append(Seam(f"{at}.up_proj", (f"{at}.down_proj",), torch.arange(width)))
    return found


def _attention_seams(attention: nn.Module) -> list[Seam]:
    columns = torch.arange(attention.o_proj.in_features)
    if isinstance(attention, LatentAttention):
        sizes = attention.sizes
        head, inner = columns // sizes.v_head_dim, columns % sizes.v_head_dim
        rows = head * (sizes.qk_nope_head_dim + sizes.v_head_dim) + sizes.qk_nope_head_dim + inner
        return [
            Seam("input_layernorm", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
            Seam("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
            Seam("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
            Seam("self_attn.kv_b_proj", ("self_attn.o_proj",), rows),
        ]
    head, inner = columns // attention.head_dim, columns % attention.head_dim
    group = attention.o_proj.in_features // attention.v_proj.out_features  # query heads of a value head
    rows = head // group * attention.head_dim + inner
    return [
        Seam("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Seam("self_attn.v_proj", ("self_attn.o_proj",), rows),
    ]


@torch.no_grad()
def fold(block: nn.Module, seam: Seam, scale: Float[Tensor, " columns"]) -> None:
    """Multiply the columns of the consumers by a scale, and divide what makes them by it.

    Columns that come from one row of the producer must have one scale.

    Raises:
        ValueError: a scale that is not positive and finite, or a layer that computes its weight, as one that
            is packed; nothing is changed then.
    """
    for name in (*seam.consumers, seam.producer):
        if not isinstance((part := block.get_submodule(name)).weight, nn.Parameter):
            raise ValueError(
                f"{name} is a {type(part).__name__}, which computes its weight anew each time, so no scale "
                "can be put into it. Fold before the layers are packed or made ternary."
            )
    if not (scale.isfinite() & (scale > 0)).all():
        raise ValueError(
            f"The scale for {seam.producer} holds numbers that are not positive and finite; no weight can be "
            "multiplied and divided by them. Are the weights whole, and what the text makes of them?"
        )
    for name in seam.consumers:
        weight = block.get_submodule(name).weight
        weight.mul_(scale.to(weight))
    weight = block.get_submodule(seam.producer).weight
    if seam.rows is None:
        weight.div_(scale.to(weight))
    else:
        weight[seam.rows] = weight[seam.rows] / scale.to(weight)[:, None]


def awq_scale(
    weights: list[Float[Tensor, "_rows columns"]],
    statistics: list[Statistics],
    types: list[str],
    rows: Int[Tensor, " columns"] | None = None,
) -> Float[Tensor, " columns"]:
    """The scale mean|x|^a with which rounding changes the products of these layers least; they share an
    input.

    Args:
        weights: of the layers that will be rounded.
        statistics: of the inputs of each.
        types: of each.
        rows: see `Seam`: columns with one number have one scale.
    """
    size, weights = _shared(_mean_abs(statistics), rows), [weight.float() for weight in weights]
    best_scale, best_error = torch.ones_like(size), torch.inf
    for step in range(_STEPS + 1):
        scale = size.pow(step / _STEPS).clamp(min=_SMALLEST)
        scale = scale / (scale.max() * scale.min()).sqrt()  # about 1, so that no float16 is left
        error = 0.0
        for weight, seen, type in zip(weights, statistics, types, strict=True):
            change = dequantize(quantize(weight * scale, type)) / scale - weight
            error += ((change @ seen.hessian) * change).sum().item()
        if error < best_error:
            best_scale, best_error = scale, error
    return best_scale


def smoothing_scale(
    weights: list[Float[Tensor, "_rows columns"]],
    statistics: list[Statistics],
    strength: float,
    rows: Int[Tensor, " columns"] | None = None,
) -> Float[Tensor, " columns"]:
    """The scale max|x|^strength / max|w|^(1 - strength) of layers that share an input."""
    inputs = torch.stack([seen.largest for seen in statistics]).amax(0)
    columns = torch.cat(weights).abs().amax(0).clamp(min=_SMALLEST)
    scale = _shared(inputs.pow(strength) / columns.pow(1 - strength), rows)
    return scale.clamp(min=_SMALLEST)


def awq_model(
    model: Decoder, types: str | Mapping[str, str], windows: Int[Tensor, "windows tokens"], skip: int = 0
) -> Decoder:
    """Fold AWQ's scales into a decoder, which computes the same as before; then it waits to be rounded.

    Args:
        model: a plain decoder, which is changed.
        types: in which it will be rounded, as `quantize_model` takes them.
        windows: texts to calibrate on.
        skip: so many positions at the beginning of each are not counted.

    Returns:
        The same model, for `quantize_model` or `gptq_model`.

    Raises:
        ValueError: the model was changed inside, or as `quantize_model` and `walk_blocks` say. Some blocks
            may be folded then, and the model computes the same as before.
    """
    types = resolve_types(model, types)

    def choose(index: int, block: nn.Module, seam: Seam, seen: dict[str, Statistics]) -> Tensor | None:
        rounded = {
            name: types[at]
            for name in seam.consumers
            if (at := f"layers.{index}.{name}.weight") in types and seen[name].tokens
        }
        weights = [block.get_submodule(name).weight for name in rounded]
        return (
            awq_scale(weights, [seen[name] for name in rounded], list(rounded.values()), seam.rows)
            if rounded
            else None
        )

    return _fold_all(model, windows, skip, choose)


def smooth_model(
    model: Decoder, windows: Int[Tensor, "windows tokens"], strength: float = 0.5, skip: int = 0
) -> Decoder:
    """Fold smoothing's scales into a decoder, which computes the same as before.

    Args:
        model: a plain decoder, which is changed.
        windows: texts to calibrate on.
        strength: from 0, which evens out the weights, to 1, which evens out the inputs.
        skip: so many positions at the beginning of each are not counted.

    Raises:
        ValueError: the strength is none, the model was changed inside, or as `walk_blocks` and `fold` say.
            Some blocks may be folded then, and the model computes the same as before.
    """
    require_probability("strength", strength)

    def choose(_: int, block: nn.Module, seam: Seam, seen: dict[str, Statistics]) -> Tensor | None:
        used = [name for name in seam.consumers if seen[name].tokens]
        weights = [block.get_submodule(name).weight for name in used]
        return smoothing_scale(weights, [seen[name] for name in used], strength, seam.rows) if used else None

    return _fold_all(model, windows, skip, choose)


def _fold_all(model: Decoder, windows: Tensor, skip: int, choose: Callable) -> Decoder:
    require_plain(model)

    def change(index: int, block: nn.Module, seen: dict[str, Statistics]) -> None:
        for seam in seams(block):
            if (scale := choose(index, block, seam, seen)) is not None:
                fold(block, seam, scale)

    walk_blocks(model, windows, change, skip)
    return model


def _mean_abs(statistics: list[Statistics]) -> Float[Tensor, " columns"]:
    tokens = sum(seen.tokens for seen in statistics)
    return sum(seen.total_abs for seen in statistics) / tokens


def _shared(
    size: Float[Tensor, " columns"], rows: Int[Tensor, " columns"] | None
) -> Float[Tensor, " columns"]:
    """The mean over the columns that come from one row."""
    if rows is None:
        return size
    total = torch.zeros(int(rows.max()) + 1).to(size)
    count = total.clone()
    rows = rows.to(size.device)
    total.index_add_(0, rows, size)
    count.index_add_(0, rows, torch.ones_like(size))
    return (total * inverse_of(count))[rows]
