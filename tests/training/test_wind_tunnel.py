"""The wind tunnel's rules and fits against exact values and outside references."""

import pytest

from minicpm_lite import load_config
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.training.wind_tunnel import mup_groups


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
