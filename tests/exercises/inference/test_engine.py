"""Right answers in another style than the chapter's are accepted."""

import math
from collections import deque
from itertools import accumulate, takewhile

import numpy as np
import pytest
import torch

from minicpm_lite.exercises.inference import engine as check
from minicpm_lite.inference.paged import PagePool


def steps_by_a_queue(waiting, work, rows):
    """With a deque, changing what was given, as tuples."""
    queue = deque(waiting)
    while queue and len(work) < rows:
        work.append(queue.popleft())
    over = []
    for place, (name, left) in enumerate(work):
        work[place] = (name, left - 1)
        if left == 1:
            over.append(name)
    return tuple(queue), tuple(pair for pair in work if pair[1] > 0), tuple(over)


def steps_by_lists(waiting, work, rows):
    """Pairs as lists, and the numbers as tensors."""
    more = max(0, rows - len(work))
    all_at_work = [[name, torch.tensor(left - 1)] for name, left in work + waiting[:more]]
    return (
        [[name, left] for name, left in waiting[more:]],
        [pair for pair in all_at_work if pair[1] != 0],
        [name for name, left in all_at_work if left == 0],
    )


def slots_by_the_library(pages, first, last, size):
    pool = PagePool(max(pages) + 1, size)
    text = pool.open([0], 1)
    text.pages = list(pages)
    return pool.slots(text, first, last)


def slots_by_tensors(pages, first, last, size):
    places = torch.arange(first, last)
    return torch.tensor(pages)[places // size] * size + places % size


def slots_by_numpy(pages, first, last, size):
    whole = np.array(pages)[:, None] * size + np.arange(size)
    return whole.ravel()[first:last]


def begin_by_sums(waiting, rows, pages):
    return list(range(len([*takewhile(lambda total: total <= pages, accumulate(waiting[:rows]))])))


def begin_by_recursion(waiting, rows, pages, place=0):
    if place == len(waiting) or rows == 0 or waiting[place] > pages:
        return ()
    return (place, *begin_by_recursion(waiting, rows - 1, pages - waiting[place], place + 1))


def shared_by_the_library(prompt, read, size):
    pool = PagePool(200, size)
    for tokens in read:
        pool.extend(pool.open(tokens[:1], len(tokens)), tokens)
    return pool.open(prompt, len(prompt)).shared // size


def shared_by_counting(prompt, read, size):
    best = 0
    for text in read:
        same = 0
        for one, other in zip(prompt[:-1], text, strict=False):
            if one != other:
                break
            same += 1
        best = max(best, same // size)
    return torch.tensor(best)


def levelled_by_dealing(wanted):
    found = [0] * len(wanted)
    for token in range(sum(wanted)):
        found[token % len(wanted)] += 1
    return tuple(found)


def levelled_by_tensors(wanted):
    total, size = sum(wanted), len(wanted)
    return torch.tensor([(total + size - 1 - place) // size for place in range(size)])


def sums_by_numpy(rows):
    """One number after the other, in 64 bits, rounded once."""
    return [float(np.float32(sum(row.tolist()))) for row in rows]


def sums_by_whole_rows(rows):
    return torch.stack([row.sum() for row in rows])


def rows_by_counting(promise, weights, text, rate):
    rows = 0
    while weights + (rows + 1) * text <= promise * rate:
        rows += 1
    return rows


def rows_by_division(promise, weights, text, rate):
    return float(max(math.floor((promise * rate - weights) / text), 0))


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.forecast_steps, [10, 7]),
        (check.forecast_steps, (10.0, 7.0)),
        (check.one_step, steps_by_a_queue),
        (check.one_step, steps_by_lists),
        (check.slots_of, slots_by_the_library),
        (check.slots_of, slots_by_tensors),
        (check.slots_of, slots_by_numpy),
        (check.mended_begin, begin_by_sums),
        (check.mended_begin, begin_by_recursion),
        (check.shared_pages, shared_by_the_library),
        (check.shared_pages, shared_by_counting),
        (check.levelled, levelled_by_dealing),
        (check.levelled, levelled_by_tensors),
        (check.mended_sums, sums_by_numpy),
        (check.mended_sums, sums_by_whole_rows),
        (check.rows_within, rows_by_counting),
        (check.rows_within, rows_by_division),
    ],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


@pytest.mark.parametrize(
    ("exercise", "answer", "idea"),
    [
        (check.forecast_steps, 10, "two numbers"),
        (check.forecast_steps, (9, 7), "how many steps are that together"),
        (check.forecast_steps, (10, 8), "last one done"),
        (check.one_step, lambda waiting, work, rows: work, "three lists"),
        (check.one_step, lambda waiting, work, rows: (waiting, work, []), "at work behind it"),
        (check.slots_of, lambda pages, first, last, size: [*range(first, last)], "begins at slot 20"),
        (check.mended_begin, lambda waiting, rows, pages: [0, 2], "the second does not fit"),
        (check.shared_pages, lambda prompt, read, size: len(prompt) / size, "whole number"),
        (check.shared_pages, lambda prompt, read, size: len(prompt) // size, "must be read"),
        (check.levelled, lambda wanted: [max(wanted)] * len(wanted), "the work differs"),
        (check.levelled, lambda wanted: [4.0, 4.5, 3.5, 4.0], "whole numbers"),
        (check.mended_sums, lambda rows: rows[0].sum()[None], "2 rows have 2 sums"),
        (check.mended_sums, lambda rows: [row[:-1].sum() for row in rows], "Is every number added once"),
        (
            check.mended_sums,
            lambda rows: [sum(part.sum() for part in row.chunk(2 + len(rows))) for row in rows],
            "depends on the other rows",
        ),
        (check.rows_within, lambda promise, weights, text, rate: 42.5, "whole number"),
        (check.rows_within, lambda promise, weights, text, rate: 149, "4.2 of them for texts"),
    ],
)
def test_what_is_missed_is_said(exercise, answer, idea):
    verdict = exercise.judge(answer)
    assert verdict.state == "wrong" and idea in verdict.message, verdict.message
