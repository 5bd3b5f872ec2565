"""Rotary parameters: both spellings, and no key that transformers reads is passed over in silence."""

import math
from itertools import combinations

import pytest
import torch
from sides import both_sides

from minicpm_lite import ModelConfig
from minicpm_lite.config import RopeScaling
from minicpm_lite.pretrained import families
from minicpm_lite.pretrained.families import config_from_json, config_to_json
from minicpm_lite.pretrained.rotary_parameters import rotary_from_json, rotary_to_json

SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    vocab_size=99,
    max_position_embeddings=64,
)
LLAMA = SHAPE | {"model_type": "llama", "rms_norm_eps": 1e-5}
SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", 64, factor=2.0),
    "dynamic": RopeScaling("dynamic", 64, factor=2.0),
    "yarn": RopeScaling("yarn", 16, factor=4.0, beta_fast=16.0),
    "yarn, attention_factor": RopeScaling("yarn", 16, factor=4.0, attention_factor=1.1),
    "llama3": RopeScaling("llama3", 16, factor=4.0, high_freq_factor=3.0),
    "longrope": RopeScaling("longrope", 16, short_factor=(1.0,) * 8, long_factor=(2.0,) * 8),
}


def read(values: dict) -> dict:
    """With a context of 64 tokens and a base of 10,000 as the family's defaults."""
    defaults = {"max_position_embeddings": 64, "rope_theta": 10_000.0}
    return rotary_from_json(
        values, values.get("model_type", "llama"), lambda name: values.get(name, defaults[name])
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_what_is_written_is_read_again_in_both_spellings(name):
    config = ModelConfig(**SHAPE, rope_theta=500.0, rope_scaling=SCALINGS[name])
    values = rotary_to_json(config)
    expected = {"rope_theta": 500.0} | ({} if SCALINGS[name] is None else {"rope_scaling": SCALINGS[name]})
    assert read(values) == expected
    old = {key: values[key] for key in ("rope_theta", "rope_scaling")}
    new = {"rope_parameters": values["rope_parameters"]}
    assert read(old) == read(new) == expected
    assert config_from_json(config_to_json(config, "llama")) == config


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {
            "rope_theta": 500.0,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        },
    ],
)
def test_both_spellings_of_the_rotary_parameters(spelling):
    config = config_from_json(LLAMA | spelling)
    assert config.rope_theta == 500
    assert config.rope_scaling == RopeScaling("linear", 64, factor=2.0)


def test_the_original_context_may_stand_outside():
    inside = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert read({"rope_scaling": inside})["rope_scaling"] == RopeScaling("yarn", 16, factor=4.0)
    outside = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16}
    assert read(outside) == read({"rope_scaling": inside})


def test_yarn_by_two_magnitudes():
    rope = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    factor = read({"rope_scaling": rope})["rope_scaling"].attention_factor
    assert factor == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rope_scaling": {"factor": 4.0}}, "hold factor and no rope_type that reads"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "expected one set for all layers"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type is 'su'; expected one of"),
        ({"rope_scaling": {"type": "linear"}}, '"linear" needs a factor'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "bend": 1}}, "of type 'linear' hold bend, unknown here"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, 'truncate of "yarn" is false'),
        (
            {"model_type": "minicpm3", "rope_scaling": {"type": "yarn", "factor": 2.0, "mscale_all_dim": 0.5}},
            'mscale_all_dim of "yarn" is 0.5; the released attention multiplies its scores',
        ),
    ],
)  # fmt: skip
def test_what_would_compute_otherwise_is_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(values)


def test_two_magnitudes_without_a_quotient_are_refused():
    rope = {"rope_type": "yarn", "factor": math.e, "mscale": 1, "mscale_all_dim": -10}
    with pytest.raises(ValueError, match="^here: .*division by zero"):
        config_from_json(LLAMA | {"rope_scaling": rope}, "here")


