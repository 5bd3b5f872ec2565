"""A decoder whose weights stay packed in memory: a seventh of the bytes at 4 bits, to read and to keep.

    quantize_model(model, "Q4_K_M")     round to nearest, in place
    save_packed(model, file)            one safetensors file: bytes, config, types
    load_packed(file)                   the same model; float32 weights never exist
    unpack_model(model)                 a plain decoder again, of the rounded weights

A packed layer keeps bytes in a buffer, and multiplies by `minicpm_lite.kernels.linear`, which reads them once
and rounds its inputs to 8 bits, or for types that the kernels do not know by unpacking some rows at a time.
It has no parameter, so it is not trained; `ternary` and adapters are.

Choices, and the traps behind them:

- The tied table is packed once, and stands in two places: `PackedEmbedding` unpacks the rows that are asked
  for, and an output layer, `PackedLinear`, multiplies by all of it. Both hold the same tensor.
- What is left, norms and routers, is frozen: else each call would want gradients through packed weights, and
  there are none. A model that shares its weights, as `fast_decoding` makes one, is frozen alone.
- Layers that are not packed, such as routers of experts or rows that no block divides, stay PyTorch's, whose
  last bits depend on how many rows a call has; packed layers behind them make much of that. `fast_decoding`
  of the packed model has kernels for these, too.
- A packed model is no plain decoder, and what asks for one (`save_pretrained`) refuses it. `unpack_model`
  gives one, whose weights are rounded and take as much room as ever.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as shown

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import kernels
from ..config import model_config
from ..language.decoder import Decoder, changed_inside, own_class, plain_shapes
from ..language.fast_decoding import FewRowsLinear
from ..language.layers import replace_linears
from ..training.checkpoint import load_checkpoint, save_checkpoint
from .mixtures import Size, mixture
from .quantization import Quantized, block_format, dequantize, quantize

__all__ = [
    "PackedEmbedding",
    "PackedLinear",
    "freeze",
    "load_packed",
    "put_packed",
    "quantize_model",
    "require_plain_layer",
    "resolve_types",
    "save_packed",
    "true_bits",
    "unpack_model",
]

_FORMAT = "minicpm_lite.packed"
_ROWS_AT_ONCE = 2048  # of a matrix, unpacked


class _Packed(nn.Module):
    """Bytes in a buffer, and their type."""

    packed: Tensor

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        self.type = quantized.type
        self.register_buffer("packed", quantized.data)

    @property
    def quantized(self) -> Quantized:
        """The bytes with their type."""
        return Quantized(self.type, self.packed)

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """The matrix that the bytes stand for, unpacked anew each time."""
        return dequantize(self.quantized)

    def extra_repr(self) -> str:
        return f"{tuple(self.quantized.shape)}, {self.type}"


class PackedLinear(_Packed):
    """A linear layer of packed weights, without a bias."""

    def __init__(self, quantized: Quantized) -> None:
        super().__init__(quantized)
        self.out_features, self.in_features = quantized.shape

    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        """Multiply by the matrix.

        Raises:
            RuntimeError: a gradient would be asked for.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"A gradient was asked for through weights that are packed as {self.type}, which have none. "
                "Compute under torch.no_grad(), or train what unpack_model gives."
            )
        if self.type in kernels.FORMATS:
            return kernels.linear(x, self.packed, self.type)
        parts = [Quantized(self.type, rows) for rows in self.packed.split(_ROWS_AT_ONCE)]
        return torch.cat([F.linear(x, dequantize(part).to(x.dtype)) for part in parts], dim=-1)

    @staticmethod
    def side_by_side(
        x: Float[Tensor, "*batch columns"], layers: Sequence["PackedLinear"]
    ) -> tuple[Float[Tensor, "*batch _rows"], ...]:
        """What each of some packed layers makes of one input."""
        type = layers[0].type
        if type not in kernels.FORMATS or any(one.type != type for one in layers):
            return tuple(layer(x) for layer in layers)
        return kernels.linears(x, [layer.packed for layer in layers], type)


class PackedEmbedding(_Packed):
    """A table of packed rows, of which those that are asked for are unpacked."""

    def __init__(self, quantized: Quantized) -> None:
        super().__init__(quantized)
        self.num_embeddings, self.embedding_dim = quantized.shape

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch columns"]:
        rows = self.packed[ids]
        if self.type in kernels.FORMATS:
            return kernels.dequantize(rows, self.type)
        return dequantize(Quantized(self.type, rows))


