"""What makes two runs the same, and what a checkpoint holds of any module."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from minicpm_lite import ModelConfig
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.training.optimizer import adamw
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.state import (
    buffers_given_back,
    checkpoint_shapes,
    checkpoint_tensors,
    make_moments,
    require_same_run,
    run_identity,
    updates_made,
)

MODEL = ModelConfig(16, 40, 1, 2, 30, num_key_value_heads=1, max_position_embeddings=64)
CONFIG, TEXT = TrainerConfig(3, 8), {"checksum": 1}


class Mixed(nn.Module):
    """A frozen part, a part that nothing uses, a buffer that is kept and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)

    def forward(self, x):
        return self.used(self.frozen(x))


def identity(model, config=CONFIG) -> dict:
    return run_identity(model, config, TEXT, "next token")


def refused(mine, theirs, sentence):
    with pytest.raises(ValueError, match=sentence):
        require_same_run("run", identity(theirs), identity(mine))


def test_a_decoder_is_named_by_its_config():
    facts = identity(Decoder(MODEL))
    assert facts["model config"]["hidden_size"] == 16 and facts["text"] == TEXT
    assert facts["trainer config"]["betas"] == [0.9, 0.95] and "compile" not in facts["trainer config"]
    require_same_run("run", facts, identity(Decoder(MODEL), replace(CONFIG, compile=True)))
    refused(
        Decoder(MODEL),
        Decoder(replace(MODEL, num_hidden_layers=2)),
        "num_hidden_layers is 2, this run's is 1",
    )


def test_another_module_is_named_by_class_and_shapes():
    refused(
        nn.Linear(2, 3), nn.Linear(2, 4), r"another model: its weight is \[4, 2\], this run's is \[3, 2\]"
    )
    refused(
        nn.Linear(2, 3),
        nn.Bilinear(2, 2, 3),
        "another model: its class is 'Bilinear', this run's is 'Linear'",
    )


def test_what_this_run_has_not_tells_it_from_another_too():
    one, two = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    refused(two, one, r"another model: its 1.weight is None, this run's is \[2, 2\]")
    refused(one, two, r"another model: its 1.weight is \[2, 2\], this run's is None")


@dataclass
class Shape:
    """As transformers' configs are: with what JSON does not take."""

    width: int = 8
    dtype: torch.dtype = torch.float32
    activation: Callable = field(default_factory=lambda: lambda x: x)


def test_a_module_is_named_by_its_config_too_whatever_that_holds():
    def module(**fields):
        module = nn.Linear(2, 3)
        module.config = Shape(**fields)
        return module

    require_same_run("run", identity(module()), identity(module()))  # whose functions lie elsewhere
    for fields, sentence in (
        ({"width": 9}, "its width is '9', this run's is '8'"),
        ({"dtype": torch.float16}, "its dtype is 'torch.float16', this run's is 'torch.float32'"),
    ):
        refused(module(), module(**fields), f"another config of the module: {sentence}")


@dataclass
class Part:
    names: frozenset = frozenset({"a"})
    hidden: int = field(default=3, repr=False)


LETTERS = "abcdefgh"


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (set(LETTERS), "{'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}"),
        (frozenset(LETTERS), "frozenset({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})"),
        ([{"b", "a"}, ({"d", "c"},), {}], "[{'a', 'b'}, ({'c', 'd'},), {}]"),
        ({"z": {"b", "a"}, "y": (1, 2)}, "{'z': {'a', 'b'}, 'y': (1, 2)}"),
        (Part(frozenset("ba")), "Part(names=frozenset({'a', 'b'}))"),
    ],
)
def test_a_set_in_a_config_is_the_same_in_every_program(value, spelled):
    """Where texts hash otherwise, a set of them has another order."""
    module = nn.Linear(2, 3)
    module.config = Shape(activation=value)
    assert identity(module)["config of the module"]["activation"] == spelled


