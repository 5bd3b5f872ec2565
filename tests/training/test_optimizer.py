"""Parameter groups: each trained parameter once, with the rate of its kind and of its own decoder."""

from dataclasses import replace

import mup
import pytest
import torch
from torch import nn

from minicpm_lite import load_config
from minicpm_lite.config import MixtureConfig, ModelConfig
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.training.optimizer import adamw, mup_groups, parameter_groups
from minicpm_lite.training.settings import TrainerConfig


def shape(width: int, base: int | None = 24, **others) -> ModelConfig:
    return ModelConfig(
        hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=2,
        num_attention_heads=width // 12, vocab_size=64, scale_emb=12, scale_depth=1.4,
        dim_model_base=base, init_std=0.1, **others,
    )  # fmt: skip


def test_groups_hold_every_parameter_once_with_its_rate():
    model = Decoder(load_config("lite-1m"))  # width 128, base 64
    groups = {group["name"]: group for group in mup_groups(model, 0.01, weight_decay=0.1)}
    held = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"matrices": 0.005, "tables": 0.01, "norms": 0.01}
    )
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "matrices": 0.1, "tables": 0.0, "norms": 0.0,
    }  # fmt: skip
    assert groups["tables"]["params"] == model.tables


def test_an_untied_output_layer_is_a_table_and_without_a_base_nothing_is_divided():
    untied = Decoder(shape(48, tie_word_embeddings=False))
    matrices, tables, _ = mup_groups(untied, 0.01)
    assert len(tables["params"]) == 2 and tables["params"][1] is untied.lm_head.weight
    assert matrices["lr"] == 0.005 and tables["lr"] == 0.01
    assert {group["lr"] for group in mup_groups(Decoder(shape(48, base=None)), 0.01)} == {0.01}


@pytest.mark.parametrize(
    ("name", "ratio", "std", "rate", "residual"),
    [("minicpm-2.4b", 9, 0.1 / 3, 0.01 / 9, 0.2214), ("minicpm4-8b", 16, 0.025, 0.000625, 0.2475)],
)
def test_table_7_at_full_scale(name, ratio, std, rate, residual):
    config = load_config(name)
    with torch.device("meta"):
        small = Decoder(replace(config, num_hidden_layers=1, vocab_size=8))
    assert config.width_ratio == ratio
    assert config.init_std / config.width_ratio**0.5 == pytest.approx(std)
    assert mup_groups(small, 0.01)[0]["lr"] == pytest.approx(rate)
    assert config.residual_scale == pytest.approx(residual, abs=5e-5)
    assert config.scale_emb == 12
    assert load_config("minicpm-1.2b").residual_scale == pytest.approx(0.1941, abs=5e-5)


def test_the_rules_of_the_mup_package():
    """Rates, start and output multiplier are `mup`'s. Its weight decay is not ours: Table 7 has none."""
    model, base, delta = Decoder(shape(96)), Decoder(shape(24)), Decoder(shape(36))
    mup.set_base_shapes(model, base, delta=delta, rescale_params=False)
    theirs = mup.MuAdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    their_rate = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    our_rate = {id(p): group["lr"] for group in mup_groups(model, 0.01, 0.1) for p in group["params"]}
    assert our_rate == pytest.approx(their_rate)
    decays = {group["weight_decay"] for group in theirs.param_groups}
    assert decays == {0.1, 0.1 * 4}, "mup multiplies the weight decay of matrices; Table 7 does not say so"

    matrix = model.layers[0].mlp.gate_proj.weight
    ours = matrix.std().item()
    torch.manual_seed(0)
    mup.init.normal_(matrix, std=0.1)
    assert ours == pytest.approx(matrix.std().item(), rel=0.02)
    assert ours == pytest.approx(0.1 / 4**0.5, rel=0.02)

    readout = mup.MuSharedReadout(model.embed_tokens.weight, bias=False)
    state = torch.randn(3, 96)
    ids = torch.arange(5)[None]
    captured = {}
    model.norm.register_forward_hook(lambda module, inputs, output: captured.update(state=output))
    logits = model(ids)
    torch.testing.assert_close(logits, readout(captured["state"]))
    assert readout(state).shape == (3, 64)


class VisionLanguage(nn.Module):
    """A tower with a convolution and a table of places, and a decoder: what a VLM is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2)
        self.places = nn.Embedding(9, 8)
        self.project = nn.Linear(8, 48)
        self.language = Decoder(shape(48, tie_word_embeddings=False))
        self.temperature = nn.Parameter(torch.ones(()))


def names_of(model: nn.Module, groups: list[dict]) -> dict[tuple[str, float], set[str]]:
    known = {parameter: name for name, parameter in model.named_parameters()}
    return {(g["name"], round(g["lr"], 6)): {known[p] for p in g["params"]} for g in groups}


def test_each_matrix_follows_its_own_decoder():
    model = VisionLanguage()
    groups = names_of(model, mup_groups(model, 0.01, 0.1))
    everything = {name for name, _ in model.named_parameters()}
    assert groups["matrices", 0.01] == {"patches.weight", "project.weight"}
    assert groups["matrices", 0.005] == {n for n in everything if n.endswith("_proj.weight")}
    assert groups["tables", 0.01] == {
        "places.weight", "language.embed_tokens.weight", "language.lm_head.weight"
    }  # fmt: skip
    assert {"patches.bias", "project.bias", "temperature", "language.norm.weight"} < groups["norms", 0.01]
    assert sorted(name for group in groups.values() for name in group) == sorted(everything)


def test_two_decoders_of_different_width():
    draft_and_target = nn.ModuleList([Decoder(shape(24)), Decoder(shape(96))])
    rates = [group["lr"] for group in mup_groups(draft_and_target, 0.01) if group["name"] == "matrices"]
    assert sorted(rates) == pytest.approx([0.0025, 0.01])


def test_routers_and_experts_are_matrices():
    model = Decoder(shape(48, mixture=MixtureConfig(4, 2)))
    groups = names_of(model, mup_groups(model, 0.01))
    assert {"layers.0.mlp.gate.weight", "layers.1.mlp.experts.3.up_proj.weight"} < groups["matrices", 0.005]


def test_frozen_parameters_are_in_no_group():
    model = VisionLanguage()
    model.language.requires_grad_(False)
    groups = names_of(model, mup_groups(model, 0.01))
    assert set().union(*groups.values()) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("language" in name for group in groups.values() for name in group)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train: every parameter of the model is frozen"):
        mup_groups(model, 0.01)


def test_the_ratio_stands_in_the_group():
    model = Decoder(shape(48))
    config = TrainerConfig(parametrization="mup", weight_decay=0.3, betas=(0.8, 0.9))
    optimizer = adamw(model, config, 0.02)
    assert [(g["name"], g["lr_ratio"]) for g in optimizer.param_groups] == [
        ("matrices", 0.5), ("tables", 1.0), ("norms", 1.0)
    ]  # fmt: skip
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.3, 0.0}
    assert {g["betas"] for g in optimizer.param_groups} == {(0.8, 0.9)}
    standard = parameter_groups(model, TrainerConfig(), 0.02)
    assert {(g["lr"], g["lr_ratio"]) for g in standard} == {(0.02, 1.0)}
    assert {g["name"]: g["weight_decay"] for g in standard} == {"matrices": 0.1, "tables": 0, "norms": 0}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: mup_groups(Decoder(shape(24)), 0), "lr is 0; expected a number greater than 0"),
        (lambda: mup_groups(Decoder(shape(24)), 0.1, -1), "weight_decay is -1"),
    ],
)
def test_bad_rates(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
