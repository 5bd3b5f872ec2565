"""Models as llama.cpp stores them in GGUF files: architectures llama, minicpm, minicpm3 and granite.

Sources: llama.cpp's conversion, src/llama-model.cpp and src/models.

Choices, and the traps behind them:

- llama.cpp turns neighbours (2i, 2i+1), this library turns (i, i + head_dim/2). So rows of the query and key
  matrices lie in another order, and are put back here; but not in "minicpm3", where llama.cpp turns as we do.
- The multipliers of "minicpm" and "granite" are three keys. Older files lack them; then those hold with which
  MiniCPM was trained; they are llama.cpp's fallbacks, but for the scale of logits, whose inverse it takes.
  Those of "minicpm3" stand in llama.cpp's code alone, whatever the model was trained with.
- llama.cpp norms the latents of "minicpm3" with the epsilon of all norms; we do with 1e-6, as it was trained.
- A file without ``output.weight`` has tied tables.
- Every frequency is divided by ``rope.scaling.factor``, or by the older ``rope.scale_linear``, unless the
  type is "none": a missing type means "linear". A missing ``attn_factor`` is 1, whatever LongRoPE's paper
  says.
- Three keys name ids that end a text: eos, eot (of a turn) and eom (of a message). Without the first,
  sentencepiece's is 2. llama.cpp stops at other tokens too, by how they are spelt; that is a guess, and not
  made here.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from reprlib import repr as shown

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..config import (
    LatentAttentionConfig,
    ModelConfig,
    RopeScaling,
    require_positive_integer,
    require_positive_number,
)
from ..language.decoder import Decoder
from .assemble import assemble, empty_decoder
from .gguf import GGUFFile, read_gguf
from .gguf_tokenizer import special_id

__all__ = ["half_split_rows", "load_gguf"]

_ARCHITECTURES = ("llama", "minicpm", "minicpm3", "granite")
_TABLES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_BLOCK = {  # the decoder's names within a block: those of GGUF
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def load_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder from a GGUF file, or from any part of one that was split, its weights unpacked.

    Raises:
        FileNotFoundError: there is no such file, or a part of it is missing.
        ValueError: the file is damaged, lacks a key, or holds another architecture or type of tensor.
        ImportError: the package gguf is missing.
    """
    file = read_gguf(path)
    config = _config(file)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in file.tensors:
            tensor = file.read(name)
            if name.endswith("attn_q.weight"):
                tensor = half_split_rows(tensor, config.num_attention_heads)
            elif name.endswith("attn_k.weight"):
                tensor = half_split_rows(tensor, config.num_key_value_heads)
            yield name, tensor

    shapes = {name: entry.shape for name, entry in file.tensors.items() if name not in _ROPE_FACTORS}
    return assemble(
        empty_decoder(config, len(shapes), str(path)),
        stored_name,
        shapes,
        tensors(),
        dtype,
        str(path),
    )


def stored_name(name: str) -> str:
    """The name of a decoder's parameter in a GGUF file.

    >>> stored_name("layers.1.mlp.up_proj.weight")
    'blk.1.ffn_up.weight'
    """
    name = name.removesuffix(".weight")
    if not name.startswith("layers."):
        return f"{_TABLES[name]}.weight"
    _, layer, inner = name.split(".", 2)
    return f"blk.{layer}.{_BLOCK[inner]}.weight"


