"""Checks and quiz of the chapter on latent attention, and the broken forms of one exercise."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from ...config import LatentAttentionConfig, load_config
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz


def _kept(config):
    latent = config.latent_attention
    if latent:
        return latent.kv_lora_rank + latent.qk_rope_head_dim
    return 2 * config.num_key_value_heads * config.head_dim


@exercise(
    "tokens that fit",
    wrong=(
        lambda config, free: free // (_kept(config) * config.num_hidden_layers),
        lambda config, free: free / (2 * _kept(config) * config.num_hidden_layers),
        lambda config, free: round(free / (2 * _kept(config) * config.num_hidden_layers)),
        lambda config, free: free // (
            4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        ),
        lambda config, free: free // (2 * 288 * config.num_hidden_layers),
        lambda config, free: free // (2 * _kept(config) * (62 if config.latent_attention else 32)),
        lambda config, free: free // (2 * _kept(config)),
        lambda config, free: free // (
            2 * (config.latent_attention.kv_lora_rank if config.latent_attention else _kept(config))
            * config.num_hidden_layers
        ),
    ),
)  # fmt: skip
def tokens_that_fit(answer):
    """The same question, whatever the attention keeps."""
    released = load_config("minicpm3-4b")
    got = answer(released, 35_712)
    assert not same(got, 2), "A value takes 2 bytes in bf16."
    assert same(got, 1), (
        "In MiniCPM3 a token keeps 288 values, in each of 62 layers. How many bytes are that? Exactly one "
        "token fits into 35,712."
    )
    assert same(answer(released, 2 * 35_712 - 1), 1), "Whole tokens only: round down."
    assert same(answer(released, 1000), 0), "Not even one token fits into 1,000 bytes: 0."
    smaller = replace(
        released,
        num_hidden_layers=5,
        latent_attention=LatentAttentionConfig(96, 100, 64, 20, 64),
        rope_scaling=None,  # its factors are for a rotated part of 32
    )
    assert same(answer(smaller, 12_000), 10), (
        "A model with 5 layers, a latent of 100 and a rotated key of 20 was asked for. Does your answer take "
        "both widths, and the number of layers, from the config?"
    )
    for name in ("minicpm4-8b", "minicpm-2.4b"):
        config = load_config(name)
        room = 1000 * 4 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        assert same(answer(config, room), 1000), (
            f"{name} has no latent: in each of its {config.num_hidden_layers} layers it keeps a key *and* a "
            f"value for each of {config.num_key_value_heads} key-value heads."
        )


@exercise(
    "absorb by hand",
    wrong=((-1, -1, -3), (-2, -2, -4), (4, 10, -6), (4, 6, 14), (-2, -2, 6), (-2, -2, -6 / math.sqrt(2))),
)
def by_pencil(answer):
    """The same score as the query times the expanded key, (4, 10)."""
    assert len(answer) == 3, "Three numbers: the two of the translated query, then the score."
    translated, score = list(answer)[:2], answer[2]
    assert not same(translated, [-1, -1]), (
        "You multiplied W q. The matrix changes sides in the product, so it must be transposed."
    )
    assert not same(translated, [4, 10]), "That is the expanded key. Here the query is translated instead."
    assert same(translated, [-2, -2]), "Each entry is a *column* of W times q."
    assert same(score, -6), (
        "The score is the translated query times the latent, not yet scaled. Compare with the other way: "
        "expand the key, and multiply it by q."
    )


def _right(sizes):
    """The right side of the rule."""
    return 2 / (sizes.qk_nope_head_dim + sizes.v_head_dim) - 1 / sizes.kv_lora_rank


def _most(keys, right, or_equal=False, text=None, first=1):
    """By trying all numbers of queries."""
    right += -1e-12 if or_equal else 1e-12
    return max((q for q in range(first, keys + 1) if 1 / q - 1 / (text or keys) > right), default=0)


def _not_capped(sizes, keys):
    """Solved for the queries, which may then be more than there are tokens."""
    left = _right(sizes) + 1 / keys
    return math.ceil(1 / left - 1e-9) - 1 if left > 0 else keys


_RELEASED = LatentAttentionConfig(768, 256, 64, 32, 64)  # MiniCPM3-4B


@exercise(
    "where to switch",
    wrong=(
        lambda sizes, keys: 85,
        lambda sizes, keys: (sizes.qk_nope_head_dim + sizes.v_head_dim) // 2,
        lambda sizes, keys: keys - 1,
        lambda sizes, keys: _most(keys, _right(sizes), or_equal=True),
        lambda sizes, keys: min(_most(keys, _right(sizes)), 512),
        lambda sizes, keys: _most(keys, _right(_RELEASED)),
        lambda sizes, keys: _most(keys, _right(sizes), text=10**9),
        lambda sizes, keys: _most(keys, _right(replace(sizes, kv_lora_rank=10**9))),
        lambda sizes, keys: _most(
            keys, _right(replace(sizes, v_head_dim=sizes.v_head_dim + sizes.qk_rope_head_dim))
        ),
        lambda sizes, keys: _most(keys, _right(sizes), first=2),
        _not_capped,
        lambda sizes, keys: {100_000: 85, 256: 63, 1: 0}.get(keys, keys),
    ),
)
def most_queries(answer):
    """From the sizes alone: no timing, no number of heads."""
    got = answer(_RELEASED, 100_000)
    assert not same(got, 64), "64 is e / 2. The other term of the right side counts as well."
    assert same(got, 85), (
        "For MiniCPM3 and a text of 100,000 tokens the right side of the rule is 2/128 - 1/256. Where does "
        "1/q - 1/n fall below it?"
    )
    assert same(answer(_RELEASED, 256), 63), (
        "With 256 tokens the two forms need equally many multiplications at 64 queries. *Fewer* were asked "
        "for."
    )
    assert same(answer(_RELEASED, 2), 1), "With two tokens, absorbing pays for one new query: 1."
    assert same(answer(_RELEASED, 1), 0), "With a single token in all, absorbing saves nothing: 0."
    for sizes, keys, most in (
        (LatentAttentionConfig(40, 56, 16, 8, 16), 40, 14),
        (LatentAttentionConfig(96, 100, 30, 50, 20), 3000, 32),
        (LatentAttentionConfig(1536, 512, 128, 64, 128), 500, 127),
    ):
        assert same(answer(sizes, keys), most), (
            f"A latent of {sizes.kv_lora_rank}, keys of {sizes.qk_nope_head_dim} without the rotated part, "
            f"values of {sizes.v_head_dim}, {keys:,} tokens: there the border is elsewhere. Which sizes, and "
            "is the number of tokens, in your answer?"
        )
    assert same(answer(LatentAttentionConfig(8, 8, 8, 8, 8), 10), 9), (
        "With a latent of 8 and e = 16 the right side is 0, so every number of queries below all 10 counts."
    )
    assert same(answer(LatentAttentionConfig(8, 8, 8, 8, 9), 20), 20), (
        "With a latent of 8 and e = 17 the right side is a little below zero. The border lies at 23 queries "
        "there, and no more than all 20 tokens can be new."
    )
    for keys in (10, 2000):
        assert same(answer(LatentAttentionConfig(8, 4, 8, 8, 8), keys), keys), (
            "With a latent of 4 and e = 16 the right side is below zero: the absorbed form needs fewer for "
            f"any number of queries, even for all {keys:,}."
        )


def _broken(change):
    """An absorbed form in which attention is given other queries, keys or values."""

    def form(layer, query, query_rotated, latent, context):
        class Changed(type(context)):
            def attend(self, layer, q, k, v):
                return super().attend(layer, *change(q, k, v))

        return layer.absorbed(query, query_rotated, latent, Changed())

    return form


BROKEN = {
    "red": _broken(lambda q, k, v: (q, k, v.roll(-32, -1))),
    "green": _broken(lambda q, k, v: (q * (96 / 288) ** 0.5, k, v)),
    "blue": _broken(lambda q, k, v: (q, F.pad(k[..., :256], (0, 32)), v)),
}


@exercise(
    "find the bug",
    wrong=(
        {"red": "scale", "green": "values", "blue": "shared key"},
        {"red": "values", "green": "shared key", "blue": "scale"},
        {"red": "values", "green": "values", "blue": "shared key"},
        {"red": "shared key", "green": "scale", "blue": "values"},
    ),
)
def found(answer):
    """Zeros in the right place tell three bugs apart."""
    assert isinstance(answer, dict) and set(answer) == set(BROKEN), (
        "A dictionary with the three colours as keys."
    )
    assert set(answer.values()) == {"scale", "values", "shared key"}, (
        "Each bug occurs once: scale, values, shared key."
    )
    assert answer["red"] == "values", (
        "Set all queries to zero: then every score is 0, whatever the scale and the keys. Which colour is "
        "still wrong?"
    )
    assert answer["blue"] == "shared key", (
        "Set only the rotated part of the queries to zero. One of the two remaining colours becomes right. "
        "What does it ignore?"
    )


def _rank(matrix, share, power=2, smallest_first=False):
    values = torch.linalg.svdvals(matrix.double()) ** power
    values = values.flip(0) if smallest_first else values
    return int((values.cumsum(0) / values.sum() < share - 1e-9).sum()) + 1


@exercise(
    "rank needed",
    wrong=(
        lambda matrix, share: int(torch.linalg.matrix_rank(matrix)),
        lambda matrix, share: math.ceil(share * min(matrix.shape)),
        lambda matrix, share: _rank(matrix, share, power=1),
        lambda matrix, share: _rank(matrix, share, power=4),
        lambda matrix, share: _rank(matrix, share, smallest_first=True),
        lambda matrix, share: _rank(matrix, share) - 1,
        lambda matrix, share: {0.6: 1, 0.7: 2, 1.0: 3}.get(share, 5),
        lambda matrix, share: _rank(matrix, 0.7 if share < 0.9 else 0.99999),
    ),
)
def rank_needed(answer):
    """How many directions carry the given share."""
    steps = torch.diag(torch.tensor([1.0, 2.0, 1.0]))
    assert same(answer(steps, 0.6), 1), (
        "Singular values 2, 1, 1: the squares are 4, 1, 1, so rank 1 keeps 4 of 6, two thirds. That is more "
        "than 0.6."
    )
    assert same(answer(steps, 0.7), 2), (
        "With 0.7, rank 1 (0.67) is too little and rank 2 (0.83) is enough. Do you square the singular "
        "values?"
    )
    assert same(answer(steps, 1.0), 3), "All of it needs the full rank, 3."
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(40, 5, generator=generator) @ torch.randn(5, 30, generator=generator)
    assert same(answer(thin, 0.99999), 5), "A product through 5 dimensions has rank 5, whatever its size."
    noise = torch.randn(12, 20, generator=generator)
    for share in (0.2, 0.5, 0.8, 0.95):
        assert same(answer(noise, share), _rank(noise, share)), (
            f"A matrix of 12 × 20 random numbers, share {share}: add up the squares, largest first, until "
            "they are at least that share of all."
        )
        assert same(answer(noise.T.contiguous(), share), _rank(noise, share)), (
            "Transposed, a matrix keeps its singular values."
        )


quiz = Quiz(
    [
        (
            "MiniCPM3 gets 80 heads in place of 40, all else equal. Its cache",
            ["doubles", "stays the same", "halves"],
            1,
            "The latent and the rotated key are shared by all heads.",
        ),
        (
            "The absorbed form of MLA is, to the attention kernel,",
            ["MHA with narrow heads", "MQA with wide heads", "no softmax attention"],
            1,
            "One key-value head, as wide as the cache, serves all queries.",
        ),
        (
            "A server checks a draft of 6 tokens after a text of 8,000. It should use",
            ["the naive form", "the absorbed form", "either, they cost the same"],
            1,
            "6 queries are far below the border of about 84.",
        ),
        (
            "Your MLA model has the right loss on whole texts, but writes worse than that. Look first at",
            ["the feed-forward network", "the tokenizer", "the scale of the absorbed form"],
            2,
            "Whole texts take the naive form. Writing takes the absorbed one.",
        ),
        (
            "Why is a part of each key rotated, and not all of it?",
            [
                "Rotation would stand between query and latent, so the matrix could not be absorbed",
                "Rotation costs too much",
                "The latent is too narrow to be rotated",
            ],
            0,
            "The rotation depends on the position, so the translated query would differ for every token.",
        ),
    ]
)
