"""GGUF, the one-file format of llama.cpp and Ollama: reading models and their tokenizers.

    header:  "GGUF", version, number of tensors, number of keys
    keys:    name, type, value                          the shape and the tokenizer
    table:   name, sizes (innermost first), type, offset   for each tensor
    tensors: each at a multiple of the alignment, in blocks of quantised numbers

Sources: ggml's gguf specification; llama.cpp's conversion and src/models; gguf-py 0.19.0, which unpacks the
blocks.

Choices, and the traps behind them:

- llama.cpp turns neighbours (2i, 2i+1), this library turns (i, i + head_dim/2). So rows of the query and key
  matrices lie in another order in architectures "llama" and "minicpm", and are put back here.
- The multipliers of "minicpm" are three keys. Older files lack them; then llama.cpp's fallbacks hold.
- A file without ``output.weight`` has tied tables.
- Sizes are checked against the length of the file before anything of that size is read.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from ..config import ModelConfig, RopeScaling
from ..language.decoder import Decoder
from ..optional import require
from .checkpoints import assemble

__all__ = ["GGUFFile", "GGUFTensor", "gguf_tokenizer", "half_split_rows", "load_gguf", "read_gguf"]

_SCALARS = {  # GGUF's value types: struct's letter
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_NAMES = {  # the decoder's names within a block: those of GGUF
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


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the table of tensors.

    Attributes:
        shape: as PyTorch orders it, the innermost size last.
        quantization: name of the type, e.g. "Q4_0".
        start: first byte in the file.
        nbytes: how many bytes.
    """

    shape: tuple[int, ...]
    quantization: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """What the head of a GGUF file says.

    Attributes:
        path: the file.
        metadata: keys with their values.
        tensors: names with their entries, in the order of the file.
    """

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, GGUFTensor]

    def value(self, key: str, default: object = None) -> object:
        """The value of a key.

        Raises:
            ValueError: the file lacks it, and no default was given.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.path} lacks the key {key}. Was it converted with an older program?")
        return value

    def read(self, name: str) -> Float[Tensor, "..."]:
        """A tensor, unpacked to float32.

        Raises:
            ValueError: its type cannot be unpacked.
        """
        gguf = _package()
        entry = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            packed = np.frombuffer(file.read(entry.nbytes), dtype=np.uint8)
        kind = gguf.GGMLQuantizationType[entry.quantization]
        try:
            numbers = gguf.dequantize(packed.reshape(*entry.shape[:-1], -1), kind)
        except NotImplementedError:
            raise ValueError(
                f"{name} in {self.path} is stored as {entry.quantization}, which gguf cannot unpack. "
                "Convert the model to another type, such as Q8_0."
            ) from None
        return torch.from_numpy(numbers.astype(np.float32)).view(entry.shape)  # a copy that may be written


def read_gguf(path: str | Path) -> GGUFFile:
    """The keys and the table of tensors of a GGUF file; no tensor is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another format or version, or ends too early; the message says where.
        ImportError: the package gguf is missing.
    """
    gguf = _package()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    with path.open("rb") as file:
        reader = _Reader(path, file)
        if reader.take(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with the letters GGUF.")
        version = reader.number("I")
        if version not in (2, 3):
            raise ValueError(
                f"{path} is GGUF of version {version}; 2 and 3 are read, in little-endian order. "
                "Convert it anew."
            )
        tensor_count, key_count = reader.number("Q"), reader.number("Q")
        metadata = {}
        for _ in range(key_count):
            key = reader.text()
            reader.at = f"the key {key}"
            metadata[key] = reader.value(reader.number("I"))
        tensors = {}
        for _ in range(tensor_count):
            name = reader.text()
            reader.at = f"the entry of {name}"
            dimensions = reader.number("I")
            if not 1 <= dimensions <= 4:
                raise ValueError(f"{path} says that {name} has {dimensions} dimensions; 1 to 4 are possible.")
            shape = tuple(reversed([reader.number("Q") for _ in range(dimensions)]))
            tensors[name] = shape, reader.number("I"), reader.number("Q")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{path} says that general.alignment is {alignment!r}; expected a whole number.")
        start = -(-file.tell() // alignment) * alignment  # the next multiple
    entries = {}
    for name, (shape, kind, offset) in tensors.items():
        try:
            quantization = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"{path} stores {name} as type {kind}, which gguf does not know.") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        if shape[-1] % block:
            raise ValueError(
                f"{path} says that {name} has rows of {shape[-1]} numbers in {quantization.name}, whose "
                f"blocks are {block}."
            )
        nbytes = int(np.prod(shape, dtype=object)) // block * block_bytes
        entries[name] = GGUFTensor(shape, quantization.name, start + offset, nbytes)
        if start + offset + nbytes > reader.size:
            raise ValueError(
                f"{path} ends at byte {reader.size:,}, and {name} should reach to byte "
                f"{start + offset + nbytes:,}. The file is cut short; fetch it again."
            )
    return GGUFFile(path, metadata, entries)


class _Reader:
    """Takes values from the head of a file, and says where the file ended too early."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size
        self.at = "its head"

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError(f"{self.path} ends within {self.at}. The file is cut short or damaged.")
        return self.file.read(count)

    def number(self, letter: str) -> int | float | bool:
        return struct.unpack("<" + letter, self.take(struct.calcsize(letter)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} holds text that is not UTF-8, near {self.at}.") from None

    def value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"{self.path} gives {self.at} the type {kind}; the format has types 0 to 12.")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            letter = _SCALARS[kind]
            return list(struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(letter))))
        if kind != _STRING:
            raise ValueError(f"{self.path} gives {self.at} a list of type {kind}, which is not read.")
        return [self.text() for _ in range(count)]