def test_a_dynamic_scaling_that_others_would_start_elsewhere_is_not_written():
    config = ModelConfig(**SHAPE, rope_scaling=RopeScaling("dynamic", 16, factor=4.0))
    with pytest.raises(ValueError, match='"dynamic" rope scaling starts at 16 tokens.*64'):
        config_to_json(config, "llama")


# Every key that transformers reads, with every method, in every attention.

FACTORS = {
    "short_factor": [1.0 + index / 8 for index in range(8)],
    "long_factor": [1.0 + index for index in range(8)],
}
METHODS = {  # with numbers that all matter to a text of 40 tokens and heads of 16 features
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 60,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 16} | FACTORS,
    "longrope, short text": {"rope_type": "longrope", "original_max_position_embeddings": 50} | FACTORS,
    "proportional": {"rope_type": "proportional", "factor": 2.0},
}
MATTERS = {  # what must change the logits, so that agreement says something
    "linear": {"factor"},
    "dynamic": set(),  # nothing below its context, and beyond it the decoder reads no text
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
    },
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "long_factor"},
    "longrope, short text": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
    },
}
OTHER = {  # another value for every key
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.5,
    "factor": 3.0,
    "original_max_position_embeddings": 32,
    "attention_factor": 1.3,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.6,
    "truncate": False,
    "mrope_section": [4, 2, 2],
} | {name: factors[::-1] for name, factors in FACTORS.items()}
FAMILIES = ("llama", "mistral", "granite", "mixtral", "minicpm3")


def test_every_key_and_every_method_of_transformers_is_tried():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

    assert RopeParameters.__annotations__.keys() - {"rope_type"} == OTHER.keys()
    assert ROPE_INIT_FUNCTIONS.keys() | {"default"} == {given["rope_type"] for given in METHODS.values()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(  # slow: families whose keys are read as those of the first
    "family",
    [
        "llama",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("mistral", "granite", "mixtral")),
        "minicpm3",
    ],
)
def test_each_key_is_applied_as_transformers_applies_it_or_refused(family, method):
    given = METHODS[method] | {"rope_theta": 100.0}
    plain = both_sides(family, rope_parameters=given)
    assert plain.agree()
    assert isinstance(plain.ours, torch.Tensor) == (method != "proportional")
    for key, value in OTHER.items():
        sides = both_sides(family, rope_parameters=given | {key: value})
        assert sides.agree(), key
        if key in MATTERS.get(method, ()):
            assert not torch.equal(sides.theirs, plain.theirs), key
            assert isinstance(sides.ours, torch.Tensor) or key == "truncate", sides.ours


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitudes_of_yarn_are_applied_together_or_refused(family):
    keys = ("attention_factor", "mscale", "mscale_all_dim")
    for count in range(1, 4):
        for some in combinations(keys, count):
            given = {key: OTHER[key] for key in some}
            sides = both_sides(family, rope_parameters=METHODS["yarn"] | given)
            assert sides.agree(), some
            refused = family == "minicpm3" and "mscale_all_dim" in some
            assert isinstance(sides.ours, str) == refused, some


@pytest.mark.parametrize(
    ("family", "method", "key"),
    [
        ("llama", "yarn", "attention_factor"),
        ("granite", "yarn", "beta_fast"),
        ("minicpm3", "yarn", "mscale_all_dim"),
        ("llama", "llama3", "low_freq_factor"),
        ("minicpm3", "longrope", "attention_factor"),
        ("mistral", "longrope, short text", "factor"),
        ("mixtral", "default", "rope_theta"),
    ],
)
def test_a_key_that_is_passed_over_is_seen(family, method, key, monkeypatch):
    def forgetful(values, *rest):
        kept = {name: value for name, value in values["rope_parameters"].items() if name != key}
        return rotary_from_json(values | {"rope_parameters": kept}, *rest)

    monkeypatch.setattr(families, "rotary_from_json", forgetful)
    rope = METHODS[method] | {"rope_theta": 100.0, key: OTHER[key]}
    assert not both_sides(family, rope_parameters=rope).agree()
