"""The wind tunnel: measure on small models what a large one needs, before the large one is paid for.

Four instruments, in the order of the chapter:

1. µP: one learning rate for all widths. `mup_groups`, from `minicpm_lite.training.optimizer`, is the
   optimiser's half of the paper's Table 7; the other half, start weights and multipliers, is in `Decoder`.
   `coordinate_check` shows whether they fit.
2. The batch law: `batch_size_tokens`, and what is needed to refit it: `tokens_to_reach`, `fit_parabola`,
   `fit_power_law`.
3. The loss surface L(N, D): `fit_loss_surface`.
4. ScalingBench: `conditional_losses` of reference answers, and `fit_sigmoid` from them to accuracy.

Sources: Hu et al. 2024, "MiniCPM", arXiv 2404.06395, sections 3.2, 3.3 and 4.5, appendix A.1 (1 to 3);
MiniCPM team 2025, "MiniCPM4", arXiv 2506.07900, section 2.3 (4); µP: Yang et al. 2022, arXiv 2203.03466.

Choices, and the traps behind them:

- Table 7 names "2-D tensors" and "others". The embedding and the output layer are "others" here: their size
  grows with the width on one side only, so theory leaves their rate and their start alone.
- The attention scale stays 1/sqrt(head_dim). µP theory says 1/head_dim; with heads of one size at every width
  the two differ by a constant.
- The weight decay is not multiplied by the width ratio, as the `mup` package does; Table 7 does not say so.
- In the batch law L is the loss, not the number of layers.
- N and D of the loss surface are what they were in the fit: its coefficients change with their units.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import least_squares, nnls
from scipy.special import expit
from torch import Tensor, nn

from ..config import require_positive_integer, require_positive_number
from ..language.decoder import Decoder
from ..language.rotary import same_frequencies
from ..language.scoring import (
    context_only,
    evaluating,
    predicted,
    readable,
    require_finite,
    token_losses,
)
from ..runtime import require_seed
from .optimizer import mup_groups

__all__ = ["LossSurface", "Parabola", "PowerLaw", "Sigmoid", "batch_size_tokens", "conditional_losses",
           "coordinate_check", "fit_loss_surface", "fit_parabola", "fit_power_law", "fit_sigmoid",
           "mup_groups", "tokens_to_reach"]  # fmt: skip

_LOG_SLOPE = 7.0  # of a sigmoid: how far from 0 it is looked for
_ON_THE_SLOPE = 1e-3  # a sigmoid is as good as flat where it is nearer to its ends than this


def coordinate_check(
    model: Decoder,
    window: Int[Tensor, "batch window"],
    lr: float,
    updates: int = 4,
    parametrization: Literal["mup", "standard"] = "mup",
) -> dict[str, list[float]]:
    """Sizes of activations before the first update and after each of a few updates on one batch.

    The size is the mean absolute value over all coordinates. Models of several widths, side by side, tell
    whether a parametrisation is right: with µP the sizes after a few updates do not grow with the width.

    Args:
        model: is trained on the way; give one that is not needed any more.
        window: token ids; each token but the first is predicted.
        lr: the rate at the base width.
        updates: updates of Adam.
        parametrization: "mup" takes the rates of `mup_groups`, "standard" takes ``lr`` for everything.

    Returns:
        ``updates + 1`` sizes of each of "embedding", "attention" and "feed-forward" of the last block,
        "residual stream" and "logits".

    Source: Yang et al. 2022, arXiv 2203.03466, appendix D.1.
    """
    require_positive_integer("updates", updates)
    if parametrization not in ("mup", "standard"):
        raise ValueError(f"parametrization is {parametrization!r}; choose mup or standard.")
    groups = mup_groups(model, lr)
    if parametrization == "standard":
        groups = [group | {"lr": lr} for group in groups]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    last = model.layers[-1]

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(
            lambda module, inputs, output: sizes[name].append(output.detach().abs().mean().item())
        )

    watched = {
        "embedding": model.embed_tokens,
        "attention": last.self_attn,
        "feed-forward": last.mlp,
        "residual stream": last,
        "logits": model,
    }
    sizes: dict[str, list[float]] = {name: [] for name in watched}
    for update in range(updates + 1):
        hooks = [watch(name, module) for name, module in watched.items()]
        try:
            loss = token_losses(model, window).mean()
        finally:
            for hook in hooks:  # before the backward pass, in which blocks may be computed again
                hook.remove()
        if update < updates:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return sizes


def batch_size_tokens(loss: float, coefficient: float = 1.2110e9, exponent: float = 6.2393) -> float:
    """The batch, in tokens, that reaches a loss with the fewest tokens: ``coefficient / loss ** exponent``.

    Args:
        loss: in nats a token. The published coefficients belong to the MiniCPM team's tokeniser and to C4.
        coefficient: in tokens; your own, if you have refitted the law.
        exponent: likewise.

    Source: MiniCPM team 2024, the report on Notion; rounded in arXiv 2404.06395, section 3.2.

    >>> round(batch_size_tokens(2.5) / 1e6, 2)  # MiniCPM-2.4B expects a loss of about 2.5
    3.98
    """
    require_positive_number("loss", loss)
    return coefficient / loss**exponent


def tokens_to_reach(tokens: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Tokens after which a loss curve first lies at or below a target, by straight lines between its points.

    None if the curve never does, or if it lies there from its first point: then the answer is not in it.

    Raises:
        ValueError: numbers that cannot be, or tokens that do not grow from point to point.
    """
    tokens, losses = _positive("tokens", tokens), _positive("losses", losses)
    _same_length(tokens=tokens, losses=losses)
    require_positive_number("target", target)
    if (np.diff(tokens) <= 0).any():
        raise ValueError(
            f"tokens is {tokens.tolist()}; expected a curve in order, each point later than the last."
        )
    below = np.flatnonzero(losses <= target)
    if len(below) == 0 or below[0] == 0:
        return None
    after = below[0]
    part = (losses[after - 1] - target) / (losses[after - 1] - losses[after])
    return float(tokens[after - 1] + part * (tokens[after] - tokens[after - 1]))


