"""Checks and quiz of the chapter on the multipliers."""

import math
from dataclasses import fields, replace

import torch
from torch import Tensor

from ...config import ModelConfig, load_config
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz


def _buried(
    start, attention, feed_forward, layers, scale, power=2, squared=True, offset=0, never=None, drowned=2
):
    r = 1.0 if scale is None else scale / math.sqrt(layers)
    each = r**power * (attention**2 + feed_forward**2 if squared else attention + feed_forward)
    word = start**2 if squared else start
    for blocks in range(1, layers + 1):
        if drowned / 2 * blocks * each > word:
            return blocks + offset
    return never


@exercise(
    "buried after",
    wrong=(
        lambda *given: _buried(*given, squared=False),
        lambda *given: _buried(*given, power=1),
        lambda *given: _buried(*given, power=0),
        lambda *given: _buried(*given, offset=-1),
        lambda *given: _buried(*given, drowned=4),  # attention and feed-forward counted twice
        lambda *given: _buried(*given, never=given[3]),
        lambda *given: _buried(*given[:4], given[4] and 1.4),
        lambda start, attention, feed_forward, layers, scale: _buried(
            start, attention, attention, layers, scale
        ),
        lambda *given: _buried(given[0] / 2, *given[1:]),
    ),
)
def buried_after(answer):
    """With the multiplier a word is buried late or never; without it, one block is often enough."""
    assert answer(3.0, 1.0, 1.0, 10, None) == 5, (
        "A word of 3 has mean square 9. Each block adds 1 for attention and 1 for the feed-forward network: "
        "8 after four blocks, 10 after five."
    )
    assert answer(1.2, 1.5, 3.8, 40, None) == 1, "1.5² + 3.8² is far more than 1.2²: one block is enough."
    assert answer(4.0, 1.0, 3.0, 9, 3.0) == 2, (
        "With scale_depth 3 and 9 blocks r is 1: each block adds 1 + 9 to the mean square, the word has 16."
    )
    assert answer(2.1, 1.0, 1.0, 16, 2.0) == 9, (
        "Here r is 2 / √16 = 0.5. In a mean square it counts squared: a block adds 0.25 · (1 + 1), the word "
        "has 4.41."
    )
    assert answer(2.1, 1.0, 1.0, 64, 2.0) == 36, "r belongs to the number of blocks: 2 / √64 = 0.25."
    assert answer(3.0, 1.0, 1.0, 16, 2.0) is None, (
        "All 16 blocks together add 8 to the mean square, and the word has 9: it is never buried. Return "
        "None."
    )
    assert answer(3.0, 1.0, 1.0, 4, None) is None, "Four blocks add 8, and there is no fifth: return None."
    assert answer(3.0, 2.0, 1.0, 8, None) == 2, "Attention adds 4 here, the feed-forward network 1."
    assert answer(3.0, 1.0, 2.0, 8, None) == 2, "Attention adds 1 here, the feed-forward network 4."
    assert answer(2.0, 1.0, 1.0, 16, 1.5) == 15, "scale_depth is an argument: with 1.5, r is 0.375 here."


_START, _END = 1.181, 5.999  # RMS of the stream of the model with 16 blocks, before training


@exercise(
    "forecast",
    wrong=(
        _END / 4,
        _END / 2,
        _END,
        math.sqrt(_START**2 + (_END**2 - _START**2) / 4),
        _START + (_END - _START) / 4,
        math.sqrt((_END**2 - _START**2) / 16),
    ),
)
def forecast(answer):
    """The part of the blocks is a sixteenth of what it was in the mean square; that of the word stays."""
    expected = math.sqrt(_START**2 + (_END**2 - _START**2) / 16)
    assert not same(answer, _END / 4, tolerance=0.01), (
        "That divides the whole stream by four. Does the word at its start become smaller, too?"
    )
    assert abs(float(answer) / expected - 1) < 0.03, (
        "Square both numbers that were printed. Their difference is what the blocks add; by how much does "
        "*that* shrink when the factor on each part is a quarter? Add the start again, and take the root."
    )


def _fold(weights, config, table=None, out=None, residual=None, names=("o_proj", "down_proj")):
    table = config.scale_emb if table is None else table
    out = 1 / config.width_ratio if out is None else out
    residual = config.residual_scale if residual is None else residual
    folded = {
        name: weight * residual if any(each in name for each in names) else weight
        for name, weight in weights.items()
    }
    tied = weights["embed_tokens.weight"]
    return folded | {"embed_tokens.weight": tied * table, "lm_head.weight": tied * out}


def _fold_in_place(weights, config):
    for name, weight in weights.items():
        if "o_proj" in name or "down_proj" in name:
            weight *= config.residual_scale
    return _fold(weights, config, residual=1.0)


