"""How well a model predicts a text: the cross entropy of each token, given those before it.

    loss[t] = -log softmax(logits[t])[window[t + 1]]        in nats

A window of ``length + 1`` tokens holds ``length`` predictions. Some tokens are read and not predicted: the
question in front of an answer, padding behind it. They are stored with a mark, so that a window stays one
tensor. The mark is known to this file alone: the complement ``~id``, which is negative for every id.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from .context import Context
from .decoder import Decoder

__all__ = [
    "context_only",
    "evaluating",
    "next_token_loss",
    "predicted",
    "readable",
    "require_finite",
    "targets_of",
    "token_losses",
]


def context_only(ids: Integer[Tensor, "*batch tokens"]) -> Int[Tensor, "*batch tokens"]:
    """Token ids with the mark: they are read, and not predicted.

    Of a type without a sign they come in one that has it.
    """
    return ~(ids if ids.dtype.is_signed else ids.long())


def readable(window: Int[Tensor, "*batch window"]) -> Int[Tensor, "*batch window"]:
    """The token ids of a window, without the mark.

    >>> readable(torch.cat([context_only(torch.tensor([5, 0])), torch.tensor([7])]))
    tensor([5, 0, 7])
    """
    return torch.where(window < 0, ~window, window)


def predicted(window: Int[Tensor, "*batch window"]) -> Bool[Tensor, "*batch length"]:
    """Which tokens of a window are predicted; the first never is, for nothing stands before it.

    >>> predicted(torch.cat([context_only(torch.tensor([5, 0])), torch.tensor([7])]))
    tensor([False,  True])
    """
    return window[..., 1:] >= 0


def targets_of(window: Int[Tensor, "*batch window"]) -> Int[Tensor, "*batch length"]:
    """What `F.cross_entropy` compares a window's logits with; -1, its ``ignore_index``, where none is.

    >>> targets_of(torch.cat([context_only(torch.tensor([5, 0])), torch.tensor([7])]))
    tensor([-1,  7])
    """
    return window[..., 1:].clamp(min=-1).long()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards, also behind an error, each part of it is as it was.

    The mode belongs to the model, so a model is for one thread at a time: another one that trains it, or
    evaluates it and ends later, finds a mode that is not its own. Give each thread a copy.
    """
    before = [(part, part.training) for part in model.modules()]  # a part before those within it
    model.eval()
    try:
        yield
    finally:
        for part, training in before:
            if part.training != training:
                part.train(training)  # which may do more than note it, as where an adapter is merged


def token_losses(
    model: Decoder, window: Int[Tensor, "batch window"], context: Context | None = None
) -> Float[Tensor, "batch length"]:
    """Cross entropy of each token of a window but the first, given those before it, in nats.

    0 for a token that is read and not predicted.

    Args:
        model: a decoder.
        window: ids, some of which may be marked as read only.
        context: what the tokens may look at; left out, each window is a text of its own.
    """
    logits = model(readable(window)[:, :-1], context)  # (batch, length, vocab)
    targets = targets_of(window)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    return losses.view_as(targets)


def next_token_loss(
    model: Decoder, window: Int[Tensor, "batch window"], context: Context | None = None
) -> Float[Tensor, ""]:
    """Mean of `token_losses` over the tokens that are predicted; nats a token, 0 if none is predicted."""
    return token_losses(model, window, context).sum() / predicted(window).sum().clamp(min=1)


def require_finite(losses: Float[Tensor, "*losses"], of: str) -> None:
    """Refuse what a broken model makes of a text, before it is compared with anything.

    Args:
        losses: in nats.
        of: what was scored, e.g. "an answer".

    Raises:
        FloatingPointError: one of them is no finite number.
    """
    if not losses.isfinite().all():
        raise FloatingPointError(f"The loss of {of} is no finite number. Are the weights whole?")
