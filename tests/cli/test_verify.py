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


def test_the_tokenizer_and_the_index_are_verified_too(at_home, capsys):
    assert main(["shards", "novel.txt", "--tokenizer", "tokenizer.json", "--out", "cut"]) == 0
    assert main(["verify", "cut"]) == 0
    tokenizer, index = at_home / "cut/tokenizer.json", at_home / "cut/shards.json"
    whole = tokenizer.read_text()
    tokenizer.write_text(whole.replace('"A":', '"\u00e9":', 1))
    says(capsys, ["verify", "cut"], "cut/tokenizer.json is not the tokenizer that made the ids beside it")
    tokenizer.unlink()
    says(capsys, ["verify", "cut"], "cut/tokenizer.json is missing")
    tokenizer.write_text(whole)
    index.write_text(index.read_text().replace('"end": null', '"end": 7'))
    says(capsys, ["verify", "cut"], "cut/shards.json is not what was written: its checksum differs")
