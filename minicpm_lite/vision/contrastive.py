"""Losses that bring a picture and its text together: SigLIP's sigmoid, and the softmax of CLIP beside it.

    score_ij = exp(t) cos(image_i, text_j) + b                          t and b are learned
    sigmoid  = -1/B sum_i sum_j log sigmoid(+-score_ij)                 + for i = j, - for all others
    softmax  = -1/(2B) sum_i (log softmax_j(score_ij) + log softmax_j(score_ji)) at j = i        without b

The softmax asks which of all texts of the batch is the picture's, so each score needs the sum over all
others. The sigmoid asks of each pair by itself whether the two belong together. So no pair waits for another
one: a process needs the texts of the others only one share at a time, and passes them on around a ring.

Sources: Zhai et al. 2023, SigLIP, arXiv 2303.15343 (the sum over all pairs is divided by B, not by B^2);
Radford et al. 2021, CLIP, arXiv 2103.00020.

Trap: of B^2 pairs only B belong together. With b = 0 the loss begins at B log 2 and spends its first steps on
saying no; the release begins with t = log 10 and b = -10, and for small batches b = -log(B - 1) is that bias
by which as many pairs are thought right as are.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .siglip import Patches, SigLIPEncoder
from .text_encoder import TextEncoder

__all__ = ["Contrastive", "sigmoid_loss", "softmax_loss"]


class Contrastive(nn.Module):
    """A picture encoder and a text encoder, whose vectors are compared.

    Args:
        images: an encoder with pooling.
        texts: an encoder as wide.
        log_scale: what the logarithm of the scale begins with; the release's is log 10.
        bias: what is added to each score at first; the release's is -10.

    Raises:
        ValueError: encoders of different width, or one without pooling.
    """

    def __init__(
        self, images: SigLIPEncoder, texts: TextEncoder, log_scale: float = math.log(10), bias: float = -10.0
    ) -> None:
        super().__init__()
        if images.head is None:
            raise ValueError("The picture encoder has no pooling; SigLIPEncoder(config, pooling=True) has.")
        if images.config.hidden_size != texts.config.hidden_size:
            raise ValueError(
                f"Pictures become vectors of {images.config.hidden_size} numbers and texts of "
                f"{texts.config.hidden_size}; both must be as wide to be compared."
            )
        self.images, self.texts = images, texts
        self.log_scale = nn.Parameter(torch.tensor(float(log_scale)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(
        self, patches: Patches, ids: Tensor
    ) -> tuple[Float[Tensor, "pictures width"], Float[Tensor, "texts width"]]:
        """The vectors of pictures and of texts, each of length 1."""
        return F.normalize(self.images.pooled(patches), dim=-1), F.normalize(self.texts(ids), dim=-1)


def sigmoid_loss(
    images: Float[Tensor, "pairs width"],
    texts: Float[Tensor, "pairs width"],
    log_scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """SigLIP's loss, in nats a pair that belongs together.

    Where processes train together, each brings its own pairs, as many as every other. It compares its
    pictures with the texts of all, of which it holds one share at a time; gradients go back to where a text
    came from. The mean of the processes' losses is the loss of all pairs.

    Args:
        images: vectors of length 1.
        texts: of the same pairs, vectors of length 1.
        log_scale: logarithm of what cosines are multiplied by.
        bias: what is added to each score.

    >>> one = torch.eye(2)
    >>> round(sigmoid_loss(one, one, torch.tensor(0.0), torch.tensor(0.0)).item(), 4)  # log(1 + 1/e) + log 2
    1.0064
    """
    belongs = 2 * torch.eye(len(images), device=images.device) - 1
    total = _of_share(images, texts, log_scale, bias, belongs)
    for _ in range(_processes() - 1):
        texts = _PassOn.apply(texts, 1)
        total = total + _of_share(images, texts, log_scale, bias, -torch.ones_like(belongs))
    return total / len(images)


def softmax_loss(
    images: Float[Tensor, "pairs width"],
    texts: Float[Tensor, "pairs width"],
    log_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """CLIP's loss in one process, in nats: which text is a picture's, and which picture is a text's.

    >>> one = torch.eye(2)
    >>> round(softmax_loss(one, one, torch.tensor(0.0)).item(), 4)  # log(1 + 1/e)
    0.3133
    """
    scores = log_scale.exp() * images @ texts.T
    right = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


def _of_share(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor, belongs: Tensor) -> Tensor:
    return -F.logsigmoid(belongs * (log_scale.exp() * images @ texts.T + bias)).sum()


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class _PassOn(torch.autograd.Function):
    """What stands in each process moves on to the next one in a ring; gradients move back."""

    @staticmethod
    def forward(context, share: Tensor, by: int) -> Tensor:
        context.by = by
        return _passed_on(share, by)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        return _passed_on(gradient, -context.by), None


def _passed_on(share: Tensor, by: int) -> Tensor:
    rank, size = dist.get_rank(), dist.get_world_size()
    found, share = torch.empty_like(share), share.contiguous()
    sends = dist.P2POp(dist.isend, share, (rank + by) % size)
    receives = dist.P2POp(dist.irecv, found, (rank - by) % size)
    for work in dist.batch_isend_irecv([sends, receives]):
        work.wait()
    return found
