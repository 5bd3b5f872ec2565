"""Checks and quiz of the chapter on looking inside a trained decoder."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...config import ModelConfig
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz
from ...language.decoder import Decoder


def _weights(
    query: Tensor, key: Tensor, *, masked: bool = True, by: float = 0.5, dim: int = -1, late: bool = False,
    itself: bool = True, in_turn: bool = False, later: bool = False,
) -> Tensor:  # fmt: skip
    heads, tokens, width = query.shape
    group = heads // key.shape[0]
    key = key.repeat(group, 1, 1) if in_turn else key.repeat_interleave(group, dim=0)
    scores = query @ key.mT / width**by
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1 if itself else 0)
    hidden = hidden.mT if later else hidden
    if not itself:
        hidden[0, 0] = False
    if late:
        return scores.softmax(dim=dim).masked_fill(hidden, 0.0)
    return (scores.masked_fill(hidden, -math.inf) if masked else scores).softmax(dim=dim).nan_to_num(0.0)


_OF_WEIGHTS = (  # mistakes, and what is said of each
    ({"masked": False}, "Yours gives weight to later tokens. The text was read with a mask."),
    ({"late": True}, "Your rows no longer add up to 1: the mask comes before the softmax."),
    ({"dim": 1}, "Yours adds up to 1 over those who *ask*. Each row, of one asker, shares its own weight."),
    ({"by": 0.0}, "Yours takes the scores as they are. They are divided by the root of the head's width."),
    ({"by": 1.0}, "Yours divides by the width of a head. It is its root."),
    ({"in_turn": True}, "Neighbouring heads share a key: 0, 0, 1, 1. Yours deals them out in turn."),
    ({"itself": False}, "A token may look at itself, too; yours hides the diagonal."),
    ({"later": True}, "Yours hides the past and shows the future."),
)


@exercise(
    "head weights",
    wrong=(
        *(lambda query, key, mistake=mistake: _weights(query, key, **mistake) for mistake, _ in _OF_WEIGHTS),
        lambda query, key: (
            (query @ key.repeat_interleave(len(query) // len(key), dim=0).mT / query.shape[-1] ** 0.5)
            .tril()
            .softmax(dim=-1)
        ),
        lambda query, key: _weights(query, key).mT,
        lambda query, key: _weights(query, key).mean(dim=0),
        lambda query, key: _weights(query, key).log(),
    ),
)
def head_weights(answer):
    """The weights were never stored, and are made again from queries and keys."""
    generator = torch.Generator().manual_seed(0)
    for heads, kept, tokens, width in ((4, 2, 5, 8), (3, 3, 7, 4), (4, 1, 1, 6)):
        query = 2 * torch.randn(heads, tokens, width, generator=generator)
        key = torch.randn(kept, tokens, width, generator=generator)
        got, expected = answer(query.clone(), key.clone()), _weights(query, key)
        shape = tuple(getattr(got, "shape", ()))
        assert shape == (heads, tokens, tokens), (
            f"{heads} heads and {tokens} tokens make weights of shape ({heads}, {tokens}, {tokens}); yours "
            f"have {shape}."
        )
        for mistake, says in _OF_WEIGHTS:
            if not same(_weights(query, key, **mistake), expected):
                assert not same(got, _weights(query, key, **mistake)), says
        assert tokens == 1 or not same(got, expected.mT), "Rows ask, columns are asked; yours are exchanged."
        assert not torch.as_tensor(got).triu(1).any(), (
            "Yours gives weight to later tokens. A hidden score is -∞ before the softmax, not 0."
        )
        assert same(got, expected), (
            f"{heads} query heads on {kept} key heads, {tokens} tokens, heads {width} wide: scores are dot "
            "products, divided by the root of the width, masked, and made shares in each row."
        )


def _shares(weights: Tensor, period: int, by: int = 1, start: int | None = None) -> Tensor:
    asking = torch.arange(period if start is None else start, weights.shape[-1])
    return weights[:, asking, (asking - period + by).clamp(max=weights.shape[-1] - 1)].mean(dim=1)


@exercise(
    "mended share",
    wrong=(
        lambda weights, period: _shares(weights, period, by=0),
        lambda weights, period: _shares(weights, period, by=-1),
        lambda weights, period: _shares(weights, period, by=2),
        lambda weights, period: _shares(weights, period, start=period - 1),
        lambda weights, period: _shares(weights, period, start=0),
        lambda weights, period: _shares(weights[:, : 2 * period, : 2 * period], period),
        lambda weights, period: _shares(weights, period) * (weights.shape[-1] - period),
        lambda weights, period: _shares(weights, period).mean(),
        lambda weights, period: weights.diagonal(-1, 1, 2)[:, period - 1 :].mean(dim=1),
    ),
)
def mended_share(answer):
    """It counts what stands behind the last copy, from the first lane that has one."""

    def looks(back: int, tokens: int) -> Tensor:
        """A head that gives all its weight to the token so far back, or to the first."""
        at = torch.arange(tokens)
        return torch.eye(tokens)[(at - back).clamp(min=0)]

    for period, tokens in ((4, 8), (5, 10), (3, 12)):
        heads = torch.stack([looks(back, tokens) for back in (period - 1, period, 1, period + 1)])
        got = answer(heads.clone(), period)
        assert isinstance(got, Tensor) and got.shape == (4,), (
            f"Four heads have four shares; yours have the shape {tuple(getattr(got, 'shape', ()))}."
        )
        assert not same(got[0], 0.0), (
            f"In a text that repeats after {period} tokens, a head that looks {period - 1} back finds what "
            "followed last time, and should get 1; yours gives it 0."
        )
        assert same(got[0], 1.0), (
            f"In a text of {tokens} tokens that repeats after {period}, a head that looks {period - 1} back "
            f"finds what followed last time in every lane that has an earlier copy, and should get 1; yours "
            f"says {float(got[0]):.2f}. Which lanes count, and is it their mean?"
        )
        assert same(got[1:], [0.0, float(period == 2), 0.0], 0.02) or got[1] < 0.5, (
            f"A head that looks {period} back finds the same word again, and not what followed it."
        )
    generator = torch.Generator().manual_seed(0)
    for period, tokens in ((4, 8), (3, 10), (6, 7)):
        weights = torch.randn(3, tokens, tokens, generator=generator).softmax(dim=-1)
        got = answer(weights.clone(), period)
        if tokens > 2 * period:
            twice = weights[:, : 2 * period, : 2 * period]
            assert not same(got, _shares(twice, period)), (
                "The text goes on after the second copy, and so do the lanes that count."
            )
        assert same(got, _shares(weights, period)), (
            f"{tokens} tokens that repeat after {period}: the mean over lanes {period} to {tokens - 1} of "
            f"the weight on the token {period - 1} back."
        )


def _headless(
    weights: Mapping[str, Tensor], config: ModelConfig, block: int, head: int, part: str = "o_proj",
    dim: int = 1, width: int | None = None, copied: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    name, width = f"layers.{block}.self_attn.{part}.weight", width or config.head_dim
    zeroed = weights[name].clone() if copied else weights[name]
    zeroed.narrow(dim, head * width % zeroed.shape[dim], width).zero_()
    return {**weights, name: zeroed}


@torch.no_grad()
def _said(config: ModelConfig, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    model = Decoder(config).eval()
    model.load_state_dict(dict(weights))
    return model(ids)


@exercise(
    "headless",
    wrong=(
        lambda weights, config, block, head: _headless(weights, config, block, head, dim=0, width=2),  # rows
        lambda weights, config, block, head: _headless(weights, config, block, head, "q_proj", dim=0),
        lambda weights, config, block, head: _headless(weights, config, block, head // 2, "v_proj", dim=0),
        lambda weights, config, block, head: _headless(weights, config, block, head // 2, "k_proj", dim=0),
        lambda weights, config, block, head: _headless(weights, config, block, (head + 1) % 4),
        lambda weights, config, block, head: _headless(weights, config, 0, head),
        lambda weights, config, block, head: _headless(
            weights, config, block, head, width=config.hidden_size // config.num_attention_heads
        ),
        lambda weights, config, block, head: dict(weights),
        lambda weights, config, block, head: _headless(weights, config, block, head, copied=False),
    ),
)
def headless(answer):
    """The columns of the output matrix are the head's own; all else is shared or does something else."""
    base = ModelConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, vocab_size=16, scale_depth=1.4,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for block, head in ((0, 0), (1, 3), (0, 2), (1, 1)):
        config = replace(base, head_dim=4) if block else base
        shapes = {name: weight.shape for name, weight in Decoder(config).state_dict().items()}
        weights = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        before = {name: weight.clone() for name, weight in weights.items()}
        ids = torch.randint(16, (1, 9), generator=generator)
        got = answer(weights, config, block, head)
        assert isinstance(got, Mapping) and got.keys() == before.keys(), (
            "Return a dictionary with the names of the one that was given: all weights of the model."
        )
        assert all(torch.equal(weights[name], before[name]) for name in before), (
            "The given tensors have changed. A new dictionary holds the same tensors, until you clone one."
        )
        mine = _said(config, got, ids)
        for part, shared, says in (
            (
                "q_proj",
                head,
                "A head without a query takes the plain average and hands it over all the same.",
            ),
            ("v_proj", head // 2, "A value head is shared by two query heads here; yours takes out both."),
            (
                "k_proj",
                head // 2,
                "A key head is shared by two query heads here, and both still hand something over.",
            ),
        ):
            wrong = _headless(before, config, block, shared, part, dim=0)
            assert not same(mine, _said(config, wrong, ids), 1e-4), says
        assert same(mine, _said(config, _headless(before, config, block, head), ids), 1e-4), (
            f"Head {head} of block {block}, counted from 0, of heads {config.head_dim} wide: does it bring "
            "nothing, and does everything else work as before? In the output "
            "matrix columns belong to heads, and rows to numbers of the lane."
        )


def _averaged(
    results: Tensor, head: int, width: int, over: tuple[int, ...] = (0, 1), copied: bool = True
) -> Tensor:
    changed = results.clone() if copied else results
    own = changed[..., head * width : (head + 1) * width]
    own.copy_(own.mean(dim=over, keepdim=True).expand_as(own))
    return changed


@exercise(
    "averaged",
    wrong=(
        lambda results, head, width: _averaged(results, head, width, over=(1,)),
        lambda results, head, width: _averaged(results, head, width, over=(0,)),
        lambda results, head, width: _averaged(results, head, width, over=(2,)),
        lambda results, head, width: _averaged(results, head, width, over=(0, 1, 2)),
        lambda results, head, width: _averaged(results, head, width, copied=False),
        lambda results, head, width: _averaged(results, 0, results.shape[-1]),
        lambda results, head, width: torch.cat(
            [
                results[..., : head * width],
                0 * results[..., head * width : (head + 1) * width],
                results[..., (head + 1) * width :],
            ],
            dim=-1,
        ),
        lambda results, head, width: results,
    ),
)
def averaged(answer):
    """What the head says about this text is gone, and what it always says is left."""
    small = torch.tensor([[[1.0, 5.0], [3.0, 6.0]], [[5.0, 7.0], [7.0, 8.0]]])
    for head, right, says in (
        (0, [[[4.0, 5.0], [4.0, 6.0]], [[4.0, 7.0], [4.0, 8.0]]], "1, 3, 5 and 7, whose mean is 4"),
        (1, [[[1.0, 6.5], [3.0, 6.5]], [[5.0, 6.5], [7.0, 6.5]]], "5, 6, 7 and 8, whose mean is 6.5"),
    ):
        given = small.clone()
        got = answer(given, head, 1)
        assert same(given, small), "The given tensor has changed. Clone it first."
        assert not same(got, small), (
            "With heads one number wide yours leaves everything as it was. The mean runs over texts and "
            "tokens, not over the head's own numbers."
        )
        own = got[..., head] if isinstance(got, Tensor) and got.shape == small.shape else None
        assert own is None or not same(own, torch.zeros(2, 2)), "Yours brings nothing. Its *mean* stays."
        assert own is None or not same(own, small[..., head].mean(1, keepdim=True).expand(2, 2)), (
            "Yours takes a mean for each text, which still says something about the text. Take one over all."
        )
        assert own is None or not same(own, small[..., head].mean(0).expand(2, 2)), (
            "Yours takes a mean for each place in the text. Take one over all texts *and* tokens."
        )
        assert same(got, right), (
            f"Two texts of two tokens and two heads one number wide. Head {head} brings {says}: that "
            "stands in all four lanes, and the other head is as it was."
        )
    generator = torch.Generator().manual_seed(0)
    for heads, width, head in ((3, 4, 2), (4, 2, 1)):
        results = torch.randn(3, 5, heads * width, generator=generator)
        assert same(answer(results.clone(), head, width), _averaged(results, head, width)), (
            f"{heads} heads {width} wide: head {head} has the numbers {head * width} to "
            f"{(head + 1) * width - 1}, and each of them has a mean of its own."
        )


def _first_on_top(logits: Tensor) -> Tensor:
    """The first depth that is right, even if a later one is not."""
    best = logits.argmax(dim=-1)
    return (best == best[-1]).int().argmax(dim=0)


def _settled(logits: Tensor) -> Tensor:
    best = logits.argmax(dim=-1)
    agree = (best == best[-1]).int().flip(0).cumprod(dim=0).sum(dim=0)
    return len(logits) - agree


def _agreeing(logits: Tensor) -> Tensor:
    best = logits.argmax(dim=-1)
    return len(logits) - (best == best[-1]).sum(dim=0)


@exercise(
    "settled",
    wrong=(
        _first_on_top,
        _agreeing,
        lambda logits: _settled(logits) - 1,
        lambda logits: torch.full((logits.shape[1],), len(logits) - 1),
        lambda logits: _settled(logits.flip(0)),
        lambda logits: _settled(logits).float().mean(),
        lambda logits: len(logits) - 1 - _settled(logits),
        lambda logits: _settled(logits.transpose(0, 1)),
    ),
)
def settled(answer):
    """A choice counts from where it is not taken back any more."""

    def of(*rows: str) -> Tensor:
        """For each token a word of the letters that are on top, one a depth."""
        best = torch.tensor([["abcd".index(letter) for letter in row] for row in rows]).T
        return 3.0 * torch.nn.functional.one_hot(best, 4).float()

    got = answer(of("aab"))
    assert getattr(got, "shape", None) == (1,) or isinstance(got, list | tuple), (
        "Return one number for each token, in a tensor or a list."
    )
    for row, right, says in (
        ("aab", 2, "only the last depth says b"),
        ("abb", 1, "b is on top from depth 1 on"),
        ("bbb", 0, "b was on top from the beginning"),
        ("bab", 2, "b is on top, is lost, and comes back: the last time counts"),
        ("bbcab", 4, "b is on top at first, and again only in the end"),
        ("babb", 2, "b is lost once, and stays from depth 2 on"),
        ("a", 0, "there is one depth, and nothing to change its mind"),
    ):
        assert same(answer(of(row)), [right]), (
            f"If the tokens on top are {', '.join(row)}, from depth 0 to {len(row) - 1}, the answer is "
            f"{right}: {says}."
        )
    assert same(answer(of("bbbb", "abca", "caaa", "abaa")), [0, 3, 1, 2]), (
        "Four tokens at once are counted each by itself."
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 40, 3, generator=generator)
    assert same(answer(logits.clone()), _settled(logits)), (
        "Random logits of 6 depths, 40 tokens and 3 words: what counts is which is largest, not by how much."
    )


_COSTS = {"P": (0.328, 0.0), "Q": (0.328, 0.328), "R": (0.762, 0.328)}


@exercise(
    "forecast",
    wrong=(
        {"P": (0.328, 0.328), "Q": (0.328, 0.328), "R": (0.762, 0.328)},
        {"P": (0.328, 0.0), "Q": (0.328, 0.0), "R": (0.762, 0.0)},
        {"P": (0.328, 0.0), "Q": (0.328, 0.328), "R": (0.328, 0.328)},
        {"P": (0.328, 0.0), "Q": (0.328, 0.328), "R": (1.523, 0.328)},
        {"P": (0.693, 0.365), "Q": (0.693, 0.693), "R": (1.127, 0.693)},  # losses
        {"P": (0.473, 0.0), "Q": (0.473, 0.473), "R": (1.099, 0.473)},  # bits
        {"P": (0.0, 0.328), "Q": (0.328, 0.328), "R": (0.328, 0.762)},  # exchanged
        {"P": (0.0, 0.0), "Q": (0.0, 0.0), "R": (0.0, 0.0)},
    ),
)
def forecast(answer):
    """Q and R say the same; by zeros R seems to be worth more than twice as much."""
    assert isinstance(answer, dict) and set(answer) == set(_COSTS), (
        'Expected a dictionary, {"P": (by zero, by mean), "Q": ..., "R": ...}.'
    )
    pairs = {}
    for name, pair in answer.items():
        assert pair is not ... and isinstance(pair, tuple | list | Tensor) and len(pair) == 2, (
            f"Give {name} a pair of numbers: what it costs by zero, and by the mean."
        )
        assert ... not in tuple(pair), "Put your numbers where the dots stand."
        assert not any(isinstance(number, str) for number in pair), "Give numbers, without quotes."
        pairs[name] = [float(number) for number in pair]

    def near(number: float, other: float) -> bool:
        return abs(number - other) < 0.012

    assert not near(pairs["P"][0], math.log(2)), (
        "That is the loss without the head. Its cost is by how much the loss *rises*."
    )
    assert not near(pairs["P"][0], 0.473), "That is in bits. Nats have the natural logarithm."
    assert near(pairs["P"][1], 0.0), (
        "P always brings 2, so its mean is 2, too. What changes, if its mean stands in its place?"
    )
    assert near(pairs["P"][0], _COSTS["P"][0]), (
        "Without P both words have a logit of 0, so each has one half. Compare -ln 0.5 with the loss before, "
        "which is that of a word of 0.88 and one of 0.12, each weighted by how often it comes."
    )
    assert all(near(cost, _COSTS["Q"][0]) for cost in pairs["Q"]), (
        "The mean of 2 and -2 is 0. So what do the two ways of taking Q out have in common?"
    )
    assert near(pairs["R"][1], _COSTS["R"][1]), (
        "The mean of 4 and 0 is 2, and -2 + 2 is 0 in every lane. Which other head costs the same?"
    )
    assert not near(pairs["R"][0], 1.523), (
        "That is what the lanes pay in which R brings 4. In the other half it brings 0 anyway."
    )
    assert near(pairs["R"][0], _COSTS["R"][0]), (
        "By zero, A has a logit of -2 in all lanes. In half of them that was so before; in the others the "
        "likely word now has 0.12. Take the mean over both kinds of lanes."
    )


quiz = Quiz(
    [
        (
            "A head gives 0.9 of its weight to the noun. What does this say about its use?",
            [
                "It carries the noun's number",
                "Nothing yet: it may bring nothing that is used, or the same from any word",
                "The model fails without it",
            ],
            1,
            "The weight says from where it takes, not what, nor what becomes of it. Take it out, and try "
            "sentences that could refute the guess.",
        ),
        (
            "All heads cost little, taken out one at a time. So the model does not need its heads?",
            [
                "Right: attention is a luxury",
                "It does not follow: what one brings may be brought by others",
                "Right, but only of this block",
            ],
            1,
            "Without any head the loss rises by far more than all single costs together.",
        ),
        (
            "By zero a head costs much, by its mean nothing. What did it do?",
            [
                "It brought about the same in all lanes",
                "It looked at the token before",
                "It cancelled another head",
            ],
            0,
            "Its mean has all that it does not say about this text, and nothing else was needed.",
        ),
        (
            "After block 1 the last norm and the table call a word likely that the model does not say in the "
            "end. Has the model changed its mind?",
            [
                "Yes, at block 2",
                "Perhaps; or the stream was never meant to be read there",
                "No, the table is wrong",
            ],
            1,
            "Norm and table learned to read the stream after the last block. Before, the lens may be wrong.",
        ),
    ]
)
