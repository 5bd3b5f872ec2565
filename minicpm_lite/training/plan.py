"""What a training run will need, before it runs: parameters, memory a GPU, steps, schedule, arithmetic.

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
- FLOPs are 6 for each parameter that takes part and each token: N counts the output layer and the experts a
  token visits, not the embedding table, which is looked up. Attention scores come on top: 14 % for
  MiniCPM-2.4B with windows of 4,096 tokens, in proportion to their length.
- What a recipe does not say is filled in with `DEFAULTS`, and `TrainingPlan.assumptions` says so.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import ModelConfig, TrainingRecipe, require_positive_integer, require_positive_number
from ..language.decoder import Decoder
from ..language.moe import num_active_parameters
from .distributed import Layout
from .trainer import Parametrization, Precision, TrainerConfig
from .wsd import WSD

__all__ = ["MemoryPlan", "TrainingPlan", "count_saved", "plan_memory", "plan_training"]

DEFAULTS = {
    "batch_tokens": (4_000_000, "what MiniCPM trained with"),
    "peak_lr": (0.01, "MiniCPM's, which µP carries over from width to width"),
    "tokens_per_parameter": (20, "the least that pays, after Hoffmann et al. 2022"),
    "sequence_length": (4096, "MiniCPM's pre-training length"),
    "warmup_share": (0.01, "of the steps, at most 2,000"),
    "decay_share": (0.1, "of the steps, which the MiniCPM paper found to be enough"),
}
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


@dataclass(frozen=True)
class TrainingPlan:
    """A run, settled in every number.

    Attributes:
        model: the shape.
        trainer: batch, precision, parametrization.
        layout: passes and recomputation.
        schedule: rate of each step.
        gpus: processes that share the work.
        parameters: all of them, tables included.
        active_parameters: N of ``6 N D``: with the output layer, without embedding table and idle experts.
        memory: bytes on each GPU.
        assumptions: a sentence for each number that was neither given nor published.
    """

    model: ModelConfig
    trainer: TrainerConfig
    layout: Layout
    schedule: WSD
    gpus: int
    parameters: int
    active_parameters: int
    memory: MemoryPlan
    assumptions: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Updates."""
        return self.schedule.total_steps

    @property
    def tokens(self) -> int:
        """Tokens predicted in all steps."""
        return self.steps * self.trainer.batch_tokens

    @property
    def flops(self) -> float:
        """6 N D."""
        return 6.0 * self.active_parameters * self.tokens

    def hours(self, gpu_flops: float = 989e12, utilisation: float = 0.4) -> float:
        """Hours on all GPUs together, if each does ``utilisation`` of ``gpu_flops`` a second (MFU).

        989e12 is what the maker states for an H100 in bfloat16, without sparsity; 40 % is a good run.
        """
        return self.flops / (self.gpus * gpu_flops * utilisation) / 3600