@dataclass(frozen=True)
class Parabola:
    """``value + curvature * (ln x - ln at) ** 2``, fitted by least squares.

    Attributes:
        at: where it is lowest, in the units of x.
        value: how low it is there.
        curvature: how fast it rises on both sides; always above 0.
        inside: whether ``at`` lies between the smallest and the largest measured x. If not, it is a guess.
    """

    at: float
    value: float
    curvature: float
    inside: bool

    def __call__(self, x: float) -> float:
        return self.value + self.curvature * (np.log(x) - math.log(self.at)) ** 2


def fit_parabola(x: Sequence[float], y: Sequence[float]) -> Parabola:
    """A parabola in the logarithm of x: the best learning rate or batch size between the measured ones.

    Raises:
        ValueError: fewer than 3 different x, or the parabola has no lowest point: it opens downwards, or what
            it bends is no more than rounding.
    """
    x, y = _positive("x", x), _numbers("y", y)
    _same_length(x=x, y=y)
    if len(set(x)) < 3:
        raise ValueError(f"A parabola needs at least 3 different x; there are {len(set(x))}.")
    center = np.log(x).mean()  # so that the squares stay small
    bend, slope, height = np.polyfit(np.log(x) - center, y, 2)
    if not bend * np.ptp(np.log(x)) ** 2 > 1e-12 * np.abs(y).max():
        raise ValueError(
            "The parabola opens downwards, or is a straight line, and has no lowest point; measure a wider "
            "range of x."
        )
    at = -slope / (2 * bend)
    inside = np.log(x).min() <= center + at <= np.log(x).max()
    return Parabola(float(np.exp(center + at)), float(height - bend * at**2), float(bend), bool(inside))


