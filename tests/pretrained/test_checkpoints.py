"""Checkpoints: written and read by transformers and by us, nothing lost on the way, and every damage named."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, processors
from torch.testing import assert_close

import minicpm_lite
from minicpm_lite import ModelConfig
from minicpm_lite.config import LatentAttentionConfig, MixtureConfig
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.data.shards import is_tokenizer
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.layers import replace_linears
from minicpm_lite.language.multipliers import fold_to_llama
from minicpm_lite.language.templates import chat_template
from minicpm_lite.language.tokenizer import BytePairTokenizer, train_tokenizer
from minicpm_lite.pretrained import checkpoints, weights
from minicpm_lite.pretrained.checkpoints import (
    load_chat_template,
    load_pretrained,
    load_special_tokens,
    load_tokenizer,
    read_tokenizer,
    save_pretrained,
)

SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
    max_position_embeddings=64,
)
MULTIPLIERS = dict(scale_emb=12, scale_depth=1.4, dim_model_base=32, init_std=0.1)
OURS = {
    "llama": ModelConfig(**SHAPE, init_std=0.1),
    "llama, untied": ModelConfig(**SHAPE, init_std=0.1, tie_word_embeddings=False),
    "minicpm": ModelConfig(**SHAPE, **MULTIPLIERS),
    "minicpm, untied": ModelConfig(**SHAPE, **MULTIPLIERS, tie_word_embeddings=False),
    "minicpm3": ModelConfig(
        **SHAPE | {"num_key_value_heads": 4}, **MULTIPLIERS, head_dim=24,
        latent_attention=LatentAttentionConfig(24, 16, 16, 8, 12),
    ),
    "minicpm, experts": ModelConfig(**SHAPE, **MULTIPLIERS, mixture=MixtureConfig(5, 2)),
    "mixtral": ModelConfig(**SHAPE, init_std=0.1, mixture=MixtureConfig(5, 2)),
}  # fmt: skip
IDS = torch.arange(34).view(2, 17)


def make_model(config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide norms that were exchanged
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def transformers_models() -> dict:
    import transformers as tf

    shape = SHAPE | {"initializer_range": 0.1}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    return {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**shape, **rope)),
        "llama, tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**shape, tie_word_embeddings=True)),
        "llama, wide heads": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**shape, head_dim=24)),
        "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**shape, sliding_window=None)),
        "granite": lambda: tf.GraniteForCausalLM(
            tf.GraniteConfig(
                **shape,
                attention_multiplier=0.25,
                embedding_multiplier=12.0,
                residual_multiplier=0.22,
                logits_scaling=8.0,
            )
        ),
        "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**shape, num_local_experts=5)),
        "minicpm3": lambda: tf.MiniCPM3ForCausalLM(
            tf.MiniCPM3Config(
                **shape | {"num_key_value_heads": 4},
                dim_model_base=32,
                q_lora_rank=24,
                kv_lora_rank=16,
                qk_nope_head_dim=16,
                qk_rope_head_dim=8,
                v_head_dim=12,
            )
        ),
        "longrope": lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(
                **shape,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 500.0,
                    "original_max_position_embeddings": 16,
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0 + index for index in range(8)],
                },
            )
        ),
    }


@pytest.mark.parametrize("shards", ["one file", "many files"])
@pytest.mark.parametrize("name", transformers_models())
@torch.no_grad()
def test_what_transformers_wrote_computes_the_same(name, shards, tmp_path):
    torch.manual_seed(0)
    theirs = transformers_models()[name]().eval()
    for parameter_name, parameter in theirs.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    size = {"one file": {}, "many files": {"max_shard_size": "20KB"}}[shards]
    theirs.save_pretrained(tmp_path, **size)
    assert ("model.safetensors.index.json" in os.listdir(tmp_path)) == (shards == "many files")
    ours = load_pretrained(tmp_path)
    assert_close(ours(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llama", None),
        ("llama, untied", None),
        ("llama", "granite"),
        ("minicpm", "granite"),
        ("minicpm, untied", "granite"),
        ("minicpm3", None),
        ("mixtral", None),
    ],
)
@torch.no_grad()
def test_what_we_wrote_computes_the_same_in_transformers(name, family, max_shard_bytes, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(OURS[name])
    save_pretrained(model, tmp_path / "model", model_type=family, max_shard_bytes=max_shard_bytes)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.dtype == torch.float32
    assert_close(model(IDS), theirs.eval()(IDS).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_folded_model_opens_as_a_llama(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(OURS["minicpm"])
    save_pretrained(fold_to_llama(model), tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert_close(model(IDS), theirs.eval()(IDS).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_what_we_wrote_we_read_bit_for_bit(name, max_shard_bytes, tmp_path):
    model = make_model(OURS[name])
    save_pretrained(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    again = load_pretrained(str(tmp_path / "model"))
    assert again.config == model.config and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for parameter, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, other) and parameter.requires_grad
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_in_memory_is_the_one_asked_for(dtype, tmp_path):
    model = make_model(OURS["minicpm"])
    save_pretrained(model, tmp_path / "model")
    again = load_pretrained(tmp_path / "model", dtype)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    assert torch.equal(again.norm.weight, model.norm.weight.to(dtype))
    save_pretrained(again, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == str(dtype).split(".")[1]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16"])
def test_weights_are_held_in_floating_point(dtype, tmp_path):
    save_pretrained(make_model(OURS["llama"]), tmp_path / "model")
    with pytest.raises((ValueError, TypeError), match="weights are held in torch.float32|torch._C.dtype"):
        load_pretrained(tmp_path / "model", dtype)


def test_a_model_does_not_hang_on_its_file(tmp_path):
    model = make_model(OURS["llama"])
    save_pretrained(model, tmp_path / "model")
    again = load_pretrained(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    with file.open("r+b") as stream:  # written over in place, as rsync may do
        stream.write(bytes(file.stat().st_size))
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = tmp_path / "model"
    save_pretrained(make_model(OURS["minicpm"]), folder)
    return folder


def change_tensors(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder: Path, file: str = "config.json", **values) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(Q), f"1 missing: {Q}"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.2." in n], "9 missing: .* and 5 more"),
        (lambda t: t.update(stranger=torch.ones(1)), "1 unknown: stranger"),
        (lambda t: t.update({Q.replace("weight", "bias"): torch.ones(64)}), "1 unknown: .*q_proj.bias"),
        (
            lambda t: t.update({Q: t[Q][:32]}),
            rf"1 of another shape: {Q} is \(32, 64\) and should be \(64, 64\)",
        ),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"{Q} in .* is stored as I8; only floating-point"),
        (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), "is stored as F8_E4M3"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(99, 64)}),
            "stores lm_head.weight with other values",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, change, sentence):
    change_tensors(saved, change)
    with pytest.raises(ValueError, match=sentence):
        load_pretrained(saved)


def test_all_differences_are_reported_at_once(saved):
    def change(tensors):
        tensors["stranger"] = tensors.pop(Q)
        tensors["model.norm.weight"] = torch.ones(3)

    change_tensors(saved, change)
    with pytest.raises(ValueError, match="missing.*unknown.*another shape.*Nothing was loaded"):
        load_pretrained(saved)


def test_harmless_tensors_are_passed_over(saved):
    before = load_pretrained(saved)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    change_tensors(saved, change)
    assert torch.equal(load_pretrained(saved)(IDS), before(IDS))


def test_untied_needs_its_output_layer(saved):
    change_config(saved, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="1 missing: lm_head.weight"):
        load_pretrained(saved)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"\xff\xfe", "config.json is not valid JSON"),
        (b"[1]", r"config.json holds list '\[1\]'; expected names with values"),
        (b"{}", "config.json: model_type is None"),
        (b"[" * 200_000, "config.json is not valid JSON"),
    ],
)
def test_a_config_that_is_none_is_refused(saved, content, sentence):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        load_pretrained(saved)


def test_a_missing_file_is_named(saved, tmp_path):
    (saved / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(
        FileNotFoundError, match="holds neither model.safetensors nor model.safetensors.index"
    ):
        load_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="There is no .*config.json; a model's folder holds its shape"
    ):
        load_pretrained(saved)
    with pytest.raises(FileNotFoundError, match="There is no folder or file .*nowhere"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="There is no folder or file nowhere.gguf"):
        load_pretrained("nowhere.gguf")
    with pytest.raises(ValueError, match="elsewhere.safetensors is a file; expected the folder"):
        load_pretrained(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no folder or file .*nobodyhere/model"):
        load_pretrained("~nobodyhere/model")


def test_a_config_of_more_layers_than_the_file_holds_is_refused_at_once(saved):
    change_config(saved, num_hidden_layers=1_000)
    with pytest.raises(ValueError, match="holds 29 tensors, too few for the 1,000 layers of its config"):
        load_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; at most 1,000 is possible"),
        (
            dict(model_type="mixtral", num_local_experts=10**9, num_experts_per_tok=1),
            "num_experts is 1000000000",
        ),
        (dict(vocab_size=10**12), "vocab_size is 1000000000000; at most 16,777,216"),
        (dict(hidden_size=2**62, head_dim=8), "hidden_size is 4611686018427387904; at most"),
        (dict(intermediate_size=10**15), "intermediate_size is 1000000000000000; at most"),
    ],
)
def test_absurd_sizes_are_refused_at_once(change, sentence, saved):
    change_config(saved, **change)
    with pytest.raises(ValueError, match=f"config.json: {sentence}"):
        load_pretrained(saved)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_name_that_stands_twice_is_refused(file, saved):
    (saved / file).write_text('{"eos_token_id": 1, "eos_token_id": 2}')
    with pytest.raises(
        ValueError, match=f"{file} is not valid JSON: the name 'eos_token_id' stands there twice"
    ):
        load_pretrained(saved)


def test_a_model_from_the_hub(saved, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        if name != "openbmb/MiniCPM4-0.5B":
            raise OSError("404: no such model")
        return str(saved)

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setattr(checkpoints, "require", lambda module, install, purpose: hub)
    model = load_pretrained("openbmb/MiniCPM4-0.5B")
    assert torch.equal(model(IDS), load_pretrained(saved)(IDS))
    assert {"config.json", "generation_config.json"} <= set(asked[0][1])
    assert not any(pattern.endswith((".bin", "*")) for pattern in asked[0][1])
    with pytest.raises(FileNotFoundError, match="no folder no/one, and the hub gave no model.*404"):
        load_pretrained("no/one")
    assert [name for name, _ in asked] == ["openbmb/MiniCPM4-0.5B", "no/one"]


def test_without_the_hub_package_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match=r'needed to download a model.*pip install "minicpm_lite\[pretrained\]"'
    ):
        load_pretrained("openbmb/MiniCPM4-0.5B")


@pytest.mark.parametrize("occupied", ["folder with a file", "file"])
def test_nothing_is_overwritten(occupied, tmp_path):
    place = tmp_path / "model"
    if occupied == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        save_pretrained(make_model(OURS["llama"]), place)
    assert (place if occupied == "file" else place / "notes").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / ".model.writing").mkdir()
    (tmp_path / ".model.writing/rest").write_text("of a killed process")
    save_pretrained(make_model(OURS["llama"]), tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["model"]


def test_of_two_programs_that_write_one_folder_one_is_refused(tmp_path, monkeypatch):
    place, other = tmp_path / "model", make_model(OURS["minicpm"])
    real = checkpoints.write_weights

    def meanwhile(*arguments):
        with pytest.raises(FileExistsError, match="model is being written by another program"):
            save_pretrained(other, place)
        real(*arguments)

    monkeypatch.setattr(checkpoints, "write_weights", meanwhile)
    save_pretrained(make_model(OURS["llama"]), place)
    assert load_pretrained(place).config == OURS["llama"] and os.listdir(tmp_path) == ["model"]


def test_what_comes_into_the_folder_before_it_is_locked_stands(tmp_path, monkeypatch):
    real = checkpoints.locked

    def late(folder):
        (folder / "notes").write_text("mine")
        return real(folder)

    monkeypatch.setattr(checkpoints, "locked", late)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        save_pretrained(make_model(OURS["llama"]), tmp_path / "model")
    assert os.listdir(tmp_path / "model") == ["notes"] and os.listdir(tmp_path) == ["model"]


def test_an_empty_folder_behind_a_link_may_be_filled(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    save_pretrained(make_model(OURS["llama"]), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path / "disk")) == ["config.json", "model.safetensors"]
    with pytest.raises(FileExistsError, match="disk exists and holds something"):
        save_pretrained(make_model(OURS["llama"]), tmp_path / "link")


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        save_pretrained(make_model(OURS["llama"]), tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="model could not be written: No space left"):
        save_pretrained(make_model(OURS["llama"]), tmp_path / "model")
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="There is no folder .*such to write folder into"):
        save_pretrained(make_model(OURS["llama"]), tmp_path / "no/such/folder")
    monkeypatch.setattr(weights, "save_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(make_model(OURS["llama"]), tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_paths_as_people_write_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="is the working directory"):
        save_pretrained(make_model(OURS["llama"]), ".")
    save_pretrained(make_model(OURS["llama"]), "~/model")
    assert os.listdir(tmp_path) == ["model"]
    assert load_pretrained("~/model").config == load_pretrained("model").config
    with pytest.raises(FileNotFoundError, match="no folder or file models.small.gguf"):
        load_pretrained("models/small.gguf")  # a file that is missing, not a name on the hub


def test_a_model_without_memory_is_not_written(tmp_path):
    with torch.device("meta"):
        model = Decoder(OURS["llama"])
    with pytest.raises(ValueError, match="on the meta device"):
        save_pretrained(model, tmp_path / "model")


class Ternary(torch.nn.Linear):
    """A layer with the names and shapes of the one it takes the place of, and another way to compute."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.sign())


