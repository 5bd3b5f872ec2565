"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest

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
