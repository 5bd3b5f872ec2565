"""The README's Python runs as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

from minicpm_lite.cli import main
from minicpm_lite.data.assets import load_austen

README = (Path(__file__).parents[1] / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def fewer_steps(text: str) -> str:
    """The same with three steps, which a test can wait for."""
    text = re.sub(r"(warmup|stable|decay)_steps=\d+", r"\1_steps=1", text)
    return text.replace("--steps 500", "--steps 3")


@pytest.fixture
def novel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("novel.txt").write_text(load_austen()[:100_000])
    return tmp_path


@pytest.mark.slow  # trains a model, and imports transformers
def test_the_first_example_makes_a_model_that_transformers_opens(novel, capsys):
    assert len([line for line in EXAMPLES[0].splitlines() if line]) <= 15
    names = {}
    exec(fewer_steps(EXAMPLES[0]), names)
    assert "It was" not in capsys.readouterr().err
    ids = torch.arange(20)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained("my-model").eval()
    with torch.no_grad():
        assert_close(theirs(ids).logits, names["model"].eval()(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.slow  # it loads a model of 135 million parameters
def test_the_pretrained_example_answers(capsys):
    exec(EXAMPLES[1], {})
    assert "Paris" in capsys.readouterr().out


def test_pictures_and_paths_exist():
    root = Path(__file__).parents[1]
    for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README) + re.findall(r"\| `([\w/]+/)` \|", README):
        assert (root / path).exists(), path


def commands(first: str) -> list[list[str]]:
    (block,) = re.findall(rf"```bash\n(minicpm-lite {first}.*?)```", README, flags=re.DOTALL)
    return [shlex.split(line, comments=True) for line in fewer_steps(block).splitlines()]


@pytest.mark.slow  # five commands one after the other; tests/cli looks at each
def test_the_same_from_the_command_line(novel, capsys):
    for line in commands("tokenizer"):
        assert line[0] == "minicpm-lite" and main(line[1:]) == 0
    assert Path("exported", "tokenizer.json").is_file()
    said = capsys.readouterr()
    assert "It was" in said.out and said.err == ""


def test_the_commands_of_a_large_run(capsys):
    """Those that list and plan as they stand, the other one as a dry run."""
    listing, dry, run = commands("models")
    assert main(listing[1:]) == main(dry[1:]) == 0
    assert "minicpm-1.2b" in capsys.readouterr().out
    start = run.index("train")
    assert run[:start] == ["torchrun", "--nproc-per-node", "8", "-m", "minicpm_lite.cli"]
    assert main([*run[start:], "--dry-run"]) == 0
