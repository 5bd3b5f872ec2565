"""Scoring: equal to the loop over positions that defines it; marks are read, not predicted, and leave no trace."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FAMILIES, GROUPED, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.scoring import (
    context_only,
    evaluating,
    next_token_loss,
    predicted,
    readable,
    token_losses,
)

MARKED = [
    torch.zeros(2, 17, dtype=torch.bool),
    torch.arange(17).expand(2, -1) < torch.tensor([[5], [0]]),  # a question, and a row without one
    torch.tensor([[2, 3, 9], [0, 1, 16]])[:, :, None].eq(torch.arange(17)).any(1),  # here and there
]


def position_by_position(model: Decoder, ids: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
    """The definition: each token given those before it, in a call of its own."""
    losses = torch.zeros(len(ids), ids.shape[1] - 1, dtype=torch.float64)
    for row in range(len(ids)):
        for at in range(1, ids.shape[1]):
            if not marked[row, at]:
                scores = model(ids[row : row + 1, :at])[0, -1].double()
                losses[row, at - 1] = scores.exp().sum().log() - scores[ids[row, at]]
    return losses


@pytest.mark.parametrize("marked", MARKED, ids=["all", "question", "scattered"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_equal_to_the_loop_over_positions(name, marked):
    """In float64 but for the logits, which a decoder gives in float32."""
    model = make_model(FAMILIES[name]).double()
    ids = make_ids(model.config)
    window = torch.where(marked, context_only(ids), ids)
    losses = token_losses(model, window)
    assert_close(losses.double(), position_by_position(model, ids, marked), atol=2e-6, rtol=1e-6)
    assert torch.equal(losses == 0, marked[:, 1:])


@torch.no_grad()
def test_ids_of_32_bits_are_scored_as_those_of_64():
    """A decoder reads both."""
    model, ids = make_model(GROUPED), make_ids(GROUPED)
    window = torch.where(MARKED[1], context_only(ids), ids)
    assert torch.equal(token_losses(model, window.int()), token_losses(model, window))
    assert torch.equal(next_token_loss(model, window.int()), next_token_loss(model, window))


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_gives_each_part_its_mode_back(training):
    """One may be held in another mode than the rest, as what is frozen is."""
    model = make_model(GROUPED).train(training)
    model.layers[1].train(not training)
    before = [part.training for part in model.modules()]
    with pytest.raises(RuntimeError, match="mine"), evaluating(model):
        assert not any(part.training for part in model.modules())
        raise RuntimeError("mine")
    assert [part.training for part in model.modules()] == before and len(set(before)) == 2


class Merged(torch.nn.Linear):
    """Its train does more than note the mode: out of training an adapter is part of the weight, as in loralib."""

    merged = False

    def train(self, mode: bool = True):
        if mode == self.merged:
            self.weight.data += -1 if mode else 1
            self.merged = not mode
        return super().train(mode)


@pytest.mark.parametrize("held", [False, True])
def test_a_part_is_led_out_of_evaluation_as_into_it(held):
    model = torch.nn.Sequential(torch.nn.Sequential(Merged(2, 2)), torch.nn.Dropout())
    part = model[0][0]
    if held:
        part.eval()
    before = part.weight.clone()
    with evaluating(model):
        assert part.merged and not part.training
    assert part.merged == held == (not part.training)
    torch.testing.assert_close(part.weight, before)


def shifted_twice(model, window):
    return F.cross_entropy(
        model(readable(window))[:, :-2].mT, window[:, 2:], reduction="none", ignore_index=-1
    )


def not_shifted(model, window):
    return F.cross_entropy(
        model(readable(window))[:, :-1].mT, window[:, :-1], reduction="none", ignore_index=-1
    )


@pytest.mark.parametrize("wrong", [shifted_twice, not_shifted])
@torch.no_grad()
def test_wrong_shifts_are_told_apart(wrong):
    model, ids = make_model(GROUPED), make_ids(GROUPED)
    assert abs(wrong(model, ids).mean() - next_token_loss(model, ids)) > 1e-2


@torch.no_grad()
def test_the_mark_changes_nothing_that_is_read():
    """A marked token still stands before the others: each loss is the one it has without marks, or 0."""
    model, ids = make_model(GROUPED), make_ids(GROUPED)
    plain = token_losses(model, ids)
    for marked in MARKED:
        losses = token_losses(model, torch.where(marked, context_only(ids), ids))
        assert torch.equal(losses, plain.masked_fill(marked[:, 1:], 0))


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 2**40), st.booleans()), min_size=3, max_size=3), min_size=1
    )
)
def test_marks_come_and_go(rows):
    ids = torch.tensor([[token for token, _ in row] for row in rows])
    marked = torch.tensor([[mark for _, mark in row] for row in rows])
    window = torch.where(marked, context_only(ids), ids)
    assert torch.equal(readable(window), ids) and torch.equal(readable(ids), ids)
    assert torch.equal(predicted(window), ~marked[:, 1:])
    assert torch.equal(readable(window[0]), ids[0]) and torch.equal(readable(window[None]), ids[None])
    assert torch.equal(predicted(window[0]), ~marked[0, 1:])  # with any shape in front
    assert torch.equal(predicted(window[None]), ~marked[None, :, 1:])


def test_the_first_id_of_a_vocabulary_can_be_marked():
    """Zero has no sign; with the negative in place of the complement it would be predicted all the same."""
    zeros = torch.zeros(2, 4, dtype=torch.long)
    assert not predicted(context_only(zeros)).any() and predicted(zeros).all()
    assert torch.equal(readable(context_only(zeros)), zeros)


def test_the_mean_of_nothing_is_zero():
    model = make_model(GROUPED)
    loss = next_token_loss(model, context_only(make_ids(GROUPED)))
    loss.backward()
    assert loss == 0 and not any(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("marked", MARKED, ids=["all", "question", "scattered"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_mean_equals_cross_entropy_with_an_ignored_index_bit_for_bit(name, marked):
    model = make_model(FAMILIES[name])
    ids = make_ids(model.config)
    window, gradients = torch.where(marked, context_only(ids), ids), []
    targets = ids.masked_fill(marked, -100)[:, 1:]
    for loss in (
        next_token_loss(model, window),
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=-100),
    ):
        model.zero_grad()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert_close(loss, token_losses(model, window).sum() / (~marked[:, 1:]).sum(), atol=1e-6, rtol=1e-6)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 5), row=st.integers(0, 4))
@torch.no_grad()
def test_rows_of_a_batch_are_scored_as_if_alone(batch, row):
    model = make_model(GROUPED)
    ids = make_ids(GROUPED, batch=5)
    alone = token_losses(model, ids[row : row + 1])
    assert_close(token_losses(model, ids)[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    equal = token_losses(model, ids[row : row + 1].expand(batch, -1))
    assert_close(equal, alone.expand(batch, -1), atol=1e-5, rtol=1e-5)
    assert_close(equal.mean(), next_token_loss(model, ids[row : row + 1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("type", [torch.uint8, torch.int32, torch.int64])
def test_ids_of_any_type_take_the_mark(type):
    read, told = torch.tensor([[65, 66]], dtype=type), torch.tensor([[67, 68]], dtype=type)
    window = torch.cat([context_only(read), told], 1)
    assert predicted(window).tolist() == [[False, True, True]]
    assert readable(window).tolist() == [[65, 66, 67, 68]]
