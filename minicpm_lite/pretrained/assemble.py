"""A model from stored tensors, whatever the format: first names and shapes, then the numbers.

Choices, and the traps behind them:

- Names and shapes are compared before the first tensor is read; every difference is reported, none skipped.
- The model is built without memory and takes its tensors one by one, so the peak is one model, not two.
- Each layer and each expert stores at least one tensor. So an absurd number of layers in a damaged file is
  refused at once, and not after hours of building them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..language.decoder import Decoder
from .weights import few

__all__ = ["assemble", "empty_decoder"]

Model = TypeVar("Model", bound=nn.Module)


def empty_decoder(config: ModelConfig, num_tensors: int, where: str) -> Decoder:
    """A decoder on the meta device, for `assemble` to fill: it has shapes and no memory.

    Args:
        config: the model's shape.
        num_tensors: how many tensors are stored.
        where: the file or folder, for messages.

    Raises:
        ValueError: that are fewer tensors than the config has layers or experts.
    """
    experts = config.mixture.num_experts if config.mixture else 1
    if config.num_hidden_layers * experts > num_tensors:
        raise ValueError(
            f"{where} holds {num_tensors} tensors, too few for the {config.num_hidden_layers:,} layers"
            f"{f' of {experts:,} experts' if config.mixture else ''} of its config. Nothing was loaded."
        )
    with torch.device("meta"):
        return Decoder(config)


def assemble(
    model: Model,
    stored_name: Callable[[str], str],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    where: str,
) -> Model:
    """Fill a model with the given tensors; those of another type are converted one by one.

    Args:
        model: on the meta device, all its numbers parameters: a decoder, or something that holds one.
        stored_name: from the name of a parameter of the model, or of its tied output layer, to the name under
            which it is stored.
        shapes: of all that is stored, known before the first tensor is read.
        tensors: the stored names with their tensors, which are copied.
        dtype: of the parameters.
        where: the file or folder, for messages.

    Returns:
        The model that was given, in evaluation mode.

    Raises:
        ValueError: names or shapes differ; or the tables are tied, and an output layer differs from them.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"dtype is {dtype!r}; weights are held in torch.float32, float16, bfloat16 or float64."
        )
    own = {stored_name(name): name for name, _ in model.named_parameters()}
    expected = {stored: model.get_parameter(name) for stored, name in own.items()}
    outputs = {  # with tied tables the output layer may be stored a second time
        stored_name(name.replace("embed_tokens", "lm_head")): name
        for name in own.values()
        if name.endswith("embed_tokens.weight")
    }
    problems = []
    if missing := [name for name in expected if name not in shapes]:
        problems.append(f"{len(missing)} missing: {few(missing)}")
    if extra := sorted(shapes.keys() - expected.keys() - outputs.keys()):
        problems.append(f"{len(extra)} unknown: {few(extra)}")
    if misshapen := [
        f"{name} is {shapes[name]} and should be {tuple(parameter.shape)}"
        for name, parameter in expected.items()
        if name in shapes and shapes[name] != tuple(parameter.shape)
    ]:
        problems.append(f"{len(misshapen)} of another shape: {few(misshapen)}")
    if problems:
        raise ValueError(
            f"The tensors in {where} do not fit its config: {'; '.join(problems)}. Nothing was loaded."
        )
    second = {}
    for name, tensor in tensors:
        # a copy, because what a reader gives may be the file itself, mapped into memory
        if name in expected:
            owner, _, leaf = own[name].rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(dtype, copy=True)))
        elif name in outputs:
            second[name] = tensor.to(dtype, copy=True)
    for name, tensor in second.items():
        if not torch.equal(tensor, model.get_parameter(outputs[name])):
            raise ValueError(
                f"{where} says that the embedding table is the output layer too (tie_word_embeddings), and "
                f"stores {name} with other values. If that is the right output layer, set "
                "tie_word_embeddings to false in config.json."
            )
    return model.eval()