@dataclass(frozen=True)
class PowerLaw:
    """``coefficient * x ** exponent``, with the spread of both.

    Attributes:
        coefficient: in the units of y.
        exponent: below 0 for a law that falls.
        draws: (coefficient, exponent) of each bootstrap sample.
    """

    coefficient: float
    exponent: float
    draws: tuple[tuple[float, float], ...]

    def __call__(self, x: float) -> float:
        return self.coefficient * np.asarray(x, dtype=float) ** self.exponent

    def band(
        self, x: float | Float[np.ndarray, "*points"], confidence: float = 0.95
    ) -> tuple[float, float] | tuple[Float[np.ndarray, "*points"], Float[np.ndarray, "*points"]]:
        """Between what the law lies at x, or at each x of an array, in this part of the bootstrap samples."""
        x = np.asarray(x, dtype=float)
        drawn = np.array([coefficient * x**exponent for coefficient, exponent in self.draws])
        return _middle(drawn, confidence)

    def exponent_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Between what the exponent lies in this part of the bootstrap samples."""
        return _middle(np.array([exponent for _, exponent in self.draws]), confidence)


def fit_power_law(
    x: Sequence[float],
    y: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> PowerLaw:
    """A straight line through the logarithms of x and y, by least squares, with a bootstrap.

    Args:
        x: positive.
        y: positive.
        groups: one label for each point. Points of one label come from the same runs and are drawn together:
            else their number would feign a certainty they do not have. Left out: each point by itself.
        draws: bootstrap samples.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than 3 points, fewer than 2 different x or groups, a group that is nan, or numbers
            without a logarithm.

    >>> law = fit_power_law([1, 2, 4, 8], [3, 12, 48, 192])
    >>> round(law.coefficient, 6), round(law.exponent, 6)
    (3.0, 2.0)
    """
    require_seed(seed)
    x, y = _positive("x", x), _positive("y", y)
    _same_length(x=x, y=y)
    if len(x) < 3 or len(set(x)) < 2:
        raise ValueError(f"A power law needs 3 points with different x; there are {len(x)}.")
    labels = list(range(len(x))) if groups is None else list(groups)
    _same_length(x=x, groups=labels)
    if len(set(labels)) < 2:
        raise ValueError(
            f"All points are of the group {labels[0]!r}, which says nothing of how groups differ. Give 2 "
            "groups at least, or leave them out."
        )
    if any(label != label for label in labels):
        raise ValueError("A group is nan, which is equal to no group. Give each point the label of its own.")
    members = [[i for i, label in enumerate(labels) if label == each] for each in dict.fromkeys(labels)]
    random, sampled = np.random.default_rng(seed), []
    while len(sampled) < draws:
        chosen = [i for group in random.integers(len(members), size=len(members)) for i in members[group]]
        if len(set(x[chosen])) >= 2:  # a line needs two; a sample that has them not says nothing
            sampled.append(_line_through_logs(x[chosen], y[chosen]))
    return PowerLaw(*_line_through_logs(x, y), tuple(sampled))


@dataclass(frozen=True)
class LossSurface:
    """``L(N, D) = C_N / N**alpha + C_D / D**beta + L0``: loss by parameters and tokens.

    Attributes:
        C_N: what too few parameters cost.
        alpha: how fast that falls with N.
        C_D: what too few tokens cost.
        beta: how fast that falls with D.
        L0: what remains for a model and a text without end.
    """

    C_N: float
    alpha: float
    C_D: float
    beta: float
    L0: float

    def __call__(self, N: float, D: float) -> float:
        return self.C_N / np.power(N, self.alpha) + self.C_D / np.power(D, self.beta) + self.L0

    @property
    def K(self) -> float:
        """``(alpha C_N / (beta C_D)) ** (1 / (alpha + beta))``.

        Raises:
            ValueError: N or D makes no difference on this surface.
        """
        self._require_optimum()
        ratio = self.alpha * self.C_N / (self.beta * self.C_D)
        return ratio ** (1 / (self.alpha + self.beta))

    @property
    def eta(self) -> float:
        """``(beta - alpha) / (alpha + beta)``: N over D at the optimum grows with this power of the FLOPs.

        Raises:
            ValueError: N or D makes no difference on this surface.
        """
        self._require_optimum()
        return (self.beta - self.alpha) / (self.alpha + self.beta)

    def _require_optimum(self) -> None:
        if not (self.C_N > 0 and self.C_D > 0):
            raise ValueError("On this surface the loss does not fall with both N and D: it has no optimum.")

    def optimal(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens of least loss for ``flops = 6 N D``; N / D is ``K**2 (flops/6)**eta``.

        Raises:
            ValueError: ``flops`` is not above 0, or N or D makes no difference on this surface.
        """
        require_positive_number("flops", flops)
        N = self.K * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return N, flops / 6 / N