def resolve_types(model: Decoder, types: str | Mapping[str, str]) -> dict[str, str]:
    """The type of each matrix of a decoder that is to be packed, by the name of its parameter.

    Args:
        model: the decoder.
        types: the name of a `mixture`, or these types themselves.

    Raises:
        ValueError: an unknown type or name, a matrix that is packed already, or whose rows are no multiple of
            its type's block; a layer that computes with more than its weight, such as an adapter; or a tied
            table beside an output layer of its own.
    """
    types = mixture(types, model.config) if isinstance(types, str) else dict(types)
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and name.endswith(".weight")}
    for name, type in types.items():
        if name not in matrices:
            raise ValueError(
                f"The model has no matrix {shown(name)} that could be packed. Names are those of parameters, "
                "such as 'layers.0.mlp.up_proj.weight'; what is packed already has none."
            )
        block_format(type, matrices[name].shape[-1])
        at = name.removesuffix(".weight")
        require_plain_layer(at, model.get_submodule(at))
    table = matrices["embed_tokens.weight"] if "embed_tokens.weight" in types else None
    tied = table is not None and model.config.tie_word_embeddings
    if tied and getattr(model.lm_head, "weight", table) is not table:
        raise ValueError(
            "The model's table is its output layer by its config, and beside it there is another, lm_head, "
            "which the packed table would replace. Pack the model first, or leave embed_tokens.weight out."
        )
    return types


def require_plain_layer(
    name: str,
    layer: nn.Module,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, FewRowsLinear, nn.Embedding),
) -> None:
    """Refuse a layer that is exchanged by its weight alone and computes with more: the rest would be lost.

    Args:
        name: what the sentence calls it.
        layer: of a decoder.
        kinds: what it may be; and it has no bias.

    Raises:
        ValueError: a sentence that names it.
    """
    kind, bias = own_class(layer), getattr(layer, "bias", None)
    if kind not in kinds or bias is not None:
        what = f"{kind.__module__}.{kind.__qualname__}{'' if bias is None else ' with a bias'}"
        raise ValueError(
            f"{name or 'The model itself'} is {what}; expected a plain layer, which computes with its weight "
            "and nothing else, or the rest would be lost. Merge or undo what was built into it, such as an "
            "adapter (packed weights: unpack_model; ternary ones: pack_ternary), or leave it as it is."
        )


def _output_is_the_table(model: Decoder) -> bool:
    """Whether what computes the scores is the table, as the config of a tied model says."""
    output, table = model.lm_head, model.embed_tokens
    if output is None:
        return True
    if isinstance(output, _Packed) and isinstance(table, _Packed):
        return output.type == table.type and torch.equal(output.packed, table.packed)
    return type(output) is not PackedLinear and torch.equal(output.weight, table.weight)


def _require_no_other_output(model: Decoder) -> None:
    if model.config.tie_word_embeddings and not _output_is_the_table(model):
        raise ValueError(
            "The model's config says that its table is its output layer, and it has another one, lm_head, "
            "which would be lost. Give the model whose vocabulary is whole, or a config that is not tied."
        )


def _require_nothing_else(model: Decoder) -> None:
    """Refuse a decoder in which something else was built than packed layers."""
    _require_no_other_output(model)
    changed = changed_inside(model)
    for name, module in model.named_modules():
        if type(module) not in (PackedLinear, PackedEmbedding) and (
            name in changed or hasattr(module, "in_features")
        ):
            require_plain_layer(name, module)


@torch.no_grad()
def quantize_model(model: Decoder, types: str | Mapping[str, str]) -> Decoder:
    """Pack the weights of a decoder by rounding each to the nearest value of its type, in the model itself.

    Args:
        model: a decoder; what is not packed is frozen, and it is put into evaluation mode.
        types: the name of a `mixture`, or a type for each matrix by the name of its parameter, such as
            "layers.0.mlp.up_proj.weight".

    Returns:
        The same model.

    Raises:
        ValueError: as `resolve_types` says, before anything changes; or a matrix holds infinite weights or no
            numbers, and others may be packed by then.
    """
    for name, type in resolve_types(model, types).items():
        try:
            put_packed(model, name, quantize(model.get_parameter(name), type))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return freeze(model).eval()


def freeze(model: Decoder) -> Decoder:
    """Let a model take no gradients, and nobody else who holds the same parameters.

    Where its table is packed, from which all comes in float32, the other weights are of that type, too.
    """
    frozen = {}  # a tied table stays one
    packed = isinstance(model.embed_tokens, PackedEmbedding)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight not in frozen:
                value = weight.detach().float() if packed else weight.detach()
                frozen[weight] = nn.Parameter(value, requires_grad=False)
            setattr(module, name, frozen[weight])
    return model


