"""Right answers in another style than the chapter's are accepted."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from minicpm_lite.exercises.language import tokenizer as check
from minicpm_lite.language.decoder import Decoder


def learn_in_place(words, how_many):
    """As lists, changed in place, ties by sorting; pairs as lists."""
    rows, merges = [[list(row), times] for row, times in words.items()], []
    for new in range(256, 256 + how_many):
        counts = Counter()
        for row, times in rows:
            counts.update(dict.fromkeys(pairwise(row), 0))
            for pair in pairwise(row):
                counts[pair] += times
        if not counts:
            return merges
        best = sorted(sorted(counts), key=counts.get, reverse=True)[0]
        merges.append(list(best))
        for row, _ in rows:
            for i in range(len(row)):
                if tuple(row[i : i + 2]) == best:
                    row[i : i + 2] = [new]
    return merges


def printed_by_first_byte(tokens):
    texts, held = [], b""
    for token in tokens:
        text = ""
        for byte in token:
            held += bytes([byte])
            first = held[0]
            if len(held) == 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0):
                text, held = text + held.decode(), b""
        texts.append(text)
    return tuple(texts)


def saved_by_counting(config):
    with torch.device("meta"):
        body = Decoder(config).num_parameters()
    table = torch.tensor(config.vocab_size * config.hidden_size, dtype=torch.float64)
    return table / (body + 2 * table)


def best_size_in_arrays(N, d, sizes, bytes_a_token, overhead):
    sizes = np.array(sizes)
    return sizes[((2.0 * (N + sizes * d) + overhead) / np.array(bytes_a_token)).argmin()]


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.characters, lambda context, token, character: torch.tensor(context) * token / character),
        (check.learn, learn_in_place),
        (check.printed, printed_by_first_byte),
        (check.saved_by_tying, saved_by_counting),
        (check.best_size, best_size_in_arrays),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message
