"""The configs of the family: every file loads, counts are the published ones, bad input gets a sentence."""

import json
from dataclasses import FrozenInstanceError, asdict, fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite import ModelConfig, list_configs, load_config
from minicpm_lite.config import (
    LatentAttentionConfig,
    MixtureConfig,
    RopeScaling,
    SparseConfig,
    load_recipe,
    load_sparse_config,
    model_config,
    sparse_config,
)
from minicpm_lite.language.decoder import Decoder
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
    assert content.keys() <= {"model", "training", "rope_scaling", "sparse_config"}
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
        (dict(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'; expected a number"),
        (dict(hidden_size=2**62), r"hidden_size is 4\d+; at most 16,777,216 is possible"),
        (dict(num_hidden_layers=3_000_000), "num_hidden_layers is 3000000; at most 1,000 is possible"),
        (dict(vocab_size=10**21), "vocab_size is 10{21}; at most 16,777,216"),
        (dict(num_attention_heads=10**6, head_dim=2), "num_attention_heads is 1000000; at most 65,536"),
        (dict(max_position_embeddings=2**70), "max_position_embeddings is .*; at most"),
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


@pytest.mark.parametrize(
    "ends", [100, -1, [2, 100], 2.0, 0.0, "", "2", ["2"], True, False, {}, [False], {2: 3}, [[2]], [None]]
)
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


@pytest.mark.parametrize("name", ["minicpm4-8b", "minicpm4.1-8b"])
def test_sparse_attention_of_a_release(name):
    """As its config.json spells it; the defaults are the same."""
    released = {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64, "window_size": 2048,
                "topk": 64, "use_nope": False, "dense_len": 8192}  # fmt: skip
    config = load_sparse_config(name)
    assert config == sparse_config(released) == SparseConfig()
    assert (config.local_blocks, config.num_blocks, config.all_visible) == (32, 96, 8191)
    assert {field: getattr(config, field) for field in released} == released
    with pytest.raises(FrozenInstanceError):
        config.topk = 1


def test_sparse_attention_that_was_not_released():
    with pytest.raises(ValueError, match="minicpm4-0.5b.yaml has no 'sparse_config' block"):
        load_sparse_config("minicpm4-0.5b")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (dict(top_k=64), "The sparse_config has an unknown field 'top_k'. Did you mean 'topk'"),
        ([64], r"The sparse_config holds \[64\]; expected names with values"),
        (dict(kernel_size=40), "kernel_size is 40 and kernel_stride is 16; expected a multiple, such as 32"),
        (dict(kernel_stride=0), "kernel_stride is 0; expected a whole number of at least 1"),
        (dict(block_size=72), "block_size is 72 and kernel_stride is 16; expected a multiple"),
        (dict(window_size=2000), "window_size is 2000 and block_size is 64; expected a multiple"),
        (dict(window_size=0), "window_size is 0; expected a whole number of at least 1"),
        (dict(kernel_size=128), "kernel_size is 128 and block_size is 64; .* give at most block_size"),
        (dict(init_blocks=65), "init_blocks is 65 and topk is 64; .* give at most as many"),
        (dict(init_blocks=-1), "init_blocks is -1; expected a whole number of at least 0"),
        (dict(topk=64.0), "topk is 64.0; expected a whole number"),
        (dict(dense_len=-2), "dense_len is -2; expected a whole number of at least -1"),
        (dict(dense_len=True), "dense_len is True; expected a whole number"),
        (dict(use_nope=True), "use_nope is true: .* not built here"),
        (dict(use_nope=0), "use_nope is 0; expected true or false"),
        (dict(approximate_lse="no"), "approximate_lse is 'no'; expected true or false"),
        (dict(coarse_topk=63), "coarse_topk is 63 and topk is 64; .* at least as many"),
    ],
)
def test_windows_and_blocks_that_do_not_fit_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        sparse_config(values)