def put_packed(model: nn.Module, name: str, quantized: Quantized) -> None:
    """Put packed weights into the place of a matrix.

    Args:
        model: a decoder, or a block of one.
        name: of the parameter that is replaced; a tied table is replaced as table and as output layer.
        quantized: of its shape.
    """
    at = name.removesuffix(".weight")
    if at == "embed_tokens":
        model.embed_tokens = PackedEmbedding(quantized)
        if model.config.tie_word_embeddings:
            model.lm_head = PackedLinear(quantized)
    else:
        replace_linears(model, lambda found, linear: PackedLinear(quantized) if found == at else linear)


@torch.no_grad()
def unpack_model(model: Decoder) -> Decoder:
    """A plain decoder in float32 of the weights that a packed one stands for; the packed one stays.

    It computes what these weights say, and the packed one nearly the same: kernels round inputs to 8 bits.

    Raises:
        ValueError: something else was built into it than packed layers, such as adapters.
    """
    _require_nothing_else(model)
    plain = Decoder(model.config).float()
    packed = {name: module for name, module in model.named_modules() if isinstance(module, _Packed)}
    weights = dict(model.named_parameters()) | {
        f"{name}.weight": each.weight for name, each in packed.items()
    }
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    plain.load_state_dict(weights)
    return plain.eval()


def true_bits(model: nn.Module) -> Size:
    """What the weights of a model take in memory, with scales, tables and norms; a tied table counts once."""
    seen, weights, nbytes = set(), 0, 0
    for module in model.modules():
        held = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for tensor in held.values():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                weights += module.quantized.shape.numel() if isinstance(module, _Packed) else tensor.numel()
                nbytes += tensor.nbytes
    return Size(weights, nbytes)


def save_packed(model: Decoder, file: str | Path) -> None:
    """Write a packed decoder as one safetensors file with checksums, which is whole or not there.

    Raises:
        ValueError: something else was built into it than packed layers, such as adapters, so that
            `load_packed` could not make it again.
        OSError: it cannot be written.
    """
    _require_no_other_output(model)
    types = {name: module.type for name, module in model.named_modules() if isinstance(module, _Packed)}
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:  # the output layer is the table
        types.pop("lm_head", None)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    plain = plain_shapes(model.config)
    held = {name: tensor.shape for name, tensor in tensors.items() if not name.endswith(".packed")}
    wanted = {name: shape for name, shape in plain.items() if name.removesuffix(".weight") not in types}
    if other := sorted(name for name in held | wanted if held.get(name) != wanted.get(name)):
        raise ValueError(
            f"The model was changed inside, not by packing alone: {other[0]} is not what a decoder of its "
            "config has there. Pack ternary layers (pack_ternary), merge adapters, and give the model whose "
            "vocabulary is whole."
        )
    _require_nothing_else(model)
    save_checkpoint(file, tensors, {"format": _FORMAT, "config": asdict(model.config), "types": types})


def load_packed(file: str | Path) -> Decoder:
    """A packed decoder from a file of `save_packed`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or another kind of file, or its tensors do not fit its config.
    """
    tensors, facts = load_checkpoint(file)
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise ValueError(f"{file} is a checkpoint, and of no packed model; save_packed writes such.")
    config = model_config(facts["config"], f"The config in {file}")
    with torch.device("meta"):
        model = Decoder(config)
    shapes = plain_shapes(config)
    for name, type in facts["types"].items():
        shape, data = shapes.get(f"{name}.weight"), tensors.get(f"{name}.packed")
        if shape is None or data is None:
            raise ValueError(f"{file} says that {name} is packed as {type}, and holds no such matrix.")
        kind = block_format(type, shape[1])
        expected = (shape[0], shape[1] // kind.block * kind.block_bytes)
        if data.dtype != torch.uint8 or data.shape != expected:
            raise ValueError(
                f"{name} in {file} holds {data.dtype} of shape {tuple(data.shape)}; {shape[0]} rows of "
                f"{shape[1]} weights in {type} are bytes of shape {expected}."
            )
        put_packed(model, f"{name}.weight", Quantized(type, data))
    if config.tie_word_embeddings and isinstance(model.embed_tokens, PackedEmbedding):
        tensors["lm_head.packed"] = tensors["embed_tokens.packed"]
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit its own config: {' '.join(str(error).split())}") from None
    return model.requires_grad_(False).eval()