def load_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder from a GGUF file of architecture "llama" or "minicpm", its weights unpacked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, lacks a key, or holds another architecture or type of tensor.
        ImportError: the package gguf is missing.
    """
    file = read_gguf(path)
    config = _config(file)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    for layer in range(config.num_hidden_layers):
        names |= {f"layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in _NAMES.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in file.tensors:
            tensor = file.read(name)
            if name.endswith("attn_q.weight"):
                tensor = half_split_rows(tensor, config.num_attention_heads)
            elif name.endswith("attn_k.weight"):
                tensor = half_split_rows(tensor, config.num_key_value_heads)
            yield name, tensor

    return assemble(
        config,
        {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in names.items()},
        {name: entry.shape for name, entry in file.tensors.items() if name not in _ROPE_FACTORS},
        tensors(),
        dtype,
        str(path),
    )


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


def _rope_scaling(file: GGUFFile, architecture: str) -> RopeScaling | None:
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    context = file.value(f"{architecture}.context_length")
    original = file.metadata.get(f"{architecture}.rope.scaling.original_context_length", context)
    stored = {name: file.read(name).tolist() for name in _ROPE_FACTORS if name in file.tensors}
    if "rope_freqs.weight" in stored:  # Llama 3.1: what llama.cpp divides each frequency by, at any length
        factors = stored["rope_freqs.weight"]
        return RopeScaling(
            "longrope", original, short_factor=factors, long_factor=factors, attention_factor=1.0
        )
    if kind == "longrope" or "rope_factors_short.weight" in stored:
        return RopeScaling(
            "longrope",
            original,
            short_factor=stored.get("rope_factors_short.weight"),
            long_factor=stored.get("rope_factors_long.weight"),
            attention_factor=file.metadata.get(f"{architecture}.rope.scaling.attn_factor"),
        )
    if kind == "linear":
        factor = file.value(f"{architecture}.rope.scaling.factor")
        return RopeScaling("linear", original, factor=factor)
    if kind != "none":
        raise ValueError(f"{file.path} scales its rotary frequencies by {kind!r}, which is not read here.")
    return None


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
    tokens, merges = file.value("tokenizer.ggml.tokens"), file.value("tokenizer.ggml.merges")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", False)
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    if rules == "smollm":  # each digit is a token
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = file.metadata.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=kind == _CONTROL, normalized=False)
            (tokenizer.add_special_tokens if kind == _CONTROL else tokenizer.add_tokens)([added])
    return tokenizer


def _package():
    return require("gguf", install="minicpm_lite[pretrained]", purpose="read GGUF files")