def with_ternary_layers(model: Decoder) -> None:
    def change(name, linear):
        new = Ternary(linear.in_features, linear.out_features, bias=False)
        new.load_state_dict(linear.state_dict())
        return new

    assert len(replace_linears(model, change)) == 21


def with_a_wrapper(model: Decoder) -> None:
    model.layers[0].mlp.up_proj = torch.nn.Sequential(model.layers[0].mlp.up_proj)


def with_a_narrow_layer(model: Decoder) -> None:
    model.layers[1].mlp.up_proj = torch.nn.Linear(64, 95, bias=False)


def with_a_buffer(model: Decoder) -> None:
    model.layers[2].self_attn.o_proj.register_buffer("scale", torch.ones(1))


def without_its_last_layer(model: Decoder) -> None:
    del model.layers[2]


def with_another_class(model: Decoder) -> None:
    model.__class__ = type("Other", (Decoder,), {})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            with_ternary_layers,
            r"layers.0.self_attn.q_proj is \S*\.Ternary, and in a plain decoder torch\S+Linear",
        ),
        (with_a_wrapper, r"layers.0.mlp.up_proj is \S+Sequential, and in a plain decoder \S+Linear"),
        (with_a_narrow_layer, r"layers.1.mlp.up_proj.weight is of shape \(95, 64\), .* of shape \(96, 64\)"),
        (
            with_a_buffer,
            r"layers.2.self_attn.o_proj.scale is of shape \(1,\), and in a plain decoder missing",
        ),
        (without_its_last_layer, r"layers.2 is missing, and in a plain decoder \S+Block"),
        (with_another_class, r"the model itself is \S+Other, and in a plain decoder \S+Decoder"),
    ],
)
def test_a_model_that_was_changed_inside_is_not_written(change, sentence, tmp_path):
    model = make_model(OURS["llama"])
    change(model)
    with pytest.raises(ValueError, match=f"changed inside: {sentence}.*Merge or undo"):
        save_pretrained(model, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_as_asked_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        save_pretrained(make_model(OURS["llama"]), tmp_path / "model", max_shard_bytes=0)
    with pytest.raises(ValueError, match="has multipliers"):
        save_pretrained(make_model(OURS["minicpm"]), tmp_path / "model", model_type="llama")
    assert os.listdir(tmp_path) == []


def tied_by_hand() -> Decoder:
    model = make_model(OURS["llama, untied"])
    model.lm_head.weight = model.embed_tokens.weight
    return model


def a_layer_twice() -> Decoder:
    model = make_model(OURS["llama"])
    model.layers[1] = model.layers[0]
    return model


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (tied_by_hand, "embed_tokens.weight and lm_head.weight"),
        (a_layer_twice, "layers.0.input_layernorm.weight and layers.1.input_layernorm.weight"),
    ],
)
def test_one_tensor_under_two_names_is_not_written(make, names, tmp_path):
    """Written as two, they would be trained apart from then on."""
    with pytest.raises(ValueError, match=f"{names} are one tensor under two names"):
        save_pretrained(make(), tmp_path / "model")
    assert os.listdir(tmp_path) == []


