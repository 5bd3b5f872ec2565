"""Models in GGUF files: read as llama.cpp and transformers read them, put back as the decoder needs them."""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from minicpm_lite import ModelConfig
from minicpm_lite.config import LatentAttentionConfig, RopeScaling
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate
from minicpm_lite.pretrained import llama_cpp as module
from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer, save_pretrained
from minicpm_lite.pretrained.gguf import GGUFFile, read_gguf
from minicpm_lite.pretrained.llama_cpp import half_split_rows, load_gguf, stored_name

SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
    max_position_embeddings=64,
)
CONFIGS = {
    "llama": ModelConfig(**SHAPE, rope_theta=500.0, tie_word_embeddings=False, init_std=0.1),
    "minicpm": ModelConfig(**SHAPE, scale_emb=12, scale_depth=1.4, dim_model_base=32, init_std=0.1),
    "minicpm3": ModelConfig(
        **SHAPE | {"num_key_value_heads": 4}, head_dim=24, scale_emb=12, scale_depth=1.4, dim_model_base=256,
        latent_attention=LatentAttentionConfig(24, 16, 16, 8, 12), init_std=0.1,
    ),
    "granite": ModelConfig(**SHAPE, scale_emb=7, scale_depth=0.7, dim_model_base=8, init_std=0.1),
}  # fmt: skip
IDS = torch.arange(34).view(2, 17)


def make_model(config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def interleaved_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp's conversion orders the rows of queries and keys."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(
    path: Path,
    model: Decoder,
    architecture: str,
    without: tuple[str, ...] = (),
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    tensors: Mapping[str, torch.Tensor] = MappingProxyType({}),
    tensors_a_part: int = 0,
    **keys: object,
) -> Path:
    """A file as llama.cpp's conversion writes it, by gguf-py."""
    config = model.config
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
    }
    if architecture in ("minicpm", "granite"):
        values |= {
            "embedding_scale": float(config.scale_emb),
            "residual_scale": config.residual_scale,
            "logit_scale": config.width_ratio,
        }
    if architecture == "granite":
        values["attention.scale"] = config.head_dim**-0.5
    if latent := config.latent_attention:
        values |= {
            "attention.q_lora_rank": latent.q_lora_rank,
            "attention.kv_lora_rank": latent.kv_lora_rank,
            "attention.key_length": config.head_dim,
            "attention.value_length": latent.v_head_dim,
            "rope.dimension_count": latent.qk_rope_head_dim,
        }
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_a_part)
    for name, value in (values | keys).items():
        if name in without:
            continue
        kinds = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            bool: writer.add_bool,
        }
        whole = name if name.startswith("tokenizer.") else f"{architecture}.{name}"
        kinds[type(value)](whole, value)
    for name, tensor in model.state_dict().items():
        stored = stored_name(name)
        if stored in without:
            continue
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = interleaved_rows(tensor, heads)
        kind = quantization if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_llama_cpp_would_write_is_the_model(architecture, tmp_path):
    model = make_model(CONFIGS[architecture])
    read = load_pretrained(write_gguf(tmp_path / "model.gguf", model, architecture))
    assert read.config == ModelConfig(**SHAPE | vars(model.config) | {"init_std": 0.02})
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


def test_weights_are_those_that_transformers_reads(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_gguf(tmp_path / "model.gguf", make_model(CONFIGS["llama"]), "llama")
    config = LlamaConfig(**load_gguf_checkpoint(str(path))["config"] | {"vocab_size": SHAPE["vocab_size"]})
    reference = LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=reference)["tensors"]
    reference.load_state_dict(tensors)
    with torch.no_grad():
        assert_close(load_gguf(path)(IDS), reference(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_model_that_was_split_is_the_model(tmp_path):
    model = make_model(CONFIGS["minicpm"])
    write_gguf(tmp_path / "model.gguf", model, "minicpm", tensors_a_part=9)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 4
    for part in parts:
        read = load_pretrained(part).state_dict()
        assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())
    parts[3].unlink()
    with pytest.raises(FileNotFoundError, match="1 of them missing: model-00004-of-00004.gguf"):
        load_pretrained(parts[0])


def test_names_are_those_that_gguf_py_writes():
    for architecture, config in CONFIGS.items():
        mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], n_blocks=3)
        for name, _ in Decoder(config).named_parameters():
            theirs = name if name == "lm_head.weight" else f"model.{name}"
            assert stored_name(name) == mapping.get_name(theirs, try_suffixes=(".weight",))


def test_rows_go_back_to_where_they_were():
    weight = torch.randn(24, 5)
    for heads in (1, 2, 3):
        assert torch.equal(half_split_rows(interleaved_rows(weight, heads), heads), weight)