@settings(deadline=None)
@given(length=st.integers(1, 300_000))
def test_tokens_that_a_query_attends_to(length):
    """All of a short text; of a long one the own block as far as it goes, and 95 whole ones."""
    visible = SparseConfig().num_visible(length)
    assert visible == (length if length < 8192 else 95 * 64 + (length - 1) % 64 + 1)


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


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model:\n  hidden_size: 64\n  hidden_size: 32\n", "line 3: 'hidden_size' stands there twice"),
        ("model:\n  vocab_size: 9\nmodel:\n  vocab_size: 8\n", "line 3: 'model' stands there twice"),
        ("model:\n  mixture: {a: 1, a: 1}\n", "line 2: 'a' stands there twice"),
        ("model: " + "[" * 5_000 + "]" * 5_000, "line 1: more than 16 levels"),
        ("model:\n" + "".join("  " * i + "a:\n" for i in range(1, 200)), "line 16: more than 16 levels"),
        ("model:\n  a: b: c\n", "line 2: mapping values are not allowed here"),
        ("model:\n  ? [1]\n  : 2\n", "line 2: found unhashable key"),
        ("model: *a\n", "line 1: found undefined alias 'a'"),
        ("model: &a [*a]\n", "has no 'model' block"),
        ("model: {mixture: &a [*a]}\n", r"mixture, holds \[+\.\.\.\]+; expected"),
        ("model: \0\n", "unacceptable character"),
        ("model: !!bool a\n", "is not valid YAML: 'a'"),
        ("model: !!int ''\n", "is not valid YAML: invalid literal for int"),
        ("model: !!timestamp a\n", "is not valid YAML"),
        ("model: !!python/object:os.system a\n", "line 1: could not determine a constructor"),
        ("model: 2026-13-45\n", "month must be in 1..12"),
        ("model: " + "9" * 5_000, "is not valid YAML: Exceeds the limit"),
    ],
)  # fmt: skip
def test_broken_yaml_is_named_with_its_line(tmp_path, text, line):
    with pytest.raises(ValueError, match=line) as caught:
        load_config(write(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 1


def test_a_bomb_of_aliases_is_not_printed(tmp_path):
    names = "abcdefghijklmnop"
    bomb = [f"a: &a [{', '.join('xxxxxxxxxx')}]"]
    bomb += [f"{new}: &{new} [{', '.join(['*' + old] * 10)}]" for old, new in pairwise(names)]
    text = "model:\n" + "".join(f"  {line}\n" for line in bomb) + "  mixture: *p\n"
    with pytest.raises(ValueError, match="mixture, holds .*expected names with values"):
        load_config(write(tmp_path, text))


@given(
    number=st.floats(1e-30, 1e30) | st.integers(1, 10**12),
    form=st.sampled_from(["{!r}", "{:e}", "{:g}", "{:G}"]),
)
def test_numbers_are_read_however_they_are_spelt(number, form, tmp_path_factory):
    text = form.format(number)
    lines = "\n".join(f"  {key}: {value}" for key, value in SMALL.items())
    path = write(tmp_path_factory.getbasetemp(), f"model:\n{lines}\n  rope_theta: {text}\n")
    assert load_config(path).rope_theta == float(text)


@pytest.mark.parametrize("text", ["0300", "+300", "300", "00300"])
def test_whole_numbers_are_decimal(tmp_path, text):
    config = write(
        tmp_path,
        f"model:\n  hidden_size: 32\n  intermediate_size: 48\n  num_hidden_layers: 1\n  num_attention_heads: 2\n  vocab_size: {text}\n",
    )
    assert load_config(config).vocab_size == 300


@pytest.mark.parametrize("text", ["1:30", "0b101100", "0x40", "1_000", ".inf"])
def test_what_is_no_decimal_number_is_no_size(tmp_path, text):
    config = write(
        tmp_path,
        f"model:\n  hidden_size: 32\n  intermediate_size: 48\n  num_hidden_layers: 1\n  num_attention_heads: 2\n  vocab_size: {text}\n",
    )
    with pytest.raises(ValueError, match="vocab_size"):
        load_config(config)


@pytest.mark.parametrize("text", ["1e9", "1E9", "1.0e9", "1.0e+9", "1.e9", "+1e9", "1000000000", "10e8"])
def test_a_billion_is_a_billion(text, tmp_path):
    assert load_recipe(write(tmp_path, f"training:\n  tokens: {text}\n")).tokens == 1e9


def test_experts_of_all_layers_together_are_bounded():
    with pytest.raises(ValueError, match="num_hidden_layers times num_experts is 200,000; at most 100,000"):
        ModelConfig(**SMALL | dict(num_hidden_layers=100), mixture=MixtureConfig(2_000, 2))


LARGE = st.one_of(st.integers(1, 9), st.sampled_from([2**n for n in range(4, 71)]), st.integers(1, 10**30))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_size_is_taken_can_be_counted_and_built(data):
    def size() -> int:
        return data.draw(LARGE)

    try:
        config = ModelConfig(
            size(), size(), data.draw(st.integers(1, 3)), size(), size(), head_dim=2 * size(), max_position_embeddings=size(),
            latent_attention=data.draw(st.none() | st.builds(LatentAttentionConfig, LARGE, LARGE, LARGE, LARGE, LARGE)),
        )  # fmt: skip
    except ValueError as error:
        assert "possible here" in str(error) or "make it even" in str(error)
        return
    with torch.device("meta"):
        assert Decoder(config).num_parameters(embeddings=True) == count_parameters(config).total


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


def test_a_name_may_be_a_path():
    assert load_config(Path("lite-1m")) == load_config("lite-1m")
