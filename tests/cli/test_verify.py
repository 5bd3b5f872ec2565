"""Shards are read whole, and damage is found."""

import shutil

from shell import damage, says

from minicpm_lite.cli import main


def test_verify(at_home, capsys):
    assert main(["verify", "one", "two"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{name}: 2,000 tokens, all as they were written." for name in ("one", "two")
    ]
    shutil.copytree(at_home / "one", at_home / "bad")
    damage(at_home / "bad")
    says(capsys, ["verify", "bad"], "tokens-00000.npy is damaged")