def _fold_the_folded(weights, config):
    return _fold(weights, config, out=config.scale_emb / config.width_ratio)


@exercise(
    "mended fold",
    wrong=(
        _fold_in_place,
        _fold_the_folded,
        lambda weights, config: _fold(weights, config, out=config.width_ratio),
        lambda weights, config: _fold(weights, config, names=("o_proj",)),
        lambda weights, config: _fold(weights, config, residual=config.scale_depth),
        lambda weights, config: _fold(weights, config, names=("o_proj", "down_proj", "up_proj")),
        lambda weights, config: _fold(weights, config, table=12),
    ),
    without=("fold_to_llama",),
)
def mended_fold(answer):
    """Each multiplier is in the matrix beside it, and the model that was folded is as it was."""
    for number, config in enumerate(_FOLDED):
        weights = _weights(config, number)
        given = {name: weight.clone() for name, weight in weights.items()}
        got = answer(given, config)
        assert all(torch.equal(given[name], weight) for name, weight in weights.items()), (
            "The weights that were given have changed: the model that they belong to is spoiled."
        )
        assert isinstance(got, dict), "Expected a dictionary of weights."
        assert "lm_head.weight" in got, "A Llama whose tables differ needs the second one, `lm_head.weight`."
        expected = _fold(weights, config)
        assert set(got) == set(expected), (
            "The folded model has the weights of the old one, and `lm_head.weight`."
        )
        told = {
            "lm_head.weight": "The output table is the *old* table, divided by `config.width_ratio`.",
            "embed_tokens.weight": "The table takes `config.scale_emb`.",
        }
        for name, weight in expected.items():
            assert same(got[name], weight), (
                told.get(name, f"`{name}` is another than expected.")
                + " Blocks take `config.residual_scale` in the two matrices that end a branch, in no other."
            )


def _rates(
    names,
    config,
    lr,
    weight_decay,
    residual=None,
    table=None,
    out=None,
    power=1,
    decays=lambda decay, c: decay / c,
):
    residual = config.residual_scale if residual is None else residual
    table = config.scale_emb if table is None else table
    out = 1 / config.width_ratio if out is None else out
    rates = {}
    for name in names:
        c, decay = 1.0, weight_decay
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            c = residual
        elif name == "embed_tokens.weight":
            c, decay = table, 0.0
        elif name == "lm_head.weight":
            c, decay = out, 0.0
        elif "norm" in name:
            decay = 0.0
        rates[name] = lr * c**power, decays(decay, c)
    return rates


@exercise(
    "folded rates",
    wrong=(
        lambda *given: _rates(*given, power=0),
        lambda *given: _rates(*given, power=-1),
        lambda *given: _rates(*given, power=2),  # plain gradient descent
        lambda *given: _rates(*given, decays=lambda decay, c: decay),
        lambda *given: _rates(*given, decays=lambda decay, c: decay * c),
        lambda *given: _rates(*given, residual=given[1].scale_depth),
        lambda *given: _rates(*given, out=given[1].width_ratio),
        lambda *given: _rates(*given, table=1.0),
        lambda *given: {
            name: (rate, given[3] if "norm" in name else decay)
            for name, (rate, decay) in _rates(*given).items()
        },
    ),
)
def folded_rates(answer):
    """The folded Llama now learns what the MiniCPM learns. Weight decay takes the rate times the decay."""
    for number, (config, lr, decay) in enumerate(zip(_FOLDED, (0.01, 0.02), (0.1, 0.3), strict=True)):
        names = [*_weights(config, number), "lm_head.weight"]
        got, expected = answer(list(names), config, lr, decay), _rates(names, config, lr, decay)
        assert isinstance(got, dict), f"Expected a dictionary from names to pairs, not {type(got).__name__}."
        assert set(got) == set(expected), "Every name has a rate and a decay, and no other has."
        for name, (rate, kept) in expected.items():
            assert len(got[name]) == 2, f"`{name}`: expected a pair of the rate and the decay."
            assert same(got[name][0], rate, tolerance=1e-9), (
                f"`{name}`: the rate should be {rate:.4g} and is {float(got[name][0]):.4g}. Which factor was "
                "folded into this matrix, and how far does it move in a step?"
            )
            assert same(got[name][1], kept, tolerance=1e-9), (
                f"`{name}`: its decay is {float(got[name][1]):.4g}. A step of AdamW shrinks a weight by rate "
                "× decay. By what share did the MiniCPM's matrix shrink? Tables and norms do not decay."
            )


_FOLDED = (
    ModelConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=10,
        scale_emb=12, scale_depth=1.4, dim_model_base=4,
    ),
    ModelConfig(
        hidden_size=12, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2, vocab_size=6,
        scale_emb=5, scale_depth=2, dim_model_base=3,
    ),
)  # fmt: skip


