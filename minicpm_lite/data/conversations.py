"""Conversations: questions with answers as windows, in which the answers alone are predicted.

`encode_example` writes a question and its answer in the template of the first MiniCPM models and cuts them
into tokens; `ConversationWindows` packs such examples into windows, each whole and exactly once an epoch.

Nothing separates the examples in a window: a question can attend to the example before it, as in prose.

Trap: a question may spell a control token, as in "what does <AI> mean?", and a tokenizer would take it for
one.
"""

import operator
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from ..config import require_positive_integer
from ..language.chat import encode_chat, encode_text, minicpm_chat
from ..language.scoring import context_only, predicted
from ..language.tokenizer import BytePairTokenizer, fast_tokenizer
from ..runtime import require_seed
from .windows import recent

__all__ = ["ConversationWindows", "EncodedExample", "Example", "encode_example", "packed_windows"]


@dataclass(frozen=True)
class Example:
    """A question, and the one answer that is learned or expected."""

    task: str
    question: str
    answer: str

    @property
    def asked(self) -> str:
        """The question in the template ``<用户>question<AI>``."""
        return minicpm_chat([{"role": "user", "content": self.question}])

    @property
    def answered(self) -> str:
        """What follows: a blank, which is part of the answer's first token, the answer, and a line end."""
        return f" {self.answer}\n"


@dataclass(frozen=True)
class EncodedExample:
    """A question and its answer as token ids.

    Attributes:
        question: read, and not predicted.
        answer: predicted, with the line end that closes it.
    """

    question: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.question) + len(self.answer)


def encode_example(tokenizer: Tokenizer | BytePairTokenizer, example: Example) -> EncodedExample:
    """An example as tokens, in the template of the first MiniCPM models.

    The question is what a model is asked in a chat, with the start token in front if the tokenizer puts one
    there. A control token stands where the template puts it; what question or answer spell like one is text.
    The blank before the answer is left to tokenizers that put one themselves, as sentencepiece's do. The line
    end that closes it is that of this book's models; a released one that is to go on ending with a token of
    its own is trained with that in its place.
    """
    tokenizer = fast_tokenizer(tokenizer)
    question = encode_chat(tokenizer, minicpm_chat, [{"role": "user", "content": example.question}])
    first, *_ = tokenizer.encode("a", add_special_tokens=False).tokens or [""]
    answered = example.answered.removeprefix(" ") if first.startswith("▁") else example.answered
    return EncodedExample(tuple(question), tuple(encode_text(tokenizer, answered)))


def packed_windows(rows: Sequence[Sequence[EncodedExample]], length: int) -> Int[Tensor, "rows length"]:
    """Examples as windows of ``length`` tokens, those of a row one after another and padding behind them.

    Answers are predicted. All else has the mark of `context_only`: questions, and the padding, which is id 0.

    Raises:
        ValueError: the examples of a row are longer than a window.
    """
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    answers = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, examples in enumerate(rows):
        parts = [part for example in examples for part in (example.question, example.answer)]  # in turn
        tokens = [token for part in parts for token in part]
        if len(tokens) > length:
            raise ValueError(f"The examples of row {row} have {len(tokens)} tokens; a window holds {length}.")
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        lengths = torch.tensor([len(part) for part in parts], dtype=torch.long)
        answers[row, : len(tokens)] = (torch.arange(len(parts)) % 2 == 1).repeat_interleave(lengths)
    return torch.where(answers, ids, context_only(ids))


@dataclass(frozen=True, eq=False)
class ConversationWindows:
    """Examples packed into windows, each whole and exactly once an epoch; answers alone are predicted.

    The examples are shuffled once and put into windows one after another; what does not fit begins the next
    window, and the rest of the old one is padding. Each epoch visits the windows in another order. Both
    orders follow from the seed.

    Attributes:
        examples: as `encode_example` makes them.
        length: tokens that are predicted in a window, or read beside them; it holds one more.
        seed: decides the orders.

    Raises:
        ValueError: no example, one without an answer, or one that is longer than a window.
    """

    examples: Iterable[EncodedExample]
    length: int
    seed: int

    def __post_init__(self) -> None:
        require_positive_integer("length", self.length)
        require_seed(self.seed)
        object.__setattr__(self, "examples", tuple(self.examples))
        if not self.examples:
            raise ValueError("There is no example to put into windows.")
        for place, example in enumerate(self.examples):
            if not example.question or not example.answer:
                raise ValueError(
                    f"Example {place} lacks a question or an answer; both need a token at least."
                )
            if len(example) > self.length + 1:
                raise ValueError(
                    f"Example {place} has {len(example)} tokens; a window holds {self.length + 1}. "
                    "Leave the example out or take longer windows."
                )

    @cached_property
    def packed(self) -> Int[Tensor, "windows window"]:
        """All windows of an epoch, in the order in which they were filled."""
        generator = torch.Generator().manual_seed(self.seed)
        rows: list[list[EncodedExample]] = [[]]
        room = self.length + 1
        for place in torch.randperm(len(self.examples), generator=generator).tolist():
            example = self.examples[place]
            if len(example) > room:
                rows.append([])
                room = self.length + 1
            rows[-1].append(example)
            room -= len(example)
        return packed_windows(rows, self.length + 1)

    def __getitem__(self, index: int) -> Int[Tensor, " window"]:
        """The window of an index, counted from 0."""
        index = operator.index(index)
        if index < 0:
            raise IndexError(f"The index of the window is {index}; windows are counted from 0.")
        epoch, place = divmod(index, len(self.packed))
        order = recent(self._epochs, epoch, lambda: _order(len(self.packed), self.seed, epoch))
        return self.packed[order[place]].clone()

    @cached_property
    def _epochs(self) -> dict[int, list[int]]:
        return {}

    @property
    def predicted_share(self) -> float:
        """Part of the tokens that is predicted: answers, without questions and padding."""
        return predicted(self.packed).double().mean().item()

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest token id in questions and answers."""
        ends = [
            each
            for example in self.examples
            for ids in (example.question, example.answer)
            for each in (min(ids), max(ids))
        ]
        return int(min(ends)), int(max(ends))

    def identity(self) -> dict:
        """Number of windows and their checksum, window length and seed."""
        checksum = zlib.crc32(self.packed.contiguous().numpy().tobytes())
        return {"windows": len(self.packed), "checksum": checksum, "length": self.length, "seed": self.seed}


def _order(windows: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch + 1)
    return torch.randperm(windows, generator=generator).tolist()
