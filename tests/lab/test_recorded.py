"""Recorded runs: done once, kept after each job, gone on with where they stopped."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from minicpm_lite.files import locked
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
    if job.number == 17:
        return {"square": np.float32(17) ** 2}  # JSON knows no such number
    if job.number == 19:
        return {"seconds": 12.5, "square": 361}
    time.sleep(0.05)
    return {"square": job.number**2, "third": job.number / 3, "curve": [(1, 2 / 3)]}


@pytest.mark.slow  # it starts worker processes, and each imports torch
def test_jobs_run_once_and_results_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "recorded" / "squares.py"
    script.parent.mkdir()
    script.touch()
    facts = {"what": "squares", "eps": 3e-7}
    runs = run_jobs(script, [Square(2), Square(3)], square, facts, workers=1)
    assert runs["square/3"]["square"] == 9 and runs["square/2"]["third"] == 0.666667
    kept = load_results(script)
    assert kept["runs"] == runs and kept["eps"] == 3e-7, "a fact is not rounded"
    assert kept["what"] == "squares" and kept["command"] == "python recorded/squares.py"
    assert kept["minutes"] > 0 and "1 worker" in kept["device"]

    kept["runs"]["square/2"]["square"] = "not computed again"
    script.with_suffix(".json").write_text(json.dumps(kept))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    with pytest.raises(ValueError, match="thirteen"):
        run_jobs(script, [*map(Square, (2, 13, 17, 5, 19))], square, facts, workers=1)
    kept = load_results(script)
    assert kept["device"] == f"Some GPU and CPU, {os.cpu_count()} cores, 1 worker"
    runs = kept["runs"]
    assert runs["square/2"]["square"] == "not computed again"
    assert runs["square/5"]["square"] == 25 and len(runs) == 4  # run after both failures, and kept
    assert runs["square/19"] == {"seconds": 12.5, "square": 361}, "seconds of its own are kept"
    assert kept["minutes"] < 0.1, "and not taken for those of the job"
    assert set(script.parent.iterdir()) == {script, script.with_suffix(".json")}  # nothing half written


@pytest.mark.slow  # it starts worker processes, and each imports torch
@pytest.mark.parametrize(
    ("stop", "by", "says"),
    [
        pytest.param(os.kill, signal.SIGINT, "KeyboardInterrupt", id="the script alone"),
        pytest.param(os.killpg, signal.SIGINT, "KeyboardInterrupt", id="all, as a terminal does"),
        pytest.param(os.kill, signal.SIGKILL, "", id="the script is killed"),
    ],
)
def test_a_stopped_script_ends_at_once_and_keeps_what_was_finished(tmp_path, stop, by, says):
    (tmp_path / "waits.py").write_text(
        textwrap.dedent("""
        import time
        from dataclasses import dataclass
        from pathlib import Path
        from minicpm_lite.lab.recorded import run_jobs

        @dataclass(frozen=True)
        class Wait:
            name: str
            seconds: int

        def wait(job):
            Path(job.name).touch()
            time.sleep(job.seconds)
            return {}

        if __name__ == "__main__":
            run_jobs(__file__, [Wait("a", 0), Wait("b", 600), Wait("c", 0)], wait, {}, workers=1)
        """)
    )
    # what a shell starts in the background ignores Ctrl-C, and so do its children
    foreground = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    script = subprocess.Popen(
        [sys.executable, "waits.py"],
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=foreground,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not ((tmp_path / "b").exists() and (tmp_path / "waits.json").exists()):
        assert script.poll() is None, script.stderr.read()
        time.sleep(0.05)
    stop(script.pid, by)
    assert says in script.communicate(timeout=60)[1]  # which its workers hold open, too
    assert list(load_results(tmp_path / "waits.py")["runs"]) == ["a"] and not (tmp_path / "c").exists()


def noted(folder, facts: dict) -> Path:
    """A script beside which the result of one job stands, with these facts."""
    (folder / "squares.json").write_text(
        json.dumps(facts | {"minutes": 1, "runs": {"square/2": {"square": 4}}})
    )
    (folder / "squares.py").touch()
    return folder / "squares.py"


@pytest.mark.parametrize(
    "facts",
    [
        {"batch": 16},
        {"batch": 8, "model": {"width": 64}},
        {"batch": 8, "budgets": (200, 400, 800)},
        {"batch": 8, "eps": 3e-7},
        {"batch": 8, "layers": True},
    ],
)
def test_results_of_other_facts_are_not_put_beside_new_ones(tmp_path, monkeypatch, facts):
    monkeypatch.chdir(tmp_path)
    script = noted(
        tmp_path, {"batch": 8, "model": {"width": 32}, "budgets": [200, 400], "eps": 1e-8, "layers": 1}
    )
    before = script.with_suffix(".json").read_bytes()
    with pytest.raises(
        ValueError,
        match=r"squares\.json holds results of (batch 8|width 32|budgets \[200, 400\]|eps 1e-08|layers 1);",
    ):
        run_jobs(script, [Square(2), Square(3)], square, facts, workers=1)
    assert script.with_suffix(".json").read_bytes() == before


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"batch": 8, "rate": 2 / 3, "budgets": (200, 400)},  # as they were, though JSON wrote them otherwise
        {"batch": 8, "peak_lr": 0.01},  # tuned by the first jobs
        {"model": {"width": 32, "rope_scaling": None}},  # a config has a new field
    ],
)
def test_facts_may_be_added(tmp_path, monkeypatch, facts):
    monkeypatch.chdir(tmp_path)
    script = noted(tmp_path, {"batch": 8, "model": {"width": 32}, "budgets": [200, 400], "rate": 2 / 3})
    before = script.with_suffix(".json").read_bytes()
    assert run_jobs(script, [Square(2)], square, facts, workers=1) == {"square/2": {"square": 4}}
    assert script.with_suffix(".json").read_bytes() == before, "nothing was run, so nothing is written"


def test_facts_that_were_added_are_kept_table_within_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = noted(tmp_path, {"model": {"width": 32, "rope": {"theta": 1e4}}})
    run_jobs(script, [Square(2), Square(3)], square, {"model": {"rope": {"kind": "yarn"}}}, workers=1)
    facts = {"model": {"width": 32, "rope": {"theta": 1e4, "kind": "yarn"}}}
    assert load_results(script)["model"] == facts["model"]
    with pytest.raises(ValueError, match="results of width 32; now it is 64"):
        run_jobs(script, [Square(4)], square, {"model": {"width": 64}}, workers=1)


@pytest.mark.parametrize("name", ["command", "device", "torch", "minutes", "runs"])
def test_what_is_noted_beside_the_facts_is_no_fact(tmp_path, name):
    (script := tmp_path / "topic.py").write_text("")
    with pytest.raises(ValueError, match=f"A fact is named '{name}', as what is noted beside the facts"):
        run_jobs(script, [Square(2)], square, {"model": "lite-1m", name: 3}, workers=1)
    assert not script.with_suffix(".json").exists()


def test_jobs_of_one_name_are_refused(tmp_path):
    """Of two results under one name the second would replace the first."""
    jobs = [Square(2), Square(3), Square(2)]
    with pytest.raises(ValueError, match="2 jobs have the name 'square/2', under which one result is kept"):
        run_jobs(noted(tmp_path, {}), jobs, square, {}, workers=1)


def test_a_script_is_run_by_one_program_at_a_time(tmp_path, monkeypatch):
    """Each holds the results that it read at its start, and would write over those of the other."""
    monkeypatch.chdir(tmp_path)
    script = noted(tmp_path, {})
    taken = pytest.raises(FileExistsError, match=r"squares\.py is already being run by another program")
    with locked(script), taken:
        run_jobs(script, [Square(2)], square, {}, workers=1)
    assert run_jobs(script, [Square(2)], square, {}, workers=1) == {"square/2": {"square": 4}}


@pytest.mark.parametrize("grid", list(permutations([0.01, 0.02, 0.04, 0.08])))
@pytest.mark.parametrize("diverged", [math.nan, math.inf])
def test_a_run_that_diverged_is_never_the_best(grid, diverged):
    def losses_of(pairs):
        return {(case, rate): diverged if rate > 0.05 else (rate - 0.02) ** 2 for case, rate in pairs}

    assert tune_rates(["valley"], grid, losses_of) == {"valley": 0.02}


def test_rates_of_which_all_diverge_are_refused():
    with pytest.raises(ValueError, match=r"All runs of 'b' diverged, with the rates \[0\.1, 0\.2\]"):
        tune_rates("ab", [0.1, 0.2], lambda pairs: {(c, r): 1.0 if c == "a" else math.nan for c, r in pairs})


@pytest.mark.parametrize("loss_of", [lambda rate: 1.0, lambda rate: round(1 + rate**2, 6)])
def test_a_search_ends_where_the_rate_makes_no_difference(loss_of):
    """As where every rate hurts: the smaller ones do nothing at all."""
    with pytest.raises(ValueError, match="The losses of 'flat' are the same with the rates"):
        tune_rates(["flat"], [0.01, 0.02], lambda pairs: {pair: loss_of(pair[1]) for pair in pairs})


@pytest.mark.parametrize("grid", [[0.01, 0.02], [0.01, 0.02, 0.04]])
def test_two_rates_beside_a_valley_may_be_equally_good(grid):
    losses_of = lambda pairs: {pair: abs(math.log2(pair[1] / 0.01) - 0.5) for pair in pairs}  # noqa: E731
    assert tune_rates(["valley"], grid, losses_of) == {"valley": 0.01}


@pytest.mark.parametrize("rate", [0, -0.1, math.nan])
def test_rates_that_cannot_be_halved_are_refused(rate):
    with pytest.raises(ValueError, match="A first rate is .*; expected a number greater than 0"):
        tune_rates(["x"], [rate, 0.02], lambda pairs: pytest.fail("nothing is run"))


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
        ('{"hidden_size": 8}', "squares.json holds no results, which run_jobs writes there"),
        ('{"runs": [1]}', "holds no results"),
    ],
)
def test_results_that_are_no_longer_whole_are_refused(tmp_path, content, says):
    (tmp_path / "squares.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        load_results(tmp_path / "squares.py")


def test_a_pipe_is_neither_read_nor_replaced(tmp_path):
    (tmp_path / "squares.py").touch()
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
