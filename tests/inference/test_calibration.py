"""Calibration: the statistics are those of hooks on a whole pass, and each block sees what earlier ones became."""

import pytest
import torch
from small_models import WIDE, make_ids, make_model
from torch.testing import assert_close

from minicpm_lite.config import LatentAttentionConfig, ModelConfig
from minicpm_lite.inference.calibration import Statistics, walk_blocks
from minicpm_lite.inference.packed import quantize_model
from minicpm_lite.language import latent_attention
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.fast_decoding import fast_decoding
from minicpm_lite.language.scoring import context_only


def seen_by_hooks(model: Decoder, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every linear layer of the blocks is given in one plain pass, a token a row."""
    inputs, handles = {}, []
    for name, module in model.layers.named_modules():
        if hasattr(module, "in_features"):
            inputs[name] = []
            keep = inputs[name]
            handles.append(
                module.register_forward_pre_hook(lambda _, x, keep=keep: keep.append(x[0].flatten(0, -2)))
            )
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) if found else torch.zeros(0) for name, found in inputs.items()}


def collected(model: Decoder, windows: torch.Tensor, **options) -> dict[str, Statistics]:
    found = {}
    walk_blocks(
        model,
        windows,
        lambda at, block, seen: found.update({f"{at}.{name}": s for name, s in seen.items()}),
        **options,
    )
    return found


@pytest.mark.parametrize("family", WIDE)
def test_statistics_are_those_of_a_whole_pass(family):
    model, windows = make_model(WIDE[family]), make_ids(WIDE[family], batch=5)
    expected, found = seen_by_hooks(model, windows), collected(model, windows, at_once=2)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].tokens == len(x), name
        if len(x):
            scale = x.square().sum()
            assert_close(found[name].hessian / scale, x.T @ x / scale, atol=1e-5, rtol=1e-4, msg=name)
            assert_close(found[name].total_abs / len(x), x.abs().mean(0), atol=1e-5, rtol=1e-4)
            assert_close(found[name].largest, x.abs().amax(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("skip", [0, 4])
def test_a_layer_that_is_only_absorbed_is_given_what_expands_its_latents(skip, monkeypatch):
    """With a small latent absorbed attention is cheaper for whole texts, too, and the layer is never called."""
    sizes = LatentAttentionConfig(64, 32, 64, 32, 64)
    model = make_model(
        ModelConfig(64, 128, 2, 4, 61, num_key_value_heads=4, head_dim=96, latent_attention=sizes)
    )
    windows, name = make_ids(model.config, batch=3), "1.self_attn.kv_b_proj"
    assert not len(seen_by_hooks(model, windows)[name])
    found = collected(model, windows, skip=skip)[name]
    monkeypatch.setattr(latent_attention, "absorbed_is_cheaper", lambda *_, **__: False)
    expected = seen_by_hooks(model, windows)[name].unflatten(0, (3, -1))[:, skip:].flatten(0, 1)
    assert found.tokens == len(expected)
    assert_close(found.hessian, expected.T @ expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", WIDE)
def test_skipped_positions_are_not_counted(family):
    """Their tokens are the same in both texts but for the first ones; those that follow see them all the same."""
    config = WIDE[family]
    model, windows = make_model(config), make_ids(config, batch=3)
    with torch.no_grad():  # what the linear layers of an expert are given, by position
        whole = collected(model, windows)
        later = collected(model, windows, skip=4)
    tokens = {name: seen.tokens for name, seen in later.items()}
    for name, seen in whole.items():
        if ".experts." not in name:
            assert (seen.tokens, tokens[name]) == (3 * 17, 3 * 13), name
    if config.mixture:
        visits = config.mixture.num_experts_per_token
        for layer in range(config.num_hidden_layers):
            gate = [
                n for name, n in tokens.items() if name.startswith(f"{layer}.") and name.endswith("gate_proj")
            ]
            assert sum(gate) == 3 * 13 * visits


def test_a_first_token_that_is_huge_is_left_out_by_skipping():
    """What P-GPTQ is for: one position as large as all others together."""
    model, windows = make_model(WIDE["grouped"]), make_ids(WIDE["grouped"], batch=4)
    windows = torch.where(windows == 7, 8, windows)
    windows[:, 0] = 7
    with torch.no_grad():
        model.embed_tokens.weight[7] *= 300
    name = "0.self_attn.q_proj"
    model.layers[0].input_layernorm.eps = 1e6  # so that the norm lets sizes through
    whole, later = (collected(model, windows, skip=skip)[name] for skip in (0, 1))
    assert later.hessian.trace() < 0.01 * whole.hessian.trace()
    assert later.largest.max() < 0.1 * whole.largest.max()


@torch.no_grad()
def test_a_block_is_given_what_the_changed_ones_before_it_give():
    """As GPTQ needs it: the second block is calibrated on the outputs of the first as it became."""
    model, windows = make_model(WIDE["grouped"]), make_ids(WIDE["grouped"])
    traces = {}

    def change(at, block, seen):
        traces[at] = seen["self_attn.q_proj"].hessian.clone()
        block.mlp.down_proj.weight.mul_(0.3)

    walk_blocks(model, windows, change)
    expected = seen_by_hooks(model, windows)["1.self_attn.q_proj"]
    assert_close(traces[1], expected.T @ expected, atol=1e-2, rtol=1e-3)
    original = seen_by_hooks(make_model(WIDE["grouped"]), windows)["1.self_attn.q_proj"]
    assert (traces[1] - original.T @ original).abs().max() > 1, "the unchanged block would be noticed"


@torch.no_grad()
def test_each_block_is_computed_twice_and_nothing_stays():
    model, windows, calls = make_model(WIDE["grouped"]).train(), make_ids(WIDE["grouped"]), []
    handles = [
        layer.register_forward_pre_hook(lambda *_, at=at: calls.append(at))
        for at, layer in enumerate(model.layers)
    ]
    walk_blocks(model, windows, lambda *_: calls.append("change"), at_once=8)
    for handle in handles:
        handle.remove()
    assert calls == [0, "change", 0, 1, "change", 1]
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_read_one_input_share_a_sum():
    found = collected(make_model(WIDE["grouped"]), make_ids(WIDE["grouped"], batch=5), at_once=2)
    sums = {id(seen) for seen in found.values()}
    assert len(found) == 14 and len(sums) == 8
    assert found["0.self_attn.q_proj"] is found["0.self_attn.v_proj"] is not found["0.self_attn.o_proj"]


def test_an_expert_without_visitors_has_no_statistics():
    model = make_model(WIDE["experts"])
    found = collected(model, torch.full((1, 1), 3))
    idle = [seen for name, seen in found.items() if ".experts." in name and not seen.tokens]
    assert len(idle) == 2 * 3 * 3  # layers, idle experts of five, linear layers of each
    assert all(not seen.hessian.any() and not seen.total_abs.any() for seen in idle)


@pytest.mark.parametrize(
    "windows",
    [
        torch.zeros(4, dtype=torch.long),
        torch.zeros(0, 9, dtype=torch.long),
        torch.zeros(2, 4, dtype=torch.long),
    ],
)
def test_texts_of_which_nothing_is_left_are_refused(windows, unchecked):
    with pytest.raises(ValueError, match="expected \\(windows, tokens\\), with more tokens than are skipped"):
        walk_blocks(make_model(WIDE["grouped"]), windows, lambda *_: None, skip=4)


@pytest.mark.parametrize("change", [fast_decoding, lambda model: quantize_model(model, "Q8_0")])
def test_layers_that_are_multiplied_together_are_seen_all_the_same(change):
    model = make_model(WIDE["grouped"])
    ids = torch.randint(model.config.vocab_size, (2, 12))
    expected = collected(model, ids)
    found = collected(change(model), ids)
    assert found.keys() == expected.keys()
    for name, seen in expected.items():
        assert found[name].tokens == seen.tokens
        assert (found[name].hessian - seen.hessian).norm() < 0.05 * seen.hessian.norm(), (
            name
        )  # inputs are rounded


def test_marks_of_what_is_not_predicted_are_read():
    model = make_model(WIDE["grouped"])
    ids = torch.randint(model.config.vocab_size, (2, 12))
    marked = torch.cat([context_only(ids[:, :5]), ids[:, 5:]], dim=1)
    found, expected = collected(model, marked), collected(model, ids)
    assert all(torch.equal(found[name].hessian, seen.hessian) for name, seen in expected.items())
