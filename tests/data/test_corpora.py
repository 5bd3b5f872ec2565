"""The token stream and its batches: nothing is lost, nothing leaks, every step is reproducible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.data.assets import load_austen
from minicpm_lite.data.corpora import TokenWindows, batch_of, load_corpus


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
    windows = TokenWindows(torch.arange(tokens), length, seed)
    in_epoch = (tokens - length) // length
    seen = torch.cat([batch_of(windows, step, batch) for step in range(-(-in_epoch // batch))])[:in_epoch]
    assert bool((seen[:, 1:] == seen[:, :-1] + 1).all()), "a window is a stretch of the stream"
    predicted = seen[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted), "no token is predicted twice"
    assert len(predicted) >= tokens - 2 * length


def test_windows_follow_from_seed_and_index_alone():
    def make(seed):
        return TokenWindows(torch.arange(1000), 8, seed)

    late_first = make(0)
    late = late_first[450]
    early = late_first[0]
    assert torch.equal(make(0)[0], early)
    assert torch.equal(make(0)[450], late)
    assert not torch.equal(make(1)[0], early)
    assert not torch.equal(make(0)[1], early)


def test_epochs_differ_in_order_and_offset():
    windows = TokenWindows(torch.arange(1000), 10, 0)
    firsts = [[int(windows[index][0]) for index in range(99 * epoch, 99 * epoch + 99)] for epoch in range(4)]
    assert len({tuple(first) for first in firsts}) == 4
    assert len({min(first) % 10 for first in firsts}) > 1, "the windows begin at other offsets"


def test_steps_share_no_window():
    windows = TokenWindows(torch.arange(1000), 8, 0)
    steps = torch.cat([batch_of(windows, step, 3) for step in range(4)])
    assert torch.equal(steps, torch.stack([windows[index] for index in range(12)]))


def test_windows_know_what_they_hold():
    tokens = torch.arange(3, 100)
    windows = TokenWindows(tokens, 8, 0)
    assert windows.id_range() == (3, 99)
    assert windows.identity() == TokenWindows(tokens.int(), 8, 0).identity()
    for other in (TokenWindows(tokens.flip(0), 8, 0), TokenWindows(tokens, 4, 0), TokenWindows(tokens, 8, 1)):
        assert windows.identity() != other.identity()


def test_the_corpus_is_made_once():
    assert load_corpus() is load_corpus(1024)


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        (lambda: TokenWindows(torch.arange(100), 0, 0), ValueError, "length is 0"),
        (
            lambda: TokenWindows(torch.arange(10), 8, 0),
            ValueError,
            "holds 10 tokens; windows of 8 need at least 16",
        ),
        (lambda: TokenWindows(torch.arange(100), 8, 0)[-1], IndexError, "index of the window is -1"),
        (lambda: batch_of(TokenWindows(torch.arange(100), 8, 0), 0, 0), ValueError, "batch_size is 0"),
        (lambda: batch_of(TokenWindows(torch.arange(100), 8, 0), -1, 2), ValueError, "The step is -1"),
    ],
)
def test_impossible_windows(wrong, error, sentence):
    with pytest.raises(error, match=sentence):
        wrong()
