"""A folder in which the commands are tried."""

import json

import numpy as np
import pytest
import yaml
from shell import SHAPE, TEXT

from minicpm_lite.data.shards import write_shards
from minicpm_lite.language.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A config, a tokenizer, texts and two folders of shards."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.yaml").write_text(yaml.safe_dump({"model": SHAPE}))
    (home / "novel.txt").write_text(TEXT)
    (home / "web.jsonl").write_text("".join(json.dumps({"text": TEXT[i:]}) + "\n" for i in range(5)))
    train_tokenizer(TEXT, 300).save(str(home / "tokenizer.json"))
    random = np.random.default_rng(0)
    for name in ("one", "two"):
        write_shards(home / name, [random.integers(0, 300, 2000)], 300, shard_tokens=700)
    return home


@pytest.fixture
def at_home(home, tmp_path, monkeypatch):
    """In a folder of its own, with what is at home under its name."""
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
