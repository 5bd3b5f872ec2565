"""All tests: one process for each core, one thread in each process, and a look at where the time goes.

``make test`` starts a worker on each core (pytest-xdist). A worker takes one group after the other, the longest
first, so that none is idle at the end: a notebook, whose cells need one kernel; a file, whose tests share what
they prepare; or a page of the book. Without workers the same tests run in the same order.

Every tensor function of the model and the data is checked against its annotated shapes while the tests run.
"""

import os
from collections import Counter

import pytest
from jaxtyping import install_import_hook

# For torch, which is imported later, and for every program that a test starts.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
install_import_hook(["minicpm_lite.language", "minicpm_lite.data"], "beartype.beartype")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make a group of each file, but for the pages, and begin with what takes longest."""
    seconds = Counter()
    for item in items:
        file = item.location[0]
        if item.get_closest_marker("pages"):
            seconds[file] = -1  # many short ones, which fill in at the end
            continue
        item.add_marker(pytest.mark.xdist_group(file))
        if item.path.suffix == ".ipynb":
            seconds[file] = item.parent.nb.metadata.get("minicpm_lite", {}).get("seconds", 0)
        else:  # roughly; what is marked slow takes more than ten seconds
            seconds[file] += 20 if item.get_closest_marker("slow") else 0.1
    items.sort(key=lambda item: seconds[item.location[0]], reverse=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what took longest, by file."""
    spent = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            spent[report.nodeid.split("::")[0]] += getattr(report, "duration", 0)
    if spent.total() > 60:
        terminalreporter.section("where the time goes")
        for file, taken in spent.most_common(15):
            terminalreporter.line(f"{taken:6.0f} s  {file}")
        terminalreporter.line(f"{spent.total():6.0f} s  in all, on all workers together")
