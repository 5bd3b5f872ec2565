"""Right answers in another style than the chapter's are accepted."""

import numpy as np
import pytest
import torch

from minicpm_lite.exercises.language import interpretability as check


def weights_one_by_one(query, key):
    """In double precision, row by row."""
    heads, tokens, width = query.shape
    weights = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    for head in range(heads):
        for t in range(tokens):
            shared = key[head * len(key) // heads, : t + 1].double()
            scores = shared @ query[head, t].double() * width**-0.5
            weights[head, t, : t + 1] = scores.exp() / scores.exp().sum()
    return weights


def weights_by_infinity(query, key):
    """With a mask that is added, and keys that are spread over groups."""
    heads, tokens, width = query.shape
    grouped = query.unflatten(0, (len(key), -1))
    scores = torch.einsum("ghtd,gjd->ghtj", grouped, key).flatten(0, 1) / width**0.5
    return (scores + torch.ones(tokens, tokens).tril().log()).softmax(-1)


def share_by_diagonal(weights, period):
    """The diagonal that lies one less than a period back holds just the lanes that count, and one more."""
    return weights.diagonal(1 - period, 1, 2)[:, 1:].numpy().mean(axis=1)


def headless_in_halves(weights, config, block, head):
    """A table of clones, in half precision for none but the one that changes."""
    changed = {name: weight.clone() for name, weight in weights.items()}
    out = changed[f"layers.{block}.self_attn.o_proj.weight"]
    out.view(config.hidden_size, config.num_attention_heads, config.head_dim)[:, head] *= 0
    return changed


def averaged_in_numpy(results, head, width):
    table = results.numpy().copy()
    for number in range(head * width, (head + 1) * width):
        table[..., number] = table[..., number].mean()
    return torch.from_numpy(table)


def settled_one_by_one(logits):
    found = []
    for token in range(logits.shape[1]):
        best = [int(np.argmax(row)) for row in logits[:, token].numpy()]
        depth = len(best) - 1
        while depth and best[depth - 1] == best[-1]:
            depth -= 1
        found.append(depth)
    return found


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.head_weights, weights_one_by_one),
        (check.head_weights, weights_by_infinity),
        (check.mended_share, lambda weights, period: torch.as_tensor(share_by_diagonal(weights, period))),
        (check.headless, headless_in_halves),
        (check.averaged, averaged_in_numpy),
        (check.settled, settled_one_by_one),
        (check.settled, lambda logits: torch.tensor(settled_one_by_one(logits))),
        (check.forecast, {"P": (0.33, 0), "Q": [0.33, 0.33], "R": torch.tensor([0.76, 0.33])}),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message
