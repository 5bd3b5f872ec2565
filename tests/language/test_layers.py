"""The layers of a plain block: known by hand, and replaced one by one in every kind of model."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import FAMILIES, GROUPED, LATENT, SPARSE, make_ids, make_model
from torch import nn
from torch.testing import assert_close

from minicpm_lite.language import latent_attention
from minicpm_lite.language.context import Context, KVCache
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.layers import Attention, FeedForward, RMSNorm, replace_linears
from minicpm_lite.language.rotary import scaled_angles


def test_rms_norm_of_a_vector_known_by_hand():
    norm = RMSNorm(2, eps=0.0)
    assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) / math.sqrt(12.5))


def test_rms_norm_keeps_its_statistics_in_float32():
    x = torch.full((4096,), 300.0, dtype=torch.bfloat16)  # the sum of squares has no place in 8 bits
    assert_close(RMSNorm(4096, eps=0.0).bfloat16()(x), torch.ones(4096, dtype=torch.bfloat16))


def test_feed_forward_is_its_formula():
    layer, x = FeedForward(GROUPED), torch.randn(2, 3, 64)
    gate, up = x @ layer.gate_proj.weight.T, x @ layer.up_proj.weight.T
    expected = (gate * torch.sigmoid(gate) * up) @ layer.down_proj.weight.T
    assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


def test_attention_reads_what_is_wider_than_the_residual_stream():
    """A draft model joins its input with the target's states: twice the width in, once the width out."""
    torch.manual_seed(0)
    wide, x = Attention(GROUPED, 0, input_size=128), torch.randn(2, 5, 128)
    narrow = Attention(GROUPED, 0)
    rotary = scaled_angles(GROUPED, torch.arange(5), 5)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(wide, name).weight.data
        weight[:, 64:] = 0
        getattr(narrow, name).weight.data.copy_(weight[:, :64])
    narrow.o_proj = wide.o_proj
    out = wide(x, rotary, Context())
    assert out.shape == (2, 5, 64)
    assert_close(out, narrow(x[..., :64], rotary, Context()), atol=1e-6, rtol=1e-5)


# Replacing linear layers


class Adapted(nn.Module):
    """A low-rank adapter around whatever stands in a linear layer's place."""

    def __init__(self, inner: nn.Module, rank: int = 2, scale: float = 0.3) -> None:
        super().__init__()
        self.inner, self.in_features, self.out_features = inner, inner.in_features, inner.out_features
        self.down = nn.Parameter(scale * torch.randn(rank, inner.in_features))
        self.up = nn.Parameter(scale * torch.randn(inner.out_features, rank))

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight + self.up @ self.down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + F.linear(F.linear(x, self.down), self.up)


def adapt(name: str, linear: nn.Module) -> nn.Module:
    return Adapted(linear)


def linears_of(model: Decoder) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_linear_layer_is_met_once_by_its_name(name):
    model = make_model(FAMILIES[name])
    met = {}
    assert replace_linears(model, lambda name, linear: met.setdefault(name, linear)) == []
    assert list(met) == linears_of(model) and all(model.get_submodule(at) is met[at] for at in met)
    per_layer = {"grouped": 7, "untied": 7, "latent": 8, "experts": 4 + 1 + 5 * 3}[name]
    assert len(met) == model.config.num_hidden_layers * per_layer + (name == "untied")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_equal_layers_in_their_place_change_no_bit(name):
    model = make_model(FAMILIES[name])
    ids = make_ids(model.config)
    before, names, weights = model(ids), linears_of(model), [p.clone() for p in model.parameters()]
    replaced = replace_linears(model, lambda name, linear: copy.deepcopy(linear))
    assert replaced == names == linears_of(model)
    assert torch.equal(model(ids), before)
    assert all(torch.equal(one, other) for one, other in zip(weights, model.parameters(), strict=True))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_adapters_compute_what_their_weights_say(name):
    """Twice around each layer; the same matrices merged into plain layers are the oracle."""
    torch.manual_seed(1)
    model = make_model(FAMILIES[name]).double()
    ids, names = make_ids(model.config), linears_of(model)
    plain = model(ids)
    for _ in range(2):
        assert replace_linears(model, lambda name, linear: Adapted(linear).double()) == names
        assert all(isinstance(model.get_submodule(at), Adapted) for at in names)
    assert all(isinstance(model.get_submodule(at).inner, Adapted) for at in names)
    adapted, cache = model(ids), KVCache(17)
    in_pieces = torch.cat([model(piece, cache) for piece in ids.split([9, 1, 7], dim=1)], dim=1)

    def merged(name: str, linear: nn.Module) -> nn.Linear:
        one = nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=torch.float64)
        one.weight.copy_(linear.weight)
        return one

    assert replace_linears(model, merged) == names == linears_of(model)
    assert_close(adapted, model(ids), atol=1e-9, rtol=1e-9)
    assert_close(in_pieces, adapted, atol=1e-9, rtol=1e-9)
    assert (adapted - plain).abs().max() > 1e-2