def plan_training(
    model: ModelConfig,
    recipe: TrainingRecipe | None = None,
    *,
    gpus: int = 8,
    layout: Layout = Layout(micro_batch=1, activation_checkpointing=True),  # noqa: B008, frozen
    steps: int | None = None,
    batch_tokens: float | None = None,
    sequence_length: int | None = None,
    peak_lr: float | None = None,
    warmup_steps: int | None = None,
    decay_steps: int | None = None,
    precision: Precision = "bfloat16",
    parametrization: Parametrization | None = None,
    seed: int = 0,
) -> TrainingPlan:
    """Settle a run: what is given counts, then the recipe, then `DEFAULTS`.

    Args:
        model: the shape.
        recipe: what was published, or None.
        gpus: processes that share the work.
        layout: passes and recomputation.
        steps: updates. Left out: as many as the recipe's tokens take.
        batch_tokens: tokens of a step, over all processes; rounded to whole windows for each process.
        sequence_length: tokens predicted in a window.
        peak_lr: rate of the stable stage.
        warmup_steps: of the rise.
        decay_steps: of the decay. Left out, and a half-life was published: until a tenth of the peak is left.
        precision: of the arithmetic.
        parametrization: left out: "mup" for a model with ``dim_model_base``, else "standard".
        seed: of weights and data.

    Raises:
        ValueError: numbers that cannot be, such as more warm-up and decay than steps.
    """
    require_positive_integer("gpus", gpus)
    for name, value in (("steps", steps), ("sequence_length", sequence_length)):
        if value is not None:
            require_positive_integer(name, value)
    for name, value in (("batch_tokens", batch_tokens), ("peak_lr", peak_lr)):
        if value is not None:
            require_positive_number(name, value)
    assumptions: list[str] = []

    def settle(name: str, given: float | None, published: float | None, default: float, why: str) -> float:
        if given is not None or published is not None:
            return published if given is None else given
        assumptions.append(f"{name} {default:,} is a default: {why}.")
        return default

    length_default = min(DEFAULTS["sequence_length"][0], model.max_position_embeddings)
    length = int(
        settle("sequence_length", sequence_length, None, length_default, DEFAULTS["sequence_length"][1])
    )
    if length > model.max_position_embeddings:
        raise ValueError(
            f"sequence_length is {length}; the model was made for {model.max_position_embeddings} tokens "
            "(max_position_embeddings)."
        )
    wanted = settle("batch_tokens", batch_tokens, recipe and recipe.batch_tokens, *DEFAULTS["batch_tokens"])
    windows = max(1, round(wanted / length / gpus)) * gpus
    peak = settle("peak_lr", peak_lr, recipe and recipe.peak_learning_rate, *DEFAULTS["peak_lr"])
    trainer = TrainerConfig(
        batch_size=windows,
        sequence_length=length,
        precision=precision,
        parametrization=parametrization or ("mup" if model.dim_model_base else "standard"),
        seed=seed,
    )
    with torch.device("meta"):
        decoder = Decoder(model)
    parameters = decoder.num_parameters(embeddings=True)
    active = num_active_parameters(decoder) + model.vocab_size * model.hidden_size
    if steps is None:
        ratio, why = DEFAULTS["tokens_per_parameter"]
        tokens = settle(
            "tokens", None, recipe and recipe.tokens, ratio * active, f"{ratio} a parameter, {why}"
        )
        steps = math.ceil(tokens / trainer.batch_tokens)
    share, why = DEFAULTS["warmup_share"]
    warmup = int(settle("warmup_steps", warmup_steps, None, min(2000, math.ceil(steps * share)),
                        f"{share:.0%} {why}"))  # fmt: skip
    half_life = recipe and recipe.decay_half_life_steps
    share, why = DEFAULTS["decay_share"]
    decay = int(settle("decay_steps", decay_steps, half_life and math.ceil(half_life * math.log2(10)),
                       max(0, min(steps - warmup, math.ceil(steps * share))),
                       f"{share:.0%} {why}"))  # fmt: skip
    if warmup + decay > steps:
        raise ValueError(
            f"{warmup:,} steps of warm-up and {decay:,} of decay do not fit into {steps:,} steps. Give "
            "fewer of them, or more steps."
        )
    return TrainingPlan(
        model, trainer, layout, WSD(peak, warmup, steps - warmup - decay, decay), gpus, parameters, active,
        plan_memory(model, trainer, layout, gpus), tuple(assumptions),
    )  # fmt: skip


def plan_memory(model: ModelConfig, trainer: TrainerConfig, layout: Layout, gpus: int) -> MemoryPlan:
    """Bytes on each of ``gpus`` GPUs while `DistributedTrainer` trains, or on one CPU."""
    with torch.device("meta"):
        decoder = Decoder(model)
    # each parameter is cut along its rows, and padded to equal parts
    sharded = sum(-(-p.shape[0] // gpus) * p[0].numel() for p in decoder.parameters())
    block = sum(p.numel() for p in decoder.layers[0].parameters())
    root = sum(p.numel() for p in decoder.parameters()) - block * len(decoder.layers)
    width = 2 if trainer.precision == "bfloat16" else 4
    windows = layout.micro_batch or max(1, trainer.batch_size // gpus)
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
            decoder = Decoder(replace(model, num_hidden_layers=blocks), _FusedAttention.apply)
            ids = torch.zeros(windows, length, dtype=torch.long)
        if precision == "bfloat16":
            decoder.to(torch.bfloat16)
        with count_saved(decoder) as saved:
            decoder(ids)
        kept.append(saved())
    return kept[1] - kept[0], 2 * kept[0] - kept[1]


@contextmanager
def count_saved(model: torch.nn.Module) -> Iterator:
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


class _FusedAttention(torch.autograd.Function):
    """Stands for a fused attention kernel where only sizes count: it keeps what such a kernel keeps."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        batch, heads, queries, _ = query.shape
        # token by token, as fused kernels write it, so that joining the heads copies nothing
        out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
        per_query = query.new_empty(query.shape[:-1], dtype=torch.float32)  # log of the softmax's sum
        ctx.save_for_backward(query, key, value, out, per_query)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("This attention only counts; it has no values to differentiate.")
