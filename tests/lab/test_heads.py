"""Heads to be looked at: what they hold as text, and what they refuse. A browser tries them in tests/book."""

import re

import pytest
import torch

from minicpm_lite import lab

TOKENS = ["the", "cats", "over", "<there>"]


def weights(blocks=2, heads=3, tokens=4):
    scores = torch.randn(blocks, heads, tokens, tokens, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(dim=-1)


def test_heads_as_text():
    given = weights()
    given[1, 2, 3] = torch.tensor([0.1, 0.7, 0.2, 0.0])
    lines = repr(lab.Heads(TOKENS, given, "Six heads.")).splitlines()
    assert lines[0] == "Heads: Six heads." and len(lines) == 7
    assert lines[1].startswith("block 1, head 1: the → the 100 %, cats → ")
    assert lines[6].startswith("block 2, head 3: ") and lines[6].endswith("<there> → cats 70 %")


def test_a_page_holds_each_weight_once():
    page = lab.Heads(TOKENS, weights(), "Six heads.", start=(1, 0, 2))._repr_html_()
    assert page == lab.Heads(TOKENS, weights().tolist(), "Six heads.", start=(1, 0, 2))._repr_html_()
    shares = re.search(r'"shares":\[\[([\d,]+)\]', page)[1].split(",")
    assert len(shares) == 10 and shares[0] == "100"
    assert 'alt="Six heads."' in page and "&lt;there&gt;" in page and r"\u003cthere>" in page
    assert 'data-head="3" data-asks="2" data-wide="3"' in page
    assert "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("tokens", "given", "start", "says"),
    [
        (TOKENS[:2], weights(tokens=2), None, "The text has 2 pieces; expected 3 to 12"),
        (TOKENS[:3], weights(), None, "block 1, head 1 has no weights of 3 by 3"),
        (TOKENS, weights().mT, None, "Row 0 of block 1, head 1 is no share of 1"),
        (TOKENS, weights() / 2, None, "Row 0 of block 1, head 1 is no share of 1"),
        (TOKENS, weights() * float("nan"), None, "Row 0 of block 1, head 1 is no share of 1"),
        (TOKENS, weights(), (0, 3, 0), "start is (0, 3, 0); expected block, head and token"),
        (TOKENS, weights(), (0, 0, 4), "start is (0, 0, 4)"),
    ],
)
def test_heads_are_refused(tokens, given, start, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        lab.Heads(tokens, given, "Six heads.", start=start)


def test_a_long_piece_is_refused():
    long = lab.Heads(["the", "universally acknowledged", "over", "there"], weights(), "Six heads.")
    with pytest.raises(ValueError, match="'universally acknowledged' is about"):
        long._repr_html_()
