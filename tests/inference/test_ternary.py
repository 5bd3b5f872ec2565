"""Ternary weights: absmean by hand, gradients straight through, trained by the trainer, packed without loss."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import WIDE, make_ids, make_model
from torch import nn
from torch.testing import assert_close

from minicpm_lite import kernels
from minicpm_lite.inference import ternary as module
from minicpm_lite.inference.packed import load_packed, quantize_model, save_packed, true_bits
from minicpm_lite.inference.quantization import Quantized, dequantize, quantize
from minicpm_lite.inference.ternary import (
    TernaryLinear,
    make_ternary,
    pack_ternary,
    ternarize,
    ternary_product,
)
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import require_plain
from minicpm_lite.training.settings import Layout, TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

TOKENS = (torch.arange(3000) * 7 // 3) % 50
CONFIG = TrainerConfig(batch_size=4, sequence_length=16)
SCHEDULE = WSD(3e-3, 2, 10, 4)


def naive(weight: torch.Tensor, width: int) -> torch.Tensor:
    """Group by group, number by number."""
    out = torch.zeros_like(weight)
    for i in range(weight.shape[0]):
        for start in range(0, weight.shape[1], width):
            group = weight[i, start : start + width].tolist()
            scale = torch.tensor(max(sum(map(abs, group)) / width, 1e-5)).half().item()
            for j, w in enumerate(group):
                out[i, start + j] = scale * max(-1, min(1, round(w / scale)))
    return out


@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    width=st.sampled_from([1, 2, 5, 32]),
    seed=st.integers(0, 999),
)
@settings(max_examples=30, deadline=None)
def test_it_is_its_formula(rows, groups, width, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * width, generator=draw)
    codes, scale = ternarize(weight, width)
    assert scale.shape == (rows, groups) and set(codes.unique().tolist()) <= {-1, 0, 1}
    assert_close(
        (codes.unflatten(1, (groups, width)) * scale[..., None]).flatten(1),
        naive(weight, width),
        atol=1e-6,
        rtol=1e-3,
    )


def test_groups_of_a_row_and_of_a_matrix():
    weight = torch.randn(6, 96)
    codes, scale = ternarize(weight)
    assert_close(scale[:, 0], weight.abs().mean(1), atol=1e-3, rtol=1e-3)
    assert torch.equal(codes, ternarize(weight, 96)[0])
    codes, scale = ternarize(weight, "matrix")
    assert scale.shape == (6, 1) and scale.unique().numel() == 1
    assert_close(scale[0, 0], weight.abs().mean(), atol=1e-3, rtol=1e-3)


def test_the_threshold_is_half_the_mean():
    weight = torch.tensor([[1.0, 1.0, -1.0, 0.49, -0.51, 2.0]]) / torch.tensor(1.0)
    scale = weight.abs().mean().item()
    codes, _ = ternarize(weight)
    assert codes[0].tolist() == [int(math.copysign(abs(w) >= scale / 2, w)) for w in weight[0].tolist()]


def test_zeros_stay_zeros():
    codes, scale = ternarize(torch.zeros(2, 8))
    assert not codes.any() and (scale > 0).all()


@given(group=st.sampled_from([1, 8, 64, "row", "matrix"]), seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_adding_and_subtracting_is_the_product(group, seed):
    torch.manual_seed(seed)
    layer, x = TernaryLinear(nn.Linear(64, 9, bias=False), group), torch.randn(3, 2, 64)
    with torch.no_grad():
        assert_close(ternary_product(x, *ternarize(layer.latent, group)), layer(x), atol=1e-5, rtol=1e-5)


def test_gradients_go_straight_through():
    torch.manual_seed(0)
    layer, x = TernaryLinear(nn.Linear(64, 9, bias=False), 32), torch.randn(5, 64, requires_grad=True)
    rounded = layer.weight.detach()
    expected = torch.randn(5, 9)
    (layer(x) * expected).sum().backward()
    assert_close(layer.latent.grad, expected.T @ x.detach(), atol=1e-5, rtol=1e-5)
    assert_close(x.grad, expected @ rounded, atol=1e-5, rtol=1e-5)
    assert set(
        (rounded.unflatten(1, (2, 32)) / ternarize(layer.latent, 32)[1][..., None]).unique().tolist()
    ) == {-1, 0, 1}


def test_the_weight_is_ternary_to_the_last_bit():
    torch.manual_seed(0)
    layer = TernaryLinear(nn.Linear(256, 64, bias=False))
    nn.init.normal_(layer.latent)
    codes, scale = ternarize(layer.latent.detach())
    assert torch.equal(layer.weight.detach(), codes * scale)


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("group", ["row", 32])
@torch.no_grad()
def test_a_ternary_model_is_the_plain_one_of_its_weights(family, group):
    config = WIDE[family]
    model, ids = make_model(config), make_ids(config)
    plain = copy.deepcopy(model)
    assert make_ternary(model, group) is model
    layers = [name for name, part in model.named_modules() if isinstance(part, TernaryLinear)]
    assert len(layers) == 2 * {"grouped": 7, "untied": 7, "latent": 8, "experts": 4 + 5 * 3}[family]
    for name in layers:
        plain.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    one = model.layers[1].self_attn.o_proj
    assert_close(one.weight, naive(one.latent, 256 if group == "row" else group), atol=1e-6, rtol=1e-3)
    assert_close(model(ids), plain(ids), atol=1e-5, rtol=1e-4)
    cache = KVCache(17)
    pieces = [model(piece, cache) for piece in ids.split([9, 1, 7], dim=1)]
    assert_close(torch.cat(pieces, dim=1), plain(ids), atol=1e-4, rtol=1e-3)


def trained(group="row", steps=16, model=None, **options):
    trainer = Trainer(
        make_ternary(model or make_model(WIDE["grouped"]), group), TOKENS, SCHEDULE, CONFIG, **options
    )
    trainer.train(steps, progress=False)
    return trainer


def test_the_trainer_trains_it_from_the_start_and_from_a_checkpoint():
    whole = Trainer(make_model(WIDE["grouped"]), TOKENS, SCHEDULE, CONFIG)
    whole.train(progress=False)
    start, later = trained(), trained(model=copy.deepcopy(whole.model))
    assert start.losses[-1] < start.losses[0] - 1 and later.losses[-1] < later.losses[0]
    assert later.losses[-1] < start.losses[-1], "what was learned before is of use"
    assert later.losses[0] > whole.losses[-1], "and rounding it costs something"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_is_resumed_bit_for_bit(precision, tmp_path):
    from dataclasses import replace

    config = replace(CONFIG, precision=precision)

    def run() -> Trainer:
        return Trainer(make_ternary(make_model(WIDE["grouped"])), TOKENS, SCHEDULE, config)

    straight, first, second = run(), run(), run()
    straight.train(6, progress=False)
    first.train(3, progress=False)
    second.load(first.save(tmp_path))
    second.train(6, progress=False)
    assert second.losses == straight.losses
    assert all(
        torch.equal(a, b) for a, b in zip(second.model.parameters(), straight.model.parameters(), strict=True)
    )


def test_a_checkpoint_of_another_group_is_refused(tmp_path):
    """Weights of the same shapes, with which another layer would compute something else."""
    checkpoint = trained("row", 3).save(tmp_path)
    other = Trainer(make_ternary(make_model(WIDE["grouped"]), 64), TOKENS, SCHEDULE, CONFIG)
    with pytest.raises(
        ValueError, match="another choice of parameters: .*group='row'.*, this run's .*group=64"
    ):
        other.load(checkpoint)
    assert other.step == 0
    trained("row", 3).load(checkpoint)


def test_latent_weights_are_matrices_to_the_optimizer():
    trainer = Trainer(
        make_ternary(make_model(WIDE["experts"])), TOKENS, SCHEDULE, CONFIG, layout=Layout(micro_batch=2)
    )
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    latents = {p for name, p in trainer.model.named_parameters() if name.endswith("latent")}
    assert latents <= set(groups["matrices"]["params"]) and groups["matrices"]["weight_decay"] > 0
    trainer.train(2, progress=False)


# Packing


@pytest.mark.parametrize("type", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("group", ["row", "matrix", 256])
def test_packing_changes_no_bit_of_the_weights(type, group, monkeypatch):
    monkeypatch.setattr(kernels, "built", lambda source: False)  # PyTorch's inputs are not rounded, either
    model = trained(group, 3).model.eval()
    ids = make_ids(model.config)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, TernaryLinear)}
    assert len(layers) == 14
    with torch.no_grad():
        before, weights = model(ids), {name: part.weight for name, part in layers.items()}
        packed = pack_ternary(model, type)
        assert all(torch.equal(packed.get_submodule(name).weight, weight) for name, weight in weights.items())
        assert_close(packed(ids), before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_kernels_do_to_inputs_is_said():
    """TQ1_0 is unpacked and computes as before; the kernel of TQ2_0 rounds its inputs to 8 bits."""
    model = make_ternary(make_model(WIDE["grouped"]))
    ids = make_ids(model.config)
    before = model(ids)
    for type, most in (("TQ1_0", 1e-5), ("TQ2_0", 0.1)):
        change = (pack_ternary(copy.deepcopy(model), type)(ids) - before).norm() / before.norm()
        assert change < most


@torch.no_grad()
def test_a_packed_model_goes_round_a_file(tmp_path):
    model = pack_ternary(make_ternary(make_model(WIDE["latent"])))
    quantize_model(model, {"embed_tokens.weight": "Q6_K"})
    save_packed(model, tmp_path / "model")
    ids = make_ids(model.config)
    assert torch.equal(load_packed(tmp_path / "model")(ids), model(ids))


@pytest.mark.parametrize("family", ["grouped", "untied"])
def test_true_bits_are_not_log2_of_3(family):
    for type, bits in (("TQ1_0", 1.6875), ("TQ2_0", 2.0625)):
        model = pack_ternary(make_ternary(make_model(WIDE[family])), type)
        layers = [part for part in model.modules() if hasattr(part, "packed")]
        assert {part.quantized.bits_per_weight for part in layers} == {bits}
        size, tables = true_bits(model), sum(table.numel() for table in model.tables)
        ternary, norms = sum(part.quantized.shape.numel() for part in layers), 5 * 256
        assert size.weights == ternary + tables + norms
        assert size.nbytes == ternary * bits / 8 + 4 * (tables + norms)
        assert size.bits_per_weight > bits > math.log2(3)


def test_groups_that_the_type_cannot_hold_are_refused():
    model = make_ternary(make_model(WIDE["grouped"]), 64)
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_proj has a scale for each group of 64, and TQ2_0"
    ):
        pack_ternary(model)
    narrow = make_ternary(make_model(WIDE["grouped"]))
    narrow.layers[1].mlp.up_proj = TernaryLinear(nn.Linear(64, 8, bias=False))
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.up_proj: Rows of 64 weights do not divide into blocks"
    ):
        pack_ternary(narrow)
    for refused in (model, narrow):
        left = [part for part in refused.modules() if isinstance(part, TernaryLinear)]
        assert len(left) == 14, "no latent weights are lost"


def test_q4_0_does_not_hold_ternary_weights():
    """llama.cpp's type for rows that 256 does not divide: what is as large as the largest and has the other sign
    comes out at seven eighths of it."""
    x = torch.tensor([[1.0, -1.0] * 16])
    assert dequantize(quantize(x, "Q4_0")).unique().tolist() == [-0.875, 1.0]


# Errors


@pytest.mark.parametrize("group", [3, 0, -2, 512, "columns", None, 2.0, True])
def test_groups_that_do_not_fit_are_refused(group, unchecked):
    model = make_model(WIDE["grouped"])
    with pytest.raises(ValueError, match="group is .*; expected a divisor of the 256 columns"):
        make_ternary(model, group)
    require_plain(model)


def test_a_layer_that_does_not_fit_leaves_the_others_as_they_are():
    model = make_model(replace(WIDE["grouped"], intermediate_size=320))
    with pytest.raises(ValueError, match="group is 256; expected a divisor of the 320 columns"):
        make_ternary(model, 256)
    require_plain(model)


def test_packed_layers_are_refused(unchecked):
    model = quantize_model(make_model(WIDE["grouped"]), {"layers.1.mlp.up_proj.weight": "Q8_0"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: .*PackedLinear; .*unpack_model"):
        make_ternary(model)
    assert not any(isinstance(part, TernaryLinear) for part in model.modules())


def test_what_is_ternary_or_packed_is_not_made_so_again(unchecked):
    model = make_ternary(make_model(WIDE["grouped"]))
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="TernaryLinear; expected a plain layer"):
        make_ternary(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="PackedLinear; expected a plain layer"):
        make_ternary(pack_ternary(model))


def test_a_bias_is_refused():
    with pytest.raises(ValueError, match="The layer is .*Linear with a bias"):
        TernaryLinear(nn.Linear(4, 4))


def test_it_is_no_plain_decoder():
    with pytest.raises(
        ValueError, match="The model was changed inside: layers.0.self_attn.q_proj is .*TernaryLinear"
    ):
        require_plain(make_ternary(make_model(WIDE["grouped"])))


# Mistakes that people make, each told apart from the formula group by group.


def no_scale(weight, group="row"):
    codes, scale = ternarize(weight, group)
    return codes, torch.ones_like(scale)


def a_tenth_of_the_mean(weight, group="row"):
    scale = weight.abs().mean(1, keepdim=True).half().float()
    return (weight.sign() * (weight.abs() > 0.1 * scale)).to(torch.int8), scale


def the_largest(weight, group="row"):
    scale = weight.abs().amax(1, keepdim=True).half().float()
    return (weight / scale).round().clamp(-1, 1).to(torch.int8), scale


def not_clamped(weight, group="row"):
    _, scale = ternarize(weight, group)
    return (weight / scale).round().to(torch.int8), scale


@pytest.mark.parametrize("wrong", [no_scale, a_tenth_of_the_mean, the_largest, not_clamped])
def test_wrong_quantisers_are_told_apart(wrong, monkeypatch):
    weight = torch.randn(4, 64)
    monkeypatch.setattr(module, "ternarize", wrong)
    linear = nn.Linear(64, 4, bias=False)
    linear.weight.data = weight
    assert (TernaryLinear(linear).weight.detach() - naive(weight, 64)).abs().max() > 0.1


def test_packed_bytes_are_of_the_type():
    layer = TernaryLinear(nn.Linear(512, 3, bias=False))
    for type, size in (("TQ1_0", 108), ("TQ2_0", 132)):
        packed = quantize(layer.weight, type)
        assert isinstance(packed, Quantized) and packed.data.shape == (3, size)
