"""All tests: one process for each core, one thread in each process, and a look at where the time goes.

``make test`` starts a worker on each core (pytest-xdist; a third worker on two cores gained nothing). A worker
takes one group after the other, the longest first, so that none is idle at the end: a notebook, whose cells need
one kernel; a file, whose tests share what they prepare; or a page of the book. Without workers the same tests
run in the same order.

Every tensor function of the model and the data is checked against its annotated shapes while their own tests
run. (The checks take as long as the functions; in the tests of other parts they would find nothing new.)
"""

import gc
import os
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import jaxtyping
import pytest
from xdist.scheduler import LoadScopeScheduling

# For torch, which is imported later, and for every program that a test starts.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.fsync = os.fstat  # it takes open files alone, too, and does not wait until they are on the disk
ROOT = Path(__file__).parents[1]
WITH_SHAPES = ("language", "data", "inference")
SHAPED = [
    f"minicpm_lite.{part}.{file.stem}"
    for part in WITH_SHAPES
    for file in (ROOT / "minicpm_lite" / part).glob("*.py")
    if "from jaxtyping import" in file.read_text(encoding="utf-8")
]
jaxtyping.install_import_hook(SHAPED, "beartype.beartype")

PAGES = "tests/book/test_pages.py"


@pytest.fixture(autouse=True, scope="module")
def shapes_are_checked(request: pytest.FixtureRequest) -> None:
    """In the tests of these parts."""
    of_them = request.path.is_relative_to(ROOT / "tests") and request.path.parent.name in WITH_SHAPES
    jaxtyping.config.update("jaxtyping_disable", not of_them)


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """One for all tests of a process, which cannot start a second. A missing one is a failure, not a skip."""
    from browser import MISSING, launch
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch(playwright)
        if browser is None:
            pytest.fail(MISSING, pytrace=False)
        yield browser
        browser.close()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks of shapes and types, as everywhere but here: what the library itself refuses."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


class Groups(LoadScopeScheduling):
    """A worker gets a file as a whole, or one page."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return nodeid if file == PAGES else file


def pytest_xdist_make_scheduler(config: pytest.Config, log) -> Groups:
    return Groups(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: the collector of garbage need not walk through it, now or during the tests.

    What the tests import later it walks through each time, so it begins less often than it would.
    """
    gc.disable()
    result = yield
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; pages are many and short, and fill in at the end."""
    seconds = Counter({PAGES: -1})
    for item in items:
        file = item.location[0]
        if item.path.suffix == ".ipynb":
            seconds[file] = item.parent.nb.metadata.get("minicpm_lite", {}).get("seconds", 0)
        elif file != PAGES:  # roughly
            seconds[file] += 5 if item.get_closest_marker("slow") else 0.1
    items.sort(key=lambda item: seconds[item.location[0]], reverse=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what took longest, by folder and by file."""
    spent, folders = Counter(), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            file, taken = report.nodeid.split("::")[0], getattr(report, "duration", 0)
            spent[file] += taken
            folders[file.rpartition("/")[0]] += taken
    if spent.total() > 60:
        terminalreporter.section("where the time goes")
        for place, taken in [*folders.most_common(), *spent.most_common(15)]:
            terminalreporter.line(f"{taken:6.0f} s  {place}")
        terminalreporter.line(f"{spent.total():6.0f} s  in all, on all workers together")
