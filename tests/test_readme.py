"""The README's Python runs as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from minicpm_lite.cli import main
from minicpm_lite.language.tokenizer import train_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_library_example_runs():
    names = {}
    exec(EXAMPLES[0], names)
    assert names["schedule"](1000) < names["schedule"](500)
    assert names["model"].num_parameters() > 0


@pytest.mark.slow  # it loads a model of 135 million parameters
def test_the_pretrained_example_answers(capsys):
    exec(EXAMPLES[1], {})
    assert "Paris" in capsys.readouterr().out


def test_pictures_and_paths_exist():
    root = Path(__file__).parents[1]
    for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README) + re.findall(r"\| `([\w/]+/)` \|", README):
        assert (root / path).exists(), path


def test_the_commands_run(tmp_path, monkeypatch, capsys):
    """Those that list and plan as they stand; the others on a small text."""
    (commands,) = re.findall(r"```bash\n(minicpm-lite models.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("novels.txt").write_text("It is a truth universally acknowledged. " * 50)
    train_tokenizer(Path("novels.txt").read_text(), 270).save("tokenizer.json")
    words = [shlex.split(line, comments=True) for line in commands.splitlines()]
    for line in words[:3]:
        assert line[0] == "minicpm-lite" and main(line[1:]) == 0
    assert "minicpm-1.2b" in capsys.readouterr().out and Path("shards", "shards.json").is_file()
    start = words[3].index("train")
    assert words[3][:start] == ["torchrun", "--nproc-per-node", "8", "-m", "minicpm_lite.cli"]
    assert main([*words[3][start:], "--dry-run"]) == 0
