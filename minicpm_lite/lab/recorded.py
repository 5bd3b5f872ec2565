"""Recorded runs: experiments too long for a chapter, run once by a script whose results are committed.

A script ``recorded/TOPIC.py`` beside the chapter says what its jobs are and what one job does; `run_jobs`
does the rest. Results go to ``recorded/TOPIC.json`` after each job, so a stopped script goes on where it was.
With them stand the facts that hold for all of them, so results under other facts are not added.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from reprlib import repr as shown
from typing import Protocol, TypeVar

import torch

from ..config import require_positive_number
from ..files import locked, written_whole
from ..pretrained.weights import read_json
from .workers import fresh_processes

__all__ = ["Job", "load_results", "run_jobs", "tune_rates"]

_BESIDE_FACTS = {"command", "device", "torch", "minutes", "runs"}

Case = TypeVar("Case", bound=Hashable)


class Job(Protocol):
    """One process' worth of work: a frozen dataclass, so that it can be sent to a worker."""

    @property
    def name(self) -> str:
        """Its key in the results."""
        ...


def run_jobs(
    script: str | Path,
    jobs: Iterable[Job],
    work: Callable[[Job], dict],
    facts: Mapping[str, object],
    workers: int | None = None,
) -> dict[str, dict]:
    """Run the jobs that have no result yet, one CPU thread each, and return the results of all.

    Args:
        script: the script's own ``__file__``; results stand beside it with the ending ``.json``.
        jobs: what to run. Longest first keeps all workers busy to the end.
        work: a function at the top level of the script; what it returns must fit into JSON.
        facts: what a reader must know to read the results: model, seeds, batch. A later call may add some,
            such as a rate that the first jobs tuned.
        workers: processes at a time; left out, one for each core.

    The numbers of results are kept to six digits after the point, facts as they are. Beside the facts stand
    the command, the device, torch's version, and the minutes that all runs together took with this number of
    workers; beside a result, the seconds that its job took, unless it has ``seconds`` of its own.

    Raises:
        ValueError: two jobs have one name, a fact has the name of what stands beside the facts, or the
            results that are there were made under other facts.
        FileExistsError: another program is at the same script.
        KeyboardInterrupt: Ctrl-C; the jobs in hand end at once, and what was finished before is kept.
        Exception: what the first job raised that failed; the others were run, and their results are kept.
    """
    script, jobs, workers = Path(script), list(jobs), workers or os.cpu_count() or 1
    _require_names_of_their_own(jobs)
    if taken := facts.keys() & _BESIDE_FACTS:
        raise ValueError(f"A fact is named {min(taken)!r}, as what is noted beside the facts; rename it.")
    with _alone(script):
        noted, failures = load_results(script), []
        runs, minutes = noted.pop("runs"), noted.pop("minutes", 0.0)
        facts = json.loads(json.dumps(dict(facts)))
        noted = _merged(_results_of(script), noted, facts)
        todo = [job for job in jobs if job.name not in runs]
        about = {
            "command": f"python {os.path.relpath(script.resolve())}",
            "device": _device(workers),
            "torch": torch.__version__,
        }
        with fresh_processes(workers) as pool:
            futures = {pool.submit(_timed, work, job): job.name for job in todo}
            for future in as_completed(futures):
                name = futures[future]
                if error := future.exception():
                    failures.append(error)
                    print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
                    continue
                runs[name], seconds = future.result()
                minutes = round(minutes + seconds / 60 / workers, 6)
                with written_whole(_results_of(script)) as beside:
                    beside.write_text(json.dumps(noted | about | {"minutes": minutes, "runs": runs}))
                print(f"{name}: {seconds:.0f} s", flush=True)
    if failures:
        raise failures[0]
    return runs


def load_results(script: str | Path) -> dict:
    """What `run_jobs` wrote beside a script so far; with no ``runs`` yet, if it wrote nothing.

    Raises:
        ValueError: the file is not JSON, gives a name twice, holds no results, or is no regular file.
    """
    path = _results_of(Path(script))
    if not path.exists():
        return {"runs": {}}
    if not path.is_file():
        raise ValueError(f"{path} is a folder, a pipe or a device; expected a file with results.")
    results = read_json(path)
    if not isinstance(results.get("runs"), dict):
        raise ValueError(
            f"{path} holds no results, which run_jobs writes there. Move it, or rename the script."
        )
    return results


