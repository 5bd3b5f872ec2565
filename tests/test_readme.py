"""The README's Python runs as it stands there."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_library_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(example, names)
    assert names["schedule"](1000) < names["schedule"](500)
    assert names["model"].num_parameters() > 0


def test_pictures_and_paths_exist():
    root = Path(__file__).parents[1]
    for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README) + re.findall(r"\| `([\w/]+/)` \|", README):
        assert (root / path).exists(), path
