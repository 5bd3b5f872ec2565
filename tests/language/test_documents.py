"""Documents in one window: each read as if it were alone, forward and backward."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FAMILIES, GROUPED, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite.language.documents import DocumentContext, loss_within_documents
from minicpm_lite.language.scoring import context_only, next_token_loss, predicted

END = 3


def cut(ids: list[int]) -> list[list[int]]:
    """The documents of a row, each with its end token."""
    documents = [[]]
    for token in ids:
        documents[-1].append(token)
        if token == END:
            documents.append([])
    return [document for document in documents if document]


def alone(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of each document fed alone, put together."""
    rows = [[model(torch.tensor([document]))[0] for document in cut(row)] for row in ids.tolist()]
    return torch.stack([torch.cat(row) for row in rows])


rows = st.integers(1, 12).flatmap(
    lambda tokens: st.lists(
        st.lists(st.sampled_from([END, END, 5, 6, 7, 8]), min_size=tokens, max_size=tokens),
        min_size=1,
        max_size=3,
    )
)


@pytest.mark.slow  # every kind of decoder
@pytest.mark.parametrize("family", FAMILIES)
@given(rows=rows)
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_each_document_is_as_if_it_were_alone(family, rows):
    model, ids = make_model(FAMILIES[family]).double(), torch.tensor(rows)
    assert_close(model(ids, DocumentContext(ids, END)), alone(model, ids), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_without_an_end_it_is_the_plain_context():
    model, ids = make_model(GROUPED), make_ids(GROUPED, 2, 20).clamp(max=97)
    assert_close(model(ids, DocumentContext(ids, 98)), model(ids), atol=1e-6, rtol=1e-5)


def test_loss_and_gradients_are_those_of_the_documents_alone():
    """The first token of a document is read and not predicted here, as alone; means weigh by their tokens."""
    model = make_model(GROUPED)
    window = torch.tensor([[5, 6, END, 7, 8, 9, END, END, 6, 7], [8, 5, 9, 6, 7, 5, END, 9, 8, 6]])
    first = torch.cat([torch.zeros(2, 1).bool(), window[:, :-1] == END], dim=1)
    loss = loss_within_documents(model, torch.where(first, context_only(window), window), END)
    loss.backward()
    packed = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    # the window's last token is only predicted, so the last document is as long as in the window
    documents = [torch.tensor([each]) for row in window.tolist() for each in cut(row) if len(each) > 1]
    tokens = sum(predicted(each).sum() for each in documents)
    expected = sum(next_token_loss(model, each) * predicted(each).sum() for each in documents) / tokens
    expected.backward()
    assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for mine, weight in zip(packed, model.parameters(), strict=True):
        assert_close(mine, weight.grad, atol=1e-6, rtol=1e-4)


def test_without_an_end_it_is_the_next_token_loss():
    model, window = make_model(GROUPED), make_ids(GROUPED, 2, 20).clamp(max=97)
    window[:, :4] = context_only(window[:, :4])
    assert_close(loss_within_documents(model, window, 98), next_token_loss(model, window))
    assert loss_within_documents(model, context_only(window.abs()), 98) == 0, "nothing is predicted"


@pytest.mark.parametrize("end", [-1, 99, None, True, 3.0, "3", torch.tensor(3)])
def test_an_end_is_an_id_of_the_model(end, monkeypatch):
    """Else nothing would end a document, and the loss would be the plain one."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a reader
    model, window = make_model(GROUPED), make_ids(GROUPED, 2, 20)
    with pytest.raises(ValueError, match="^The end is "):
        loss_within_documents(model, window, end)
    with pytest.raises(ValueError, match="^The end is "):
        model(window, DocumentContext(window, end))


class EndIsNext(DocumentContext):  # the end token as the first one of the next document
    def read(self, ids):
        self._document = (ids == END).cumsum(1)


class Everywhere(DocumentContext):  # positions restart and nothing is masked
    def begin(self, x):
        positions = super().begin(x)
        self.mask = None
        return positions


class OneRow(DocumentContext):  # the first row's documents for all
    def read(self, ids):
        super().read(ids[:1].expand_as(ids))


@pytest.mark.parametrize("wrong", [EndIsNext, Everywhere, OneRow])
@torch.no_grad()
def test_wrong_contexts_are_told_apart(wrong):
    model, ids = make_model(GROUPED), torch.tensor([[5, 6, END, 7, 8, 9], [8, 5, 9, 6, END, 5]])
    assert (model(ids, wrong(ids, END)) - alone(model, ids)).abs().max() > 1e-3


@torch.no_grad()
def test_other_ids_are_cut_into_their_own_documents():
    model, ids = make_model(GROUPED), torch.tensor([[5, 6, END, 7, 8, 9], [8, 5, 9, 6, END, 5]])
    context = DocumentContext(ids, END)
    for other in (ids, ids.flip(0), ids[:, 1:4]):
        assert torch.equal(model(other, context), model(other, DocumentContext(other, END)))


@torch.no_grad()
def test_features_are_in_the_place_of_the_ids():
    model, ids = make_model(GROUPED), torch.tensor([[5, 6, END, 7, 8, 9]])
    features = model.embed(ids)
    at_once = model.logits(model.states(features, DocumentContext(ids, END))[-1])
    assert torch.equal(at_once, model(ids, DocumentContext(ids, END)))
    with pytest.raises(ValueError, match=r"made for ids of shape \(1, 6\), and \(2, 6\) came"):
        model.states(features.repeat(2, 1, 1), DocumentContext(ids, END))
