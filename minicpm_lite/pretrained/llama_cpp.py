"""Models and tokenizers as llama.cpp stores them in GGUF files.

Sources: llama.cpp's conversion, src/llama-model.cpp, src/llama-vocab.cpp and src/models.

Choices, and the traps behind them:

- llama.cpp turns neighbours (2i, 2i+1), this library turns (i, i + head_dim/2). So rows of the query and key
  matrices lie in another order in architectures "llama" and "minicpm", and are put back here.
- The multipliers of "minicpm" are three keys. Older files lack them; then llama.cpp's fallbacks hold.
- A file without ``output.weight`` has tied tables.
- Every frequency is divided by ``rope.scaling.factor``, or by the older ``rope.scale_linear``, unless the
  type is "none": a missing type means "linear". A missing ``attn_factor`` is 1, whatever LongRoPE's paper
  says.
- Three keys name ids that end a text: eos, eot (of a turn) and eom (of a message). llama.cpp stops at other
  tokens too, by how they are spelt; that is a guess, and not made here.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from ..config import ModelConfig, RopeScaling
from ..language.decoder import Decoder
from .assemble import assemble, empty_decoder
from .gguf import GGUFFile, read_gguf

__all__ = ["gguf_tokenizer", "half_split_rows", "load_gguf"]

_TABLES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_BLOCK = {  # the decoder's names within a block: those of GGUF
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
_CONTROL, _USER_DEFINED = 3, 4  # token types that are never split


def load_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder from a GGUF file of architecture "llama" or "minicpm", its weights unpacked.

    Raises:
        FileNotFoundError: there is no such file.
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
    if architecture not in ("llama", "minicpm"):
        raise ValueError(
            f"{file.path} is of architecture {architecture!r}; llama and minicpm are read. Another "
            "architecture computes something else."
        )

    def key(name: str, default: object = None):
        return file.value(f"{architecture}.{name}", default)

    def optional(name: str):
        return file.metadata.get(f"{architecture}.{name}")

    width, layers, heads = key("embedding_length"), key("block_count"), key("attention.head_count")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} lacks token_embd.weight, the embedding table.")
    try:
        config = ModelConfig(
            hidden_size=width,
            intermediate_size=key("feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=optional("attention.head_count_kv"),
            head_dim=optional("attention.key_length"),
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            max_position_embeddings=key("context_length"),
            rope_theta=key("rope.freq_base", 10_000.0),
            rope_scaling=_rope_scaling(file, architecture),
            rms_norm_eps=_shortest(key("attention.layer_norm_rms_epsilon")),
            tie_word_embeddings="output.weight" not in file.tensors,
            eos_token_id=_ends(file),
        )
        if architecture == "minicpm":
            config = replace(config, **_multipliers(file, width, layers))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        sentence = str(error)
        raise ValueError(sentence if str(file.path) in sentence else f"{file.path}: {sentence}") from None
    for name, expected in (
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
        ("expert_count", 0),
        ("attention.sliding_window", 0),
    ):
        if optional(name) not in (None, expected):
            raise ValueError(
                f"{file.path} says that {architecture}.{name} is {optional(name)}; only {expected} "
                "is read here."
            )
    return config


def _multipliers(file: GGUFFile, width: int, layers: int) -> dict[str, float]:
    """The three multipliers; where a key is missing, llama.cpp's fallback."""
    emb, residual, logit = (
        file.metadata.get(f"minicpm.{name}", fallback)
        for name, fallback in (
            ("embedding_scale", 12.0),
            ("residual_scale", 1.4 / layers**0.5),
            ("logit_scale", width / 256),
        )
    )
    return {
        "scale_emb": _shortest(emb),
        "scale_depth": _shortest(residual, lambda depth: depth / layers**0.5, residual * layers**0.5),
        "dim_model_base": _shortest(logit, lambda base: width / base, width / logit),
    }


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
        if np.float32(to_stored(candidate)) == np.float32(stored):
            return candidate
    return value


def _ends(file: GGUFFile) -> list[object]:
    keys = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
    return [file.metadata[key] for key in keys if key in file.metadata]


def _rope_scaling(file: GGUFFile, architecture: str) -> RopeScaling | None:
    def key(name: str, default: object) -> object:
        return file.metadata.get(f"{architecture}.rope.{name}", default)

    kind = key("scaling.type", "linear")
    if kind not in ("none", "linear", "longrope"):
        raise ValueError(f"{file.path} scales its rotary frequencies by {kind!r}, which is not read here.")
    factor = key("scaling.factor", key("scale_linear", 1.0)) or 1.0  # 0 means none, too
    if kind == "none":
        factor = 1.0
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
            f"{file.path} multiplies cosine and sine by {attention} (rope.scaling.attn_factor) and stores no "
            "factors of LongRoPE; that is not read here."
        )
    return None if factor == 1 else RopeScaling("linear", original, factor=factor)


def gguf_tokenizer(path: str | Path) -> Tokenizer:
    """The byte-level tokenizer that a GGUF file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the tokenizer is of another kind, or splits text by rules that are not known here.
    """
    file = read_gguf(path)
    kind = file.value("tokenizer.ggml.model")
    rules = file.metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2":
        raise ValueError(
            f"The tokenizer in {file.path} is of the kind {kind!r}; only byte-level ones ('gpt2') are "
            "rebuilt. Take tokenizer.json from the model's folder."
        )
    if rules not in ("gpt-2", "gpt2", "smollm"):
        raise ValueError(
            f"{file.path} splits text by the rules {rules!r}; known are gpt-2 and smollm. With other rules "
            "the same text gets other tokens. Take tokenizer.json from the model's folder."
        )
    tokens, merges = _texts(file, "tokens"), _texts(file, "merges")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise ValueError(
                f"{file.path} joins {' and '.join(map(repr, pair))}; expected two tokens of its vocabulary "
                "that together are a third. The file is damaged."
            )
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=_flag(file, "add_space_prefix"))]
    if rules == "smollm":  # each digit is a token
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = file.metadata.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=kind == _CONTROL, normalized=False)
            (tokenizer.add_special_tokens if kind == _CONTROL else tokenizer.add_tokens)([added])
    if _flag(file, "add_bos_token"):
        begin = file.value("tokenizer.ggml.bos_token_id")
        if begin not in range(len(tokens)):
            raise ValueError(
                f"{file.path} begins texts with the id {begin!r}; its vocabulary has {len(tokens)} tokens."
            )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[begin], "$A"], special_tokens=[(tokens[begin], begin)]
        )
    return tokenizer


def _flag(file: GGUFFile, key: str) -> bool:
    flag = file.metadata.get(f"tokenizer.ggml.{key}", False)
    if not isinstance(flag, bool):
        raise ValueError(f"{file.path} gives tokenizer.ggml.{key} as {flag!r}; expected true or false.")
    return flag


def _texts(file: GGUFFile, key: str) -> list[str]:
    texts = file.value(f"tokenizer.ggml.{key}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{file.path} gives tokenizer.ggml.{key} as {str(texts)[:40]}; expected texts.")
    return texts
