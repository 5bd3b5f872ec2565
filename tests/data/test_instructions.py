"""Nothing held out is learned, answers are right, and encoded examples read back."""

import pytest

from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.data.instructions import (
    TASKS,
    encode_example,
    load_instruction_corpus,
    load_instructions,
)


@pytest.fixture(scope="module")
def corpus():
    return load_instruction_corpus()


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


@pytest.mark.slow  # learns two vocabularies from four and eight million characters
def test_the_prose_is_that_of_the_other_chapters(corpus):
    other = load_corpus()
    for mine, theirs in ((corpus.prose, other.train), (corpus.prose_held_out, other.validation)):
        assert corpus.tokenizer.decode(mine.tolist()) == other.tokenizer.decode(theirs.tolist())


@pytest.mark.slow  # learns two vocabularies from four and eight million characters
def test_encoded_examples_read_back(corpus):
    example = next(e for e in load_instructions()[1] if e.task == "sum")
    encoded = encode_example(corpus.tokenizer, example)
    text = corpus.tokenizer.decode([*encoded.question, *encoded.answer])
    assert text == f"<用户>{example.question}<AI> {example.answer}\n"
    assert encoded.window[: len(encoded.question)] == [~i for i in encoded.question]
    marks = [corpus.tokenizer.token_to_id(mark) for mark in ("<用户>", "<AI>")]
    assert [encoded.question[0], encoded.question[-1]] == marks and corpus.tokenizer.get_vocab_size() == 1024
    assert max(len(e.window) for e in corpus.train) <= 129
