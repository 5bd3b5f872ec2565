"""Checks and quiz of the chapter on the multipliers."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from ...config import ModelConfig, load_config
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz
from ...language.decoder import Decoder


def _buried(
    start, attention, feed_forward, layers, scale, power=2, squared=True, offset=0, never=None, drowned=2,
    equal=False, unseen=0, powers=(2, 2),
):  # fmt: skip
    r = 1.0 if scale is None else scale / math.sqrt(layers)
    first, second = powers if squared else (1, 1)
    each = r**power * (attention**first + feed_forward**second)
    word = start**2 if squared else start
    for blocks in range(1, layers + 1 - unseen):
        added = drowned / 2 * blocks * each
        if added > word or equal and added == word:
            return blocks + offset
    return never


@exercise(
    "buried after",
    wrong=(
        lambda *given: _buried(*given, squared=False),
        lambda *given: _buried(*given, powers=(1, 1)),
        lambda *given: _buried(*given, powers=(3, 2)),
        lambda *given: _buried(*given, powers=(2, 3)),
        lambda *given: _buried(*given, power=1),
        lambda *given: _buried(*given, power=0),
        lambda *given: _buried(*given, offset=-1),
        lambda *given: _buried(*given, equal=True),
        lambda *given: _buried(*given, unseen=1),  # the last block is not looked at
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
    """A word does not last long: two blocks of 40 in a MiniCPM, and one without the multiplier."""
    assert answer(3.0, 1.0, 1.0, 10, None) == 5, (
        "A word of 3 has mean square 9. Each block adds 1 for attention and 1 for the feed-forward network: "
        "8 after four blocks, 10 after five."
    )
    assert answer(1.2, 1.5, 3.8, 40, None) == 1, "1.5² + 3.8² is far more than 1.2²: one block is enough."
    assert answer(1.2, 1.5, 3.8, 40, 1.4) == 2, (
        "With a scale_depth of 1.4 and 40 blocks, r² is 0.049: a block adds 0.82 to the mean square, and the "
        "word has 1.44."
    )
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
    assert answer(3.0, 1.0, 1.0, 5, None) == 5, (
        "Five blocks add 10 to a word of 9: the last block may be the one that buries it."
    )
    assert answer(3.0, 2.0, 1.0, 8, None) == 2, "Attention adds 4 here, the feed-forward network 1."
    assert answer(3.0, 1.0, 2.0, 8, None) == 2, "Attention adds 1 here, the feed-forward network 4."
    for parts in ((1.5, 0.5), (0.5, 1.5)):
        assert answer(4.9, *parts, 40, None) == 10, (
            "Attention and the feed-forward network of 1.5 and 0.5 add 2.25 and 0.25, squares both; the word "
            "has 24.01, so ten blocks do."
        )
    assert answer(2.0, 1.0, 1.0, 4, None) == 3, (
        "After two blocks 4 has been added to a word of 4: as much, and not more."
    )
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
        math.sqrt(_START**2 + _END**2 / 16),  # the start counted twice: 1.2 % too much
        "1.9",
    ),
)
def forecast(answer):
    """The part of the blocks is a sixteenth of what it was in the mean square; that of the word stays."""
    expected = math.sqrt(_START**2 + (_END**2 - _START**2) / 16)
    assert not isinstance(answer, str), f"Expected a number, not the text {answer!r}."
    assert not same(answer, _END / 4, tolerance=0.01), (
        "That divides the whole stream by four. Does the word at its start become smaller, too?"
    )
    assert abs(float(answer) / expected - 1) < 0.01, (
        "Square both numbers that were printed. Their difference is what the blocks add; by how much does "
        "*that* shrink when the factor on each part is a quarter? Add the start again, and take the root."
    )


@exercise(
    "other name",
    wrong=(
        lambda config, scale_emb: replace(config, scale_emb=scale_emb),
        lambda config, scale_emb: _renamed(config, scale_emb, power=0),
        lambda config, scale_emb: _renamed(config, scale_emb, power=1),
        lambda config, scale_emb: _renamed(config, scale_emb, power=-2),
        lambda config, scale_emb: _renamed(config, scale_emb, depth=-1),
        lambda config, scale_emb: _renamed(config, scale_emb, depth=0),
        lambda config, scale_emb: _renamed(config, scale_emb, without=1.0),
        lambda config, scale_emb: replace(
            _renamed(config, scale_emb), scale_depth=config.scale_depth and _renamed(config, 1.0).scale_depth
        ),
        lambda config, scale_emb: replace(_renamed(config, scale_emb), dim_model_base=None),
        lambda config, scale_emb: replace(
            _renamed(config, scale_emb), init_std=config.init_std * config.scale_emb
        ),
    ),
)
def other_name(answer):
    """The same function of the same weights: of the two factors only their ratio counts."""
    cases = (
        (_FOLDED[0], 1.0),
        (_FOLDED[1], 20.0),
        (replace(_FOLDED[0], scale_emb=3.0, rms_norm_eps=0.04), 12.0),
        (replace(_FOLDED[0], scale_depth=None, num_hidden_layers=9), 1.0),
        (replace(_FOLDED[0], scale_emb=1.0, scale_depth=None, num_hidden_layers=16), 12.0),
    )
    for config, scale_emb in cases:
        got, expected = answer(config, scale_emb), _renamed(config, scale_emb)
        assert isinstance(got, ModelConfig), f"Expected a `ModelConfig`, not {type(got).__name__}."
        assert math.isclose(got.scale_emb, scale_emb), f"`scale_emb` was to become {scale_emb:g}."
        assert got.scale_depth is not None, (
            "Without `scale_depth` r is 1, and here it has to become another number. Which `scale_depth` "
            "gives r = 1?"
        )
        assert math.isclose(got.residual_scale, expected.residual_scale, rel_tol=1e-6), (
            f"r was {config.residual_scale:.4g} with scale_emb {config.scale_emb:g}, and is now "
            f"{got.residual_scale:.4g} with {scale_emb:g}: the ratio of the two is another."
        )
        assert math.isclose(got.rms_norm_eps, expected.rms_norm_eps, rel_tol=1e-6), (
            f"`rms_norm_eps` is {got.rms_norm_eps:.4g}. It is added to a mean *square*: by what has that of "
            "the stream been multiplied?"
        )
        changed = [
            field.name
            for field in fields(config)
            if field.name not in ("scale_emb", "scale_depth", "rms_norm_eps")
            and getattr(got, field.name) != getattr(config, field.name)
        ]
        assert not changed, f"`{', '.join(changed)}` has no reason to change."


def _renamed(
    config: ModelConfig, scale_emb: float, power: int = 2, depth: int = 1, without: float | None = None
) -> ModelConfig:
    change = scale_emb / config.scale_emb
    scale_depth = config.scale_depth or without or config.num_hidden_layers**0.5
    return replace(
        config,
        scale_emb=scale_emb,
        scale_depth=scale_depth * change**depth,
        rms_norm_eps=config.rms_norm_eps * change**power,
    )


def _fold(weights, config, residual=None, last=None, power=2, ends=("o_proj", "down_proj"), norms=()):
    residual = config.residual_scale / config.scale_emb if residual is None else residual
    last = 1 / config.width_ratio if last is None else last
    folded = {}
    for name, weight in weights.items():
        if name == "norm.weight" or any(each in name for each in norms):
            weight = weight * last
        elif any(each in name for each in ends):
            weight = weight * residual
        folded[name] = weight
    return folded, config.rms_norm_eps / config.scale_emb**power


def _fold_in_place(weights, config):
    for name, weight in weights.items():
        if "o_proj" in name or "down_proj" in name:
            weight *= config.residual_scale / config.scale_emb
    return _fold(weights, config, residual=1.0)


@exercise(
    "mended fold",
    wrong=(
        _fold_in_place,
        lambda weights, config: _fold(weights, config, power=0),
        lambda weights, config: _fold(weights, config, power=1),
        lambda weights, config: _fold(weights, config, norms=("norm",)),
        lambda weights, config: _fold(weights, config, last=1.0),
        lambda weights, config: _fold(weights, config, last=config.width_ratio),
        lambda weights, config: _fold(weights, config, ends=("o_proj",)),
        lambda weights, config: _fold(weights, config, ends=("o_proj", "down_proj", "up_proj")),
        lambda weights, config: _fold(weights, config, residual=config.residual_scale),
        lambda weights, config: _fold(weights, config, residual=config.scale_depth / config.scale_emb),
        lambda weights, config: _fold(weights, config)[0],
    ),
    without=("fold_to_llama",),
)
def mended_fold(answer):
    """A Llama computes the same with these weights, and the model that was folded is as it was."""
    for number, config in enumerate(_FOLDED):
        weights = _weights(config, number)
        given = {name: weight.clone() for name, weight in weights.items()}
        got = answer(given, config)
        assert all(torch.equal(given[name], weight) for name, weight in weights.items()), (
            "The weights that were given have changed: the model that they belong to is spoiled."
        )
        assert isinstance(got, tuple | list) and len(got) == 2, (
            "Expected two things: the dictionary of weights, and the ε of the norms."
        )
        folded, eps = got
        assert isinstance(folded, Mapping), f"Expected a dictionary of weights, not {type(folded).__name__}."
        assert set(folded) - {"lm_head.weight"} == set(weights), (
            "The folded model has the weights of the old one, and no other."
        )
        ids = torch.arange(config.vocab_size)[None]
        with torch.no_grad():
            expected = _decoder(weights, config)(ids)
            llama = replace(
                config, scale_emb=1.0, scale_depth=None, dim_model_base=None, rms_norm_eps=float(eps),
                tie_word_embeddings="lm_head.weight" not in folded,
            )  # fmt: skip
            logits = _decoder(folded, llama)(ids)
        assert same(logits, expected), (
            "A Llama with these weights and this ε computes other logits. Go through the list of what takes "
            "which factor: the ends of the branches, the last norm, ε."
        )


def _decoder(weights: Mapping[str, Tensor], config: ModelConfig) -> Decoder:
    decoder = Decoder(config).double()
    decoder.load_state_dict(dict(weights))
    return decoder


def _rates(
    names,
    config,
    lr,
    weight_decay,
    residual=None,
    last=None,
    power=1,
    norms=("norm.weight",),
    decays=lambda decay, c: decay / c,
):
    residual = config.residual_scale / config.scale_emb if residual is None else residual
    last = 1 / config.width_ratio if last is None else last
    rates = {}
    for name in names:
        c, decay = 1.0, weight_decay
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            c = residual
        elif name in norms:
            c = last
        if "norm" in name or name == "embed_tokens.weight":
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
        lambda *given: _rates(*given, residual=given[1].residual_scale),
        lambda *given: _rates(*given, residual=given[1].scale_depth),
        lambda *given: _rates(*given, last=given[1].width_ratio),
        lambda *given: _rates(*given, last=1.0),
        lambda *given: _rates(*given, norms=[name for name in given[0] if "norm" in name]),
        lambda *given: {
            name: (rate * given[1].scale_emb if name == "embed_tokens.weight" else rate, decay)
            for name, (rate, decay) in _rates(*given).items()
        },
        lambda *given: {
            name: (rate, given[3] if "norm" in name else decay)
            for name, (rate, decay) in _rates(*given).items()
        },
    ),
)
def folded_rates(answer):
    """The folded Llama now learns what the MiniCPM learns. Weight decay takes the rate times the decay."""
    for number, (config, lr, decay) in enumerate(zip(_FOLDED, (0.01, 0.02), (0.1, 0.3), strict=True)):
        names = list(_weights(config, number))
        got, expected = answer(list(names), config, lr, decay), _rates(names, config, lr, decay)
        assert isinstance(got, dict), f"Expected a dictionary from names to pairs, not {type(got).__name__}."
        assert set(got) == set(expected), "Every name has a rate and a decay, and no other has."
        for name, (rate, kept) in expected.items():
            assert len(got[name]) == 2, f"`{name}`: expected a pair of the rate and the decay."
            assert same(got[name][0], rate, tolerance=1e-9), (
                f"`{name}`: the rate should be {rate:.4g} and is {float(got[name][0]):.4g}. Which factor was "
                "folded into this weight, and how far does it move in a step?"
            )
            assert same(got[name][1], kept, tolerance=1e-9), (
                f"`{name}`: its decay is {float(got[name][1]):.4g}. A step of AdamW shrinks a weight by rate "
                "× decay. By what share did the MiniCPM's matrix shrink? The table and norms do not decay."
            )


_FOLDED = (
    ModelConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=10,
        scale_emb=12, scale_depth=1.4, dim_model_base=4, rms_norm_eps=0.01,
    ),
    ModelConfig(
        hidden_size=12, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2, vocab_size=6,
        scale_emb=5, scale_depth=2, dim_model_base=3, rms_norm_eps=0.02,
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
_ABOVE_HALF, _BELOW_HALF = 333, 331  # the fraction of 96/128 of these feed-forward widths
_SHAPES = (
    (_SHALLOW, 8),
    (replace(_SHALLOW, vocab_size=2048, num_hidden_layers=3), 9),
    (replace(_SHALLOW, intermediate_size=_ABOVE_HALF, tie_word_embeddings=False), 6),
    (replace(_SHALLOW, intermediate_size=_BELOW_HALF, tie_word_embeddings=False), 6),
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
        lambda config, layers: _equal_in_all(config, layers, rounded=math.ceil),
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
            "The feed-forward width is as near as possible to the same multiple of the width, here "
            f"{ratio * got.hidden_size:g}: rounded to the nearest, not always down or up."
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
        replace(_FITS, hidden_size=1600, intermediate_size=4800, num_hidden_layers=53, num_attention_heads=1,
                num_key_value_heads=1),  # one narrow head
    ),
)  # fmt: skip
def design(answer):
    """It fits. Now find out what it costs in loss."""
    assert isinstance(answer, ModelConfig), f"Expected a `ModelConfig`, not {type(answer).__name__}."
    assert answer.vocab_size == _PHONE.vocab_size, "Keep the vocabulary: 73,440."
    kept_fields = ("scale_emb", "scale_depth", "dim_model_base", "init_std", "tie_word_embeddings")
    assert all(getattr(answer, name) == getattr(_PHONE, name) for name in kept_fields), (
        "Keep the multipliers of the 1.2B, and what gives them their meaning, its start and its tied tables: "
        "scale_emb=12, scale_depth=1.4, dim_model_base=256, init_std=0.1, tie_word_embeddings=True."
    )
    assert 2 <= answer.intermediate_size / answer.hidden_size <= 4, (
        f"The feed-forward width is {answer.intermediate_size / answer.hidden_size:.1f} times the width: two "
        "to four times was asked for."
    )
    assert answer.head_dim in (64, 128), f"Heads are {answer.head_dim} wide; choose 64 or 128."
    assert answer.num_attention_heads * answer.head_dim == answer.hidden_size, (
        f"{answer.num_attention_heads} heads of {answer.head_dim} are not as wide as the model, "
        f"{answer.hidden_size}."
    )
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
            "Why are the rows of the table not simply drawn twelve times as large, in place of scale_emb?",
            [
                "They would not fit in bf16",
                "They are the output table, too, and all logits would be twelve times as large",
                "Large numbers cannot be learned",
            ],
            1,
            "One table serves both ends. (And Adam would move rows that large by a twelfth of their former "
            "share in a step, as it moves a number by about the rate, whatever its size.)",
        ),
        (
            "scale_emb is set from 12 to 1, scale_depth from 1.4 to 1.4/12, and the ε of the norms divided "
            "by 144. What does the model do differently?",
            [
                "The words weigh less against what the blocks add",
                "The logits are a twelfth of what they were",
                "Nothing, neither when it computes nor when it learns",
            ],
            2,
            "The whole stream is a twelfth, and every norm reads its direction: only r / scale_emb counts.",
        ),
        (
            "Two rules keep the sum of all steps the same whatever the depth. With one, the rate divided by "
            "the start of the ends of the branches falls as 1/√L. What does it lose?",
            [
                "Deep models diverge",
                "The blocks of deep models change ever less of what they began as",
                "The stream grows with the depth",
            ],
            1,
            "A step is an ever smaller part of the weight that it changes: the blocks learn lazily.",
        ),
    ]
)
