"""The workers that share the tests: cells of a notebook and tests of a file belong together."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("tests/test_files.py", "tests/book/test_contents.py")


@pytest.mark.slow  # three processes of pytest start
def test_a_file_goes_to_one_worker():
    """Seen from outside, because a plugin that no longer groups says nothing, and notebooks then fail at random."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "-v", "-p", "no:cacheprovider", *FILES]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    workers = defaultdict(set)
    for worker, file in re.findall(r"^\[(gw\d)\].* PASSED ([^:\s]+)::", ran.stdout, flags=re.MULTILINE):
        workers[file].add(worker)
    assert set(workers) == set(FILES), ran.stdout
    assert all(len(used) == 1 for used in workers.values()), workers
    assert set.union(*workers.values()) == {"gw0", "gw1"}