@torch.no_grad()
def test_rows_that_are_not_put_back_are_told_apart(tmp_path, monkeypatch):
    model = make_model(CONFIGS["minicpm"])
    path = write_gguf(tmp_path / "model.gguf", model, "minicpm")
    for wrong in (lambda w, heads: w, interleaved_rows, lambda w, heads: half_split_rows(w, 1)):
        monkeypatch.setattr(module, "half_split_rows", wrong)
        assert (load_gguf(path)(IDS) - model(IDS)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_are_unpacked(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    model = make_model(CONFIGS["minicpm"])
    read = load_gguf(write_gguf(tmp_path / "model.gguf", model, "minicpm", quantization=kind))
    for name in ("embed_tokens.weight", "layers.1.mlp.down_proj.weight"):
        tensor = model.state_dict()[name].numpy()
        expected = torch.from_numpy(gguf.dequantize(gguf.quantize(tensor, kind), kind))
        assert torch.equal(read.state_dict()[name], expected)


def test_the_type_in_memory_is_the_one_asked_for(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(CONFIGS["minicpm"]), "minicpm")
    assert {p.dtype for p in load_pretrained(path, torch.bfloat16).parameters()} == {torch.bfloat16}


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 6),
    emb=st.integers(1, 2400).map(lambda n: n / 100),
    depth=st.integers(1, 400).map(lambda n: n / 100),
    base=st.integers(8, 512),
)
def test_multipliers_come_back_as_they_were(layers, emb, depth, base):
    residual, logit = (np.float32(x).item() for x in (depth / layers**0.5, 64 / base))
    file = GGUFFile(
        Path("model.gguf"),
        {
            "minicpm.embedding_scale": np.float32(emb).item(),
            "minicpm.residual_scale": residual,
            "minicpm.logit_scale": logit,
        },
        {},
    )
    found = module._multipliers(file, "minicpm", 64, layers)
    assert found == {
        "scale_emb": emb,
        "scale_depth": None if residual == 1 else depth,
        "dim_model_base": None if logit == 1 else base,
    }


def test_missing_multipliers_are_llama_cpps(tmp_path):
    keys = ("embedding_scale", "residual_scale", "logit_scale")
    path = write_gguf(tmp_path / "model.gguf", make_model(CONFIGS["minicpm"]), "minicpm", without=keys)
    config = load_gguf(path).config
    assert (config.scale_emb, config.scale_depth, config.dim_model_base) == (12, 1.4, 256)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(without=("embedding_length",)), "lacks the key minicpm.embedding_length. Was it converted"),
        (dict(without=("attention.layer_norm_rms_epsilon",)), "lacks the key minicpm.attention.layer_norm"),
        (dict(without=("token_embd.weight",)), "lacks token_embd.weight, the embedding table"),
        (dict(without=("blk.1.attn_k.weight",)), "1 missing: blk.1.attn_k.weight"),
        (dict(feed_forward_length=32), "of another shape: blk.0.ffn_gate.weight"),
        (dict(embedding_length="wide"), "minicpm.embedding_length is 'wide'; expected a whole number"),
        (dict(block_count=1.5), "minicpm.block_count is 1.5; expected a whole number"),
        (dict(residual_scale="much"), "minicpm.residual_scale is 'much'; expected a number"),
        (dict(logit_scale=-1.0), "minicpm.logit_scale is -1.0; expected a number"),
        ({"attention.layer_norm_rms_epsilon": "small"}, "layer_norm_rms_epsilon is 'small'"),
        ({"rope.freq_base": math.inf}, "rope.freq_base is inf"),
        (dict(context_length=0), "minicpm.context_length is 0"),
        (dict(expert_count=8), "minicpm.expert_count is 8; only 0 is read"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8; only 16"),
        ({"attention.causal": False}, "attention.causal is False; only True"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, sentence, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(CONFIGS["minicpm"]), "minicpm", **change)
    with pytest.raises(ValueError, match=f"model.gguf.*{sentence}"):
        load_gguf(path)


def test_another_architecture_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(CONFIGS["llama"]), "qwen2")
    with pytest.raises(
        ValueError, match="of architecture 'qwen2'; read are llama, minicpm, minicpm3, granite"
    ):
        load_gguf(path)


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (1_000, "holds 30 tensors, too few for the 1,000 layers"),
        (2**32 - 1, "num_hidden_layers is 4294967295; at most 1,000"),
    ],
)
def test_more_blocks_than_tensors_are_refused_at_once(count, sentence, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(CONFIGS["llama"]), "llama", block_count=count)
    with pytest.raises(ValueError, match=sentence):
        load_gguf(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(without=("attention.q_lora_rank",)), "lacks the key minicpm3.attention.q_lora_rank"),
        (dict(without=("attention.key_length",)), "lacks the key minicpm3.attention.key_length"),
        (
            {"attention.kv_lora_rank": "low"},
            "minicpm3.attention.kv_lora_rank is 'low'; expected a whole number",
        ),
        (
            {"rope.dimension_count": 24},
            "rope.dimension_count is 24; expected less than attention.key_length, 24",
        ),
        ({"attention.head_count_kv": 2}, "attention.head_count_kv is 2; only 4 is read"),
        (
            {"attention.value_length": 16},
            "of another shape: blk.0.attn_",
        ),
        (dict(without=("attention.value_length",)), "of another shape"),  # then it is width / heads, 16
    ],
)
def test_latent_attention_that_does_not_fit_is_named(change, sentence, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(CONFIGS["minicpm3"]), "minicpm3", **change)
    with pytest.raises(ValueError, match=f"model.gguf.*{sentence}"):
        load_gguf(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(without=("logit_scale",)), "lacks the key granite.logit_scale"),
        ({"attention.scale": 0.5}, "multiplies scores by 0.5 .*; the decoder does by .*, 0.25"),
        ({"attention.scale": "root"}, "multiplies scores by 'root'"),
        ({"rope.scaling.finetuned": False}, "rotates nothing"),
    ],
)
def test_other_granites_are_refused(change, sentence, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(CONFIGS["granite"]), "granite", **change)
    with pytest.raises(ValueError, match=f"model.gguf.*{sentence}"):
        load_gguf(path)