# Ids that end a text.

ENDS = {"none": (), "one": (7,), "several": (2, 73, 11)}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("name", ["llama", "minicpm", "minicpm3", "mixtral"])
def test_the_ids_that_end_a_text_are_kept(name, ends, tmp_path):
    model = make_model(replace(OURS[name], eos_token_id=ends))
    save_pretrained(model, tmp_path / "a")
    spelt = {(): None, (7,): 7}.get(ends, list(ends))
    assert json.loads((tmp_path / "a/config.json").read_text())["eos_token_id"] == spelt
    assert (tmp_path / "a/generation_config.json").exists() == bool(ends)
    save_pretrained(load_pretrained(tmp_path / "a"), tmp_path / "b")
    assert load_pretrained(tmp_path / "b").config == model.config


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_the_ids_that_end_a_text_survive_transformers(family, ends, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(replace(OURS["llama"], eos_token_id=ends))
    save_pretrained(model, tmp_path / "ours", model_type=family)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    found = theirs.generation_config.eos_token_id
    assert tuple([found] if isinstance(found, int) else found or ()) == ends
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_pretrained(tmp_path / "theirs").config == model.config


@pytest.mark.parametrize(
    "generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": 3}, {"eos_token_id": [4, 5]}]
)
@pytest.mark.parametrize(
    "config", [{}, {"eos_token_id": None}, {"eos_token_id": 7}, {"eos_token_id": [8, 9]}]
)
@pytest.mark.parametrize("family", ["granite", "minicpm3"])
def test_a_text_ends_where_generate_of_transformers_ends_it(family, config, generation, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(OURS[{"granite": "minicpm"}.get(family, family)])
    save_pretrained(model, tmp_path / "model", model_type=family)
    values = json.loads((tmp_path / "model/config.json").read_text())
    del values["eos_token_id"]
    (tmp_path / "model/config.json").write_text(json.dumps(values | config))
    if generation is not None:
        (tmp_path / "model/generation_config.json").write_text(json.dumps({"top_p": 0.8} | generation))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eos_token_id
    ours = load_pretrained(tmp_path / "model").config.eos_token_id
    assert ours == tuple([theirs] if isinstance(theirs, int) else theirs or ())


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ends", [99, -1, [2, 99], "</s>", 2.0, True, [[2]], {"a": 1}])
def test_ids_outside_the_vocabulary_are_refused_by_file(file, ends, saved):
    (saved / "generation_config.json").write_text("{}")
    change_config(saved, file, eos_token_id=ends)
    with pytest.raises(ValueError, match=f"/{file}: eos_token_id is .*; expected ids of the vocabulary"):
        load_pretrained(saved)


def test_a_generation_config_that_is_none_is_refused(saved):
    (saved / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        load_pretrained(saved)


# Tokenizers.

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 3
TEXTS = [
    TEXT,
    "  def f(x):\n\treturn x ** 2  # naïve café 帽 🙂\n\n",
    "a<|end|>b <|end|> c",
    "1984's 12,345",
    "",
]


def make_tokenizer() -> Tokenizer:
    """A byte-level vocabulary with a token that ends a text, the way released ones are."""
    tokenizer = train_tokenizer(TEXT, 300)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<|user|>", special=False, normalized=False)])
    return tokenizer


def wide_model(family: str, **changes) -> Decoder:
    """A small model of a family that transformers knows, with a vocabulary for `make_tokenizer`."""
    name = {"granite": "minicpm"}.get(family, family)
    return make_model(replace(OURS[name], vocab_size=320, **changes))


@pytest.mark.parametrize("family", ["llama", "granite", "minicpm3", "mixtral"])
@pytest.mark.parametrize("kind", ["tokenizers", "ours"])
@pytest.mark.filterwarnings("ignore:The model ends texts at")
def test_stock_transformers_opens_a_folder_and_writes_the_same_tokens(family, kind, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fast = make_tokenizer() if kind == "tokenizers" else train_tokenizer(TEXT, 300)
    tokenizer = fast if kind == "tokenizers" else BytePairTokenizer.from_tokenizers(fast)
    end = fast.token_to_id("<|end|>") if kind == "tokenizers" else 5
    model = wide_model(family, eos_token_id=end)
    save_pretrained(model, tmp_path / "model", tokenizer, model_type=family)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in TEXTS:
        ids = fast.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == fast.decode(ids, skip_special_tokens=False) == text
        assert load_tokenizer(tmp_path / "model").encode(text).ids == ids
    assert theirs.eos_token == ("<|end|>" if kind == "tokenizers" else None)
    assert theirs.model_max_length == 64
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.tensor([fast.encode("a single man").ids])
    with torch.no_grad():
        assert_close(model(ids), reference(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_tokenizer_reads_whole_texts_wherever_it_came_from(tmp_path):
    whole = make_tokenizer()
    ids = whole.encode(TEXT).ids
    cutting = make_tokenizer()
    cutting.enable_truncation(8)
    cutting.enable_padding(length=2048, pad_id=0, pad_token="!")
    save_pretrained(wide_model("llama"), tmp_path / "ours", cutting)
    assert cutting.truncation and cutting.padding and len(cutting.encode(TEXT).ids) == 2048  # as it was
    written = json.loads((tmp_path / "ours/tokenizer.json").read_text())
    assert written["truncation"] is None and written["padding"] is None
    (tmp_path / "theirs").mkdir()
    cutting.save(str(tmp_path / "theirs/tokenizer.json"))
    assert load_tokenizer(tmp_path / "theirs").encode(TEXT).ids == ids


def test_what_begins_a_text_is_kept(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer()
    end = tokenizer.token_to_id("<|end|>")
    tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", end)])
    save_pretrained(wide_model("llama"), tmp_path / "model", tokenizer)
    expected = tokenizer.encode("a man").ids
    assert expected[0] == end
    assert load_tokenizer(tmp_path / "model").encode("a man").ids == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("a man")["input_ids"] == expected


@pytest.mark.parametrize("ends", [(64,), (301,)], ids=["an ordinary token", "an added one"])
def test_an_end_that_is_no_special_token_is_not_made_one(ends, tmp_path):
    """transformers would cut every text at it."""
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer()
    assert tokenizer.id_to_token(301) == "<|user|>"
    said = pytest.warns(UserWarning, match="ends texts at 'a'") if ends == (64,) else nullcontext()
    with said:
        save_pretrained(wide_model("llama", eos_token_id=ends), tmp_path / "model", tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.eos_token is None
    for text in [*TEXTS, "aaa baa abacus", "x<|user|>y"]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids


@pytest.mark.filterwarnings("ignore:The model ends texts at")
def test_the_first_special_end_is_named(tmp_path):
    tokenizer = make_tokenizer()
    save_pretrained(wide_model("llama", eos_token_id=(3, 300, 301)), tmp_path / "model", tokenizer)
    assert json.loads((tmp_path / "model/tokenizer_config.json").read_text())["eos_token"] == "<|end|>"


def test_another_models_tokenizer_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="gives ids up to 301, and the model knows 99 ids"):
        save_pretrained(make_model(OURS["llama"]), tmp_path / "model", make_tokenizer())
    with pytest.raises(TypeError, match="tokenizer"):
        save_pretrained(make_model(OURS["llama"]), tmp_path / "model", "granite")
    assert os.listdir(tmp_path) == []


def test_a_tokenizer_of_a_folder(saved):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json.*sentencepiece"):
        load_tokenizer(saved)
    Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).save(str(saved / "tokenizer.json"))
    assert load_tokenizer(saved).encode("a").ids == [0]
    content = (saved / "tokenizer.json").read_text()
    (saved / "tokenizer.json").write_text(
        content.replace('"?":1', f'"?":{2**31}').replace('"?": 1', f'"?": {2**31}')
    )
    with pytest.raises(ValueError, match="tokenizer.json gives a token the id 2,147,483,648; expected less"):
        load_tokenizer(saved)
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        load_tokenizer(saved)


def give_two_tokens_one_id(described: dict) -> None:
    described["model"]["vocab"]["L"] = described["model"]["vocab"]["e"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda d: d["post_processor"]["special_tokens"].clear(),
            r"json: The tokenizer's post-processor cannot be applied .* Does it name a token without its id\?",
        ),
        (
            lambda d: d["model"].update(continuing_subword_prefix="é"),
            "json is not a tokenizer.json of the tokenizers package: ",
        ),
        (give_two_tokens_one_id, "json gives 'L' and 'e' the same id, 68; expected an id of its own"),
    ],
)
def test_a_tokenizer_at_which_the_package_panics_or_stumbles_is_refused_by_name(damage, sentence, tmp_path):
    tokenizer = train_tokenizer("the cat and the hat", 262)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 262)])
    described, file = json.loads(tokenizer.to_str()), tmp_path / "t.json"
    file.write_text(json.dumps(described))
    assert read_tokenizer(file).encode("the").ids == tokenizer.encode("the").ids
    damage(described)
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=sentence):
        read_tokenizer(file)
    assert not is_tokenizer(file, [0])


