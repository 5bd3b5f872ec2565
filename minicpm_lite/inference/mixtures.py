"""Which matrix is stored in which type: llama.cpp's mixtures, MiniCPM-1's INT4, and what a model then weighs.

    mixture("Q4_K_M", config)  ->  {"embed_tokens.weight": "Q6_K", "layers.0.mlp.up_proj.weight": "Q4_K", …}

A GGUF file that is called Q4_K_M holds several types. Some matrices lose more by rounding than others, and
get more bits: the output layer always, values and down projections in the first and the last eighth of the
layers and in each third layer between. So 4.5 bits become 4.8 or 5, and with a large table of few layers
more.

Sources: llama.cpp as in llama-cpp-python 0.3.36, src/llama-quant.cpp, llama_tensor_get_type_impl and
tensor_type_fallback; Hu et al. 2024, arXiv 2404.06395, appendix D: INT4 leaves tables and norms as they are.

Choices, and the traps behind them:

- A name stands for a mixture, also "Q4_0": its output layer is Q6_K. For one type in all, name each matrix.
- A tied table is an output layer, and gets its type. An untied one is read by rows and gets the plain type.
- A row that is no multiple of 256 (SmolLM2-135M's is 576 wide) gets another type of about the same error and
  blocks of 32: Q5_0 for Q4_K, Q8_0 for Q6_K, Q4_0 for the ternary types. With rows that 32 does not divide
  llama.cpp writes F16; here they are not named, and stay as they are.
- Routers and norms are small and decide much. They stay as they are.
- With exactly eight experts llama.cpp gives keys and values Q8_0 and the output projection Q5_K: of such a
  model attention is the smallest part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shown

import torch

from ..config import ModelConfig
from ..language.decoder import plain_shapes
from .quantization import block_format

__all__ = ["Size", "mixture", "packed_size"]

_MIXTURES = {  # by name: the type of most of its matrices
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q4_K_M": "Q4_K",
    "Q4_0": "Q4_0",
    "TQ2_0": "TQ2_0",
    "TQ1_0": "TQ1_0",
}
_SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0"}
_VALUES = ("self_attn.v_proj", "self_attn.kv_b_proj")
_EIGHT = 8  # experts


@dataclass(frozen=True)
class Size:
    """What the weights of a model take.

    Attributes:
        weights: how many there are, norms and tables too; a tied table once.
        nbytes: bytes of them, with all scales.
    """

    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Of all weights together."""
        return 8 * self.nbytes / self.weights

    @property
    def megabytes(self) -> float:
        """In units of a million bytes."""
        return self.nbytes / 1e6


def mixture(name: str, config: ModelConfig) -> dict[str, str]:
    """The type of each matrix that is quantised, by the name of the decoder's parameter.

    Args:
        name: "Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "TQ2_0" or "TQ1_0", as llama.cpp mixes them; or "INT8" or
            "INT4_G128" (or another group), which leave the tables as they are.
        config: the shape of the model.

    Raises:
        ValueError: there is no such mixture, or INT4's groups do not divide a row.

    >>> from minicpm_lite import load_config
    >>> types = mixture("Q4_K_M", load_config("minicpm4-8b"))
    >>> [types[f"layers.9.mlp.{name}.weight"] for name in ("up_proj", "down_proj")]
    ['Q4_K', 'Q6_K']
    """
    shapes = {name: shape for name, shape in plain_shapes(config).items() if _is_quantised(name, shape)}
    if name.startswith("INT"):
        linear = {at: shape for at, shape in shapes.items() if at.startswith("layers.")}
        for _, columns in linear.values():
            block_format(name, columns)
        return dict.fromkeys(linear, name)
    if name not in _MIXTURES:
        raise ValueError(
            f"There is no mixture {name!r}. Known are {', '.join(_MIXTURES)}, INT8, and INT4_G128 or with "
            "another group; for other types, give a type for each matrix by its name."
        )
    types = {at: _that_fits(_wanted(name, at, config), columns) for at, (_, columns) in shapes.items()}
    return {at: type for at, type in types.items() if type is not None}


def packed_size(config: ModelConfig, types: Mapping[str, str], rest: torch.dtype = torch.float32) -> Size:
    """What a model of this shape takes with these types, and what they do not name in ``rest``.

    Nothing is built.

    Raises:
        ValueError: an unknown type, a matrix that the model lacks, or whose rows the type's blocks do not
            divide.

    >>> from minicpm_lite import load_config
    >>> config = load_config("minicpm-2.4b")
    >>> round(packed_size(config, mixture("Q4_K_M", config)).bits_per_weight, 2)
    5.28
    """
    weights, nbytes, shapes = 0, 0, plain_shapes(config)
    for name in types:
        if len(shapes.get(name, ())) != 2:
            raise ValueError(
                f"A model of this shape has no matrix {shown(name)}. Names are those of parameters, such as "
                "'layers.0.mlp.up_proj.weight'; a tied output layer is 'embed_tokens.weight'."
            )
    for name, shape in shapes.items():
        weights += shape.numel()
        if name in types:
            kind = block_format(types[name], shape[-1])
            nbytes += shape.numel() // kind.block * kind.block_bytes
        else:
            nbytes += rest.itemsize * shape.numel()
    return Size(weights, nbytes)


def _is_quantised(name: str, shape: torch.Size) -> bool:
    return len(shape) == 2 and not name.endswith("mlp.gate.weight")  # a router


def _wanted(name: str, matrix: str, config: ModelConfig) -> str:
    """What llama.cpp would take if every row were a multiple of 256."""
    plain, eight = _MIXTURES[name], config.mixture is not None and config.mixture.num_experts == _EIGHT
    if matrix == ("embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"):
        if plain == "Q8_0" or config.hidden_size % block_format(plain, 256).block:
            return "Q8_0"
        return "Q6_K"
    if matrix == "embed_tokens.weight":
        return "Q4_K" if plain.startswith("TQ") else plain
    _, layer, inner = matrix.removesuffix(".weight").split(".", 2)
    more = name == "Q4_K_M" and _gets_more_bits(int(layer), config.num_hidden_layers)
    if eight and inner in ("self_attn.k_proj", *_VALUES):
        return "Q8_0"
    if eight and inner == "self_attn.o_proj" and name == "Q4_K_M":
        return "Q5_K"
    return "Q6_K" if more and (inner in _VALUES or inner.endswith("down_proj")) else plain


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The first eighth of the layers, the last, and each third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _that_fits(type: str, columns: int) -> str | None:
    """The type, or where its blocks do not divide a row the one that llama.cpp takes, or none."""
    for each in (type, _SMALLER_BLOCKS.get(type)):
        if each is not None and columns % block_format(each, 256).block == 0:
            return each
    return None