@pytest.mark.parametrize(
    "value",
    [
        set(),
        frozenset(),
        (),
        [],
        {},
        (1,),
        {1},
        {"b": 2, "a": (1, [2])},
        "é'",
        1e-5,
        None,
        Part(),
        torch.float16,
    ],
    ids=repr,
)
def test_what_has_an_order_of_its_own_is_spelled_as_before(value):
    module = nn.Linear(2, 3)
    module.config = Shape(activation=value)
    assert identity(module)["config of the module"]["activation"] == repr(value)


class Counting(nn.Linear):
    def get_extra_state(self):
        return {"passes": 3}

    def set_extra_state(self, state):
        pass


def test_a_state_that_no_checkpoint_holds_is_refused():
    with pytest.raises(ValueError, match=r"1 keeps a state of its own \(Counting.get_extra_state\)"):
        identity(nn.Sequential(nn.Linear(2, 2), Counting(2, 2)))


def test_buffers_under_a_wrapper_are_kept():
    """Its state_dict leaves out the wrapper's name."""
    model = nn.Sequential(checkpoint_wrapper(Mixed()))
    tensors = checkpoint_tensors(model, adamw(model, CONFIG, 0.1))
    assert [name for name in tensors if not name.endswith(("weight", "bias"))] == [
        "model.0._checkpoint_wrapped_module.seen"
    ]


def test_which_parameters_are_trained_and_in_which_numbers_belongs_to_it():
    free, frozen = Decoder(MODEL), Decoder(MODEL)
    frozen.norm.requires_grad_(False)
    sentence = (
        "another choice of parameters: its norm.weight is '{} in float32', this run's is '{} in float32'"
    )
    refused(free, frozen, sentence.format("frozen", "trained"))
    refused(frozen, free, sentence.format("trained", "frozen"))
    for kind in (torch.float64, torch.bfloat16):
        refused(free, Decoder(MODEL).to(kind), f"its .* is 'trained in {kind}'".replace("torch.", ""))
    refused(Mixed(), Mixed().to(torch.float64), "its frozen.weight is 'frozen in float64'")
    half = Mixed()
    half.seen = half.seen.half()
    refused(Mixed(), half, "its seen is 'a buffer in float16', this run's is 'a buffer in float32'")


def test_buffers_are_given_back_after_an_error():
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("moved", torch.zeros(3))
            self.register_buffer("anew", torch.zeros(3), persistent=False)
            self.register_buffer("none", None)

    model = nn.Sequential(Running())
    moved = model[0].moved
    with pytest.raises(KeyboardInterrupt), buffers_given_back(model):
        model[0].moved += 1
        model[0].anew = torch.ones(3)
        raise KeyboardInterrupt
    assert model[0].moved is moved and not moved.any() and not model[0].anew.any()
    with buffers_given_back(model):
        model[0].moved += 1
    assert moved.all()


def test_what_a_checkpoint_holds():
    model = Mixed()
    optimizer = adamw(model, CONFIG, 0.1)
    weights = {f"model.{layer}.{part}" for layer in ("frozen", "used", "idle") for part in ("weight", "bias")}
    assert checkpoint_tensors(model, optimizer).keys() == weights | {"model.seen"}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    updates = updates_made(model, optimizer)
    assert updates == {"used.weight": 3, "used.bias": 3}
    tensors = checkpoint_tensors(model, optimizer)
    moments = {f"optimizer.{m}.used.{part}" for m in ("exp_avg", "exp_avg_sq") for part in ("weight", "bias")}
    assert tensors.keys() == weights | {"model.seen"} | moments
    assert {name: tensor.shape for name, tensor in tensors.items()} == checkpoint_shapes(model, updates)


def test_room_for_moments_is_made_anew():
    model = Mixed()
    optimizer = adamw(model, CONFIG, 0.1)
    make_moments(model, optimizer, {"idle.bias": 7})
    assert updates_made(model, optimizer) == {"idle.bias": 7}
    make_moments(model, optimizer, {"used.bias": 2})
    assert updates_made(model, optimizer) == {"used.bias": 2}
    names = {name for name in checkpoint_tensors(model, optimizer) if name.startswith("optimizer")}
    assert names == {"optimizer.exp_avg.used.bias", "optimizer.exp_avg_sq.used.bias"}
