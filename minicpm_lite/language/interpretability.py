"""Looking inside a trained decoder: where its heads look, what it loses without one, what it says on the way.

    seen = Watched(); model(ids, seen); seen.weights[block]     how much each head of a block takes from whom
    with without_heads(model, [(block, head)]): ...             the head brings nothing
    with without_heads(model, [(block, head)], means): ...      it brings what it brings on average
    logits_by_depth(model, ids)                                 what the stream would say after each block

Sources: Michel et al. 2019 (heads taken out one at a time); nostalgebraist 2020 (the "logit lens").

Choices, and the traps behind them:

- Weights of attention are never stored by fast attention, so `Watched` computes them as the formula says: for
  texts of a few hundred tokens.
- A head ends where the output matrix begins, and is taken out there. Its key and value may be shared.
- Nothing is a value like any other. Where a head always brings about the same, the model without it sees
  lanes that it never saw in training; its mean in its place takes away only what it says about this text.
- The last norm and the table were trained to read the stream after the last block. What they read before is
  what the model would say if it stopped there, which it was never asked to.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .context import Context, causal_mask
from .decoder import Decoder
from .scoring import evaluating

__all__ = ["Watched", "head_means", "logits_by_depth", "without_heads"]


class Watched(Context):
    """A call is a whole text, and where its heads look is noted.

    Attributes:
        weights: by block, (batch, heads, tokens, tokens): the share of each token, by who asks.
        queries: by block, (batch, heads, tokens, head_dim), turned by their positions.
        keys: by block, of the same shape: keys that heads share are repeated for each of them.
    """

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch heads tokens head_dim"],
        key: Float[Tensor, "batch kv_heads tokens head_dim"],
        value: Float[Tensor, "batch kv_heads tokens value_dim"],
    ) -> Float[Tensor, "batch heads tokens value_dim"]:
        """As any context attends, step by step; the steps are noted."""
        group, tokens = query.shape[1] // key.shape[1], query.shape[2]
        key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
        scores = query @ key.mT / query.shape[-1] ** 0.5  # (batch, heads, tokens, tokens)
        seen = causal_mask(tokens, tokens, query.device)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        self.weights[layer], self.queries[layer], self.keys[layer] = weights, query, key
        return weights @ value


@torch.no_grad()
def head_means(model: Decoder, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "blocks heads width"]:
    """What each head brings on average, over all tokens of some texts: what it says about none of them."""
    brought = []

    def note(_: nn.Module, given: tuple[Tensor]) -> None:
        by_head = given[0].unflatten(-1, (model.config.num_attention_heads, -1))
        brought.append(by_head.mean(dim=(0, 1)))  # (heads, width)

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for layer in model.layers:
            stack.callback(layer.self_attn.o_proj.register_forward_pre_hook(note).remove)
        model.states(model.embed(ids))
    return torch.stack(brought)


@contextmanager
def without_heads(
    model: Decoder,
    heads: Iterable[tuple[int, int]],
    means: Float[Tensor, "blocks heads width"] | None = None,
) -> Iterator[None]:
    """The model without some heads; afterwards, also behind an error, it is as it was.

    Args:
        model: any decoder.
        heads: block and head of each, counted from 0.
        means: what they bring instead, in every lane, as `head_means` gives it; left out, nothing.

    Raises:
        ValueError: the model has no such head, or the means are those of another shape.
    """
    heads, config = list(heads), model.config
    for block, head in heads:
        if not (0 <= block < config.num_hidden_layers and 0 <= head < config.num_attention_heads):
            raise ValueError(
                f"Block {block} has no head {head}, or is none; the model has {config.num_hidden_layers} "
                f"blocks of {config.num_attention_heads} heads, both counted from 0."
            )

    if means is not None:
        width = model.layers[0].self_attn.o_proj.in_features // config.num_attention_heads
        shape = (config.num_hidden_layers, config.num_attention_heads, width)
        if means.shape != shape:
            raise ValueError(
                f"means has shape {tuple(means.shape)}; expected those of all heads, {shape}, as head_means "
                "gives them."
            )

    def instead(block: int, given: tuple[Tensor]) -> tuple[Tensor]:
        by_head = given[0].unflatten(-1, (config.num_attention_heads, -1)).clone()
        for at, head in heads:
            if at == block:
                by_head[..., head, :] = 0 if means is None else means[block, head]
        return (by_head.flatten(-2),)

    with ExitStack() as stack:
        for block in {block for block, _ in heads}:
            output = model.layers[block].self_attn.o_proj
            hook = output.register_forward_pre_hook(lambda _, given, block=block: instead(block, given))
            stack.callback(hook.remove)
        yield


@torch.no_grad()
def logits_by_depth(
    model: Decoder, ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "depths batch tokens vocab"]:
    """What the stream would say of the next token after each number of blocks, from 0 to all of them."""
    with evaluating(model):
        states = model.states(model.embed(ids), after=range(len(model.layers)))
        return torch.stack([model.logits(x) for x in states])
