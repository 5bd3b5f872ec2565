"""WSD, the warm-up, stable, decay learning-rate schedule of MiniCPM, and the cosine it is compared with.

    lr(s) = peak * s / W             0 <= s < W            warm-up
          = peak                     W <= s < T            stable;  T = W + stable_steps
          = peak * f(s - T)          T <= s <= S           decay;   S = T + decay_steps

Source: Hu et al. 2024, "MiniCPM", arXiv 2404.06395, section 4.

Two misprints of the paper, and what stands here instead:

- The decay is printed as 0.5^((s - S)/T) with S and T defined as the ends of the decay and of the stable
  stage, which would grow. The team's earlier report shows that S means the end of the stable stage there and
  T the half-life. So f(k) = 0.5^(k / half_life), with k steps since the decay began.
- The cosine is printed as 0.9 peak cos(pi s/T) + 0.1 peak, which turns negative. The schedule that was meant
  falls from peak to a tenth of it: 0.1 peak + 0.9 peak (1 + cos(pi s/T)) / 2.

The exponential form is MiniCPM's. "linear", "cosine" and "sqrt" are other choices of f; "sqrt" is
1 - sqrt(k / decay_steps), from Hägele et al. 2024, arXiv 2405.18392.

Convention: the k-th update, counted from 1, uses lr(k). So no update is wasted on a rate of zero.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["WSD", "Cosine", "DecayForm", "Schedule", "require_steps"]

DecayForm = Literal["exponential", "linear", "cosine", "sqrt"]


class Schedule:
    """A rate for each step: ``schedule(step)``, or in a torch loop ``schedule.scheduler(optimizer)``."""

    peak_lr: float
    total_steps: int

    def __call__(self, step: float) -> float:
        """Learning rate at a step."""
        raise NotImplementedError

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """The same schedule as a torch scheduler: call ``step()`` after each ``optimizer.step()``.

        Each parameter group's own learning rate is taken as its peak, so groups keep their ratios.
        """
        return LambdaLR(optimizer, lambda updates: self(updates + 1) / self.peak_lr)

    def _warmed_up(self, step: float, warmup_steps: int) -> bool:
        if step < 0:
            raise ValueError(f"The step is {step}; steps are counted from 0.")
        return step >= warmup_steps


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay.

    Attributes:
        peak_lr: learning rate of the stable stage.
        warmup_steps: steps of linear warm-up from 0, "W".
        stable_steps: steps at ``peak_lr``.
        decay_steps: steps of the decay; 0 for a run that is still in its stable stage.
        form: shape of the decay, "exponential" unless another is named.
        final_ratio: lr at the end of the decay, as a part of ``peak_lr``.
        half_life: steps in which the exponential decay halves the rate. Left out: chosen so that the decay
            ends at ``final_ratio``. Given: it decides where the decay ends, and ``final_ratio`` says so.

    Raises:
        ValueError: a number that cannot be, an unknown form, or a half-life for a form that has none.

    >>> schedule = WSD(peak_lr=0.01, warmup_steps=100, stable_steps=800, decay_steps=100)
    >>> [round(schedule(step), 6) for step in (50, 100, 900, 950, 1000)]
    [0.005, 0.01, 0.01, 0.003162, 0.001]
    """

    peak_lr: float
    warmup_steps: int
    stable_steps: int
    decay_steps: int
    form: DecayForm = "exponential"
    final_ratio: float = 0.1
    half_life: float | None = None

    def __post_init__(self) -> None:
        _check_peak(self.peak_lr)
        for name in ("warmup_steps", "stable_steps", "decay_steps"):
            require_steps(name, getattr(self, name))
        if self.form not in get_args(DecayForm):
            raise ValueError(
                f"The decay form is {self.form!r}; choose one of {', '.join(get_args(DecayForm))}."
            )
        if self.half_life is not None:
            if self.form != "exponential":
                raise ValueError(f"half_life belongs to the exponential decay; the form is {self.form!r}.")
            if not self.half_life > 0:
                raise ValueError(f"half_life is {self.half_life}; expected a number of steps greater than 0.")
            object.__setattr__(self, "final_ratio", 0.5 ** (self.decay_steps / self.half_life))
        _check_ratio(self.final_ratio, may_be_zero=self.form != "exponential")

    @property
    def decay_start(self) -> int:
        """The step at which the decay begins, "T": the checkpoint to keep is taken here."""
        return self.warmup_steps + self.stable_steps

    @property
    def total_steps(self) -> int:
        """Updates from the first to the end of the decay, "S"."""
        return self.decay_start + self.decay_steps

    def __call__(self, step: float) -> float:
        """Learning rate at a step; at the end of the decay and later, its final value.

        Raises:
            ValueError: the step is negative.
        """
        if not self._warmed_up(step, self.warmup_steps):
            return self.peak_lr * step / self.warmup_steps
        if step <= self.decay_start or self.decay_steps == 0:
            return self.peak_lr
        progress = (step - self.decay_start) / self.decay_steps
        return self.peak_lr * self._decay(min(progress, 1.0))

    def _decay(self, progress: float) -> float:
        """f, from 1 at progress 0 to final_ratio at progress 1."""
        if self.form == "exponential":
            return self.final_ratio**progress
        shape = {
            "linear": progress,
            "cosine": (1 - math.cos(math.pi * progress)) / 2,
            "sqrt": math.sqrt(progress),
        }
        return 1 - (1 - self.final_ratio) * shape[self.form]


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to ``final_ratio`` of the peak at ``total_steps``.

    Source: Loshchilov and Hutter 2017, arXiv 1608.03983; to a tenth of the peak as in the MiniCPM paper.

    >>> [round(Cosine(peak_lr=1.0, warmup_steps=0, total_steps=100)(step), 3) for step in (0, 50, 100)]
    [1.0, 0.55, 0.1]
    """

    peak_lr: float
    warmup_steps: int
    total_steps: int
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_peak(self.peak_lr)
        require_steps("warmup_steps", self.warmup_steps)
        require_steps("total_steps", self.total_steps)
        if self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"total_steps is {self.total_steps} and warmup_steps {self.warmup_steps}: the cosine needs "
                "at least one step after the warm-up."
            )
        _check_ratio(self.final_ratio, may_be_zero=True)

    def __call__(self, step: float) -> float:
        """Learning rate at a step; at ``total_steps`` and later, its final value."""
        if not self._warmed_up(step, self.warmup_steps):
            return self.peak_lr * step / self.warmup_steps
        progress = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return self.peak_lr * (
            self.final_ratio + (1 - self.final_ratio) * (1 + math.cos(math.pi * progress)) / 2
        )


def _check_peak(peak_lr: float) -> None:
    if not 0 < peak_lr < math.inf:
        raise ValueError(f"peak_lr is {peak_lr}; expected a finite number greater than 0.")


def require_steps(name: str, steps: object) -> None:
    """Refuse what is no number of steps, with a sentence that names it."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{name} is {steps!r}; expected a whole number of steps, 0 or more.")


def _check_ratio(ratio: float, may_be_zero: bool) -> None:
    if not (0 < ratio <= 1 or (may_be_zero and ratio == 0)):
        raise ValueError(
            f"final_ratio is {ratio}; expected a part of the peak between 0 and 1"
            + ("." if may_be_zero else ", and above 0, since an exponential never reaches 0.")
        )