def _weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {"embed_tokens.weight": (config.vocab_size, width), "norm.weight": (width,)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"layers.{layer}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"} | {
            f"layers.{layer}.mlp.gate_proj.weight": (inner, width),
            f"layers.{layer}.mlp.up_proj.weight": (inner, width),
            f"layers.{layer}.mlp.down_proj.weight": (width, inner),
            f"layers.{layer}.input_layernorm.weight": (width,),
            f"layers.{layer}.post_attention_layernorm.weight": (width,),
        }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _equal_in_all(
    config: ModelConfig, layers: int, with_table: bool = True, most: int = 64, rounded=round
) -> ModelConfig:
    sizes = {}
    for heads in range(1, most + 1):
        width = heads * config.head_dim
        candidate = replace(
            config,
            hidden_size=width,
            intermediate_size=rounded(width * config.intermediate_size / config.hidden_size),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
        )
        sizes[candidate] = abs(_count(candidate, with_table) - _count(config, with_table))
    return min(sizes, key=sizes.get)


def _count(config: ModelConfig, with_table: bool = True) -> int:
    d, width = config.hidden_size, config.head_dim
    attention = 2 * d * width * (config.num_attention_heads + config.num_key_value_heads)
    block = attention + 3 * d * config.intermediate_size + 2 * d
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * block + d + with_table * tables * config.vocab_size * d


_SHALLOW = ModelConfig(
    hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=8, vocab_size=4096,
    scale_emb=12, scale_depth=1.4, dim_model_base=64,
)  # fmt: skip
_FEED_FORWARD = 333  # 2.6 times the width, so that rounding is not rounding down
_SHAPES = (
    (_SHALLOW, 8),
    (replace(_SHALLOW, vocab_size=2048, num_hidden_layers=3), 9),
    (replace(_SHALLOW, intermediate_size=_FEED_FORWARD, tie_word_embeddings=False), 6),
    (replace(_SHALLOW, hidden_size=384, intermediate_size=996, num_attention_heads=12, num_key_value_heads=12,
             head_dim=32, num_hidden_layers=12), 4),  # wider heads, and more of them than before
    (replace(_SHALLOW, scale_depth=2.0, rope_theta=500_000.0, num_hidden_layers=8), 2),
)  # fmt: skip
_SEARCHED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip


@exercise(
    "equal in all",
    wrong=(
        lambda config, layers: _equal_in_all(config, layers, with_table=False),
        lambda config, layers: replace(config, num_hidden_layers=layers),
        lambda config, layers: replace(
            _equal_in_all(config, layers), intermediate_size=config.intermediate_size
        ),
        lambda config, layers: replace(
            _equal_in_all(config, layers), num_hidden_layers=config.num_hidden_layers
        ),
        lambda config, layers: replace(_equal_in_all(config, layers), scale_depth=None),
        lambda config, layers: replace(_equal_in_all(config, layers), tie_word_embeddings=True),
        lambda config, layers: replace(_equal_in_all(config, layers), rope_theta=10_000.0),
        lambda config, layers: _equal_in_all(config, layers, most=config.num_attention_heads),
        lambda config, layers: _equal_in_all(config, layers, rounded=int),
        lambda config, layers: _equal_in_all(
            replace(
                config,
                head_dim=16,
                num_attention_heads=config.hidden_size // 16,
                num_key_value_heads=config.hidden_size // 16,
            ),
            layers,
        ),
    ),
)
def equal_in_all(answer):
    """Only what is held equal has changed; what does not come out even is reported."""
    for config, layers in _SHAPES:
        got = answer(config, layers)
        assert isinstance(got, ModelConfig), f"Expected a `ModelConfig`, not {type(got).__name__}."
        assert got.num_hidden_layers == layers, f"{layers} blocks were asked for."
        assert got.head_dim == config.head_dim, (
            f"Heads keep their width, {config.head_dim} here; yours are {got.head_dim} wide."
        )
        assert got.num_key_value_heads == got.num_attention_heads, (
            "Each query head has its own key-value head."
        )
        assert got.hidden_size == got.num_attention_heads * got.head_dim, "The width consists of whole heads."
        changed = [
            field.name
            for field in fields(config)
            if field.name not in _SEARCHED and getattr(got, field.name) != getattr(config, field.name)
        ]
        assert not changed, (
            f"`{', '.join(changed)}` is another than in `config`. A control changes what is held equal, and "
            "nothing else: the multipliers, the tables and the rest stay."
        )
        ratio = config.intermediate_size / config.hidden_size
        assert abs(got.intermediate_size - ratio * got.hidden_size) <= 0.5, (
            "The feed-forward width is as near as possible to the same multiple of the width: rounded, and "
            "not rounded down."
        )
        off = abs(_count(got) - _count(config))
        assert off <= abs(_count(_equal_in_all(config, layers)) - _count(config)), (
            f"From {config.num_hidden_layers} blocks to {layers}, yours is off by {off:,} parameters, the "
            "table counted; another number of heads comes nearer, perhaps more than there were."
        )


