"""Questions with answers, for fine-tuning: real small talk, and four tasks with exact answers.

- chat: a message and the reply to it, from the Chit Chat Challenge of Brigham Young University: 7,168
  conversations of 2018 (package ``chitchat-dataset``, MIT).
- novel: a passage by Jane Austen; which of the six novels is it from?
- kind: the English name of an emoji; what kind of thing is it, in Unicode's order of emoji?
- larger: the larger of two numbers of two digits.
- sum: of two digits.

The four take the place of published benchmarks, which no package carries under a clear licence. Held out are
whole conversations, passages from the held-out blocks of the novels, and whole problems. Small talk repeats
itself: a question that also stands in a held-out conversation is left out of the training part.
"""

import copy
import random
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from ..language.tokenizer import train_tokenizer
from .assets import load_austen, load_conversations, load_emoji, load_novels
from .conversations import EncodedExample, Example, encode_example
from .corpora import BLOCK_CHARACTERS, block_is_held_out, split_novels

__all__ = ["TASKS", "InstructionCorpus", "load_instruction_corpus", "load_instructions"]

TASKS = ("chat", "novel", "kind", "larger", "sum")
_EXAMPLES = {"chat": 4000, "novel": 4000, "kind": 15_000, "larger": 15_000, "sum": 15_000}  # to learn from
_TESTED = 500  # of each task, held out; fewer where there are fewer
_SHORTEST, _LONGEST = 10, 100  # characters of a message
_PASSAGE = 90  # characters of a novel
_ROLES = ["<用户>", "<AI>"]  # of `minicpm_chat`


@dataclass(frozen=True, eq=False)
class InstructionCorpus:
    """Prose and questions with answers, as tokens of one vocabulary that was learned from both.

    Attributes:
        tokenizer: learned from the training parts, equal amounts of each.
        prose: Austen's novels, the part to train on.
        prose_held_out: the rest of them.
        bytes_per_token: of the held-out prose, so that losses per token become bits per byte.
        train: examples to learn from, all tasks mixed.
        held_out: for each task the examples that are held out.
    """

    tokenizer: Tokenizer
    prose: Int[Tensor, " train_tokens"]
    prose_held_out: Int[Tensor, " held_out_tokens"]
    bytes_per_token: float
    train: tuple[EncodedExample, ...]
    held_out: Mapping[str, tuple[EncodedExample, ...]]


def load_instruction_corpus(vocab_size: int = 1024) -> InstructionCorpus:
    """Austen's novels and all tasks, tokenised.

    The first call takes about ten seconds; the result is remembered, and each caller gets a copy.

    Raises:
        ImportError: the package with the conversations is missing; the message names the command to get it.
    """
    corpus = _load_instruction_corpus(vocab_size)
    tokenizer, prose, prose_held_out = copy.deepcopy((corpus.tokenizer, corpus.prose, corpus.prose_held_out))
    return replace(
        corpus,
        tokenizer=tokenizer,
        prose=prose,
        prose_held_out=prose_held_out,
        held_out=dict(corpus.held_out),
    )


@cache
def _load_instruction_corpus(vocab_size: int) -> InstructionCorpus:
    prose, prose_held_out = split_novels()
    train, held_out = load_instructions()
    conversations = "".join(example.asked + example.answered for example in train)
    tokenizer = train_tokenizer(prose + conversations[: len(prose)], vocab_size - len(_ROLES))
    tokenizer.add_tokens(_ROLES)  # one token each
    ids, ids_held_out = (torch.tensor(tokenizer.encode(text).ids) for text in (prose, prose_held_out))
    return InstructionCorpus(
        tokenizer,
        ids,
        ids_held_out,
        len(prose_held_out.encode()) / len(ids_held_out),
        tuple(encode_example(tokenizer, example) for example in train),
        {
            task: tuple(encode_example(tokenizer, example) for example in held_out if example.task == task)
            for task in TASKS
        },
    )


