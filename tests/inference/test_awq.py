"""AWQ and smoothing: what is folded changes no function, and rounding afterwards loses less."""

import copy

import pytest
import torch
from small_models import WIDE, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite.inference import awq as module
from minicpm_lite.inference.awq import (
    Seam,
    awq_model,
    awq_scale,
    fold,
    seams,
    smooth_model,
    smoothing_scale,
)
from minicpm_lite.inference.calibration import Statistics, walk_blocks
from minicpm_lite.inference.gptq import gptq_model
from minicpm_lite.inference.packed import quantize_model
from minicpm_lite.inference.quantization import dequantize, quantize
from minicpm_lite.inference.ternary import make_ternary
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import Decoder


def outlying(family: str) -> Decoder:
    """A model some of whose features are far larger than others, as in large models."""
    model = make_model(WIDE[family])
    with torch.no_grad():
        for layer in model.layers:
            layer.input_layernorm.weight[3] *= 30
            layer.post_attention_layernorm.weight[[5, 77]] *= 30
    return model


def some_scale(block: torch.nn.Module, seam: Seam, seed: int) -> torch.Tensor:
    """Any numbers, one for each row of what makes the columns."""
    columns = block.get_submodule(seam.consumers[0]).in_features
    numbers = torch.rand(4096, generator=torch.Generator().manual_seed(seed)).double() * 3 + 0.1
    return numbers[:columns] if seam.rows is None else numbers[seam.rows]


