"""A decoder from stored tensors, whatever the format: first names and shapes, then the numbers.

Choices, and the traps behind them:

- Names and shapes are compared before the first tensor is read; every difference is reported, none skipped.
- The model is built without memory and takes its tensors one by one, so the peak is one model, not two.
- Each layer and each expert stores at least one tensor. So an absurd number of layers in a damaged file is
  refused at once, and not after hours of building them.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..language.decoder import Decoder

__all__ = ["assemble"]


def assemble(
    config: ModelConfig,
    stored_name: Callable[[str], str],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    where: str,
) -> Decoder:
    """A decoder whose weights are the given tensors; those of another type are converted one by one.

    Args:
        config: the model's shape.
        stored_name: from the name of a parameter of the decoder to the name under which it is stored.
        shapes: of all that is stored, known before the first tensor is read.
        tensors: the stored names with their tensors, which are copied.
        dtype: of the parameters.
        where: the file or folder, for messages.

    Raises:
        ValueError: names or shapes differ; or the tables are tied, and an output layer differs from them.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"dtype is {dtype!r}; weights are held in torch.float32, float16, bfloat16 or float64."
        )
    experts = config.mixture.num_experts if config.mixture else 1
    if config.num_hidden_layers * experts > len(shapes):
        raise ValueError(
            f"{where} holds {len(shapes)} tensors, too few for the {config.num_hidden_layers:,} layers"
            f"{f' of {experts:,} experts' if config.mixture else ''} of its config. Nothing was loaded."
        )
    with torch.device("meta"):
        model = Decoder(config)
    own = {stored_name(name): name for name, _ in model.named_parameters()}
    expected = {stored: model.get_parameter(name) for stored, name in own.items()}
    output = stored_name("lm_head.weight")  # with tied tables it may be stored a second time
    problems = []
    if missing := [name for name in expected if name not in shapes]:
        problems.append(f"{len(missing)} missing: {few(missing)}")
    if extra := sorted(shapes.keys() - expected.keys() - {output}):
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
    second = None
    for name, tensor in tensors:
        # a copy, because what a reader gives may be the file itself, mapped into memory
        if name in expected:
            owner, _, leaf = own[name].rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(dtype, copy=True)))
        elif name == output:
            second = tensor.to(dtype, copy=True)
    if second is not None and not torch.equal(second, model.embed_tokens.weight):
        raise ValueError(
            f"{where} says that the embedding table is the output layer too (tie_word_embeddings), and "
            f"stores {output} with other values. If that is the right output layer, set "
            "tie_word_embeddings to false in config.json."
        )
    return model.eval()


def few(names: list[str], shown: int = 4) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