def test_missing_multipliers_of_granite_are_one(tmp_path):
    keys = ("embedding_scale", "residual_scale", "attention.scale")
    path = write_gguf(tmp_path / "model.gguf", make_model(CONFIGS["granite"]), "granite", without=keys)
    config = load_gguf(path).config
    assert (config.scale_emb, config.residual_scale, config.width_ratio) == (1, 1, 8)


# Rotary frequencies.

SHORT, LONG = torch.linspace(1, 2, 8), torch.linspace(1, 30, 8)
TABLES = {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG}


def longrope(
    short: torch.Tensor, long: torch.Tensor, attention: float = 1.0, original: int = 64
) -> RopeScaling:
    return RopeScaling(
        "longrope",
        original,
        short_factor=short.tolist(),
        long_factor=long.tolist(),
        attention_factor=attention,
    )


@pytest.mark.parametrize(
    ("keys", "tensors", "expected"),
    [
        ({}, {}, None),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, {}, RopeScaling("linear", 64, factor=4.0)),
        ({"scaling.factor": 4.0}, {}, RopeScaling("linear", 64, factor=4.0)),
        ({"scale_linear": 4.0}, {}, RopeScaling("linear", 64, factor=4.0)),
        ({"scaling.factor": 2.0, "scale_linear": 4.0}, {}, RopeScaling("linear", 64, factor=2.0)),
        ({"scaling.type": "none", "scaling.factor": 4.0}, {}, None),
        ({"scaling.type": "linear"}, {}, None),
        ({"scaling.factor": 0.0}, {}, None),
        ({"scaling.factor": 1.0, "scaling.attn_factor": 1.0}, {}, None),
        (
            {"scaling.type": "linear", "scaling.factor": 2.0, "scaling.original_context_length": 16}, {},
            RopeScaling("linear", 16, factor=2.0),
        ),
        ({"scaling.type": "longrope"}, TABLES, longrope(SHORT, LONG)),
        (
            {"scaling.type": "longrope", "scaling.attn_factor": 1.25, "scaling.original_context_length": 16}, TABLES,
            longrope(SHORT, LONG, 1.25, 16),
        ),
        ({"scaling.type": "longrope", "scaling.factor": 2.0}, TABLES, longrope(2 * SHORT, 2 * LONG)),
        ({}, {"rope_freqs.weight": LONG}, longrope(LONG, LONG)),
        ({"scaling.factor": 2.0}, {"rope_freqs.weight": LONG}, longrope(2 * LONG, 2 * LONG)),
        ({"scaling.type": "none", "scaling.factor": 2.0}, {"rope_freqs.weight": LONG}, longrope(LONG, LONG)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("architecture", ["llama", "minicpm"])
def test_frequencies_are_divided_as_llama_cpp_divides_them(architecture, keys, tensors, expected, tmp_path):
    """As llama-model.cpp reads the keys: "linear" is the default, and the factor counts with every type but "none"."""
    keys = {f"rope.{name}": value for name, value in keys.items()}
    path = write_gguf(
        tmp_path / "model.gguf", make_model(CONFIGS[architecture]), architecture, tensors=tensors, **keys
    )
    assert load_gguf(path).config.rope_scaling == expected


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"scaling.type": "yarn", "scaling.factor": 2.0}, "scales its rotary frequencies by 'yarn'"),
        ({"scaling.type": "longrope"}, '"longrope" needs short_factor'),
        ({"scaling.factor": 0.5}, "factor is 0.5; a context is made longer"),
        ({"scaling.factor": "wide"}, "factor is 'wide'; expected a number"),
        ({"scaling.attn_factor": 1.25}, "multiplies cosine and sine by 1.25"),
        ({"scaling.factor": 2.0, "scaling.attn_factor": 1.25}, "multiplies cosine and sine by 1.25"),
    ],
)
def test_other_frequencies_are_refused(keys, sentence, tmp_path):
    keys = {f"rope.{name}": value for name, value in keys.items()}
    path = write_gguf(tmp_path / "model.gguf", make_model(CONFIGS["llama"]), "llama", **keys)
    with pytest.raises(ValueError, match=f"model.gguf.*{sentence}"):
        load_gguf(path)


