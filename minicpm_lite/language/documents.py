"""Several documents in one window, each read as if it were alone.

    ids          the  cat  </s>  a  dog  barks  </s>  it
    document      0    0    0    1   1    1      1    2      how many ended before this token
    positions     0    1    2    0   1    2      3    0

Windows are cut from a stream of documents wherever they fall. With the plain causal mask a token attends to
all that stands before it, also to documents that have nothing to do with its own; a model must learn that the
end token cuts them off. `DocumentContext` cuts them off itself, as in the training of Llama 3 (Grattafiori et
al. 2024, 3.2). Nothing but the end token says where a document begins: a window needs no second tensor, and
shards note the token (`minicpm_lite.data.shards.Shards.end`).

`minicpm_lite.training.objective.within_documents` trains so, and ``minicpm-lite train --within-documents``.

Choices and traps:

- The first token of a document is predicted from the end token alone: a model learns how documents begin.
- The end token belongs to the document that it ends, and is predicted from it. Where a tokenizer puts the
  same token in front of each text, too, that one would be a document of its own, and no text would see how it
  begins: with such shards the command line refuses.
- Rotary positions act by their differences, so where a document's positions begin changes nothing but
  rounding. They begin at 0, as they would alone.
- Not so where the rotary frequencies follow the length of the text ("dynamic", "longrope" around its border):
  the length of the window decides for all documents in it.
- The mask has ``tokens ** 2`` entries for each row, where the causal one needs none. With it a step of
  `lite-1m` takes 1.06 times as long (windows of 512, one CPU core).
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .context import Context, causal_mask
from .decoder import Decoder
from .scoring import next_token_loss, readable

__all__ = ["DocumentContext", "loss_within_documents", "require_end"]


def require_end(end: int, vocab_size: int | None = None) -> None:
    """Refuse what ends no document.

    Args:
        end: the id that ends each.
        vocab_size: of the model that reads them, where it is known.

    Raises:
        ValueError: it is no id, or none of the vocabulary.
    """
    if type(end) is not int or end < 0:  # None, say, of shards that note no end
        raise ValueError(f"The end is {end!r}; expected the id that ends each document, an int.")
    if vocab_size is not None and end >= vocab_size:
        raise ValueError(
            f"The end is {end}, which ends no document; the model has ids from 0 to {vocab_size - 1}."
        )


class DocumentContext(Context):
    """A call is a batch of windows, in which a token sees itself and those before it in its own document.

    Args:
        ids: the tokens of the call. Where it brings tokens itself, these say where documents end.
        end: the id that ends a document; what follows the last one is a document, too.

    Raises:
        ValueError: the end is no id.

    >>> import torch
    >>> context = DocumentContext(torch.tensor([[5, 9, 6, 7]]), end=9)
    >>> context.begin(torch.zeros(1, 4, 8))
    tensor([[[0, 1, 0, 1]]])
    >>> context.mask[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """

    def __init__(self, ids: Int[Tensor, "batch tokens"], end: int) -> None:
        require_end(end)
        self._end = end
        self.read(ids)

    def read(self, ids: Int[Tensor, "batch tokens"]) -> None:
        """The tokens of the call, which say where its documents end."""
        ends = ids == self._end
        self._document = ends.cumsum(1) - ends.long()  # (batch, tokens)

    def belong(self, model: nn.Module) -> None:
        """The model whose call begins.

        Raises:
            ValueError: the end is no id of its vocabulary.
        """
        require_end(self._end, model.config.vocab_size)

    def begin(self, x: Float[Tensor, "batch tokens d"]) -> Int[Tensor, "batch 1 tokens"]:
        """The positions of the tokens in their documents.

        Raises:
            ValueError: features in place of more or fewer tokens than the context was made for.
        """
        if x.shape[:2] != self._document.shape:
            raise ValueError(
                f"The context was made for ids of shape {tuple(self._document.shape)}, and "
                f"{tuple(x.shape[:2])} came; make one for each call."
            )
        at = super().begin(x)
        same = self._document[:, :, None] == self._document[:, None]  # (batch, queries, keys)
        self.mask = (same & causal_mask(self.reach, self.reach, x.device))[:, None]
        begins = F.pad(self._document.diff(dim=1), (1, 0)) > 0
        return (at - (at * begins).cummax(1).values)[:, None]  # (batch, 1, tokens)


def loss_within_documents(model: Decoder, window: Int[Tensor, "batch window"], end: int) -> Float[Tensor, ""]:
    """`minicpm_lite.language.scoring.next_token_loss` where no token sees another document; nats a token.

    Raises:
        ValueError: the end is no id of the model's vocabulary.
    """
    return next_token_loss(model, window, DocumentContext(readable(window)[:, :-1], end))
