"""The configs of the family: every file loads, counts are the published ones, bad input gets a sentence."""

import json
from dataclasses import FrozenInstanceError, asdict, fields

import pytest
import yaml

from minicpm_lite import ModelConfig, list_configs, load_config
from minicpm_lite.config import RopeScaling, load_recipe, model_config
from minicpm_lite.parameters import count_parameters

RELEASED = {  # non-embedding and total parameters; the first two are Table 2 of arXiv 2404.06395
    "minicpm-1.2b": (1_247_442_432, 1_360_246_272),
    "minicpm-2.4b": (2_442_057_984, 2_724_880_896),
    "minicpm-2b-128k": (2_442_057_984, 2_442_057_984 + 2 * 122_753 * 2304),
    "minicpm-moe-8x2b": (13_590_468_864, 13_590_468_864 + 122_753 * 2304),
    "minicpm3-4b": (3_885_849_088, 4_073_875_968),
    "minicpm4-0.5b": (358_663_168, 433_873_920),
    "minicpm4-8b": (7_583_567_872, 8_185_253_888),
    "minicpm4.1-8b": (7_583_567_872, 8_185_253_888),
    "bitcpm4-0.5b": (358_663_168, 433_873_920),
    "bitcpm4-1b": (1_247_442_432, 1_247_442_432 + 73_448 * 1536),
}
SMALL = dict(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
)


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts_are_the_published_ones(name):
    """That the decoder has as many is a test of `parameters`."""
    count = count_parameters(load_config(name))
    assert (count.others, count.total) == RELEASED[name]


def test_every_config_is_either_released_or_of_the_book():
    assert {name for name in list_configs() if not name.startswith("lite-")} == set(RELEASED)


@pytest.mark.parametrize("name", list_configs())
def test_every_block_names_its_source(name):
    from minicpm_lite import config

    content = yaml.safe_load((config._CONFIGS / f"{name}.yaml").read_text())
    assert content.keys() <= {"model", "training", "rope_scaling"}
    assert all(block["source"] for block in content.values())
    if "training" in content:
        load_recipe(name)


def test_multipliers_of_a_release():
    config = load_config("minicpm-2.4b")
    assert config.residual_scale == pytest.approx(1.4 / 40**0.5)
    assert config.width_ratio == 9
    llama = ModelConfig(**SMALL)
    assert (llama.residual_scale, llama.width_ratio, llama.num_key_value_heads) == (1, 1, 4)


def test_configs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        load_config("lite-1m").hidden_size = 1


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("minicpm-2.4", "minicpm-2.4b"),
        ("MiniCPM4-8B", "minicpm4-8b"),
        ("minicpm3", "minicpm3-4b"),
        ("lite1m", "lite-1m"),
    ],
)
def test_unknown_name_suggests_the_nearest(name, suggestion):
    with pytest.raises(ValueError, match=f"no config named '{name}'.*Did you mean.*{suggestion}"):
        load_config(name)


def test_unknown_name_far_from_all_lists_all():
    with pytest.raises(ValueError, match="Known are: .*minicpm-1.2b"):
        load_config("@@@@")


def test_recipe_that_was_not_published():
    with pytest.raises(ValueError, match="minicpm3-4b.yaml has no 'training' block"):
        load_recipe("minicpm3-4b")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(num_attention_heads=5), "hidden_size 64 does not divide into 5 attention heads"),
        (dict(num_key_value_heads=3), "num_attention_heads is 4 and num_key_value_heads is 3"),
        (dict(num_attention_heads=64), "so make it even"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0; expected a whole number"),
        (dict(hidden_size=64.0), "hidden_size is 64.0; expected a whole number"),
        (dict(vocab_size=True), "vocab_size is True; expected a whole number"),
        (dict(scale_depth=-1), "scale_depth is -1; expected a number greater than 0"),
        (dict(rope_theta="high"), "rope_theta is 'high'; expected a number"),
        (dict(dim_model_base=float("nan")), "dim_model_base is nan"),
        (dict(rope_theta=float("inf")), "rope_theta is inf"),
        (dict(rms_norm_eps="1e-5"), "YAML reads 1e-5 as text"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; expected true or false"),
    ],
)
def test_impossible_shapes_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelConfig(**(SMALL | change))


@pytest.mark.parametrize(
    ("given", "ends"),
    [(None, ()), ((), ()), ([], ()), (0, (0,)), (99, (99,)), ([2, 73, 2], (2, 73)), ((7, 3), (7, 3))],
)
def test_ids_that_end_a_text_become_a_tuple_without_repetition(given, ends):
    config = ModelConfig(**SMALL, eos_token_id=given)
    assert config.eos_token_id == ends
    assert hash(config) == hash(ModelConfig(**SMALL, eos_token_id=ends))
    assert model_config(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("ends", [100, -1, [2, 100], 2.0, "2", ["2"], True, [False], {2: 3}, [[2]], [None]])
def test_ids_that_end_a_text_are_of_the_vocabulary(ends):
    with pytest.raises(
        ValueError, match="eos_token_id is .*; expected ids of the vocabulary: .* from 0 to 99"
    ):
        ModelConfig(**SMALL, eos_token_id=ends)


def test_facts_of_older_checkpoints_name_no_ids_that_end_a_text():
    facts = asdict(ModelConfig(**SMALL))
    del facts["eos_token_id"]
    assert model_config(facts) == ModelConfig(**SMALL)


def test_ids_that_end_a_text_are_given_where_a_source_is_known():
    known = {name: load_config(name).eos_token_id for name in list_configs()}
    assert {name: ends for name, ends in known.items() if ends} == {"minicpm4-0.5b": (2, 73_440)}


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_file_of_ones_own(tmp_path):
    lines = "\n".join(f"  {key}: {value}" for key, value in SMALL.items())
    assert load_config(write(tmp_path, f"model:\n{lines}\n")) == ModelConfig(**SMALL)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model:\n  hiden_size: 64\n", "unknown field 'hiden_size'. Did you mean 'hidden_size'?"),
        ("model:\n  hidden_size: 64\n", "is incomplete: .*intermediate_size"),
        ("model: 3\n", "has no 'model' block"),
        ("model: [", "is not valid YAML"),
        ("- 1\n", "has no 'model' block"),
        ("model:\n  mixture: 8\n", "mixture, holds 8"),
        ("model:\n  mixture: {num_experts: 2, num_experts_per_token: 4}\n", "visits 4 of 2"),
        ("model:\n  mixture: {num_experts: 2.5, num_experts_per_token: 1}\n", "num_experts is 2.5"),
        (
            "model:\n  latent_attention: {q_lora_rank: 8}\n",
            "latent_attention, is incomplete: it lacks kv_lora_rank",
        ),
    ],
)
def test_broken_files_are_named_with_their_fault(tmp_path, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config(write(tmp_path, text))


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="There is no file .*none.yaml"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="no config named '../configs/lite-1m'"):
        load_config("../configs/lite-1m")


@pytest.mark.parametrize("name", list_configs())
def test_a_config_comes_back_from_its_plain_values(name):
    assert model_config(asdict(load_config(name))) == load_config(name)


def test_documented_fields_are_the_fields():
    documented = ModelConfig.__doc__.split("Attributes:")[1].split("Raises:")[0]
    assert all(f"        {field.name}:" in documented for field in fields(ModelConfig))


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "llama3"])
def test_an_attention_factor_that_no_one_reads_is_refused(rope_type):
    with pytest.raises(ValueError, match="read attention_factor"):
        RopeScaling(rope_type, 64, factor=2.0, attention_factor=2.0)
