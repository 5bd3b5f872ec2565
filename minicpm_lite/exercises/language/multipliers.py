"""Checks and quiz of the chapter on the multipliers."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ...config import ModelConfig, load_config
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz


def _predicted(start, added, layers, scale, parts=2, power=2):
    r = 1.0 if scale is None else scale / math.sqrt(layers)
    return math.sqrt(start**2 + parts * layers * r**power * added**2)


@exercise(
    "predict RMS",
    wrong=(
        lambda start, added, layers, scale: (
            start + 2 * layers * (scale / layers**0.5 if scale else 1) * added
        ),
        lambda start, added, layers, scale: _predicted(start, added, layers, scale, parts=1),
        lambda start, added, layers, scale: _predicted(start, added, layers, scale, power=1),
        lambda start, added, layers, scale: _predicted(start, added, layers, scale and 1.4),
        lambda start, added, layers, scale: _predicted(start, added, 2 * layers, scale, parts=1),
    ),
)
def predict_rms(answer):
    """With the multiplier, the number of blocks cancels."""
    assert same(answer(3.0, 0.0, 10, None), 3), "If the blocks add nothing, the stream stays as it was."
    assert same(answer(0.0, 1.0, 8, None), 4), (
        "8 blocks add 16 times, each with mean square 1, to nothing: what is the root of the sum?"
    )
    assert same(answer(3.0, 2.0, 2, None), 5), (
        "A start of 3 and 2 blocks whose parts have RMS 2: 9 and four times 4 are 25, and the RMS is 5."
    )
    deep, flat = answer(1.0, 0.5, 52, 1.4), answer(1.0, 0.5, 4, 1.4)
    assert same(deep, flat), (
        "With r = scale_depth / sqrt(layers) the depth must cancel. In the mean square, r counts squared."
    )
    assert same(deep, math.sqrt(1.98)), "start 1, added 0.5, scale_depth 1.4: 1 + 2 × 1.4² × 0.5² = 1.98."
    assert same(answer(1.0, 2.0, 9, 3.0), math.sqrt(73)), (
        "start 1, added 2, scale_depth 3: 1 + 2 × 3² × 2² = 73. Does your answer use all four arguments?"
    )


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


def _equal_in_all(config: ModelConfig, layers: int, with_table: bool = True) -> ModelConfig:
    sizes = {}
    for heads in range(1, 25):
        width = heads * config.head_dim
        candidate = replace(
            config,
            hidden_size=width,
            intermediate_size=round(width * config.intermediate_size / config.hidden_size),
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
    ),
)
def equal_in_all(answer):
    """Only what is held equal has changed; what does not come out even is reported."""
    for config, layers in (
        (_SHALLOW, 8),
        (replace(_SHALLOW, vocab_size=2048, num_hidden_layers=3), 9),
        (replace(_SHALLOW, intermediate_size=331, tie_word_embeddings=False), 6),
    ):
        got = answer(config, layers)
        assert isinstance(got, ModelConfig), f"Expected a `ModelConfig`, not {type(got).__name__}."
        assert got.num_hidden_layers == layers, f"{layers} blocks were asked for."
        assert got.head_dim == config.head_dim and got.num_key_value_heads == got.num_attention_heads, (
            "Heads keep their width, and each query head has its own key-value head."
        )
        assert got.hidden_size == got.num_attention_heads * got.head_dim, "The width consists of whole heads."
        ratio = config.intermediate_size / config.hidden_size
        assert abs(got.intermediate_size - ratio * got.hidden_size) <= 0.5, (
            "The feed-forward width is as near as possible to the same multiple of the width."
        )
        off = abs(_count(got) - _count(config))
        assert off <= abs(_count(_equal_in_all(config, layers)) - _count(config)), (
            f"Yours is off by {off:,} parameters, the table counted; another number of heads comes nearer."
        )


_PHONE = load_config("minicpm-1.2b")


@exercise(
    "design",
    wrong=(
        _PHONE,  # its cache is too large
        replace(_PHONE, num_key_value_heads=2),  # too small
        load_config("minicpm4-8b"),
        replace(_PHONE, num_key_value_heads=2, intermediate_size=4096, vocab_size=32_000),
        replace(_PHONE, num_key_value_heads=2, intermediate_size=7000, num_hidden_layers=32),
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
    kept = 4 * answer.num_hidden_layers * answer.num_key_value_heads * answer.head_dim * 32_768
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
            "36 parts of equal size, each in a random direction, are added. Their sum is typically how many "
            "times one part?",
            ["36", "18", "6"],
            2,
            "Mean squares add up: 36 of them, and the root of 36 is 6.",
        ),
        (
            "The same 36 parts all move a little in the *same* direction. The sum moves how many times that?",
            ["6", "36", "not at all"],
            1,
            "What agrees does not cancel. One step of training is of this kind.",
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
