"""What a training run will need, before it runs: parameters, memory a GPU, steps, schedule, arithmetic.

    steps  = tokens of the recipe / tokens of a step      of which a run makes those behind its checkpoint
    FLOPs  = 6 N D

N is the parameters that take part for a token, D the tokens of the steps that are made.
Memory: see `plan_memory`.

Choices, and the traps behind them:

- N counts the output layer and the experts a token visits, not the embedding table, which is looked up.
  Attention scores come on top: 14 % for MiniCPM-2.4B with windows of 4,096 tokens, in proportion to their
  length.
- What a recipe does not say is filled in with `DEFAULTS`, and `TrainingPlan.assumptions` says so.
"""

import math
from dataclasses import dataclass

from ..config import ModelConfig, TrainingRecipe, require_positive_integer, require_positive_number
from ..parameters import count_parameters
from .memory import MemoryPlan, plan_memory
from .settings import Layout, Parametrization, Precision, TrainerConfig
from .wsd import WSD, require_steps

__all__ = ["TrainingPlan", "plan_training", "published_decay"]

DEFAULTS = {
    "batch_tokens": (4_000_000, "what MiniCPM trained with"),
    "peak_lr": (0.01, "MiniCPM's, which µP carries over from width to width"),
    "tokens_per_parameter": (20, "the least that pays, after Hoffmann et al. 2022"),
    "sequence_length": (4096, "MiniCPM's pre-training length"),
    "warmup_share": (0.01, "of the steps, at most 2,000"),
    "decay_share": (0.1, "of the steps, which the MiniCPM paper found to be enough"),
}


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
        made: the steps of the schedule that the run makes, not those before the checkpoint it starts from.
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
    made: range

    @property
    def steps(self) -> int:
        """Updates that the run makes."""
        return len(self.made)

    @property
    def tokens(self) -> int:
        """Tokens predicted in them."""
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


def published_decay(recipe: TrainingRecipe | None) -> int | None:
    """Steps in which a decay of the published half-life leaves a tenth of the peak; None if none was."""
    half_life = recipe and recipe.decay_half_life_steps
    return half_life and math.ceil(min(half_life, 1e18) * math.log2(10))  # more steps fit into no run


def plan_training(
    model: ModelConfig,
    recipe: TrainingRecipe | None = None,
    *,
    gpus: int = 8,
    layout: Layout = Layout(micro_batch=1, activation_checkpointing=True),
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
    for name, value in (("warmup_steps", warmup_steps), ("decay_steps", decay_steps)):
        if value is not None:
            require_steps(name, value)
    for name, value in (("batch_tokens", batch_tokens), ("peak_lr", peak_lr)):
        if value is not None:
            require_positive_number(name, value)
    assumptions: list[str] = []

    def settle(name: str, given: float | None, published: float | None, default: float, why: str) -> float:
        if given is not None or published is not None:
            return published if given is None else given
        assumptions.append(f"{name} {default:,} is a default: {why}.")
        return default

    default = DEFAULTS["sequence_length"]
    if default[0] > model.max_position_embeddings:
        default = (model.max_position_embeddings, "all that the model was made for")
    length = int(settle("sequence_length", sequence_length, None, *default))
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
    count = count_parameters(model)
    active = count.others - count.idle + model.vocab_size * model.hidden_size
    if steps is None:
        ratio, why = DEFAULTS["tokens_per_parameter"]
        tokens = settle(
            "tokens", None, recipe and recipe.tokens, ratio * active, f"{ratio} a parameter, {why}"
        )
        steps = math.ceil(tokens / trainer.batch_tokens)
    if steps * trainer.batch_tokens >= 1 << 63:
        raise ValueError(
            "The run would read more tokens than 63 bits count. Give fewer steps, or smaller batches."
        )
    share, why = DEFAULTS["warmup_share"]
    warmup = settle("warmup_steps", warmup_steps, None, min(2000, math.ceil(steps * share)),
                    f"{share:.0%} {why}")  # fmt: skip
    share, why = DEFAULTS["decay_share"]
    decay = settle("decay_steps", decay_steps, published_decay(recipe),
                   max(0, min(steps - warmup, math.ceil(steps * share))), f"{share:.0%} {why}")  # fmt: skip
    if warmup + decay > steps:
        raise ValueError(
            f"{warmup:,} steps of warm-up and {decay:,} of decay do not fit into {steps:,} steps. Give "
            "fewer of them, or more steps."
        )
    return TrainingPlan(
        model, trainer, layout, WSD(peak, warmup, steps - warmup - decay, decay), gpus, count.total, active,
        plan_memory(model, trainer, layout, gpus), tuple(assumptions), range(steps),
    )  # fmt: skip
