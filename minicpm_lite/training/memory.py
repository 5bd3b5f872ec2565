"""Memory of a training step: what it takes on each GPU, and how to do with less.

    memory a GPU =  weights + gradients + moments     16 bytes a parameter (float32), divided over the GPUs
                  + gathered weights and gradients    the block at work, the next, the tables
                  + activations                       what the backward pass needs of the forward pass
                  + logits                            of one pass, with their gradient

Parameters are counted on the meta device, which has shapes and no memory. Activations are not a formula: the
model runs there, too, and what autograd keeps is added up. So a new kind of block is planned for at once.

Choices, and the traps behind them:

- Attention is counted as a fused kernel keeps it: queries, keys, values, output and a number for each query.
  A kernel that writes down every score needs far more; `dense_attention` asks for the fused one.
- Two blocks are gathered at a time, because FSDP fetches the next one while one computes.
- With experts, all of a block's experts are gathered, though a token visits two. Their activations are those
  of one feed-forward network as wide as the visited ones together.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ..config import ModelConfig
from ..language.context import Context
from ..language.decoder import Decoder
from .settings import Layout, Precision, TrainerConfig

__all__ = ["MemoryPlan", "count_saved", "plan_memory", "recompute_blocks"]

_STATE_BYTES = 4  # float32, for each of weight, gradient and AdamW's two moments


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU.

    Attributes:
        weights: its part of the weights.
        gradients: its part of the gradients.
        moments: its part of AdamW's two moments.
        gathered: whole weights and gradients of the blocks at work and of the tables.
        activations: what the backward pass of one micro batch needs, without the logits.
        logits: of one micro batch, with their gradient.
    """

    weights: int
    gradients: int
    moments: int
    gathered: int
    activations: int
    logits: int

    @property
    def state(self) -> int:
        """What stays from step to step, and the gradients."""
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> int:
        """All of it. Allow some 10 % more for communication buffers and fragmentation."""
        return self.state + self.gathered + self.activations + self.logits


def plan_memory(model: ModelConfig, trainer: TrainerConfig, layout: Layout, gpus: int) -> MemoryPlan:
    """Bytes on each of ``gpus`` GPUs while a sharded model trains, or on one CPU."""
    with torch.device("meta"):
        decoder = Decoder(model)
    # each parameter is cut along its rows, and padded to equal parts
    sharded = sum(-(-p.shape[0] // gpus) * p[0].numel() for p in decoder.parameters())
    block = sum(p.numel() for p in decoder.layers[0].parameters())
    root = sum(p.numel() for p in decoder.parameters()) - block * len(decoder.layers)
    width = 2 if trainer.precision == "bfloat16" else 4
    windows = layout.rows_at_once(trainer.batch_size, gpus)
    tokens = windows * trainer.sequence_length
    per_block, rest = _activations(model, windows, trainer.sequence_length, trainer.precision)
    if layout.activation_checkpointing:
        entering = tokens * model.hidden_size * width
        activations = rest + len(decoder.layers) * entering + per_block  # the block that is computed again
    else:
        activations = rest + len(decoder.layers) * per_block
    logits = tokens * model.vocab_size
    return MemoryPlan(
        weights=sharded * _STATE_BYTES,
        gradients=sharded * _STATE_BYTES,
        moments=2 * sharded * _STATE_BYTES,
        gathered=(2 * root + 3 * block) * width,  # weights: tables, two blocks; gradients: tables, one block
        activations=activations,
        # log-softmax and its gradient in float32, and the logits or their gradient as they were computed
        logits=logits * (4 + 4 + (width if width == 2 else 0)),
    )


def _activations(model: ModelConfig, windows: int, length: int, precision: Precision) -> tuple[int, int]:
    """Bytes that autograd keeps for each block, and for what lies outside the blocks."""
    if model.mixture is not None:
        visits = model.mixture.num_experts_per_token
        model = replace(model, mixture=None, intermediate_size=visits * model.intermediate_size)
    kept = []
    for blocks in (1, 2):
        with torch.device("meta"):
            # the residual scale is a number and has no size, so the number of blocks may change
            decoder = Decoder(replace(model, num_hidden_layers=blocks))
            ids = torch.zeros(windows, length, dtype=torch.long)
        if precision == "bfloat16":
            decoder.to(torch.bfloat16)
        with count_saved(decoder) as saved:
            decoder(ids, _FusedContext())
        kept.append(saved())
    return kept[1] - kept[0], 2 * kept[0] - kept[1]


@contextmanager
def count_saved(model: nn.Module) -> Iterator:
    """Add up what autograd keeps for the backward pass, each memory once, without the model's parameters.

    >>> model = torch.nn.Linear(3, 5)
    >>> with count_saved(model) as saved:
    ...     out = model(torch.zeros(2, 3, requires_grad=True))
    >>> saved()
    24
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in kept.values())


class _FusedContext(Context):
    """Attention as a fused kernel keeps it, where only sizes count."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _FusedAttention.apply(query, key, value)


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps, and computes nothing."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, queries, _ = query.shape
        # token by token, as fused kernels write it, so that joining the heads copies nothing
        out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
        per_query = query.new_empty(query.shape[:-1], dtype=torch.float32)  # log of the softmax's sum
        ctx.save_for_backward(query, key, value, out, per_query)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("This attention only counts; it has no values to differentiate.")


def recompute_blocks(model: nn.Module) -> None:
    """Let the blocks of a module's decoders keep only what enters them, and compute the rest again.

    They stay so; outside of training it changes nothing. What a layer keeps in buffers, such as a running
    mean, is moved once. Source: Chen et al. 2016, arXiv 1604.06174.
    """
    for decoder in (module for module in model.modules() if isinstance(module, Decoder)):
        for block in decoder.layers:
            if not isinstance(block.forward, partial):  # a copy of such a model has it already
                block.forward = partial(_recomputed, block, block.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Tensor], *given: object) -> Tensor:
    """What a block makes of what it is given; the backward pass makes it again.

    Whether it has buffers is asked each time, since its layers may be replaced between two runs.
    """
    if next(block.buffers(), None) is None:
        return recompute(forward, *given, use_reentrant=False)
    return recompute(forward, *given, use_reentrant=False, context_fn=partial(_once, block))


def _once(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts for a block's forward pass, which begins now, and for its repetition."""
    return nullcontext(), _BuffersOf(block)


class _BuffersOf:
    """A context in which the buffers of a module are copies of what they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._then = [(part, name, buffer.clone()) for part, name, buffer in self._buffers()]

    def _buffers(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for part in self._module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                yield part, name, buffer

    def __enter__(self) -> None:
        self._now = list(self._buffers())
        for part, name, buffer in self._then:
            part._buffers[name] = buffer.clone()

    def __exit__(self, *error: object) -> None:
        for part, name, buffer in self._now:
            part._buffers[name] = buffer
