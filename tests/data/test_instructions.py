"""Nothing held out is learned, answers are right, and encoded examples read back."""

import zlib
from dataclasses import astuple

import pytest

from minicpm_lite.data.conversations import ConversationWindows, encode_example
from minicpm_lite.data.corpora import split_novels
from minicpm_lite.data.instructions import TASKS, load_instruction_corpus, load_instructions


@pytest.fixture(scope="module")
def corpus():
    return load_instruction_corpus()


@pytest.mark.slow  # makes the whole corpus of instructions
def test_nothing_held_out_is_learned():
    train, held_out = load_instructions()
    assert {example.task for example in train} == {example.task for example in held_out} == set(TASKS)
    learned = {(example.task, example.question.lower()) for example in train}
    assert not learned & {(example.task, example.question.lower()) for example in held_out}
    swapped = {(e.task, " or ".join(reversed(e.question[len("larger of ") :].split(" or "))))
               for e in train if e.task == "larger"}  # fmt: skip
    assert not swapped & {(e.task, e.question[len("larger of ") :]) for e in held_out if e.task == "larger"}


def test_answers_are_right():
    train, held_out = load_instructions()
    for example in [*train[:2000], *held_out]:
        digits = example.question.replace(" ", "")
        if example.task == "sum":
            assert int(example.answer.replace(" ", "")) == sum(map(int, digits.split("plus")))
        if example.task == "larger":
            assert int(example.answer.replace(" ", "")) == max(
                map(int, digits[len("largerof") :].split("or"))
            )
    novels = {e.answer for e in train if e.task == "novel"}
    assert novels == {"Emma", "Mansfield", "Northanger", "Persuasion", "Pride", "Sense"}
    named = {"Darcy": "Pride", "Knightley": "Emma", "Wentworth": "Persuasion", "Tilney": "Northanger"}
    for name, novel in named.items():
        told = [e.answer for e in train if e.task == "novel" and name in e.question]
        assert told and set(told) == {novel}


def test_equal_in_every_process():
    """Held-out parts follow from the text alone, not from Python's hash seed."""
    train, held_out = load_instructions()
    assert [sum(example.task == task for example in train) for task in TASKS] == [
        4000,
        4000,
        15_000,
        15_000,
        15_000,
    ]
    assert [sum(example.task == task for example in held_out) for task in TASKS] == [500, 217, 200, 500, 25]
    assert held_out[0].question.startswith("I think it just randomly matches")


def test_the_examples_are_those_of_the_first_edition():
    """Recorded runs learned from these very examples, in this order."""
    found = [
        zlib.crc32(repr([astuple(example) for example in part]).encode()) for part in load_instructions()
    ]
    assert found == [3019825226, 3129980174]


@pytest.mark.slow  # learns two vocabularies from four and eight million characters
def test_the_corpus_is_that_of_the_first_edition(corpus):
    tokens = [zlib.crc32(part.numpy().tobytes()) for part in (corpus.prose, corpus.prose_held_out)]
    assert tokens == [2136089342, 3251259213]
    assert zlib.crc32(corpus.tokenizer.to_str().encode()) == 2672211841

    def checksum(examples) -> int:
        return zlib.crc32(repr([(example.question, example.answer) for example in examples]).encode())

    assert checksum(corpus.train) == 2493164249
    assert {task: checksum(corpus.held_out[task]) for task in TASKS} == {
        "chat": 3172363397, "novel": 866769134, "kind": 2797870529, "larger": 1495994807, "sum": 945010985
    }  # fmt: skip
    windows = ConversationWindows(corpus.train, 128, 0)
    assert windows.identity() == {"windows": 6698, "checksum": 3541110751, "length": 128, "seed": 0}


@pytest.mark.slow  # learns two vocabularies from four and eight million characters
def test_the_prose_is_that_of_the_other_chapters(corpus):
    """Which is split_novels, as tests/data/test_corpora.py sees."""
    for mine, theirs in zip((corpus.prose, corpus.prose_held_out), split_novels(), strict=True):
        assert corpus.tokenizer.decode(mine.tolist()) == theirs


@pytest.mark.slow  # learns two vocabularies from four and eight million characters
def test_encoded_examples_read_back(corpus):
    example = next(e for e in load_instructions()[1] if e.task == "sum")
    encoded = encode_example(corpus.tokenizer, example)
    text = corpus.tokenizer.decode([*encoded.question, *encoded.answer])
    assert text == f"<用户>{example.question}<AI> {example.answer}\n"
    marks = [corpus.tokenizer.token_to_id(mark) for mark in ("<用户>", "<AI>")]
    assert [encoded.question[0], encoded.question[-1]] == marks and corpus.tokenizer.get_vocab_size() == 1024
    assert max(len(e) for e in corpus.train) <= 129