@pytest.mark.parametrize("family", WIDE)
@torch.no_grad()
def test_any_scale_may_be_folded(family):
    """In float64, so that nothing but a wrong fold can make a difference of 1e-10."""
    model, ids = make_model(WIDE[family]).double(), make_ids(WIDE[family])
    before, weights = model(ids), [p.clone() for p in model.parameters()]
    for number, layer in enumerate(model.layers):
        for seam in seams(layer):
            fold(layer, seam, some_scale(layer, seam, number))
    assert_close(model(ids), before, atol=1e-11, rtol=1e-11)
    cache = KVCache(17)
    pieces = [model(piece, cache) for piece in ids.split([9, 1, 7], dim=1)]
    assert_close(torch.cat(pieces, dim=1), before, atol=1e-11, rtol=1e-11)
    changed = sum(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    tables = 1 if model.config.tie_word_embeddings else 2
    assert changed == len(weights) - tables - 1, "all but the tables and the last norm"


@pytest.mark.parametrize("family", WIDE)
def test_every_linear_layer_reads_one_seam(family):
    block = make_model(WIDE[family]).layers[0]
    consumers = [name for seam in seams(block) for name in seam.consumers]
    linears = [name for name, part in block.named_modules() if hasattr(part, "in_features")]
    assert sorted(consumers) == sorted(linears)
    for seam in seams(block):
        made = block.get_submodule(seam.producer).weight.shape[0]
        columns = block.get_submodule(seam.consumers[0]).in_features
        assert (
            made == columns
            if seam.rows is None
            else len(seam.rows) == columns and int(seam.rows.max()) < made
        )


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("how", ["awq", "smooth"])
@torch.no_grad()
def test_scales_that_are_chosen_change_no_function_and_help_rounding(family, how, unchecked):
    model, windows = outlying(family), make_ids(WIDE[family], batch=8)
    expected = model(windows)
    folded = copy.deepcopy(model)
    given = awq_model(folded, "INT4_G32", windows) if how == "awq" else smooth_model(folded, windows)
    assert given is folded
    assert_close(folded(windows), expected, atol=5e-4, rtol=1e-3)

    def lost(model: Decoder) -> float:
        return (model(windows) - expected).square().mean().item()

    nearest = lost(quantize_model(copy.deepcopy(model), "INT4_G32"))
    after = lost(quantize_model(copy.deepcopy(folded), "INT4_G32"))
    assert after < 0.9 * nearest
    if how == "awq":
        both = lost(gptq_model(folded, "INT4_G32", windows))
        assert both < after, "GPTQ takes it from there (S-GPTQ)"


def statistics(x: torch.Tensor) -> Statistics:
    seen = Statistics(x.shape[1])
    seen.add(x)
    return seen


@torch.no_grad()
def test_awq_finds_the_best_of_its_grid():
    """By computing the outputs, and not by the hessian."""
    torch.manual_seed(0)
    weights = [torch.randn(8, 64), torch.randn(12, 64)]
    x = torch.randn(200, 64) * torch.exp(torch.randn(64))
    size, errors = x.abs().mean(0), {}
    for step in range(21):
        s = size ** (step / 20)
        rounded = [dequantize(quantize(w * s, "Q4_0")) for w in weights]
        errors[step] = sum(
            (x / s @ r.T - x @ w.T).square().sum().item() for r, w in zip(rounded, weights, strict=True)
        )
    best = min(errors, key=errors.get)
    found = awq_scale(weights, [statistics(x)] * 2, ["Q4_0"] * 2)
    expected = size ** (best / 20)
    assert best > 0 and errors[best] < 0.8 * errors[0]
    assert_close(found / found[0], expected / expected[0], atol=1e-3, rtol=1e-3)


def test_smoothing_by_hand():
    x, w = torch.tensor([[4.0, -1.0], [2.0, 0.5]]), torch.tensor([[0.5, 1.0], [-0.25, 4.0]])
    scale = smoothing_scale([w], [statistics(x)], 0.5)
    assert_close(scale, torch.tensor([(4 / 0.5) ** 0.5, (1 / 4) ** 0.5]))
    even = smoothing_scale([w], [statistics(x)], 1.0)
    assert_close((x / even).abs().amax(0), torch.ones(2)), "all inputs become as large"


def test_columns_of_one_row_have_one_scale():
    rows = torch.tensor([0, 1, 0, 1])
    x, w = torch.rand(9, 4) + torch.tensor([1.0, 2, 3, 4]), torch.randn(32, 4)
    for scale in (smoothing_scale([w], [statistics(x)], 0.5, rows), module._shared(x.mean(0), rows)):
        assert torch.equal(scale[:2], scale[2:]) and scale[0] != scale[1]


@torch.no_grad()
def test_a_column_that_no_text_used_is_not_divided_by_zero():
    x = torch.randn(50, 64)
    x[:, 9] = 0
    scale = awq_scale([torch.randn(4, 64)], [statistics(x)], ["Q4_0"])
    assert bool(scale.isfinite().all()) and scale.min() > 0


@pytest.mark.parametrize("how", ["norm", "up"])
@torch.no_grad()
def test_wrong_sides_are_told_apart(how, monkeypatch):
    """What is divided and multiplied exchanged, on one side alone; and a router that does not follow."""
    model, ids = make_model(WIDE["experts"]).double(), make_ids(WIDE["experts"])
    before, layer = model(ids), model.layers[0]
    seam = next(s for s in seams(layer) if s.producer.endswith("layernorm" if how == "norm" else "up_proj"))
    scale = some_scale(layer, seam, 0)
    fold(layer, seam, scale)
    assert_close(model(ids), before, atol=1e-11, rtol=1e-11)
    producer = layer.get_submodule(seam.producer).weight
    scale = scale if how == "norm" else scale[:, None]
    for wrong in (scale, scale**2):  # not divided at all; multiplied
        producer.mul_(wrong)
        assert (model(ids) - before).abs().max() > 1e-3
        producer.div_(wrong)
    assert_close(model(ids), before, atol=1e-11, rtol=1e-11)


@torch.no_grad()
def test_a_router_that_does_not_follow_is_told_apart():
    model, ids = make_model(WIDE["experts"]).double(), make_ids(WIDE["experts"])
    before, layer = model(ids), model.layers[0]
    seam = next(s for s in seams(layer) if "mlp.gate" in s.consumers)
    without = Seam(seam.producer, tuple(name for name in seam.consumers if name != "mlp.gate"))
    fold(layer, without, some_scale(layer, seam, 0))
    assert (model(ids) - before).abs().max() > 1e-3


@torch.no_grad()
def test_value_heads_in_the_wrong_order_are_told_apart():
    """Query head h reads value head h // group, not h % heads."""
    model, ids = make_model(WIDE["grouped"]).double(), make_ids(WIDE["grouped"])
    before, layer = model(ids), model.layers[0]
    seam = next(s for s in seams(layer) if s.producer == "self_attn.v_proj")
    columns = torch.arange(256)
    wrong = Seam(seam.producer, seam.consumers, columns // 64 % 2 * 64 + columns % 64)
    fold(layer, wrong, some_scale(layer, wrong, 0))
    assert (model(ids) - before).abs().max() > 1e-3


@pytest.mark.parametrize("strength", [float("nan"), -0.1, 1.5, float("inf")])
def test_a_strength_that_is_none_is_refused(strength):
    model = make_model(WIDE["grouped"])
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="strength is .*; expected a number from 0 to 1"):
        smooth_model(model, make_ids(model.config), strength)
    assert all(torch.equal(weights[name], each) for name, each in model.state_dict().items())


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_destroys_weights_is_refused(broken):
    layer = make_model(WIDE["grouped"]).layers[0]
    weights = copy.deepcopy(layer.state_dict())
    for seam in seams(layer):
        scale = torch.ones(layer.get_submodule(seam.consumers[0]).in_features)
        scale[3] = broken
        with pytest.raises(ValueError, match=f"scale for {seam.producer} holds numbers that are not pos"):
            fold(layer, seam, scale)
    assert all(torch.equal(weights[name], each) for name, each in layer.state_dict().items())


def test_a_model_that_was_changed_inside_is_refused():
    model = quantize_model(make_model(WIDE["grouped"]), {"layers.0.mlp.up_proj.weight": "Q4_0"})
    for how in (
        lambda: awq_model(model, {}, make_ids(model.config)),
        lambda: smooth_model(model, make_ids(model.config)),
    ):
        with pytest.raises(ValueError, match="The model was changed inside"):
            how()


@torch.no_grad()
def test_only_what_will_be_rounded_counts():
    """With no type there is nothing to fold; with one, its seam alone."""
    model, windows = outlying("grouped"), make_ids(WIDE["grouped"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    awq_model(model, {"layers.1.mlp.down_proj.weight": "Q4_0"}, windows)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"layers.1.mlp.down_proj.weight", "layers.1.mlp.up_proj.weight"}


@torch.no_grad()
def test_statistics_of_a_folded_layer_are_divided():
    model, windows = outlying("grouped"), make_ids(WIDE["grouped"])
    before, after = {}, {}
    walk_blocks(model, windows, lambda at, block, seen: before.setdefault(at, seen))
    smooth_model(model, windows, strength=1.0)
    walk_blocks(model, windows, lambda at, block, seen: after.setdefault(at, seen))
    assert_close(after[0]["self_attn.q_proj"].largest, torch.ones(256), atol=1e-3, rtol=1e-3)
    assert before[0]["self_attn.q_proj"].largest.max() > 5


@pytest.mark.parametrize("change", [make_ternary, lambda model: quantize_model(model, "Q8_0")])
def test_no_scale_is_folded_into_weights_that_are_computed(change):
    model, ids = make_model(WIDE["grouped"]), make_ids(WIDE["grouped"])
    layer = change(model).layers[0]
    with torch.no_grad():
        before = model(ids)
        with pytest.raises(ValueError, match="(Ternary|Packed)Linear, which computes its weight"):
            fold(layer, seams(layer)[0], torch.full((256,), 2.0))
        assert torch.equal(model(ids), before)