@cache
def load_instructions() -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Examples to learn from, in random order, and held-out ones, up to 500 of each task.

    There are 4,000 each of chats and passages, which are long, and 15,000 each of the three short tasks.

    Raises:
        ImportError: the package with the conversations is missing; the message names the command to get it.
    """
    train, held_out = _chat()
    for task, make in {"novel": _novel, "kind": _kind, "larger": _larger, "sum": _sum}.items():
        learned, tested = _problems(make, _EXAMPLES[task])
        train += learned
        held_out += tested
    random.Random(0).shuffle(train)
    return tuple(train), tuple(held_out)


def _held_out(key: object, every: int) -> bool:
    """One key in so many, whatever other keys there are: equal keys fall on the same side."""
    return zlib.crc32(repr(key).encode()) % every == 0


def _chat() -> tuple[list[Example], list[Example]]:
    """Each message with the reply to it; every question once."""
    learned, tested = {}, {}
    for conversation in load_conversations():
        turns = [" ".join(" ".join(messages).split()) for messages in conversation]
        part = tested if _held_out(turns, 20) else learned
        for question, answer in pairwise(turns):
            if all(_SHORTEST <= len(text) <= _LONGEST for text in (question, answer)):
                part.setdefault(question.lower(), Example("chat", question, answer))
    new = [example for question, example in learned.items() if question not in tested]
    return new[: _EXAMPLES["chat"]], list(tested.values())[:_TESTED]


def _problems(
    make: Callable[[random.Random], tuple[bool, Example]], count: int
) -> tuple[list[Example], list[Example]]:
    """Problems to learn, with repeats where there are few, and held-out ones, each once."""
    generator = random.Random(0)
    learned: list[Example] = []
    tested: dict[Example, None] = {}
    while len(learned) < count:
        held_out, example = make(generator)
        if not held_out:
            learned.append(example)
        elif len(tested) < _TESTED:
            tested[example] = None
    return learned, list(tested)


def _novel(generator: random.Random) -> tuple[bool, Example]:
    """A passage from within a block, held out if `load_corpus` holds the block out."""
    text = load_austen()
    block = generator.randrange(len(text) // BLOCK_CHARACTERS)
    start = block * BLOCK_CHARACTERS + generator.randrange(BLOCK_CHARACTERS - _PASSAGE)
    passage = " ".join(text[start : start + _PASSAGE].split()[1:-1])  # whole words
    novel = next(title for title, end in _ends_of_novels() if start < end)
    return block_is_held_out(block), Example("novel", f"which novel: {passage}", novel.split()[0])


@cache
def _ends_of_novels() -> list[tuple[str, int]]:
    novels = load_novels()
    return list(zip(novels, accumulate(map(len, novels.values())), strict=True))


def _kind(generator: random.Random) -> tuple[bool, Example]:
    name, category = generator.choice(_emoji_kinds())
    return _held_out(name, 5), Example("kind", f"what kind: {name}", category)


@cache
def _emoji_kinds() -> list[tuple[str, str]]:
    """Name and category of each emoji; of a category the first word."""
    return [(emoji.english, re.findall(r"\w+", emoji.category.lower())[0]) for emoji in load_emoji()]


def _larger(generator: random.Random) -> tuple[bool, Example]:
    a, b = generator.sample(range(10, 100), 2)
    return _held_out(sorted((a, b)), 10), Example(
        "larger", f"larger of {_spaced(a)} or {_spaced(b)}", _spaced(max(a, b))
    )


def _sum(generator: random.Random) -> tuple[bool, Example]:
    a, b = generator.randrange(10), generator.randrange(10)
    return _held_out((a, b), 5), Example("sum", f"{a} plus {b}", _spaced(a + b))


def _spaced(number: int) -> str:
    """With blanks between the digits, so that each is one token."""
    return " ".join(str(number))
