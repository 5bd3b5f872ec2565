"""What the linear layers of a decoder are given: statistics of their inputs, from a text, in one walk.

    hessian = sum over tokens of x xᵀ        which columns are large together; (columns, columns)
    total_abs, largest                       how large each column is; (columns,)
    tokens                                   how many were counted

They are all that GPTQ, AWQ and smoothing ask of data: the error of a changed matrix W' on the text is a
function of the hessian alone,

    sum over tokens of |W x - W' x|²  =  trace((W - W') hessian (W - W')ᵀ)

Source: Frantar et al. 2022, "GPTQ", arXiv 2210.17323, section 3, for the walk.

Choices, and the traps behind them:

- The walk goes once through the blocks. A block's inputs are those that the blocks before it give *after*
  they were changed, so that each one makes up for what the earlier ones lost. It costs two passes of each
  block, one that counts and one that goes on, and memory for the residual stream, not for all activations.
- The first positions of a text see few others and have activations that are ten times as large, or more. They
  are seldom in practice, and overwhelm the sum. ``skip`` leaves them out (P-GPTQ).
- An expert is given the tokens that visit it, without their positions, so to skip some its feed-forward layer
  is called once more, on the others. An expert that no token visits has no statistics.
- Layers that are given one input, as queries, keys and values are, have one sum between them.
- Where latent attention is absorbed, the layer that expands latents is never called, only its weight is read.
  So its inputs are counted where they are made, behind their norm.
- Output layer and tables are no part of the blocks, and not calibrated.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..language.context import Context
from ..language.decoder import Decoder
from ..language.moe import MixtureOfExperts
from ..language.scoring import evaluating, readable

__all__ = ["Statistics", "walk_blocks"]


class Statistics:
    """What one linear layer was given, added up.

    Attributes:
        tokens: how many.
        hessian: the sum of x xᵀ, in float32.
        total_abs: the sum of magnitudes, one for each column.
        largest: the largest magnitude of each column.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.hessian = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.total_abs, self.largest = self.hessian.new_zeros(2, columns)

    def add(self, x: Float[Tensor, "*batch columns"]) -> None:
        """Count inputs of the layer, one for each token."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if len(x):
            self.tokens += len(x)
            self.hessian.addmm_(x.T, x)
            self.total_abs += x.abs().sum(0)
            self.largest = torch.maximum(self.largest, x.abs().amax(0))


@torch.no_grad()
def walk_blocks(
    model: Decoder,
    windows: Int[Tensor, "windows tokens"],
    change: Callable[[int, nn.Module, dict[str, Statistics]], None],
    skip: int = 0,
    at_once: int = 8,
) -> None:
    """Visit the blocks of a decoder in their order, each with the statistics of its linear layers.

    Args:
        model: a decoder, which ``change`` may change.
        windows: texts, each of its own.
        change: called with the index of a block, the block, and the statistics by the name of each linear
            layer within it, such as "mlp.up_proj". The next block is given what this one computes afterwards.
        skip: so many positions at the beginning of each window are not counted.
        at_once: windows that are computed together.

    Raises:
        ValueError: no windows, or none that is longer than what is skipped.
    """
    if windows.ndim != 2 or not windows.numel() or not 0 <= skip < windows.shape[1]:
        raise ValueError(
            f"windows has shape {tuple(windows.shape)} and skip is {skip}; expected (windows, tokens), with "
            "more tokens than are skipped."
        )
    with evaluating(model):
        streams = [model.embed(part) for part in readable(windows).split(at_once)]
        for index, block in enumerate(model.layers):
            with _counting(block, skip) as statistics:
                for x in streams:
                    _through(model, block, x)
            change(index, block, statistics)
            streams = [_through(model, block, x) for x in streams]


def _through(model: Decoder, block: nn.Module, x: Tensor) -> Tensor:
    """What a block makes of the residual stream of whole texts."""
    context = Context()
    return block(x, context.angles(model.config, context.begin(x)), context)


@contextmanager
def _counting(block: nn.Module, skip: int) -> Iterator[dict[str, Statistics]]:
    """Within, the inputs of a block's linear layers are counted, but for the first positions of each text."""
    linears = {name: module for name, module in block.named_modules() if hasattr(module, "in_features")}
    statistics = {
        name: Statistics(linear.in_features, next(block.parameters()).device)
        for name, linear in linears.items()
    }
    apart = skip > 0 and isinstance(block.mlp, MixtureOfExperts)  # its linear layers are given no positions
    counted = {"attention": True, "mlp": not apart}
    newest: tuple[Tensor | None, str] = (None, "")  # the input counted last, and the layer that was given it

    def count(name: str) -> Callable:
        part = "mlp" if name.startswith("mlp.") else "attention"

        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            nonlocal newest
            (x,) = inputs
            if x is newest[0]:  # as queries, keys and values are: one sum does for all
                statistics[name] = statistics[newest[1]]
            elif counted[part]:
                statistics[name].add(x[:, skip:] if x.ndim == 3 else x)
                newest = x, name

        return hook

    def later_positions(mlp: nn.Module, inputs: tuple[Tensor]) -> None:
        counted["mlp"] = True
        mlp.forward(inputs[0][:, skip:])
        counted["mlp"] = False

    def latents(_: nn.Module, __: tuple[Tensor], latent: Tensor) -> None:
        statistics["self_attn.kv_b_proj"].add(latent[:, 0, skip:])

    handles = []
    if linears.pop("self_attn.kv_b_proj", None) is not None:
        handles.append(block.self_attn.kv_a_layernorm.register_forward_hook(latents))
    handles += [linear.register_forward_pre_hook(count(name)) for name, linear in linears.items()]
    if apart:
        handles.append(block.mlp.register_forward_pre_hook(later_positions))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
