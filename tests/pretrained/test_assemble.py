"""Assembling a decoder: names and shapes before numbers, copies, and files too small for their config."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from minicpm_lite import ModelConfig
from minicpm_lite.config import MixtureConfig
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.pretrained.assemble import assemble, empty_decoder

CONFIG = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=30,
    init_std=0.1,
)


def upper(name: str) -> str:
    """A format that writes its names in capitals."""
    return name.upper()


def stored(config: ModelConfig) -> tuple[Decoder, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Decoder(config).eval()
    return model, {upper(name): tensor for name, tensor in model.state_dict().items()}


def empty(config: ModelConfig) -> Decoder:
    return empty_decoder(config, 10**6, "here")


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_stored_ones_and_copies_of_them(tied, dtype):
    model, tensors = stored(replace(CONFIG, tie_word_embeddings=tied))
    again = assemble(empty(model.config), upper, shapes_of(tensors), tensors.items(), dtype, "here")
    assert not again.training
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(dtype)) and parameter.requires_grad
        assert parameter.data_ptr() != model.get_parameter(name).data_ptr()


def test_the_order_of_the_file_does_not_matter():
    model, tensors = stored(CONFIG)
    again = assemble(
        empty(CONFIG), upper, shapes_of(tensors), reversed(tensors.items()), torch.float32, "here"
    )
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_no_number_is_read_before_all_names_fit():
    def tensors():
        raise AssertionError("a tensor was read")
        yield

    _, whole = stored(CONFIG)
    shapes = shapes_of(whole)
    for name in shapes:
        with pytest.raises(ValueError, match=f"here do not fit its config: 1 missing: {name}. Nothing was"):
            others = {other: shape for other, shape in shapes.items() if other != name}
            assemble(empty(CONFIG), upper, others, tensors(), torch.float32, "here")


def test_a_tied_output_layer_may_be_stored_twice_but_not_differ():
    _, tensors = stored(CONFIG)
    twice = tensors | {"LM_HEAD.WEIGHT": tensors["EMBED_TOKENS.WEIGHT"].clone()}
    assemble(empty(CONFIG), upper, shapes_of(twice), twice.items(), torch.float32, "here")
    twice["LM_HEAD.WEIGHT"][3, 4] += 1
    with pytest.raises(ValueError, match="stores LM_HEAD.WEIGHT with other values"):
        assemble(empty(CONFIG), upper, shapes_of(twice), twice.items(), torch.float32, "here")


class Sees(nn.Module):
    """What a model of images and text is: a tower beside a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(3, 16)
        self.language = Decoder(CONFIG)


def test_a_model_that_holds_a_decoder_is_filled_too():
    torch.manual_seed(0)
    whole = Sees()
    tensors = {upper(name): tensor for name, tensor in whole.state_dict().items()}
    tensors["LANGUAGE.LM_HEAD.WEIGHT"] = tensors["LANGUAGE.EMBED_TOKENS.WEIGHT"].clone()
    with torch.device("meta"):
        model, tower = Sees(), nn.Linear(3, 16)
    again = assemble(model, upper, shapes_of(tensors), tensors.items(), torch.float32, "here")
    assert again is model
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    alone = {"WEIGHT": whole.tower.weight.data, "BIAS": whole.tower.bias.data}
    assemble(tower, upper, shapes_of(alone), alone.items(), torch.float32, "here")
    assert torch.equal(tower.bias, whole.tower.bias)
    tensors["LANGUAGE.LM_HEAD.WEIGHT"][0, 0] += 1
    with torch.device("meta"):
        model = Sees()
    with pytest.raises(ValueError, match="stores LANGUAGE.LM_HEAD.WEIGHT with other values"):
        assemble(model, upper, shapes_of(tensors), tensors.items(), torch.float32, "here")


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, num_hidden_layers=1_000),
        replace(CONFIG, mixture=MixtureConfig(10**4, 2)),
    ],
    ids=["layers", "experts"],
)
def test_more_layers_than_tensors_are_refused_at_once(config):
    _, tensors = stored(CONFIG)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"here holds \d+ tensors, too few for the .* layers.* Nothing was"):
        empty_decoder(config, len(tensors), "here")
    assert time.perf_counter() - start < 5  # building them would take hours


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16", None])
def test_weights_are_held_in_floating_point(dtype):
    _, tensors = stored(CONFIG)
    with pytest.raises(ValueError, match="weights are held in torch.float32, float16, bfloat16 or float64"):
        assemble(empty(CONFIG), upper, shapes_of(tensors), tensors.items(), dtype, "here")
