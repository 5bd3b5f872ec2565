"""Where a command reads and writes: never where nobody said so."""

import shlex
from pathlib import Path

import pytest
from shell import says

from minicpm_lite.cli.places import as_path, as_place


@pytest.mark.parametrize(
    "command",
    [
        'tokenizer "" --out tokenizer.json',
        'tokenizer novel.txt --out ""',
        'shards "" --tokenizer tokenizer.json --out shards',
        'shards novel.txt --tokenizer "" --out shards',
        'shards novel.txt --tokenizer tokenizer.json --out ""',
        'verify one ""',
        'train --config tiny.yaml --data one --out ""',
        'train --config tiny.yaml --data one --out run --resume-from ""',
        'train --config tiny.yaml --dry-run --decay-from ""',
        'generate "" "It was"',
        'chat ""',
        'export "" --out model',
        'export run --out ""',
    ],
)
def test_an_empty_place_is_not_the_working_directory(at_home, capsys, command):
    """As of a variable of the shell that is not set."""
    before = sorted(at_home.iterdir())
    says(capsys, shlex.split(command), "it is empty; expected a place")
    assert sorted(at_home.iterdir()) == before


@pytest.mark.parametrize("data", ["", ":0.5"])
def test_data_without_a_folder(at_home, capsys, data):
    says(
        capsys,
        ["train", "--config", "tiny.yaml", "--data", data, "--out", "run"],
        f"--data {shlex.quote(data)} names no folder",
    )


def test_a_home_that_the_shell_left_is_one(monkeypatch):
    """Shells expand a tilde at the beginning of a word, and so not behind ``--out=``."""
    monkeypatch.setenv("HOME", "/somewhere")
    assert as_place("~/run") == "/somewhere/run" and as_path("~/run") == Path("/somewhere/run")
    assert as_place("owner/name~") == "owner/name~"