def half_split_rows(weight: Float[Tensor, "rows columns"], heads: int) -> Float[Tensor, "rows columns"]:
    """Rows of a query or key matrix from pairs that are neighbours to pairs half a head apart.

    >>> half_split_rows(torch.arange(6)[:, None], heads=1).flatten()
    tensor([0, 2, 4, 1, 3, 5])
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _config(file: GGUFFile) -> ModelConfig:
    architecture = file.value("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{file.path} is of architecture {shown(architecture)}; read are {', '.join(_ARCHITECTURES)}. "
            "Another architecture computes something else."
        )

    def optional(name: str) -> object:
        return file.metadata.get(f"{architecture}.{name}")

    try:
        width = _size(file, f"{architecture}.embedding_length")
        layers = _size(file, f"{architecture}.block_count")
        heads = _size(file, f"{architecture}.attention.head_count")
        if "token_embd.weight" not in file.tensors:
            raise ValueError("it lacks token_embd.weight, the embedding table.")
        config = ModelConfig(
            hidden_size=width,
            intermediate_size=_size(file, f"{architecture}.feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=optional("attention.head_count_kv"),
            head_dim=optional("attention.key_length"),
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            max_position_embeddings=_size(file, f"{architecture}.context_length"),
            rope_theta=_factor(file, f"{architecture}.rope.freq_base", 10_000.0),
            rope_scaling=_rope_scaling(file, architecture),
            rms_norm_eps=_shortest(_factor(file, f"{architecture}.attention.layer_norm_rms_epsilon")),
            tie_word_embeddings="output.weight" not in file.tensors,
            latent_attention=_latent_attention(file, width // heads) if architecture == "minicpm3" else None,
            eos_token_id=_ends(file),
            **_multipliers(file, architecture, width, layers),
        )
    except ValueError as error:
        sentence = str(error)
        raise ValueError(sentence if str(file.path) in sentence else f"{file.path}: {sentence}") from None
    latent = config.latent_attention
    for name, expected in (
        ("attention.head_count_kv", heads if latent else config.num_key_value_heads),
        ("attention.value_length", latent.v_head_dim if latent else config.head_dim),
        ("rope.dimension_count", config.rotary_dim),
        ("expert_count", 0),
        ("attention.sliding_window", 0),
        ("attention.causal", True),
    ):
        if optional(name) not in (None, expected):
            raise ValueError(
                f"{file.path} says that {architecture}.{name} is {shown(optional(name))}; only {expected} "
                "is read here."
            )
    if architecture == "granite":
        _refuse_other_granites(file, config)
    return config


def _size(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.value(key, default)
    require_positive_integer(key, value)
    return value


def _factor(file: GGUFFile, key: str, default: float | None = None) -> float:
    value = file.value(key, default)
    require_positive_number(key, value)
    return value


def _latent_attention(file: GGUFFile, plain_head: int) -> LatentAttentionConfig:
    rotated, whole = (
        _size(file, f"minicpm3.{name}") for name in ("rope.dimension_count", "attention.key_length")
    )
    if rotated >= whole:
        raise ValueError(
            f"minicpm3.rope.dimension_count is {rotated}; expected less than attention.key_length, {whole}, "
            "which counts what is not rotated too."
        )
    return LatentAttentionConfig(
        q_lora_rank=_size(file, "minicpm3.attention.q_lora_rank"),
        kv_lora_rank=_size(file, "minicpm3.attention.kv_lora_rank"),
        qk_nope_head_dim=whole - rotated,
        qk_rope_head_dim=rotated,
        v_head_dim=_size(file, "minicpm3.attention.value_length", plain_head),
    )


def _multipliers(file: GGUFFile, architecture: str, width: int, layers: int) -> dict[str, float]:
    """The three multipliers; where a key is missing, MiniCPM's own."""
    if architecture == "llama":
        return {}
    if architecture == "minicpm3":
        return {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256}
    fallbacks = (12.0, 1.4 / layers**0.5, width / 256) if architecture == "minicpm" else (1.0, 1.0, None)
    names = ("embedding_scale", "residual_scale", "logit_scale")
    emb, residual, logit = (
        _factor(file, f"{architecture}.{name}", fallback)
        for name, fallback in zip(names, fallbacks, strict=True)
    )
    depth = _shortest(residual, lambda depth: depth / layers**0.5, residual * layers**0.5)
    base = _shortest(logit, lambda base: width / base, width / logit)
    return {
        "scale_emb": _shortest(emb),
        "scale_depth": None if residual == 1 else depth,
        "dim_model_base": None if logit == 1 else base,
    }


def _refuse_other_granites(file: GGUFFile, config: ModelConfig) -> None:
    """Refuse what only Granite has: another scale of the scores, and layers that know no positions."""
    own = config.head_dim**-0.5
    scale = file.metadata.get("granite.attention.scale") or own  # 0 means this one, too
    if not isinstance(scale, float) or not math.isclose(scale, own, rel_tol=1e-6):
        raise ValueError(
            f"{file.path} multiplies scores by {shown(scale)} (granite.attention.scale); the decoder does by "
            f"1/sqrt(head_dim), {own:.6g}."
        )
    if not file.metadata.get("granite.rope.scaling.finetuned", True):
        raise ValueError(f"{file.path} rotates nothing (granite.rope.scaling.finetuned); the decoder does.")


def _shortest(
    stored: float, to_stored: Callable[[float], float] = lambda value: value, value: float | None = None
) -> float:
    """The number with the fewest digits behind a float32 of the file: 1e-5, not 9.99999975e-06.

    >>> _shortest(0.22135943174362183, lambda depth: depth / 40**0.5, 0.22135943174362183 * 40**0.5)
    1.4
    """
    value = stored if value is None else value
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if candidate and np.float32(to_stored(candidate)) == np.float32(stored):
            return candidate
    return value


def _ends(file: GGUFFile) -> list[object]:
    ids = (special_id(file, name) for name in ("eos", "eot", "eom"))
    return [end for end in ids if end is not None]


def _rope_scaling(file: GGUFFile, architecture: str) -> RopeScaling | None:
    def key(name: str, default: object) -> object:
        return file.metadata.get(f"{architecture}.rope.{name}", default)

    kind = key("scaling.type", "linear")
    if kind not in ("none", "linear", "longrope"):
        raise ValueError(
            f"{file.path} scales its rotary frequencies by {shown(kind)}, which is not read here."
        )
    factor = key("scaling.factor", key("scale_linear", 1.0)) or 1.0  # 0 means none, too
    if kind == "none":
        factor = 1.0
    require_positive_number(f"{architecture}.rope.scaling.factor", factor)
    attention = key("scaling.attn_factor", 1.0)
    original = key("scaling.original_context_length", file.value(f"{architecture}.context_length"))
    stored = {name: file.read(name) for name in _ROPE_FACTORS if name in file.tensors}
    if stored or kind == "longrope":  # each frequency has a factor of its own, beside the one for all
        freqs = stored.get("rope_freqs.weight")  # Llama 3.1: at any length
        short, long = (
            factors if factors is None else (factor * factors).tolist()
            for factors in (
                stored.get("rope_factors_short.weight", freqs),
                stored.get("rope_factors_long.weight", freqs),
            )
        )
        return RopeScaling(
            "longrope", original, short_factor=short, long_factor=long, attention_factor=attention
        )
    if attention != 1:
        raise ValueError(
            f"{file.path} multiplies cosine and sine by {shown(attention)} (rope.scaling.attn_factor) and "
            "stores no factors of LongRoPE; that is not read here."
        )
    return None if factor == 1 else RopeScaling("linear", original, factor=factor)
