"""Choosing the next token from its scores.

Scores pass through the same steps in the same order as in `transformers`: repetition penalty, temperature,
top-k, top-p, draw. Temperature 0 takes the best token and draws nothing. Of equal scores that of the lowest
id counts as the better one, so that top-k keeps exactly k; `transformers` keeps all that equal the k-th.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..config import require_positive_integer

__all__ = ["Sampling", "choose", "next_token_probabilities", "require_sampling"]

_SMALLEST = 1e-5  # what scores are divided by: below, a quotient may exceed the numbers that there are


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the scores.

    Attributes:
        temperature: scores are divided by it before the softmax; 0 takes the best token.
        top_k: only the k best tokens may be drawn; of equal ones those of the lowest ids.
        top_p: only the fewest tokens whose probabilities sum to at least this may be drawn (nucleus).
        repetition_penalty: scores of tokens that already occurred are divided by it if positive and
            multiplied by it if negative; 1 changes nothing. Source: Keskar et al. 2019, CTRL.

    >>> Sampling(temperature=-1.0)
    Traceback (most recent call last):
        ...
    ValueError: temperature is -1.0; expected 0 (always the best token) or a number from 1e-05 on.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _is_divisor(self.temperature):
            raise ValueError(
                f"temperature is {self.temperature!r}; expected 0 (always the best token) or a number from "
                f"{_SMALLEST} on."
            )
        if self.top_k is not None:
            require_positive_integer("top_k", self.top_k)
        if self.top_p is not None and not (isinstance(self.top_p, int | float) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p is {self.top_p!r}; expected a probability above 0 and up to 1.")
        if not _is_divisor(self.repetition_penalty):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty!r}; expected 1 (none) or another number "
                f"from {_SMALLEST} on."
            )


def require_sampling(sampling: object) -> None:
    """Refuse what does not say how tokens are chosen; wherever it is given.

    Raises:
        ValueError: a sentence that says what was given.
    """
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling is {sampling!r}; expected how to choose, e.g. Sampling(temperature=0.7).")


def _is_divisor(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _SMALLEST <= value < math.inf


def choose(
    logits: Float[Tensor, "batch vocab"],
    sampling: Sampling,
    seen: Int[Tensor, "batch tokens"] | None = None,
    padding: Int[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """The next token of each row: the best one at temperature 0, else one that is drawn.

    Args:
        logits: scores of the next token.
        sampling: temperature, filters and penalty.
        seen: the tokens so far; needed for a repetition penalty.
        padding: how many of the first ``seen`` of each row are no text.
        generator: source of chance; left out, PyTorch's global one.

    Raises:
        ValueError: a repetition penalty without the tokens so far, scores to draw by that are no numbers, or
            a generator of another device.
    """
    if sampling.temperature == 0:
        return _penalised(logits, sampling.repetition_penalty, seen, padding).argmax(-1)
    if generator is not None and generator.device.type != logits.device.type:
        raise ValueError(
            f"The generator draws on {generator.device} and the scores are on {logits.device}; give "
            f"torch.Generator({str(logits.device)!r})."
        )
    probabilities = next_token_probabilities(logits, sampling, seen, padding)
    try:
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    except RuntimeError as error:
        raise ValueError(f"No token can be drawn by these scores; are all finite numbers? {error}") from None


def next_token_probabilities(
    logits: Float[Tensor, "batch vocab"],
    sampling: Sampling,
    seen: Int[Tensor, "batch tokens"] | None = None,
    padding: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """From scores to the probabilities that a token is drawn with.

    Args:
        logits: scores of the next token.
        sampling: temperature, filters and penalty.
        seen: the tokens so far; needed for a repetition penalty.
        padding: how many of the first ``seen`` of each row are no text.

    Raises:
        ValueError: a repetition penalty without the tokens so far.
    """
    logits = _penalised(logits, sampling.repetition_penalty, seen, padding)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        best = logits.topk(sampling.top_k + 1, dim=-1).values
        kth_best = best[:, -2:-1]
        dropped = logits < kth_best
        if bool((best[:, -1:] == kth_best).any()):  # more tokens equal the k-th than there are places for
            equal, places = logits == kth_best, sampling.top_k - (logits > kth_best).sum(-1, keepdim=True)
            dropped |= equal & (equal.cumsum(-1) > places)
        logits = logits.masked_fill(dropped, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        best_first, order = probabilities.sort(dim=-1, descending=True, stable=True)
        enough_before = F.pad(best_first.cumsum(-1)[:, :-1] >= sampling.top_p, (1, 0))  # the best one stays
        dropped = torch.zeros_like(enough_before).scatter(-1, order, enough_before)
        probabilities = probabilities.masked_fill(dropped, 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def _penalised(logits: Tensor, penalty: float, seen: Tensor | None, padding: Tensor | None) -> Tensor:
    """The scores, lowered for the tokens that a row's text already holds."""
    if penalty == 1:
        return logits
    if seen is None:
        raise ValueError(f"repetition_penalty is {penalty}; give the tokens so far as seen.")
    text = torch.ones_like(seen, dtype=torch.bool)
    if padding is not None:
        text = torch.arange(seen.shape[1], device=seen.device) >= padding[:, None]
    # counted, not set: padding may hold the id of a token that the text holds too
    occurred = torch.zeros_like(logits).scatter_add(-1, seen, text.to(logits.dtype)) > 0
    return torch.where(occurred, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