# Ids that end a text.


def test_ids_that_end_a_text_are_those_of_the_three_keys(tmp_path):
    keys = {
        f"tokenizer.ggml.{kind}_token_id": value for kind, value in {"eom": 11, "eot": 8, "eos": 2}.items()
    }
    path = write_gguf(tmp_path / "model.gguf", make_model(CONFIGS["llama"]), "llama", **keys)
    assert load_gguf(path).config.eos_token_id == (2, 8, 11)
    save_pretrained(load_gguf(path), tmp_path / "folder")
    assert load_pretrained(tmp_path / "folder").config.eos_token_id == (2, 8, 11)
    keys["tokenizer.ggml.eot_token_id"] = 99
    path = write_gguf(tmp_path / "model.gguf", make_model(CONFIGS["llama"]), "llama", **keys)
    with pytest.raises(
        ValueError, match=r"model.gguf: eos_token_id is \[2, 99, 11\]; expected ids of the voc"
    ):
        load_gguf(path)


def test_a_sentencepiece_model_that_does_not_say_ends_with_token_2(tmp_path):
    """As in llama.cpp, and as its tokenizer here ends texts."""
    model = make_model(CONFIGS["llama"])
    for kind, ends in (("llama", (2,)), ("gpt2", ())):
        keys = {"tokenizer.ggml.model": kind}
        path = write_gguf(tmp_path / f"{kind}.gguf", model, "llama", **keys)
        assert load_gguf(path).config.eos_token_id == ends


# A real model.


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return smollm2_file()


def test_its_ids_that_end_a_text(smollm2):
    file = read_gguf(smollm2)
    assert module._ends(file) == [2] and file.metadata["tokenizer.ggml.tokens"][2] == "<|im_end|>"


PROMPTS = [
    "What is the capital of France?",
    "List three colours.",
    "Explain why the sky is blue to a child.",
]


@pytest.fixture
def one_thread():
    """Two threads that wait for each other crawl on a machine that is busy with something else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def read_once(monkeypatch):
    """transformers reads a file twice, and makes the table of its names again for each module of the model."""
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))


@pytest.mark.slow  # 135M parameters are unpacked twice and write 72 tokens
@torch.no_grad()
def test_a_real_model_writes_what_transformers_writes(smollm2, one_thread, read_once):
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model, tokenizer = load_pretrained(smollm2), load_tokenizer(smollm2)
    with torch.device("meta"):
        reference = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(str(smollm2))["config"])).eval()
    tensors = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=reference)["tensors"]
    own = model.state_dict()
    assert len(tensors) == len(own) == 272
    for name, tensor in tensors.items():
        assert torch.equal(own[name.removeprefix("model.")], tensor), name
    del tensors, tensor
    # the reference takes our tensors, so the weights are in memory once
    reference.load_state_dict(
        {f"model.{name}": tensor for name, tensor in own.items()}
        | {"lm_head.weight": own["embed_tokens.weight"]},
        assign=True,
    )
    reference.model.rotary_emb = type(reference.model.rotary_emb)(reference.config)
    for prompt in PROMPTS:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(text).ids])
        assert_close(model(ids), reference(ids).logits, atol=1e-3, rtol=1e-3)
        expected = reference.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        cache, newest, written = KVCache(ids.shape[1] + 12), ids, []
        while len(written) < len(expected):
            newest = model(newest, cache)[:, -1:].argmax(-1)
            written.append(newest.item())
        assert written == expected
    # without being told, it stops where its file says that a text ends
    ids = torch.tensor(
        [tokenizer.encode("<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n").ids]
    )
    answer = generate(model, ids, max_new_tokens=200)[0, ids.shape[1] :].tolist()
    assert len(answer) < 200 and answer[-1] == tokenizer.token_to_id("<|im_end|>") not in answer[:-1]
