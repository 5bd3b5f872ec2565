"""Right answers in another style than the chapter's are accepted."""

import random

import numpy as np
import pytest
import torch

from minicpm_lite.config import SparseConfig
from minicpm_lite.exercises.inference import sparse_attention as check


def read_by_counting(length, config):
    """Windows one by one."""
    seen = config.num_visible(length)
    starts = range(0, length - config.kernel_size + 1, config.kernel_stride)
    return torch.tensor(2 * seen + (len(starts) if seen < length else 0))


def blocks_by_token(shares, seen, config):
    """Each window tells each of its tokens' blocks; numpy sorts."""
    score = np.zeros(-(-seen // config.block_size))
    for j, share in enumerate(np.asarray(shares, dtype=np.float64)):
        for token in range(j * config.kernel_stride, j * config.kernel_stride + config.kernel_size):
            b = token // config.block_size
            score[b] = max(score[b], share)
    score[: config.init_blocks] = np.inf
    score[-config.local_blocks :] = np.inf
    return np.argsort(-score, kind="stable")[: config.num_blocks].tolist()


def shares_with_loops(query, key, size, stride):
    """In double precision, a token at a time."""
    query, key = query.double(), key.double()
    starts = list(range(0, len(key) - size + 1, stride))
    out = torch.zeros(len(key), len(starts), dtype=torch.float64)
    for t in range(len(key)):
        seen = [start for start in starts if start + size <= t + 1]
        if seen:
            means = torch.stack([key[start : start + size].mean(0) for start in seen])
            for head in query[:, t]:
                out[t, : len(seen)] += torch.softmax(means @ head / len(head) ** 0.5, dim=0)
    return out


def starts_by_ends(lengths, size, stride):
    """A tuple of those whose end lies behind what was never cut off."""
    now = lengths[-1]
    return tuple(s for s in range(0, now, stride) if min(lengths) < s + size <= now)


def control_by_drawing(own, config, generator):
    """One after another from a list that shrinks."""
    got = [b for b in range(own + 1) if b < config.init_blocks or b > own - config.local_blocks]
    others = [b for b in range(own + 1) if b not in got]
    while len(got) < config.num_blocks and others:
        got.append(others.pop(int(torch.randint(len(others), (1,), generator=generator))))
    return got


def control_by_python(own, config, generator):
    """Python's own generator, seeded from the one that was given."""
    luck = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
    forced = set(range(own + 1)) - set(range(config.init_blocks, own - config.local_blocks + 1))
    others = sorted(set(range(own + 1)) - forced)
    return forced.union(luck.sample(others, min(len(others), config.num_blocks - len(forced))))


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (check.vectors_read, read_by_counting),
        (check.chosen_blocks, blocks_by_token),
        (check.mended_shares, shares_with_loops),
        (check.windows_to_make, starts_by_ends),
        (check.forecast, torch.tensor(0.222)),
        (check.control_blocks, control_by_drawing),
        (check.control_blocks, control_by_python),
        (check.my_settings, SparseConfig(kernel_size=16, kernel_stride=8, window_size=2048, topk=15)),
    ],
)
def test_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


def said(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "wrong"
    return verdict.message


def without_a_window(length, config):
    return int(read_by_counting(length, config)) - (config.num_visible(length) < length)


def added_before(query, key, size, stride):
    """One softmax for the whole group."""
    return shares_with_loops(query.sum(0, keepdim=True), key, size, stride)


def divided_by_width(query, key, size, stride):
    return shares_with_loops(query / query.shape[-1] ** 0.5, key, size, stride)


def a_token_late(query, key, size, stride):
    shares = shares_with_loops(query, key, size, stride)
    return torch.cat([torch.zeros_like(shares[:1]), shares[:-1]])


def keys_without_values(length, config):
    return int(read_by_counting(length, config)) - config.num_visible(length)


def numbers_in_vectors(length, config):
    """Of a model whose vectors have 128."""
    return 128 * read_by_counting(length, config).item()


def chosen_by_mean(shares, seen, config):
    blocks, per = -(-seen // config.block_size), config.block_size // config.kernel_stride
    over = config.kernel_size // config.kernel_stride - 1
    score = [
        float(torch.as_tensor(shares[max(0, per * b - over) : per * b + per]).mean()) for b in range(blocks)
    ]
    forced = {*range(config.init_blocks), *range(max(0, blocks - config.local_blocks), blocks)}
    others = sorted(set(range(blocks)) - forced, key=lambda b: -score[b])
    return forced | set(others[: max(0, config.num_blocks - len(forced))])


def chosen_with_next(shares, seen, config):
    """The own block is taken for `seen // block_size`."""
    return blocks_by_token(shares, seen + (seen % config.block_size == 0), config)


def test_messages_name_the_idea_that_is_missed():
    assert "Yours leaves 8,190 for means" in said(check.vectors_read, without_a_window)
    assert "are 12,288 vectors; yours is 6144" in said(
        check.vectors_read, lambda length, config: config.num_visible(length)
    )
    assert "not their values" in said(check.vectors_read, keys_without_values)
    assert "is 128 times what is right" in said(check.vectors_read, numbers_in_vectors)
    assert "the *mean* or the *sum*" in said(check.chosen_blocks, chosen_by_mean)
    assert "still empty" in said(check.chosen_blocks, chosen_with_next)
    assert "come to 1; 2 heads" in said(check.mended_shares, added_before)
    assert "root of the keys' width" in said(check.mended_shares, divided_by_width)
    assert "its last token is seen" in said(check.mended_shares, a_token_late)
    assert "guesses, and one guess in ten" in said(check.forecast, 8 / 59)
    assert "eight of 63 blocks" in said(check.forecast, 8 / 63)
    assert "four of them are forced" in said(check.forecast, 12 / 63)
    too_many = SparseConfig(kernel_size=16, kernel_stride=8, window_size=2048, topk=16)
    assert "reads 22,527 vectors. The release reads 20,479" in said(check.my_settings, too_many)
    assert "rounded down, is 22,526." in said(check.my_settings, too_many)


def windows_of_the_release(shares, seen, config):
    """Right where a window is half a block and begins every quarter of one."""
    blocks = -(-seen // config.block_size)
    score = [max(map(float, shares[max(0, 4 * b - 1) : 4 * b + 4]), default=0.0) for b in range(blocks)]
    forced = {*range(config.init_blocks), *range(max(0, blocks - config.local_blocks), blocks)}
    others = sorted(set(range(blocks)) - forced, key=lambda b: -score[b])
    return forced | set(others[: max(0, config.num_blocks - len(forced))])


def averaged_over_heads(query, key, size, stride):
    return shares_with_loops(query, key, size, stride) / len(query)


def control_of_its_own(own, config, generator):
    return control_by_drawing(own, config, torch.Generator().manual_seed(0))


def test_messages_tell_near_mistakes_apart():
    assert "as in the release" in said(check.chosen_blocks, windows_of_the_release)
    assert "mean of the 2 heads" in said(check.mended_shares, averaged_over_heads)
    assert "one of your own that starts anew" in said(check.control_blocks, control_of_its_own)
