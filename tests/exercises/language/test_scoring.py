"""Right answers in another style than the chapter's are accepted."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minicpm_lite.exercises.language import scoring as check


def answer_loss_by_steps(logits, ids, start):
    """In double precision, one token after the other."""
    total, count = 0.0, 0
    for position in range(len(ids)):
        if position >= max(start, 1):
            row = logits[position - 1].double()
            total += row.max() + math.log((row - row.max()).exp().sum()) - row[ids[position]]
            count += 1
    return total / count


def update_by_steps(table, ids, rate):
    """Numbers of numpy, in double precision, one lane after the other."""
    old = table.double().numpy()
    new = old.copy()
    for asks, came in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
        chances = np.exp(old[asks]) / np.exp(old[asks]).sum()
        new[asks] -= rate * (chances - np.eye(len(old))[came]) / (len(ids) - 1)
    return new


def update_by_counts(table, ids, rate):
    """How often each row was asked, and how often each word followed."""
    seen = torch.zeros_like(table)
    seen.index_put_((ids[:-1], ids[1:]), torch.tensor(1.0), accumulate=True)
    slopes = seen.sum(1, keepdim=True) * torch.exp(torch.log_softmax(table, -1)) - seen
    return table - rate * slopes / seen.sum()


def training_by_gradients(table, texts, steps, rate):
    """With PyTorch's slopes and an optimizer, as the chapter would mend it; the result has a way back."""
    table = torch.nn.Parameter(table.double())
    optimizer = torch.optim.SGD([table], lr=rate)
    for ids in [*texts] * steps:
        optimizer.zero_grad()
        F.cross_entropy(table[ids[:-1]], ids[1:]).backward()
        optimizer.step()
    return table


def training_by_hand(table, texts, steps, rate):
    """Numbers of numpy, without PyTorch's slopes."""
    table = table.numpy().astype(np.float64)
    for _ in range(steps):
        for ids in texts:
            table = update_by_steps(torch.tensor(table), ids, rate)
    return table


def control_by_lists(lesson):
    """Twice over, and in another order, which no loss notices."""
    texts = lesson.tolist()
    return np.array([[*one[:-1], other[-1]] for other in texts for one in texts] * 2)


def control_of_the_least(lesson):
    """Beginnings with each last word, for a lesson of texts that are all different in both."""
    texts = lesson.tolist()
    pairs = [[*one[:-1], other[-1]] for one in texts for other in texts]
    return torch.tensor(sorted(pairs), dtype=torch.int32)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.one_update, update_by_steps),
        (check.one_update, update_by_counts),
        (check.answer_loss, answer_loss_by_steps),
        (check.mended_training, training_by_gradients),
        (check.mended_training, training_by_hand),
        (check.control, control_by_lists),
        (check.control, control_of_the_least),
        (check.floor, {"best": 0.26, "blind": 0.336, "is": 2 / 3} | {"best": torch.tensor(0.2637)}),
        (check.floor, {"is": 0.67, "blind": 0.3365, "best": 0.2637}),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


def softmax_kept(table, texts, steps, rate):
    """The slopes are forgotten, and the softmax too many stays."""
    table = table.clone().requires_grad_()
    for ids in [*texts] * steps:
        loss = F.cross_entropy(table[ids[:-1]].softmax(dim=1), ids[1:])
        (slope,) = torch.autograd.grad(loss, table)
        with torch.no_grad():
            table -= rate * slope
    return table.detach()


def update_in_turn(table, ids, rate):
    """Each lane moves the table before the next one asks."""
    table = table.clone()
    for asks, came in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
        slope = table[asks].softmax(dim=0)
        slope[came] -= 1
        table[asks] -= rate * slope / (len(ids) - 1)
    return table


@pytest.mark.parametrize(
    ("exercise", "answer", "told"),
    [
        (check.floor, {"best": 0.269, "blind": 0.337, "is": 0.667}, "`best`: The noun is no fair coin"),
        (check.floor, {"best": 0.264, "blind": 0.269, "is": 0.667}, "`blind`: Yours is an average over five"),
        (check.floor, {"best": 0.264, "blind": 0.341, "is": 0.667}, "`blind`: Neither the noun"),
        (check.floor, {"best": 0.26, "blind": 0.337, "is": 0.667}, "`best`: right as far as it goes"),
        (check.floor, {"best": 0.264, "blind": 0.34, "is": 0.667}, "`blind`: right as far as it goes"),
        (check.mended_training, softmax_kept, "what does `cross_entropy` expect"),
        (check.one_update, update_in_turn, "lane by lane"),
    ],
)
def test_likely_slips_get_a_message_of_their_own(exercise, answer, told):
    verdict = exercise.judge(answer)
    assert verdict.state != "right" and told in verdict.message


def test_a_banned_class_is_found_wherever_it_was_called():
    loss = torch.nn.CrossEntropyLoss()

    def answer(logits, ids, start):
        first = max(start, 1)
        return loss(torch.as_tensor(logits)[first - 1 : -1], ids[first:])

    assert "CrossEntropyLoss" in check.answer_loss.judge(answer).message
