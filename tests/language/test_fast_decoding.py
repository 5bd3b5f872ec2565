"""A copy for decoding: the same function and the same weights, while the model stays as it is."""

import copy

import pytest
import torch
from small_models import FAMILIES, GROUPED, SPARSE, UNTIED, make_ids, make_model
from torch import nn
from torch.testing import assert_close

from minicpm_lite import kernels
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import changed_inside, require_plain
from minicpm_lite.language.fast_decoding import FewRowsLinear, fast_decoding
from minicpm_lite.language.generation import generate
from minicpm_lite.language.layers import replace_linears

CLOSE = dict(atol=1e-5, rtol=1e-4)


@pytest.fixture
def multiplied(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the matrices that the kernels multiply, as they do."""
    found, linears = [], kernels.linears

    def noted(x, weights, type):
        found.extend(tuple(weight.shape) for weight in weights)
        return linears(x, weights, type)

    monkeypatch.setattr(kernels, "linears", noted)
    return found


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_copy_computes_the_same_with_every_matrix_by_the_kernels(name, multiplied):
    model, ids = make_model(FAMILIES[name]), make_ids(FAMILIES[name])
    fast, cache, other = fast_decoding(model), KVCache(17), KVCache(17)
    for piece in ids.split([9, 1, 1, 6], dim=1):
        multiplied.clear()
        assert_close(fast(piece, cache), model(piece, other), **CLOSE)
        expected = [tuple(layer.weight.shape) for layer in fast.modules() if type(layer) is FewRowsLinear]
        if name == "experts":  # of which a token visits some
            assert set(multiplied) <= set(expected) and len(multiplied) > 4
        elif name == "latent":  # one of whose matrices is read as it is, by few tokens
            assert set(multiplied) <= set(expected)
        else:
            assert sorted(multiplied) == sorted(expected)
    assert not any(type(layer) is nn.Linear for layer in fast.modules())


@torch.no_grad()
def test_layers_of_one_input_are_multiplied_in_one_call(monkeypatch):
    fast, ids, calls, linears = (
        fast_decoding(make_model(GROUPED)),
        make_ids(GROUPED)[:, :5],
        [],
        kernels.linears,
    )
    monkeypatch.setattr(kernels, "linears", lambda x, w, type: calls.append(len(w)) or linears(x, w, type))
    together = fast(ids)
    assert calls == [3, 1, 2, 1] * GROUPED.num_hidden_layers + [1]  # q, k, v; o; gate, up; down
    monkeypatch.delattr(FewRowsLinear, "side_by_side")
    calls.clear()
    assert torch.equal(fast(ids), together) and set(calls) == {1}


@torch.no_grad()
def test_a_hook_is_called_where_layers_would_be_multiplied_in_one_call():
    fast, ids, seen = fast_decoding(make_model(GROUPED)), make_ids(GROUPED)[:, :5], []
    expected = fast(ids)
    fast.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda *_: seen.append("before"))
    fast.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append("behind"))
    assert torch.equal(fast(ids), expected) and seen == ["before", "behind"]


@torch.no_grad()
def test_layers_of_two_classes_are_multiplied_one_by_one():
    fast, ids = fast_decoding(make_model(GROUPED)), make_ids(GROUPED)[:, :5]
    expected = fast(ids)
    for block in fast.layers:
        block.self_attn.k_proj, plain = nn.Linear(1, 1, bias=False), block.self_attn.k_proj
        block.self_attn.k_proj.weight = plain.weight
    assert_close(fast(ids), expected, **CLOSE)


def test_weights_are_shared_and_the_model_stays_plain():
    model, ids = make_model(GROUPED), make_ids(GROUPED)
    fast = fast_decoding(model)
    require_plain(model)
    assert {id(p) for p in fast.parameters()} == {id(p) for p in model.parameters()}
    assert fast.lm_head.weight is fast.embed_tokens.weight is model.embed_tokens.weight
    assert fast.num_parameters(embeddings=True) == model.num_parameters(embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert_close(fast(ids), model(ids), **CLOSE)


def test_the_copy_is_no_plain_decoder():
    """What asks for one is told which layer is another."""
    fast = fast_decoding(make_model(UNTIED))
    assert changed_inside(fast).keys() == {n for n, m in fast.named_modules() if type(m) is FewRowsLinear}
    with pytest.raises(
        ValueError, match="The model was changed inside: layers.0.self_attn.q_proj is .*FewRows"
    ):
        require_plain(fast)


def test_texts_are_those_of_the_model():
    model, ids = make_model(GROUPED), make_ids(GROUPED)
    assert torch.equal(generate(fast_decoding(model), ids, 12), generate(model, ids, 12))


def test_with_gradients_the_layers_are_pytorchs(multiplied):
    model, ids = make_model(GROUPED), make_ids(GROUPED)
    fast = fast_decoding(model)
    gradients = []
    for each in (model, fast):
        each(ids).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    assert multiplied == []
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_other_layers_stay():
    """Biased ones, and what others put in the place of a linear layer."""

    class Other(nn.Linear):
        pass

    model = make_model(GROUPED)
    model.layers[0].mlp.up_proj = nn.Linear(64, GROUPED.intermediate_size)
    replace_linears(model, lambda name, old: Other(64, 64, bias=False) if name.endswith("o_proj") else old)
    fast, ids = fast_decoding(model), make_ids(GROUPED)
    assert type(fast.layers[0].mlp.up_proj) is nn.Linear and type(fast.layers[0].self_attn.o_proj) is Other
    assert_close(fast(ids), model(ids), **CLOSE)
    again = fast_decoding(fast)  # nothing is left to do
    assert_close(again(ids), model(ids), **CLOSE)


def test_a_copy_can_be_copied():
    fast = copy.deepcopy(fast_decoding(make_model(SPARSE)))
    assert fast.lm_head is None or fast.lm_head.weight is fast.embed_tokens.weight


@torch.no_grad()
def test_it_compiles_to_one_graph_for_each_kind_of_call(unchecked):
    torch._dynamo.reset()
    model, ids = make_model(GROUPED), make_ids(GROUPED)
    compiled, cache, other = (
        torch.compile(fast_decoding(model), fullgraph=True, backend="eager"),
        KVCache(17),
        KVCache(17),
    )
    for piece in ids.split([9, 1, 1, 1, 5], dim=1):
        assert_close(compiled(piece, cache), model(piece, other), **CLOSE)


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double, lambda model: model.to("meta")])
def test_other_weights_are_refused(change):
    with pytest.raises(
        ValueError, match="The weights are torch.float.* on .*; the kernels multiply float32 on a"
    ):
        fast_decoding(change(make_model(GROUPED)))