def listing(*tokens: str, first: int) -> str:
    listed = {str(first + i): {"content": token, "special": True} for i, token in enumerate(tokens)}
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": listed})


def test_control_tokens_that_the_settings_list_are_added(tmp_path):
    """As transformers does, which is the oracle; in a chat they would be spelt in letters."""
    from transformers import AutoTokenizer

    tokenizer, folder = make_tokenizer(), tmp_path / "model"
    save_pretrained(wide_model("llama"), folder, tokenizer)
    first, plain = tokenizer.get_vocab_size(), load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(listing("<|im_start|>", "<|im_end|>", first=first))
    text, ours = "<|im_start|>a<|im_end|>", load_tokenizer(folder)
    expected = [first, *plain.encode("a").ids, first + 1]
    assert ours.encode(text).ids == AutoTokenizer.from_pretrained(folder)(text).input_ids == expected
    assert ours.encode("a?").ids == plain.encode("a?").ids
    (folder / "tokenizer_config.json").write_text(listing("<|im_start|>", first=first + 1))
    with pytest.raises(
        ValueError, match=f"lists '<|im_start|>' as id {first + 1}, .* it has id {first}. The two"
    ):
        load_tokenizer(folder)
    for wrong in ([], {"a": {}}, {"1": {"content": 5}}, {"1": "a"}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": wrong}))
        with pytest.raises(ValueError, match="as added tokens; expected tokens and their ids"):
            load_tokenizer(folder)


# Chat templates.

TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>\r\n{{ message.content }}\n{% endfor %} 帽"


def test_a_chat_template_is_kept_and_is_transformers_own(tmp_path):
    from transformers import AutoTokenizer

    save_pretrained(wide_model("llama"), tmp_path / "model", make_tokenizer(), chat_template=TEMPLATE)
    assert load_chat_template(tmp_path / "model").replace("\r\n", "\n") == TEMPLATE.replace("\r\n", "\n")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.chat_template == load_chat_template(tmp_path / "model")
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_chat_template(tmp_path / "theirs") == theirs.chat_template
    save_pretrained(wide_model("llama"), tmp_path / "none", make_tokenizer())
    assert load_chat_template(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"chat_template": None}, None),
        ({"chat_template": "a {{ b }}"}, "a {{ b }}"),
        (
            {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]},
            "d",
        ),
    ],
)
def test_a_chat_template_of_an_older_release(settings, expected, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_chat_template(tmp_path) == expected
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert load_chat_template(tmp_path) == TEMPLATE.replace("\r\n", "\n")  # the file counts


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ('{"chat_template": 1}', "chat_template, holds 1; expected a text"),
        ('{"chat_template": []}', "holds templates named ; none is the default"),
        ('{"chat_template": [{"name": "rag", "template": "t"}, 7]}', "named rag; none is the default"),
        ('{"chat_template": [{"name": "default"}]}', None),
        ('{"chat_template": [{"name": "default", "template": [1]}]}', r"holds \[1\]; expected a text"),
        ('{"chat_template": "a", "chat_template": "b"}', "the name 'chat_template' stands there twice"),
        ("[]", "expected names with values"),
    ],
)
def test_a_damaged_chat_template_is_named(settings, sentence, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(settings)
    if sentence is None:
        assert load_chat_template(tmp_path) is None
        return
    with pytest.raises(ValueError, match=f"tokenizer_config.json.*{sentence}"):
        load_chat_template(tmp_path)


def test_a_chat_template_that_is_no_text_or_nowhere(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8"):
        load_chat_template(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder or file .*nowhere"):
        load_chat_template(tmp_path / "nowhere")


def test_a_chat_template_in_gguf():
    template = load_chat_template(smollm2_file())
    assert template.startswith("{% for message in messages %}") and "<|im_start|>" in template


# The promised name.


def test_the_package_offers_it():
    from minicpm_lite import load_pretrained as promised

    assert promised is load_pretrained is minicpm_lite.load_pretrained
    assert "load_pretrained" in dir(minicpm_lite) and "load_pretrained" in minicpm_lite.__all__
    with pytest.raises(AttributeError, match="module 'minicpm_lite' has no attribute 'load_pretraind'"):
        minicpm_lite.load_pretraind  # noqa: B018


def test_to_list_the_models_torch_is_not_imported():
    program = "import sys, minicpm_lite as m; m.list_configs(); dir(m); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# Wrong readers that people really write. Each must differ from the reference by far more than rounding.
WRONG = {
    "gate and up exchanged": lambda n: n.replace("gate_proj", "x").replace("up_proj", "gate_proj").replace("x", "up_proj"),
    "norms exchanged": lambda n: n.replace("input_", "x").replace("post_attention_", "input_").replace("x", "post_attention_"),
    "key and value exchanged": lambda n: n.replace("k_proj", "x").replace("v_proj", "k_proj").replace("x", "v_proj"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_wrong_readers_are_told_apart(saved, name, monkeypatch):
    right = load_pretrained(saved)(IDS)
    real = checkpoints.stored_name
    monkeypatch.setattr(checkpoints, "stored_name", lambda own, family: real(WRONG[name](own), family))
    assert (load_pretrained(saved)(IDS) - right).abs().max() > 1e-2


@torch.no_grad()
def test_a_wrong_multiplier_is_told_apart(tmp_path):
    saved = tmp_path / "model"
    save_pretrained(make_model(OURS["minicpm"]), saved, model_type="minicpm")
    right = load_pretrained(saved)(IDS)
    for change in (dict(scale_emb=1), dict(scale_depth=2.0), dict(dim_model_base=16)):
        values = json.loads((saved / "config.json").read_text())
        change_config(saved, **change)
        wrong = load_pretrained(saved)
        (saved / "config.json").write_text(json.dumps(values))
        assert (wrong(IDS) - right).abs().max() > 1e-2
        assert wrong.config == replace(OURS["minicpm"], **change)


def test_special_tokens_that_a_template_may_name(tmp_path):
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None,
                "model_max_length": 9, "added_token": 3}  # fmt: skip
    assert load_special_tokens(tmp_path) == {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json"):
        load_special_tokens(tmp_path)


@pytest.mark.parametrize("lists_added_tokens", [False, True])
@pytest.mark.parametrize("named", [{}, {"bos_token": "<s>", "eos_token": "</s>"}])
def test_special_tokens_of_an_older_folder_are_those_of_transformers(tmp_path, lists_added_tokens, named):
    """There a file of its own has the last word."""
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer("some plain words of a chat " * 20, 290)
    tokenizer.add_special_tokens(["<s>", "</s>", "<|end|>"])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | named
    if lists_added_tokens:
        added = tokenizer.get_added_tokens_decoder().items()
        settings["added_tokens_decoder"] = {
            i: {"content": each.content, "special": True} for i, each in added
        }
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    older = {"bos_token": {"content": "<s>"}, "eos_token": "<|end|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    theirs = AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    assert load_special_tokens(tmp_path) == theirs
    assert (theirs.get("eos_token") == "<|end|>") == (not lists_added_tokens)


def test_special_tokens_of_a_gguf_file():
    assert load_special_tokens(smollm2_file()) == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


@pytest.mark.parametrize("ordinary", [",", "a", "<|user|>", "not in it"])
def test_a_special_token_that_the_tokenizer_finds_ordinary_is_not_written(ordinary, tmp_path):
    """GGUF files name such, as a comma that begins texts; transformers would leave every comma out of a text."""
    from transformers import AutoTokenizer

    named = {"bos_token": ordinary, "eos_token": "<|end|>"}
    save_pretrained(wide_model("llama"), tmp_path / "model", make_tokenizer(), special_tokens=named)
    assert load_special_tokens(tmp_path / "model") == {"eos_token": "<|end|>"}
    theirs, text = AutoTokenizer.from_pretrained(tmp_path / "model"), "a man, a fortune<|user|>"
    ids = make_tokenizer().encode(text).ids
    assert theirs(text)["input_ids"] == load_tokenizer(tmp_path / "model").encode(text).ids == ids
    assert theirs.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_are_written_with_the_template_that_names_them(tmp_path):
    """As another release names them: the end that a template writes need not be the first that ends a text."""
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<s>", "<|eot|>"])
    model = wide_model("llama", eos_token_id=(300, 303))
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    named = {"bos_token": "<s>", "eos_token": "<|eot|>", "unk_token": "<|end|>"}
    save_pretrained(model, tmp_path / "a", tokenizer, chat_template=template, special_tokens=named)
    assert load_special_tokens(tmp_path / "a") == named
    theirs = AutoTokenizer.from_pretrained(tmp_path / "a")
    talk = [{"role": "user", "content": "plain"}]
    expected = "<s>[user]plain<|eot|>"
    assert theirs.apply_chat_template(talk, tokenize=False) == expected
    ours = chat_template(load_chat_template(tmp_path / "a"), load_special_tokens(tmp_path / "a"))
    assert ours(talk) == expected
    for text in [*TEXTS, expected]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    save_pretrained(model, tmp_path / "b", tokenizer, special_tokens={"bos_token": "<s>"})
    assert load_special_tokens(tmp_path / "b") == {"bos_token": "<s>", "eos_token": "<|end|>"}


def test_a_tokenizer_in_a_folder_whose_name_is_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"s\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system knows no such names")
    tokenizer = train_tokenizer("the cat and the hat", 260)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    assert checkpoints.read_tokenizer(folder / "tokenizer.json").get_vocab() == tokenizer.get_vocab()
    with pytest.raises(FileNotFoundError):
        checkpoints.read_tokenizer(folder / "none.json")
