"""What training minimises: a loss of a model on a batch, and what the loss is a mean over.

    minimised, reported = objective.loss(model, batch)        both are means over ...
    units = objective.weight(batch)                           ... so many tokens, pairs, answers

A step may be cut into passes, and shared by processes. A pass then counts by its share of the step's units,
so the mean is over the units of the whole step. A mean of the passes' means is another number, wherever they
hold unequal numbers of units.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import require_probability
from ..language.decoder import Decoder
from ..language.documents import loss_within_documents, require_end
from ..language.scoring import evaluating, next_token_loss, predicted, readable, token_losses
from ..language.upcycling import balance_loss
from .batches import Batch
from .state import fingerprint

__all__ = ["Objective", "distillation", "next_token", "within_documents"]


@dataclass(frozen=True)
class Objective:
    """A loss, and what it is a mean over.

    Attributes:
        name: by it a checkpoint knows its objective; one that minimises something else needs another.
        loss: of a module and a batch: what is minimised, and what is reported, which has no gradient. They
            differ by what is added for the module's sake, such as the balance loss of a mixture. Both are
            means over the batch's units. A batch without a unit has the loss 0 with gradient 0, since a
            process may be left with such a pass.
        weight: the units of a batch; it is asked before the batch goes to the device.
        total: the reported loss summed over a batch's units, where that can be had without the rounding of a
            mean. Left out: the mean times the units.
    """

    name: str
    loss: Callable[[nn.Module, Batch], tuple[Float[Tensor, ""], Float[Tensor, ""]]]
    weight: Callable[[Batch], int]
    total: Callable[[nn.Module, Batch], Float[Tensor, ""]] | None = None

    def summed(self, model: nn.Module, batch: Batch) -> float:
        """The reported loss of a batch, summed over its units."""
        if self.total is not None:
            return self.total(model, batch).item()
        return self.loss(model, batch)[1].item() * self.weight(batch)


def _next_token_loss(
    model: Decoder, window: Int[Tensor, "batch window"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    return _balanced(model, next_token_loss(model, window))


def _balanced(model: Decoder, loss: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """What is minimised, with the balance loss of a mixture in training, and what is reported."""
    mixture = model.config.mixture
    if mixture is None or mixture.balance_loss_weight == 0 or not model.training:
        return loss, loss.detach()
    return loss + mixture.balance_loss_weight * balance_loss(model), loss.detach()


def _predicted_tokens(window: Int[Tensor, "batch window"]) -> int:
    return int(predicted(window).sum())


def _total_loss(model: Decoder, window: Int[Tensor, "batch window"]) -> Float[Tensor, ""]:
    return token_losses(model, window).sum()


next_token = Objective("next token", _next_token_loss, _predicted_tokens, _total_loss)
"""A decoder's cross entropy of each predicted token of a window, given those before it, in nats a token.

With experts, what is minimised in training mode holds their balance loss, too: that of each pass, by its
share."""


def within_documents(end: int) -> Objective:
    """As `next_token`, and no token sees another document of its window.

    Args:
        end: the id that ends a document, as `minicpm_lite.data.shards.Shards.end` notes it. It must not begin
            documents, too.

    Raises:
        ValueError: it is no id.
    """
    require_end(end)

    def loss(
        model: Decoder, window: Int[Tensor, "batch window"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        return _balanced(model, loss_within_documents(model, window, end))

    return Objective(f"next token within documents that end with {end}", loss, _predicted_tokens)


def distillation(teacher: Decoder, share: float = 1.0) -> Objective:
    """The next token as another model says it: the divergence of the model's distribution from the teacher's.

        loss = share * KL(teacher || model) + (1 - share) * cross entropy of the text

    in nats a predicted token. A distribution says more of each place than the one token that stands there.

    Args:
        teacher: a decoder of the same vocabulary; it stays as it is.
        share: from 0, the text alone, to 1, the teacher alone.

    Raises:
        ValueError: the share is none; or, from the loss, a model of another vocabulary.

    Source: Hinton et al. 2015, arXiv 1503.02531, at temperature 1.
    """
    require_probability("share", share)

    def loss(
        model: Decoder, window: Int[Tensor, "batch window"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        its, own = teacher.config.vocab_size, model.config.vocab_size
        if its != own:
            raise ValueError(
                f"The teacher has {its} token ids and the model has {own}; a distribution is learned over "
                "the same tokens. Give a teacher of the model's vocabulary."
            )
        ids, counted = readable(window)[:, :-1], predicted(window)
        with torch.no_grad(), evaluating(teacher):
            wanted = teacher(ids).log_softmax(-1)
        said = model(ids).log_softmax(-1)
        divergence = F.kl_div(said, wanted, reduction="none", log_target=True).sum(-1)  # (batch, length)
        targets = window[:, 1:].clamp(min=0).long()
        surprise = -said.gather(-1, targets[..., None])[..., 0]
        losses = torch.where(counted, share * divergence + (1 - share) * surprise, 0)
        return _balanced(model, losses.sum() / counted.sum().clamp(min=1))

    name = f"distillation, {share:g} from teacher {fingerprint(teacher)}"
    return Objective(name, loss, _predicted_tokens)
