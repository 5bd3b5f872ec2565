"""Two-stage pre-training: coarse data while the rate is high, good data from the moment it decays.

MiniCPM trains the stable stage of WSD on coarse data alone. When the decay begins, instruction data of high
quality are mixed in; a separate fine-tuning (SFT) follows, at the rate the decay ended with. Source: Hu et
al. 2024, arXiv 2404.06395, section 5 and Table 1.

Which data come when is a `MixtureWindows` (`minicpm_lite.data.mixtures`); questions with answers as windows
are `ConversationWindows` (`minicpm_lite.data.conversations`). Here is what a model makes of held-out
questions: `score_answers`, `choice_accuracy`. What gradients and curvature do while the rate falls is
measured by `minicpm_lite.training.curvature`.

Traps:

- The loss of an answer is a sum over its tokens, so a choice between answers compares losses a token.
- Where the rotary frequencies follow the length of the text ("dynamic", "longrope" around its border), the
  longest row of a batch decides for all. So what shares a batch here has the same frequencies by itself.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..config import require_positive_integer
from ..data.conversations import EncodedExample, packed_windows
from ..language.decoder import Decoder
from ..language.rotary import same_frequencies
from ..language.scoring import evaluating, predicted, readable, require_finite, targets_of

__all__ = ["AnswerScores", "choice_accuracy", "score_answers"]


@dataclass(frozen=True)
class AnswerScores:
    """What a model makes of some examples, one entry each.

    Attributes:
        total_loss: cross entropy of the whole answer, in nats.
        tokens: of the answer.
        exact: the most likely token is right at every place of the answer. Greedy decoding then gives exactly
            this answer, and only then.
    """

    total_loss: Float[Tensor, " examples"]
    tokens: Int[Tensor, " examples"]
    exact: Bool[Tensor, " examples"]

    @property
    def loss(self) -> float:
        """Answer loss: mean over all answer tokens, in nats a token."""
        return (self.total_loss.sum() / self.tokens.sum()).item()

    @property
    def accuracy(self) -> float:
        """Part of the examples that are answered exactly."""
        return self.exact.double().mean().item()


@torch.no_grad()
def score_answers(model: Decoder, examples: Iterable[EncodedExample], batch_size: int = 64) -> AnswerScores:
    """Loss and exactness of the given answers, whatever they are given beside.

    The model is left as it was, training or not.

    Raises:
        ValueError: there is no example; or one has no question, so that nothing stands before its answer, or
            no answer; or ``batch_size`` is below 1.
        FloatingPointError: a loss that is no finite number.
    """
    require_positive_integer("batch_size", batch_size)
    examples = tuple(examples)
    if not examples:
        raise ValueError("There is no example to score.")
    if not all(example.question for example in examples):
        raise ValueError("An example has no question; give it one token at least, such as the start token.")
    if not all(example.answer for example in examples):
        raise ValueError("An example has no answer, so there is nothing to score; leave it out.")
    device, places, parts = next(model.parameters()).device, [], []
    with evaluating(model):
        for at in _batches(model, examples, batch_size):
            batch = [examples[place] for place in at]
            window = packed_windows([[example] for example in batch], max(map(len, batch))).to(device)
            logits = model(readable(window)[:, :-1])  # (batch, length, vocab)
            answers = predicted(window)
            targets = targets_of(window)
            losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")
            exact = ((logits.argmax(-1) == targets) | ~answers).all(1)
            parts.append((losses.double().sum(1).cpu(), answers.sum(1).cpu(), exact.cpu()))
            places += at
    order = torch.tensor(places).argsort()
    scores = AnswerScores(*(torch.cat(part)[order] for part in zip(*parts, strict=True)))
    require_finite(scores.total_loss, "an answer")
    return scores


def _batches(model: Decoder, examples: Sequence[EncodedExample], batch_size: int) -> Iterator[list[int]]:
    """The places of examples that are read together: those with the same rotary frequencies."""
    lengths = [len(example) - 1 for example in examples]  # the last token is predicted, not read
    for places in same_frequencies(model.config, lengths):
        for start in range(0, len(places), batch_size):
            yield places[start : start + batch_size]


def choice_accuracy(model: Decoder, choices: Iterable[Iterable[EncodedExample]]) -> float:
    """How often the first of several answers has the lowest loss a token; a tie does not count.

    Args:
        model: any decoder.
        choices: for each question as many examples as there are answers to choose from, the right one first.

    Raises:
        ValueError: no question, or a different number of answers, or fewer than two.
        FloatingPointError: a loss that is no finite number.
    """
    choices = [tuple(options) for options in choices]
    sizes = {len(options) for options in choices}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(
            f"The questions have {sorted(sizes)} answers; expected one number of answers for all, 2 or more."
        )
    scores = score_answers(model, [option for options in choices for option in options])
    per_token = (scores.total_loss / scores.tokens).view(len(choices), -1)  # (questions, answers)
    return (per_token[:, :1] < per_token[:, 1:]).all(1).double().mean().item()