def fit_loss_surface(N: Sequence[float], D: Sequence[float], L: Sequence[float]) -> LossSurface:
    """The surface through measured losses, by least squares.

    With the two exponents given the rest is linear, and least squares without negative coefficients solve it
    at once. So only the exponents are searched for, as logarithms and from several starts.

    Args:
        N: parameters of each model.
        D: tokens it was trained on, to the end of a decay.
        L: its loss there.

    Raises:
        ValueError: fewer than 6 points, fewer than 3 different N or D, or numbers that are not above 0.
    """
    N, D, L = _positive("N", N), _positive("D", D), _positive("L", L)
    _same_length(N=N, D=D, L=L)
    if len(L) < 6 or len(set(N)) < 3 or len(set(D)) < 3:
        raise ValueError(
            f"{len(L)} points with {len(set(N))} different N and {len(set(D))} different D do not fix the "
            "five unknowns of the surface; measure at least 6 points, 3 different N and 3 different D."
        )
    unit_n, unit_d = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())  # so that all terms are of one size

    def solve(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        alpha, beta = np.exp(logs)
        terms = np.stack([(N / unit_n) ** -alpha, (D / unit_d) ** -beta, np.ones_like(L)], axis=1)
        coefficients, _ = nnls(terms, L)
        return coefficients, terms @ coefficients - L

    starts = [np.log([alpha, beta]) for alpha in (0.1, 0.3, 0.8) for beta in (0.1, 0.3, 0.8)]
    found = [
        least_squares(lambda logs: solve(logs)[1], start, bounds=np.log([[0.01] * 2, [5] * 2]).tolist())
        for start in starts
    ]
    best = min(found, key=lambda result: result.cost).x
    (alpha, beta), (c_n, c_d, floor) = np.exp(best), solve(best)[0]
    # what is no more than rounding beside the losses, in units of the mean N and D, is no term
    c_n, c_d = (term if term > 1e-9 * L.mean() else 0.0 for term in (c_n, c_d))
    return LossSurface(
        float(c_n * unit_n**alpha), float(alpha), float(c_d * unit_d**beta), float(beta), float(floor)
    )


@torch.no_grad()
def conditional_losses(
    model: Decoder, contexts: Int[Tensor, "items context"], answers: Int[Tensor, "items answer"]
) -> Float[Tensor, " items"]:
    """Loss of each answer given its context: the mean over the answer's tokens alone, in nats a token.

    Shorter answers are padded with tokens that carry the mark of `context_only`, which do not count: the loss
    is that of the answer alone, also where rotary frequencies follow the length of the text.

    Raises:
        ValueError: the contexts are empty, so that nothing stands before an answer's first token, or carry
            the mark already; or an answer has no token.
        FloatingPointError: a loss that is no finite number.
    """
    if not contexts.numel():
        raise ValueError("The contexts hold no token; give one at least, such as the start token.")
    if not torch.equal(readable(contexts), contexts):
        raise ValueError("Some tokens of the contexts carry the mark of context_only; give plain ids.")
    window = torch.cat([context_only(contexts), answers], dim=1)
    counted = predicted(window).sum(dim=1)
    if not counted.all():
        raise ValueError("An answer holds no token that is predicted; each needs one at least.")
    ends = (predicted(window) * torch.arange(1, window.shape[1]).to(window)).amax(dim=1)  # behind, padding
    parts, order = [], []
    with evaluating(model):
        for places in same_frequencies(model.config, ends.tolist()):
            part = window[places, : int(ends[places].max()) + 1]
            parts.append(token_losses(model, part).sum(dim=1) / counted[places])
            order += places
    losses = torch.cat(parts)[torch.tensor(order).argsort()]
    require_finite(losses, "an answer")
    return losses


@dataclass(frozen=True)
class Sigmoid:
    """Accuracy from loss: ``chance + (ceiling - chance) / (1 + exp(slope * (loss - midpoint)))``.

    Attributes:
        midpoint: the loss half-way between chance and ceiling.
        slope: how sharply accuracy falls with the loss; above 0.
        chance: accuracy of guessing, which a large loss tends to.
        ceiling: accuracy that a small loss tends to.
    """

    midpoint: float
    slope: float
    chance: float = 0.0
    ceiling: float = 1.0

    def predict(self, loss: float) -> float:
        """Accuracy at a loss."""
        part = expit(-self.slope * (np.asarray(loss, dtype=float) - self.midpoint))
        return self.chance + (self.ceiling - self.chance) * part

    def inverse(self, accuracy: float) -> float:
        """The loss at which an accuracy is reached.

        Raises:
            ValueError: the accuracy does not lie between chance and ceiling.
        """
        if not self.chance < accuracy < self.ceiling:
            raise ValueError(
                f"accuracy is {accuracy}; the sigmoid runs between {self.chance} and {self.ceiling}."
            )
        part = (accuracy - self.chance) / (self.ceiling - self.chance)
        return self.midpoint + math.log(1 / part - 1) / self.slope


def fit_sigmoid(
    loss: Sequence[float], accuracy: Sequence[float], chance: float = 0.0, ceiling: float = 1.0
) -> Sigmoid:
    """The sigmoid through measured pairs of loss and accuracy, by least squares.

    Args:
        loss: of reference answers, in nats a token.
        accuracy: between 0 and 1.
        chance: accuracy of guessing: 0.25 for four choices.
        ceiling: best accuracy that can be hoped for.

    Raises:
        ValueError: fewer than 3 different losses, an accuracy that is none, or chance not below ceiling; or
            accuracy does not fall with the loss, or fewer than 2 losses lie where it falls.
    """
    loss, accuracy = _positive("loss", loss), _numbers("accuracy", accuracy)
    _same_length(loss=loss, accuracy=accuracy)
    if not 0 <= chance < ceiling <= 1:
        raise ValueError(f"chance is {chance} and ceiling {ceiling}; expected 0 <= chance < ceiling <= 1.")
    if not ((accuracy >= 0) & (accuracy <= 1)).all():
        raise ValueError("An accuracy lies outside 0 to 1; give parts, not per cent.")
    if len(set(loss)) < 3:
        raise ValueError(f"A sigmoid needs at least 3 different losses; there are {len(set(loss))}.")
    no_fall = ValueError(
        "Accuracy does not fall with the loss, so no sigmoid fits. Were they exchanged? Else measure a wider "
        "range of losses."
    )
    if not np.polyfit(loss, accuracy, 1)[0] * np.ptp(loss) < -1e-9:  # more than rounding
        raise no_fall
    found = min(
        (
            least_squares(
                lambda p: Sigmoid(p[0], math.exp(p[1]), chance, ceiling).predict(loss) - accuracy,
                [middle, math.log(slope)],
                bounds=([-np.inf, -_LOG_SLOPE], [np.inf, _LOG_SLOPE]),
            )
            for middle in (loss.min(), loss.mean(), loss.max())
            for slope in (1.0, 5.0)
        ),
        key=lambda result: result.cost,
    )
    if found.x[1] < -0.99 * _LOG_SLOPE:  # the flattest that is looked for
        raise no_fall
    sigmoid = Sigmoid(float(found.x[0]), math.exp(found.x[1]), chance, ceiling)
    part = (sigmoid.predict(loss) - chance) / (ceiling - chance)
    on_the_slope = loss[(part > _ON_THE_SLOPE) & (part < 1 - _ON_THE_SLOPE)]
    if len(set(on_the_slope)) < 2:
        raise ValueError(
            f"Of the losses, {len(set(on_the_slope))} lie where accuracy falls, so nothing says how steep a "
            "sigmoid is there. Measure at more losses in between."
        )
    if found.x[1] > 0.99 * _LOG_SLOPE:  # the steepest that is looked for
        raise ValueError(
            "Accuracy falls in a jump, steeper than any sigmoid that is looked for. Measure at more losses "
            "where it falls."
        )
    return sigmoid


def _numbers(name: str, values: Sequence[float], what: str = "finite numbers") -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a row of {what}; it holds others.")
    return array


def _positive(name: str, values: Sequence[float]) -> np.ndarray:
    array = _numbers(name, values, "finite numbers above 0")
    if not (array > 0).all():
        raise ValueError(f"{name} must be a row of finite numbers above 0; it holds others.")
    return array


def _same_length(**rows: Sequence) -> None:
    if len({len(row) for row in rows.values()}) > 1:
        counts = ", ".join(f"{len(row)} {name}" for name, row in rows.items())
        raise ValueError(f"There are {counts}; each point needs one of each.")


def _line_through_logs(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    slope, height = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(height)), float(slope)


def _middle(values: np.ndarray, confidence: float) -> tuple[float, float] | tuple[np.ndarray, np.ndarray]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a part between 0 and 1, such as 0.95.")
    if not len(values):
        raise ValueError("The law was fitted without bootstrap samples; give fit_power_law draws above 0.")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return (float(low), float(high)) if values.ndim == 1 else (low, high)
