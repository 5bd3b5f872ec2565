"""Recorded runs: done once, kept after each job, gone on with where they stopped."""

import json
import math
import os
import time
from dataclasses import dataclass

import pytest

from minicpm_lite.lab.recorded import load_results, run_jobs, tune_rates


@dataclass(frozen=True)
class Square:
    number: int

    @property
    def name(self) -> str:
        return f"square/{self.number}"


def square(job: Square) -> dict:
    if job.number == 13:
        raise ValueError("thirteen")
    time.sleep(0.05)
    return {"square": job.number**2, "third": job.number / 3, "curve": [(1, 2 / 3)]}


@pytest.mark.slow  # it starts worker processes, and each imports torch
def test_jobs_run_once_and_results_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "recorded" / "squares.py"
    script.parent.mkdir()
    runs = run_jobs(script, [Square(2), Square(3)], square, {"what": "squares"}, workers=1)
    assert runs["square/3"]["square"] == 9 and runs["square/2"]["third"] == 0.666667
    kept = load_results(script)
    assert kept["what"] == "squares" and kept["command"] == "python recorded/squares.py"
    assert kept["minutes"] > 0 and "1 worker" in kept["device"]

    kept["runs"]["square/2"]["square"] = "not computed again"
    script.with_suffix(".json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="thirteen"):
        run_jobs(script, [Square(2), Square(5), Square(13)], square, {"what": "squares"}, workers=1)
    runs = load_results(script)["runs"]
    assert runs["square/2"]["square"] == "not computed again"
    assert runs["square/5"]["square"] == 25  # done before the failure, and kept
    assert list(script.parent.iterdir()) == [script.with_suffix(".json")]  # nothing half written


def test_iterators_are_read_once_for_all_cases():
    losses_of = lambda pairs: {pair: (pair[1] - 0.08) ** 2 for pair in pairs}  # noqa: E731
    assert tune_rates(iter("ab"), iter([0.01, 0.02]), losses_of) == {"a": 0.08, "b": 0.08}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            '{"runs": {"a": {"loss": 1, "loss": 2}}}',
            "squares.json is not valid JSON: the name 'loss' stands there twice",
        ),
        ('{"runs": {}, "runs": {}}', "'runs' stands there twice"),
        ('{"runs": {', "is not valid JSON"),
    ],
)
def test_results_that_are_no_longer_whole_are_refused(tmp_path, content, says):
    (tmp_path / "squares.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        load_results(tmp_path / "squares.py")


def test_a_pipe_is_neither_read_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "squares.json")
    with pytest.raises(ValueError, match=r"squares\.json is a folder, a pipe or a device"):
        run_jobs(tmp_path / "squares.py", [Square(2)], square, {}, workers=1)
    assert (tmp_path / "squares.json").is_fifo()


def test_rates_are_tuned_until_the_best_lies_inside_the_grid():
    """Each case has its own valley: one to the left of the grid, one inside it, one to the right."""
    valleys = {"left": 0.0025, "inside": 0.02, "right": 0.16}
    asked = []

    def losses_of(pairs):
        asked.append(pairs)
        return {(case, rate): abs(math.log(rate / valleys[case])) for case, rate in pairs}

    assert tune_rates(valleys, (0.01, 0.02, 0.04), losses_of) == pytest.approx(valleys)
    assert len(asked) == 4, "three extensions to the right; the left needs as many"
    assert [case for case, _ in asked[0]] == ["left"] * 3 + ["inside"] * 3 + ["right"] * 3
    assert sum(case == "inside" for case, _ in asked[-1]) == 3, "a grid whose best lies inside stays"
