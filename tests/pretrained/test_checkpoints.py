"""Checkpoints: written and read by transformers and by us, nothing lost on the way, and every damage named."""

import json
import os
import pickle
import shutil
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
from minicpm_lite.language.decoder import Decoder, fold_to_llama
from minicpm_lite.language.tokenizer import BytePairTokenizer, train_tokenizer
from minicpm_lite.pretrained import checkpoints, weights
from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer, save_pretrained

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


def change_config(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


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
    assert "config.json" in asked[0][1] and not any(p.endswith((".bin", "*")) for p in asked[0][1])
    with pytest.raises(FileNotFoundError, match="no folder no/one, and the hub gave no model.*404"):
        load_pretrained("no/one")
    assert [name for name, _ in asked] == ["openbmb/MiniCPM4-0.5B", "no/one"]


def test_without_the_hub_package_the_command_is_named(monkeypatch):
    import sys

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


def test_a_model_that_was_changed_inside_is_not_written(tmp_path):
    model = make_model(OURS["llama"])
    model.layers[0].mlp.up_proj = torch.nn.Sequential(model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match="differ from those of a plain decoder in 2: .*Merge or undo"):
        save_pretrained(model, tmp_path / "model")
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        save_pretrained(make_model(OURS["llama"]), tmp_path / "model", max_shard_bytes=0)
    with pytest.raises(ValueError, match="has multipliers"):
        save_pretrained(make_model(OURS["minicpm"]), tmp_path / "model", model_type="llama")
    assert os.listdir(tmp_path) == []


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
def test_a_wrong_multiplier_is_told_apart(saved):
    right = load_pretrained(saved)(IDS)
    for change in (dict(scale_emb=1), dict(scale_depth=2.0), dict(dim_model_base=16)):
        values = json.loads((saved / "config.json").read_text())
        change_config(saved, **change)
        wrong = load_pretrained(saved)
        (saved / "config.json").write_text(json.dumps(values))
        assert (wrong(IDS) - right).abs().max() > 1e-2
        assert wrong.config == replace(OURS["minicpm"], **change)


