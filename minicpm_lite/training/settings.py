"""What is settled before a run: what a step is (`TrainerConfig`), and how its work is laid out (`Layout`)."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..config import require_positive_integer, require_positive_number
from ..runtime import require_seed

__all__ = ["Layout", "Parametrization", "Precision", "TrainerConfig"]

Precision = Literal["float32", "bfloat16"]
Parametrization = Literal["standard", "mup"]


@dataclass(frozen=True)
class TrainerConfig:
    """What stays the same over a run, apart from model, data and schedule.

    Attributes:
        batch_size: sequences in a batch.
        sequence_length: tokens predicted in each sequence.
        weight_decay: of AdamW, on matrices; norms, embeddings and output layer are not decayed.
        betas: of AdamW.
        max_grad_norm: longer gradients are shortened to this norm.
        parametrization: "standard" gives all parameters one learning rate; "mup" divides that of matrices by
            their decoder's ``width_ratio``, as MiniCPM does.
        precision: "bfloat16" computes with weights that are rounded to bfloat16; the weights themselves, the
            sums of gradients and the moments stay in float32. See `minicpm_lite.training.precision`.
        compile: compile forward and backward. On 2 CPU cores this takes about half a minute and then makes
            a small model's steps about a third faster: it pays for runs of several minutes.
        seed: decides the order of the data; a whole number that fits in 32 bits.
    """

    batch_size: int = 12
    sequence_length: int = 128
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    parametrization: Parametrization = "standard"
    precision: Precision = "float32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive_integer("batch_size", self.batch_size)
        require_positive_integer("sequence_length", self.sequence_length)
        require_positive_number("max_grad_norm", self.max_grad_norm)
        if self.weight_decay != 0:
            require_positive_number("weight_decay", self.weight_decay)
        betas = self.betas if isinstance(self.betas, tuple | list) else ()
        if not (len(betas) == 2 and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas)):
            raise ValueError(f"betas is {self.betas!r}; expected two numbers from 0 to below 1.")
        require_seed(self.seed)
        for name, known in (("parametrization", Parametrization), ("precision", Precision)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(get_args(known))}.")

    @property
    def batch_tokens(self) -> int:
        """Tokens predicted in one step."""
        return self.batch_size * self.sequence_length


@dataclass(frozen=True)
class Layout:
    """How the work of a step is laid out: decides speed and memory, and no number but by rounding.

    With experts it decides one: their load is balanced within each pass, so over its rows alone.

    Attributes:
        micro_batch: rows of a batch that a process computes at once; its part of a step is cut into as many
            passes as that takes. None: all in one pass.
        activation_checkpointing: keep only what enters each block of a decoder, and compute the block again
            when its gradient is due: about a third more arithmetic, far less memory.
        sharded: cut the model over all `processes`, so that each keeps its part of every weight, gradient and
            moment. See `minicpm_lite.training.distributed`.
    """

    micro_batch: int | None = None
    activation_checkpointing: bool = False
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch is not None:
            require_positive_integer("micro_batch", self.micro_batch)

    def rows_at_once(self, batch_size: int, processes: int) -> int:
        """Rows of the largest pass, when so many processes share a batch evenly."""
        own = max(1, batch_size // processes)
        return own if self.micro_batch is None else min(self.micro_batch, own)
