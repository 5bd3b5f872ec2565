"""Right answers in another style than the chapter's are accepted."""

import numpy as np
import pytest
import torch

from minicpm_lite.exercises.pretrained import checkpoints as check


def powers(config):
    """With a field that was not asked for."""
    return {
        "embedding_multiplier": torch.tensor(config.scale_emb),
        "residual_multiplier": config.scale_depth * config.num_hidden_layers**-0.5,
        "logits_scaling": config.hidden_size / config.dim_model_base,
        "attention_multiplier": config.head_dim**-0.5,
        "model_type": "granite",
    }


def by_index(weight, heads):
    places = torch.arange(len(weight)).view(heads, -1)
    return weight[torch.cat([places[:, 0::2], places[:, 1::2]], dim=1).flatten()]


def in_place(weight, heads):
    pairs = weight.clone().unflatten(0, (heads, -1, 2))
    weight.unflatten(0, (heads, 2, -1)).copy_(pairs.transpose(1, 2))
    return weight


def counts_room(sizes, limit):
    shards, room = [], 0
    for size in sizes:
        if size <= room:
            shards[-1] += (size,)
        else:
            shards.append((size,))
            room = limit
        room -= size
    return tuple(shards)


def walks(expected, stored):
    missing, unknown, misshapen = [], [], []
    for name in sorted({**expected, **stored}):
        if name not in stored:
            missing.append(name)
        elif name not in expected:
            if not name.endswith("rotary_emb.inv_freq"):
                unknown.append(name)
        elif expected[name] != stored[name]:
            misshapen.append(name)
    return [missing, unknown, misshapen]


def quotients(embedding, output):
    quotient = (embedding / output).double()
    return quotient.mean() if torch.allclose(quotient, quotient[0, 0], rtol=1e-4) else torch.tensor(0)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.file_bytes, lambda n, shapes, each: 8 + n + each * sum(np.prod(s) for s in shapes)),
        (check.granite_fields, powers),
        (check.put_back, by_index),
        (check.put_back, in_place),
        (check.fill_shards, counts_room),
        (check.differences, walks),
        (check.factor_between, quotients),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


def test_a_loop_is_refused():
    """The exercise asks to put the rows back without one."""
    verdict = check.put_back.judge(check._with_loops)
    assert verdict.state == "wrong" and "do without a loop" in verdict.message
