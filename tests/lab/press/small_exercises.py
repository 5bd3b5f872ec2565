"""The exercises of the small chapter in `second_edition`, as a module of `minicpm_lite.exercises` holds them."""

import numpy as np
import torch

from minicpm_lite.config import ModelConfig
from minicpm_lite.lab.exercises import exercise
from minicpm_lite.lab.mistakes import same
from minicpm_lite.lab.quiz import Quiz


@exercise("twice", wrong=(lambda x: x**2,), without=("a loop", "sum"))
def twice(answer):
    """Twice is `x + x`."""
    assert same(answer(2), 4), "Twice 2 is `4`."
    assert same(answer(torch.tensor([1.0, -3.0])), [2, -6]), "Each number of a tensor is doubled."
    try:
        answer("text")
    except TypeError:
        pass
    else:
        raise AssertionError("A text is refused with a TypeError.")


@exercise("half in place", wrong=(lambda numbers: None,))
def halve(answer):
    """The list itself is changed, and the function is called for each number once."""
    for numbers in ([2, 4], [6.0]):
        calls, halves = [], [number / 2 for number in numbers]
        assert answer(numbers, lambda x, calls=calls: calls.append(x) or x / 2) is None, (
            "Nothing is returned."
        )
        assert same(numbers, halves), "Change the list itself."
        assert len(calls) == len(numbers), "Call the function for each number."


@exercise("all in place", wrong=(lambda *arguments: None,))
def clear(answer):
    """Whatever holds numbers, they become zero in it."""
    for size in (2, 3):
        whole, array, table = torch.ones(2, size), np.ones(size), {"a": torch.ones(size), "b": [1]}
        names, several = {"x"}, (torch.ones(size), [torch.ones(1), "text"])
        answer(whole[1], array, table, names=names, several=several)
        assert same(whole, [[1] * size, [0] * size]), "A part of a tensor is changed in the whole."
        assert same(array, [0] * size) and names == set(), "The array is zero, the set empty."
        assert same(table, {"a": [0] * size, "b": []}), "The table's tensor is zero, its list empty."
        assert same(several[0], [0] * size) and same(several[1][0], [0]), "What a tuple holds is zero."


@exercise("by pencil", wrong=((1, 2),))
def by_pencil(answer):
    assert same(answer, (3, 4)), "Count again."


@exercise("a gradient", wrong=(lambda model, x: None,))
def push(answer):
    """Its gradient is that of the mean."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, x = torch.nn.Linear(3, 1), torch.randn(5, 3)
        answer(model, x)
        grad = model.weight.grad
        assert grad is not None and torch.allclose(grad, x.mean(0, keepdim=True)), (
            "Call backward on the mean."
        )


@exercise("a shape", wrong=(None,))
def shape(answer):
    assert isinstance(answer, ModelConfig) and answer.hidden_size == 8, "It is a ModelConfig of width 8."


quiz = Quiz([("What is 1 + 1?", ["1", "2"], 1, "Count.")])
