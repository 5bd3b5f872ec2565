"""A notebook as if it had just run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_chapter import sealed


@pytest.fixture
def write(tmp_path) -> Callable[[object], Path]:
    """Writes a notebook as if it had just run."""
    return lambda nb: sealed(nb, tmp_path / "topic.ipynb")
