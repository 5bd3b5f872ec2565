"""The token stream and its batches: nothing is lost, nothing leaks, every step is reproducible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.data.assets import load_austen
from minicpm_lite.data.corpora import TokenBatches, load_corpus


def test_corpus_holds_the_whole_text_once():
    corpus = load_corpus()
    train, validation = (corpus.tokenizer.decode(part.tolist()) for part in (corpus.train, corpus.validation))
    text = load_austen()
    assert len(train) + len(validation) == len(text)
    assert 0.04 < len(validation) / len(text) < 0.06
    assert validation == "".join(text[start : start + 20_000] for start in range(380_000, len(text), 400_000))
    assert int(corpus.train.max()) < 1024
    assert corpus.bytes_per_token == pytest.approx(len(validation.encode()) / len(corpus.validation))


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(20, 300), batch=st.integers(1, 7), length=st.integers(1, 9), seed=st.integers(0, 2**20)
)
def test_an_epoch_visits_every_window_once(tokens, batch, length, seed):
    batches = TokenBatches(torch.arange(tokens), batch, length, seed)
    windows = (tokens - length) // length
    seen = torch.cat([batches(step) for step in range(-(-windows // batch))])[:windows]
    assert bool((seen[:, 1:] == seen[:, :-1] + 1).all()), "a window is a stretch of the stream"
    predicted = seen[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted), "no token is predicted twice"
    assert len(predicted) >= tokens - 2 * length


def test_batches_follow_from_seed_and_step_alone():
    def make(seed):
        return TokenBatches(torch.arange(1000), 3, 8, seed)

    late_first = make(0)
    late = late_first(150)
    early = late_first(0)
    assert torch.equal(make(0)(0), early)
    assert torch.equal(make(0)(150), late)
    assert not torch.equal(make(1)(0), early)
    assert not torch.equal(make(0)(1), early)


def test_epochs_differ_in_order_and_offset():
    batches = TokenBatches(torch.arange(1000), 1, 10, 0)
    firsts = [[int(batches(step)[0, 0]) for step in range(99 * epoch, 99 * epoch + 99)] for epoch in range(4)]
    assert len({tuple(first) for first in firsts}) == 4
    assert len({min(first) % 10 for first in firsts}) > 1, "the windows begin at other offsets"


def test_the_corpus_is_made_once():
    assert load_corpus() is load_corpus(1024)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(batch_size=0), "batch_size is 0"),
        (dict(length=0), "length is 0"),
    ],
)
def test_impossible_batches(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        TokenBatches(**(dict(tokens=torch.arange(100), batch_size=1, length=8, seed=0) | change))


def test_too_short_a_stream():
    with pytest.raises(ValueError, match="holds 10 tokens; windows of 8 need at least 16"):
        TokenBatches(torch.arange(10), 1, 8, 0)