def tune_rates(
    cases: Iterable[Case],
    first_rates: Iterable[float],
    losses_of: Callable[[list[tuple[Case, float]]], Mapping[tuple[Case, float], float]],
) -> dict[Case, float]:
    """The learning rate of least loss for each case, so that each side of a comparison is tuned alike.

    A grid is extended by factors of 2 while the best rate lies at its edge. A run that diverged, to a loss
    that is not finite, is worse than any other.

    Args:
        cases: what is compared.
        first_rates: the grid to begin with, at least two rates.
        losses_of: from all pairs of a case and a rate to the loss of each; pairs it was asked for before are
            among them, so it should remember them, as `run_jobs` does.

    Raises:
        ValueError: all runs of a case diverged, or its losses no longer depend on the rate where it is
            smallest, so nothing says where its best rate lies; or a first rate that is not above 0.

    >>> tune_rates(["valley"], [0.01, 0.02], lambda pairs: {pair: (pair[1] - 0.08) ** 2 for pair in pairs})
    {'valley': 0.08}
    """
    first_rates = list(first_rates)
    for rate in first_rates:
        require_positive_number("A first rate", rate)
    rates = {case: first_rates.copy() for case in cases}
    while True:
        losses = losses_of([(case, rate) for case in rates for rate in rates[case]])
        best = {}
        for case, grid in rates.items():
            finite = [(losses[case, rate], rate) for rate in grid if math.isfinite(losses[case, rate])]
            if not finite:
                raise ValueError(
                    f"All runs of {case!r} diverged, with the rates {grid}. Begin with smaller ones."
                )
            best[case] = min(finite)[1]
        if all(min(rates[case]) < best[case] < max(rates[case]) for case in rates):
            return best
        for case, rate in best.items():
            lowest = sorted(rates[case])[:3]
            if rate == lowest[0] and [losses[case, each] for each in lowest] == [losses[case, rate]] * 3:
                raise ValueError(
                    f"The losses of {case!r} are the same with the rates {lowest}, so smaller ones would not "
                    "tell which is best. Begin with larger ones, or leave the case out."
                )
            if rate == min(rates[case]):
                rates[case].append(rate / 2)
            elif rate == max(rates[case]):
                rates[case].append(rate * 2)


def _results_of(script: Path) -> Path:
    return script.with_suffix(".json")


def _require_names_of_their_own(jobs: Sequence[Job]) -> None:
    times = Counter(job.name for job in jobs)
    if shared := [name for name in times if times[name] > 1]:
        raise ValueError(
            f"{times[shared[0]]} jobs have the name {shared[0]!r}, under which one result is kept. Put what "
            "tells them apart into their names."
        )


@contextmanager
def _alone(script: Path) -> Iterator[None]:
    """Keep out other programs that run the same script: each would write over the results of the other."""
    with ExitStack() as hold:
        try:
            hold.enter_context(locked(script))
        except FileExistsError:
            raise FileExistsError(
                f"{script} is already being run by another program. Wait for its end; a result that it has "
                "kept is not computed again."
            ) from None
        yield


def _merged(file: Path, noted: Mapping[str, object], facts: Mapping[str, object]) -> dict[str, object]:
    """The facts of all calls, table within table: a later call adds to what earlier ones noted.

    A fact may be the fields of a config, and a config may have more fields than when the facts were noted.

    Raises:
        ValueError: a fact is another than was noted.
    """
    merged = {**noted, **facts}
    for name in sorted(noted.keys() & facts.keys()):
        before, now = noted[name], facts[name]
        if isinstance(before, dict) and isinstance(now, dict):
            merged[name] = _merged(file, before, now)
        elif json.dumps(before) != json.dumps(now):  # for which True is not 1
            raise ValueError(
                f"{file} holds results of {name} {shown(before)}; now it is {shown(now)}. Results of two "
                "kinds are not put into one file: move it away, or take the change back."
            )
    return merged


def _device(workers: int) -> str:
    """What the workers share, in words."""
    processors = f"{torch.cuda.get_device_name()} and CPU" if torch.cuda.is_available() else "CPU"
    return f"{processors}, {os.cpu_count()} cores, {workers} worker{'s' * (workers > 1)}"


def _timed(work: Callable[[Job], dict], job: Job) -> tuple[dict, float]:
    """A result as it will be read again, and what it took in seconds.

    One that does not fit into JSON is a failure of this job alone.
    """
    torch.set_num_threads(1)
    start = time.perf_counter()
    run = work(job)
    seconds = time.perf_counter() - start
    return json.loads(json.dumps(_rounded({"seconds": seconds} | run))), seconds


def _rounded(value):
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(child) for key, child in value.items()}
    return [_rounded(child) for child in value] if isinstance(value, list | tuple) else value
