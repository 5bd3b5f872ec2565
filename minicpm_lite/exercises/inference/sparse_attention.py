"""Checks and quiz of the chapter on sparse attention."""

import itertools
import math
from collections import Counter

import torch

from ...config import SparseConfig
from ...inference.block_choice import window_means
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz

_SMALL = SparseConfig(kernel_size=2, kernel_stride=1, block_size=4, window_size=4, topk=2, dense_len=0)
_WIDE = SparseConfig(
    kernel_size=4, kernel_stride=2, block_size=8, window_size=16, topk=4, init_blocks=2, dense_len=0
)
_THRICE = SparseConfig(kernel_size=6, kernel_stride=2, block_size=8, window_size=8, topk=3, dense_len=0)
_SIDE_BY_SIDE = SparseConfig(kernel_size=4, kernel_stride=4, block_size=8, window_size=8, topk=3, dense_len=0)


def _windows(length: int, size: int, stride: int) -> int:
    return max(0, (length - size) // stride + 1)


def _read(length, config, both=2, means=True, short=True, floor=True, offset=0):
    seen = config.num_visible(length)
    if seen == length and short:
        return both * length
    windows = _windows(length, config.kernel_size, config.kernel_stride)
    if not floor:
        windows = length / config.kernel_stride
    return both * seen + (windows + offset if means else 0)


@exercise(
    "vectors read",
    wrong=(
        lambda *given: _read(*given, means=False),
        lambda *given: _read(*given, both=1),
        lambda *given: _read(*given, short=False),
        lambda *given: _read(*given, floor=False),
        lambda *given: _read(*given, offset=1),
        lambda *given: _read(*given, offset=-1),
        lambda *given: 2 * given[0],
        lambda *given: 128 * _read(*given),
        lambda length, config: _read(length, SparseConfig()),
        lambda length, config: _read(131_072, config),
        lambda length, config: (
            _read(length, config) + _windows(length, config.kernel_size, config.kernel_stride)
        ),
        lambda length, config: (
            2 * length if length < config.dense_len else _read(length, config, short=False)
        ),
    ),
)
def vectors_read(answer):
    """At 128K two fifths of what is read are means."""
    cases = (
        (131_072, SparseConfig()),
        (4096, SparseConfig()),
        (8192, SparseConfig()),
        (24, _SMALL),
        (12, _SMALL),
        (61, _WIDE),
        (70, _THRICE),
        (40_000, SparseConfig(kernel_size=64, kernel_stride=32, topk=32)),
    )
    for length, config in cases:
        got = answer(length, config)
        assert same(got, _read(length, config)), _about_read(got, length, config)


def _about_read(got, length, config) -> str:
    seen, sizes = config.num_visible(length), f"{config.kernel_size}, one every {config.kernel_stride}"
    text = f"A text of {length:,} tokens, windows of {sizes}: {seen:,} tokens are attended to. "
    times, rest = divmod(got, _read(length, config)) if isinstance(got, int | float) else (0, 1)
    if rest == 0 and times >= 4:
        return text + (
            f"Yours is {times:,g} times what is right. Was each number of a vector counted, or each byte? "
            "A key, a value or a mean is one vector, however wide."
        )
    if seen == length and got == length:
        return text + f"Yours, {got:,}, has their keys, but not their values: each is one vector more."
    if seen == length:
        return text + f"That is all of them, so nothing is chosen: expected {2 * length:,}, without any mean."
    keys_only = _read(length, config, both=1)
    if isinstance(got, int | float) and got == keys_only:
        return text + f"Yours, {got:,}, has their keys, but not their values: each is one vector more."
    if isinstance(got, int | float) and got >= 2 * seen:
        left = f"Yours leaves {got - 2 * seen:,} for means. "
        return text + left + "Count the whole windows: each ends in the text, and the first begins at 0."
    return text + f"Their keys and values alone are {2 * seen:,} vectors; yours is {got}."


def _chosen(shares, seen, config, overlap=True, first=True, mean=False, total=False, later=False,
            own=True, extra=0, whole=True, forced_only=False, fixed=False):  # fmt: skip
    size, stride, wide = config.kernel_size, config.kernel_stride, config.block_size
    blocks = range(-(-seen // wide) if whole else seen // wide)
    if len(blocks) <= config.num_blocks:
        return set(blocks)

    def score(b):
        if fixed:  # of the release's proportions
            mine = [float(share) for share in shares[max(0, 4 * b - 1) : 4 * b + 4]]
        elif overlap:
            mine = [
                float(share)
                for j, share in enumerate(shares)
                if j * stride < (b + 1) * wide and j * stride + size > b * wide
            ]
        else:
            mine = [float(share) for j, share in enumerate(shares) if j * stride // wide == b]
        if total:
            return sum(mine)
        return (sum(mine) / max(1, len(mine))) if mean else max(mine, default=0.0)

    last = len(blocks) - (config.local_blocks if own else 0)
    forced = {b for b in blocks if first and b < config.init_blocks or b >= last}
    others = sorted((b for b in blocks if b not in forced), key=lambda b: (-score(b), -b if later else b))
    if forced_only:
        return forced
    return forced | set(others[: max(0, config.num_blocks - len(forced) + extra)])


def _own_too_late(shares, seen, config):
    """Takes `seen // block_size` for the own block."""
    return _chosen(shares, seen + (seen % config.block_size == 0), config)


def _pencil() -> torch.Tensor:
    shares = torch.full((23,), 0.01)
    shares[7], shares[8], shares[17] = 0.31, 0.37, 0.36
    return shares


def _cases_of_choice():
    random = torch.Generator().manual_seed(3)
    border = torch.full((23,), 0.01)
    border[7] = 0.5  # tokens 7 and 8: blocks 1 and 2 tie
    late = torch.full((23,), 0.01)
    late[11] = 0.5  # tokens 11 and 12; the earlier block has a second best
    wide = torch.full((31,), 0.02)
    wide[11], wide[17], wide[15] = 0.4, 0.3, 0.29  # 22-25, 34-37, 30-33: a border again
    flat = torch.full((23,), 0.1)
    flat[12:15] = 0.12  # many good ones against one very good one
    flat[9] = 0.2
    several = torch.full((38,), 0.01)
    several[13] = 0.5
    yield (_pencil(), 24, _SMALL, "On the pencil's text blocks 0, 2 and 5 are read.")
    yield (
        border,
        24,
        _SMALL,
        "Window 7 touches blocks 1 and 2, which then score the same: the earlier is taken.",
    )
    yield (flat, 24, _SMALL, "A block scores as its best window, not as their mean.")
    yield (late, 21, _SMALL, "With 21 tokens the last block has one token, and is the query's own.")
    yield (torch.rand(11, generator=random), 12, _SMALL, "Twelve tokens are three blocks: all are read.")
    yield (torch.rand(7, generator=random), 8, _SMALL, "Two blocks, of which three may be read: all are.")
    yield (wide, 64, _WIDE, "A window of 4 tokens that begins at 22 touches blocks 2 and 3.")
    yield (several, 78, _WIDE, "Two first blocks and two last ones are forced here.")
    yield (torch.rand(38, generator=random), 78, _WIDE, "Six of ten blocks, the best by their windows.")
    yield (torch.rand(47, generator=random), 97, _WIDE, "Six of thirteen blocks; shares may be any numbers.")
    thrice = torch.full((38,), 0.01)
    thrice[14], thrice[20] = 0.5, 0.4  # tokens 28-33 and 40-45
    why = "Windows of 6, one every 2, with blocks of 8: the one that begins at 28 touches blocks 3 and 4."
    yield (thrice, 80, _THRICE, why)
    yield (torch.rand(38, generator=random), 80, _THRICE, why)
    beside = torch.full((20,), 0.01)
    beside[7], beside[12] = 0.5, 0.4  # tokens 28-31 and 48-51
    why = "Windows of 4 side by side: the one that begins at 28 ends with block 3, and touches no other."
    yield (beside, 80, _SIDE_BY_SIDE, why)
    yield (torch.rand(20, generator=random), 80, _SIDE_BY_SIDE, why)


@exercise(
    "chosen blocks",
    wrong=(
        lambda *given: _chosen(*given, overlap=False),
        lambda *given: _chosen(*given, first=False),
        lambda *given: _chosen(*given, own=False),
        lambda *given: _chosen(*given, mean=True),
        lambda *given: _chosen(*given, total=True),
        lambda *given: _chosen(*given, later=True),
        lambda *given: _chosen(*given, extra=1),
        lambda *given: _chosen(*given, extra=-1),
        lambda *given: _chosen(*given, whole=False),
        lambda *given: _chosen(*given, forced_only=True),
        lambda *given: _chosen(*given, fixed=True),
        lambda *given: _own_too_late(*given),
        lambda *given: {0, 2, 5},
        lambda *given: set(range(-(-given[1] // given[2].block_size))),
    ),
)
def chosen_blocks(answer):
    """Forced blocks, and of the others those whose best window gets most: the heart of InfLLM v2."""
    for shares, seen, config, why in _cases_of_choice():
        got = answer(shares.clone(), seen, config)
        assert not isinstance(got, torch.Tensor | str), "Expected a set or a list of whole numbers."
        expected, blocks = _chosen(shares, seen, config), {int(b) for b in got}
        assert blocks == expected and len(list(got)) == len(expected), (
            f"{_about_choice(blocks, shares, seen, config)}{why} Expected {sorted(expected)}, yours is "
            f"{sorted(blocks)}."
        )


def _about_choice(blocks, shares, seen, config) -> str:
    own = (seen - 1) // config.block_size
    if max(blocks, default=0) > own:
        return (
            f"Of {seen} tokens the last is number {seen - 1}, in block {own}: yours has a later block, which "
            "is still empty. "
        )
    names = {"mean": "the *mean*", "total": "the *sum*"}  # often they choose alike
    alike = [name for way, name in names.items() if blocks == _chosen(shares, seen, config, **{way: True})]
    if alike:
        return f"That is the choice by {' or '.join(alike)} of a block's windows; the best of them counts. "
    if blocks == _chosen(shares, seen, config, first=False):
        return "That is the choice without the first blocks forced: what does every query get? "
    if blocks == _chosen(shares, seen, config, fixed=True):  # right until other sizes are asked for
        return "That is the choice by the windows 4b − 1 to 4b + 3, as in the release; here others overlap. "
    if blocks == _chosen(shares, seen, config, overlap=False):
        return "That is the choice with each window counted for the block of its start alone. "
    return ""


def _shares(query, key, size, stride, future=0, width=None, before=False, zeros=True, average=False,
            heads=None, late=0):  # fmt: skip
    means = window_means(key[None, None], size, stride)[0, 0]
    query = query[:heads] if heads else query
    scores = query @ means.T / math.sqrt(width or query.shape[-1])
    end = stride * torch.arange(len(means)) + (size - 1) * (1 - future)
    seen = end[None] + late <= torch.arange(len(key))[:, None]
    scores = scores.sum(0, keepdim=True) if before else scores
    each = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    each = torch.where(seen, each, 0) if zeros else each
    return each.mean(0) if average else each.sum(0)


@exercise(
    "mended shares",
    wrong=(
        lambda *given: _shares(*given, future=1),
        lambda *given: _shares(*given, before=True),
        lambda *given: _shares(*given, zeros=False),
        lambda *given: _shares(*given, width=len(given[1])),
        lambda *given: _shares(*given, average=True),
        lambda *given: _shares(*given, heads=1),
        lambda *given: _shares(*given, late=1),
        lambda *given: _shares(*given, width=1),
        lambda *given: _shares(*given, width=given[0].shape[-1] ** 2),
        lambda query, key, size, stride: _shares(query, key, 2, 1),
        lambda query, key, size, stride: _shares(query, key, size, size),
        lambda *given: _shares(*given) / _shares(*given).sum(-1, keepdim=True).clamp(min=1e-9),
    ),
)
def mended_shares(answer):
    """Each head has its own softmax, over the windows that have ended; then the heads are added."""
    random = torch.Generator().manual_seed(5)
    for heads, tokens, width, size, stride in ((2, 24, 4, 2, 1), (3, 17, 8, 4, 2), (1, 9, 2, 3, 3)):
        query = 2 * torch.randn(heads, tokens, width, generator=random)
        key = 2 * torch.randn(tokens, width, generator=random)
        got = answer(query.clone(), key.clone(), size, stride)
        expected = _shares(query, key, size, stride)
        assert isinstance(got, torch.Tensor), f"Expected a tensor, not {type(got).__name__}."
        assert got.shape == expected.shape, (
            f"Expected {tuple(expected.shape)}, tokens × windows; yours is {tuple(got.shape)}."
        )
        assert not got.isnan().any(), (
            "A token before the end of the first window sees none: softmax makes no numbers of that. Zeros, "
            "please."
        )
        seen = expected > 0
        assert bool((got[~seen].abs() < 1e-6).all()), (
            "A window counts as seen before it has ended: its mean holds keys of the future."
        )
        assert bool((got[seen] > 0).all()), (
            "A window that has ended at the query's own token is left out: its last token is seen, too."
        )
        assert heads == 1 or not same(heads * got, expected, 1e-4), (
            f"That is the mean of the {heads} heads' shares. Each softmax is right; add them up instead."
        )
        total = got[seen.any(1)].sum(1)
        assert same(total, torch.full_like(total, heads), 1e-4), (
            f"The shares of a token that sees windows come to {float(total[0]):.3g}; {heads} heads with a "
            f"softmax of their own, added up, come to {heads}. What is added first, scores or shares?"
        )
        assert same(got, expected, 1e-4), (
            "What is seen is right, and so are the sums, but not how the shares lie. Is each head's score "
            "divided by the root of the keys' width, and by nothing else, before its own softmax?"
        )


def _to_make(lengths, size, stride, valid=min, needed=-1, offset=0, numbers=False, whole=_windows):
    first = whole(valid(lengths), size, stride) + offset
    found = range(max(0, first), whole(lengths[needed], size, stride))
    return [j if numbers else stride * j for j in found]


@exercise(
    "windows to make",
    wrong=(
        lambda *given: _to_make(*given, valid=max),
        lambda *given: _to_make(*given, valid=lambda lengths: lengths[0]),
        lambda *given: _to_make(*given, valid=lambda lengths: lengths[-2]),
        lambda *given: _to_make(*given, valid=lambda lengths: 0),
        lambda *given: _to_make(*given, valid=lambda lengths: min(lengths[0], lengths[-1])),
        lambda *given: _to_make(*given, valid=lambda lengths: min(lengths[1:])),
        lambda *given: _to_make(*given, valid=lambda lengths: min(lengths[-2:])),
        lambda *given: _to_make(*given, offset=1),
        lambda *given: _to_make(*given, offset=-1),
        lambda *given: _to_make(*given, numbers=True),
        lambda *given: _to_make(*given, whole=lambda length, size, stride: length // stride - 1),
        lambda *given: _to_make(*given, whole=lambda length, size, stride: length // stride),
        lambda lengths, size, stride: _to_make(lengths, stride, stride),
        lambda lengths, size, stride: _to_make(lengths, size, size),
        lambda lengths, size, stride: [],
    ),
)
def windows_to_make(answer):
    """A mean is made once, and made anew only where the text was."""
    cases = (
        ([0, 100], 32, 16, "Nothing was made yet: all whole windows."),
        ([100, 111], 32, 16, "100 tokens have windows at 0, 16, 32, 48 and 64; 111 tokens have no more."),
        ([100, 112], 32, 16, "With the 112th token the window from 80 to 111 is whole."),
        ([100, 40, 100], 32, 16, "The text went back to 40 tokens; what stands behind is another text."),
        ([40, 100, 120], 32, 16, "The means were made at 40 tokens, and none since: not those of 100."),
        ([100, 120, 90], 32, 16, "A text that has only become shorter needs no new mean."),
        ([100, 60, 120, 80, 130], 32, 16, "It went back twice; the shorter time, to 60, says what is left."),
        ([100, 80, 120, 60, 130], 32, 16, "It went back twice; the shorter time, to 60, says what is left."),
        ([20, 31], 32, 16, "31 tokens have no whole window."),
        ([60, 0, 33], 32, 16, "It went back to nothing."),
        ([7, 12], 4, 2, "Windows of 4, one every 2: 7 tokens have two, 12 have five."),
        ([0, 20], 6, 2, "Windows of 6, one every 2: the last that ends within 20 tokens begins at 14."),
        ([9, 20], 4, 4, "Windows of 4 side by side: 9 tokens have two, 20 have five."),
        ([11, 8, 19], 5, 3, "Windows of 5, one every 3: 8 tokens have two, 19 have five."),
        ([0, 40], 2, 5, "Windows of 2, one every 5: the last that ends within 40 tokens begins at 35."),
    )
    for lengths, size, stride, why in cases:
        got = answer(list(lengths), size, stride)
        assert got is not None and not isinstance(got, int | str), "Expected a list of starts."
        expected, mine = _to_make(lengths, size, stride), [int(x) for x in got]
        assert mine == expected or [stride * x for x in mine] != expected, (
            f"Those are the windows' numbers, {mine}; asked for are their starts, in tokens: {expected}."
        )
        assert mine == expected, f"{why} Lengths {lengths}: expected {expected}."


_READ = 8 / (63 - 4)


def _right(read: float) -> float:
    """If the block is read with this probability."""
    return read + (1 - read) / 10


@exercise(
    "forecast",
    wrong=(_READ, 22.2, 0.225, 8 / 63, 8 / 60 + 0.1, 12 / 63 * 0.9 + 0.1, 8 / 58 + 0.9 * 0.1, "0.22", 0.1,
           12 / 63, 8 / 51 * 0.9 + 0.1, 8 / 60 * 0.9 + 0.1, 8 / 58 * 0.9 + 0.1, 8 / 63 * 0.9 + 0.1),
)  # fmt: skip
def forecast(answer):
    """Luck is not at chance: it finds the block now and then, and guesses right now and then."""
    assert not isinstance(answer, str), f"Expected a number, not the text {answer!r}."
    given = float(answer)
    assert 0 <= given <= 1, f"A share lies between 0 and 1; yours is {given:g}."

    def near(value: float) -> bool:
        return abs(given - value) < 0.001

    assert not near(_READ), (
        "8/59 is how probable it is that the fact's block is read. If it is not, the model guesses, and one "
        "guess in ten is right."
    )
    for pool in (58, 60, 62, 63):
        assert not near(8 / pool) and not near(_right(8 / pool)), (
            f"That is eight of {pool} blocks. 1,000 tokens have 63, the last one half full, and the four "
            "forced ones cannot be drawn again."
        )
    assert not near(12 / 63) and not near(_right(12 / 63)), (
        "Twelve blocks are read, but four of them are forced, and the fact is in none of these: eight are "
        "drawn."
    )
    assert near(_right(_READ)), (
        "First how probable it is that the block is drawn: how many blocks are drawn, and of how many? Then "
        "the answer is right; in the other cases it is right once in ten."
    )


def _control(own, config, generator, future=0, twice=False, first=True, local=True, size=None, luck=True,
             run=False, step=None):  # fmt: skip
    forced = {
        b
        for b in range(own + 1)
        if first and b < config.init_blocks or local and b > own - config.local_blocks
    }
    others = [b for b in range(own + 1 + future) if b not in forced]
    free = (config.num_blocks if size is None else size) - len(forced)
    if twice:
        drawn = torch.randint(len(others), (free,), generator=generator).tolist() if others else []
    elif (run or step) and others:  # one place by luck, and the others follow from it
        begin = int(torch.randint(len(others), (1,), generator=generator))
        apart = 1 if run else max(1, len(others) // max(1, free))
        drawn = [(begin + apart * number) % len(others) for number in range(min(free, len(others)))]
    elif luck:
        drawn = torch.randperm(len(others), generator=generator).tolist()[: max(0, free)]
    else:
        drawn = range(min(free, len(others)))
    return forced | {others[place] for place in drawn}


def _draws(answer, own, config, seed, rounds):
    """What the answer takes, with one generator again and again."""
    generator = torch.Generator().manual_seed(seed)
    return [answer(own, config, generator) for _ in range(rounds)]


@exercise(
    "control blocks",
    ask=_draws,
    wrong=(
        lambda *given: _control(*given, future=3),
        lambda *given: _control(*given, twice=True),
        lambda *given: _control(*given, first=False),
        lambda *given: _control(*given, local=False),
        lambda *given: _control(*given, luck=False),
        lambda *given: _control(*given, run=True),
        lambda *given: _control(*given, step=True),
        lambda own, config, generator: _control(own, config, None),
        lambda own, config, generator: _control(own, config, torch.Generator().manual_seed(0)),
        lambda own, config, generator: _control(own, _SMALL, generator),
        lambda own, config, generator: set(torch.randperm(own + 1, generator=generator).tolist()[
            : config.num_blocks]),
        lambda own, config, generator: _control(own, config, generator, size=config.num_blocks - 1),
    ),
)  # fmt: skip
def control_blocks(answer):
    """Equal in all but one thing: which of the free blocks are read."""
    wide = SparseConfig(kernel_size=4, kernel_stride=2, block_size=8, window_size=24, topk=5, init_blocks=2)
    for config, own in ((_SMALL, 5), (wide, 20), (wide, 6), (_SMALL, 1), (wide, 0)):
        rounds, drawn, pairs = 1500, Counter(), Counter()
        draws = [{int(block) for block in blocks} for blocks in answer(own, config, own, rounds)]
        for got in draws:
            assert all(0 <= b <= own for b in got), "A block of the future, or none of the text, was taken."
            expected = min(config.num_blocks, own + 1)
            assert len(got) == expected, (
                f"In block {own} the real choice has {expected} blocks, yours {len(got)}. Was one drawn "
                "twice, or a forced one drawn again?"
            )
            forced = {b for b in range(own + 1) if b < config.init_blocks or b > own - config.local_blocks}
            assert forced <= got, f"Block {min(forced - got, default=0)} is forced, and was left out."
            drawn.update(got - forced)
            pairs.update(itertools.combinations(sorted(got - forced), 2))
        others = own + 1 - len(forced)
        free = expected - len(forced)
        if 0 < free < others:
            assert any(got != draws[0] for got in draws), (
                f"{rounds:,} draws, one after another, are all {sorted(draws[0])}. Is it the given "
                "`generator` that is drawn from, and not one of your own that starts anew each time?"
            )
            share = rounds * free / others
            off = 5 * math.sqrt(share * (1 - free / others))
            assert all(abs(drawn[b] - share) < off for b in range(own + 1) if b not in forced), (
                "Each block that is not forced should be equally likely."
            )
            share = rounds * free * (free - 1) / (others * (others - 1))
            both = itertools.combinations((b for b in range(own + 1) if b not in forced), 2)
            assert all(abs(pairs[two] - share) <= 6 * math.sqrt(share) for two in both), (
                "Each block is taken as often as it should be, but not each *pair*: one block tells which "
                "others are taken, as in a run of neighbours. Draw each block by itself."
            )
            again = [{int(block) for block in blocks} for blocks in answer(own, config, own, 20)]
            assert again == draws[:20], "With the generator in the same state the choice should be the same."


_RELEASE = _read(131_072, SparseConfig())


@exercise(
    "my settings",
    wrong=(
        SparseConfig(),
        SparseConfig(kernel_size=16, kernel_stride=8),
        SparseConfig(kernel_size=16, kernel_stride=16, block_size=32, window_size=1024, topk=128),
        SparseConfig(kernel_size=16, kernel_stride=16, topk=64, init_blocks=0),
        SparseConfig(kernel_size=16, kernel_stride=16, topk=4),
        SparseConfig(kernel_size=16, kernel_stride=16, dense_len=200_000),
        SparseConfig(kernel_size=16, kernel_stride=8, topk=15, coarse_topk=64),
        SparseConfig(kernel_size=16, kernel_stride=16),
        SparseConfig(kernel_size=16, kernel_stride=16, block_size=32, topk=128),
        SparseConfig(kernel_size=16, kernel_stride=8, topk=16),
        SparseConfig(kernel_size=16, kernel_stride=8, topk=5),
        SparseConfig(kernel_size=16, kernel_stride=8, topk=1, window_size=2944),
        SparseConfig(kernel_size=16, kernel_stride=8, topk=8, window_size=2496),
    ),
)
def my_settings(answer):
    """It is affordable. Whether it is better is for five seeds to say."""
    assert isinstance(answer, SparseConfig), f"Expected a `SparseConfig`, not {type(answer).__name__}."
    assert answer.kernel_size <= 16, f"Windows are {answer.kernel_size} tokens; at most 16 were asked for."
    assert answer.kernel_stride <= answer.kernel_size / 2, (
        f"Windows of {answer.kernel_size} begin every {answer.kernel_stride} tokens: a token should be in "
        "two of them at least, so that no fact is cut in both."
    )
    assert answer.window_size >= 2048, f"{answer.window_size} local tokens: at least 2,048 were asked for."
    assert answer.init_blocks >= 1, "The first block of the text is to be forced."
    assert answer.dense_len <= 8192, "Texts longer than 8,192 tokens are to be read sparse."
    assert answer.coarse_topk is None, "Without coarse means, which the release has not."
    free = (answer.topk - answer.init_blocks) * answer.block_size
    assert free >= 512, (
        f"{max(0, free)} tokens are chosen by their means, the others are forced; at least 512 were asked "
        "for."
    )
    read = _read(131_072, answer)
    assert 10 * read <= 11 * _RELEASE, (
        f"At 131,072 tokens it reads {read:,} vectors. The release reads {_RELEASE:,}, so that a tenth more, "
        f"rounded down, is {11 * _RELEASE // 10:,}."
    )


quiz = Quiz(
    [
        (
            "What does training with sparse attention change about how blocks are chosen?",
            [
                "The weights of the selector",
                "The queries and keys, through attention to what was chosen",
                "The means of the windows, which are learned",
            ],
            1,
            "There is no selector and nothing in it to learn; no gradient passes the choice.",
        ),
        (
            "A text has 48 tokens, windows 32 and a stride of 16. How many means does its last token see?",
            ["1", "2", "3"],
            1,
            "Those that end at token 32 and at token 48. The third would end at token 64.",
        ),
        (
            "Why are shares added up over the group, and not scores?",
            [
                "It is faster",
                "A softmax brings each head to the same total, so that no head is louder than another",
                "Scores may be negative, and a maximum needs positive numbers",
            ],
            1,
            "A head with large scores would decide for all sixteen.",
        ),
        (
            "At 128K a token reads 21 times fewer tokens. Why is attention not 21 times as fast?",
            [
                "The means are read as well, and are two fifths of what is left",
                "Values are not compressed",
                "The first block is read twice",
            ],
            0,
            "2 · 131,072 vectors become 2 · 6,144 and 8,191 means: 12.8 times fewer.",
        ),
        (
            "A sparse model has the perplexity of one with a sliding window of equal budget. What follows?",
            [
                "Choosing is of no use",
                "Nothing yet: ask for something that stands far back",
                "The choice is broken",
            ],
            1,
            "Most tokens of a text can be foreseen from the last ones; questions cannot.",
        ),
        (
            "What happens to the memory that the cache takes?",
            ["It falls to a twentieth", "It stays, and 3 % are added", "It is halved"],
            1,
            "Any block may be chosen by the next token, so all of them are kept; the means come on top.",
        ),
    ]
)