_PHONE = load_config("minicpm-1.2b")
_PHONE_TOKENS = 32_768
_FITS = replace(
    _PHONE, num_key_value_heads=2, intermediate_size=4096, max_position_embeddings=_PHONE_TOKENS
)  # the solution, of which the wrong answers miss one thing each


@exercise(
    "design",
    wrong=(
        replace(_PHONE, max_position_embeddings=_PHONE_TOKENS),  # its cache is too large
        replace(_FITS, intermediate_size=_PHONE.intermediate_size),  # too small
        load_config("minicpm4-8b"),
        replace(_FITS, vocab_size=32_000),
        replace(_FITS, intermediate_size=7000, num_hidden_layers=32),
        replace(_FITS, max_position_embeddings=4096),
        replace(_FITS, scale_depth=None),
    ),
)
def design(answer):
    """It fits. Now find out what it costs in loss."""
    assert isinstance(answer, ModelConfig), f"Expected a `ModelConfig`, not {type(answer).__name__}."
    assert answer.vocab_size == _PHONE.vocab_size, "Keep the vocabulary: 73,440."
    of_releases = (_PHONE.scale_emb, _PHONE.scale_depth, _PHONE.dim_model_base)
    assert (answer.scale_emb, answer.scale_depth, answer.dim_model_base) == of_releases, (
        "Keep the multipliers of the 1.2B: scale_emb=12, scale_depth=1.4, dim_model_base=256."
    )
    assert 2 <= answer.intermediate_size / answer.hidden_size <= 4, (
        f"The feed-forward width is {answer.intermediate_size / answer.hidden_size:.1f} times the width: two "
        "to four times was asked for."
    )
    assert answer.head_dim in (64, 128), f"Heads are {answer.head_dim} wide; choose 64 or 128."
    assert answer.num_hidden_layers >= 40, f"{answer.num_hidden_layers} blocks: at least 40 were asked for."
    assert answer.max_position_embeddings >= _PHONE_TOKENS, (
        f"`max_position_embeddings` is {answer.max_position_embeddings:,}: this model refuses the "
        f"{_PHONE_TOKENS:,} tokens that it is made for."
    )
    kept = 4 * answer.num_hidden_layers * answer.num_key_value_heads * answer.head_dim * _PHONE_TOKENS
    assert kept <= 2**30, (
        f"The cache takes {kept / 2**30:.2f} GiB at 32,768 tokens. Fewer key-value heads, or fewer blocks?"
    )
    size = _count(answer, with_table=False)
    off = size / _count(_PHONE, with_table=False) - 1
    assert abs(off) <= 0.02, (
        f"{size:,} parameters without embeddings: {100 * off:+.1f} %. The feed-forward width is the easiest "
        "place to put them back."
    )


quiz = Quiz(
    [
        (
            "Someone trains a Llama with Adam, starts o_proj and down_proj a third as large as usual, and "
            "gives these two a third of the rate. What has been built?",
            [
                "A MiniCPM with r = 1/3, under another name",
                "A MiniCPM with r = 1/9, since start and rate both count",
                "A Llama that learns like any other, since Adam ignores the size of gradients",
            ],
            0,
            "A multiplier c is a start of c and a rate of c at once: that is r = 1/3, and both learn alike.",
        ),
        (
            "The same, but with plain gradient descent in the place of Adam. Which rate do the two matrices "
            "need to learn as with r = 1/3?",
            ["a third", "a ninth", "the whole one"],
            1,
            "The gradient is a third, and the step in the stream is a third of the step of the weight: 1/9.",
        ),
        (
            "scale_depth is 1.4 and a model gets four times the blocks. Before training, the stream ends",
            ["twice as large", "as large as before", "half as large"],
            1,
            "r falls to a half, its square to a quarter, and there are four times the parts.",
        ),
        (
            "A late block of a deep model turns the lane little. With the multiplier it turns it",
            ["more", "about as much", "less"],
            1,
            "Its part and the lane that it is added to both contain r, which cancels: about 1/√l in block l.",
        ),
        (
            "Why are the rows of the table not simply drawn twelve times as large?",
            [
                "They would not fit in bf16",
                "A multiplier also makes each step on them count twelve times",
                "Large numbers cannot be learned",
            ],
            1,
            "Adam moves a number by about the rate, whatever its size; the multiplier enlarges the step.",
        ),
        (
            "Why can a folded MiniCPM not keep its tables tied?",
            [
                "Llama does not allow it",
                "The input table is multiplied, the output table divided",
                "It would need more memory",
            ],
            1,
            "They take different factors, so they are different tables.",
        ),
    ]
)