def test_a_change_that_refuses_one_layer_changes_none():
    model = make_model(GROUPED)
    before = dict(model.named_modules())

    def refusing(name: str, linear: nn.Module) -> nn.Module:
        if name == "layers.2.mlp.up_proj":
            raise ValueError("not this one")
        return adapt(name, linear)

    with pytest.raises(ValueError, match="not this one"):
        replace_linears(model, refusing)
    assert dict(model.named_modules()) == before


def test_both_forms_of_latent_attention_read_adapters(monkeypatch):
    """The absorbed form takes the matrix itself; gradients reach the adapter by either way."""
    torch.manual_seed(1)
    model = make_model(LATENT).double()
    replace_linears(model, lambda name, linear: Adapted(linear).double())
    out, gradients = {}, {}
    for absorbed in (False, True):
        monkeypatch.setattr(latent_attention, "absorbed_is_cheaper", lambda *_, **__: absorbed)  # noqa: B023
        model.zero_grad()
        out[absorbed] = model(make_ids(LATENT))
        out[absorbed].square().mean().backward()
        gradients[absorbed] = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_close(out[True], out[False], atol=1e-9, rtol=1e-9)
    for name, gradient in gradients[False].items():
        assert_close(gradients[True][name], gradient, atol=1e-8, rtol=1e-6, msg=name)
        assert name.endswith("norm.weight") or gradient.any(), name


@torch.no_grad()
def test_latent_attention_with_biases_is_the_same_with_a_cache():
    def biased(name: str, linear: nn.Linear) -> nn.Linear:
        new = nn.Linear(linear.in_features, linear.out_features)
        new.weight = linear.weight
        return new

    torch.manual_seed(1)
    model, ids, cache = make_model(LATENT), make_ids(LATENT), KVCache(17)
    replace_linears(model, biased)
    step_by_step = torch.cat([model(token, cache) for token in ids.split(1, dim=1)], dim=1)
    assert_close(step_by_step, model(ids), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_layers_are_chosen_by_name():
    model = make_model(SPARSE)
    routers = replace_linears(
        model, lambda at, linear: Adapted(linear) if at.endswith("mlp.gate") else linear
    )
    assert routers == ["layers.0.mlp.gate", "layers.1.mlp.gate"]
    one = replace_linears(
        model,
        lambda at, linear: (
            Adapted(linear) if ".experts.3.up_proj" in at and at.startswith("layers.1") else linear
        ),
    )
    assert one == ["layers.1.mlp.experts.3.up_proj"]
    assert isinstance(model.layers[1].mlp.experts[3].up_proj, Adapted)
    assert type(model.layers[1].mlp.experts[2].up_proj) is nn.Linear
    assert bool(model(make_ids(SPARSE)).isfinite().all())


def test_anything_with_a_matrix_may_take_the_place_of_anything_with_one():
    """No module of ours is needed: any tree of modules is walked, and what replaced is not walked into."""
    model = nn.ModuleDict(
        {"a": nn.Linear(2, 3), "b": nn.Sequential(nn.ReLU(), nn.Linear(3, 1)), "c": nn.Embedding(2, 2)}
    )
    assert replace_linears(model, adapt) == ["a", "b.1"]
    assert type(model["a"].inner) is nn.Linear
