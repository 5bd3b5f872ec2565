"""Worker processes that end with the program that wants their results.

A pool of Python's own, when Ctrl-C comes, first does all the jobs that it was given, and nobody takes what
they give: hours, perhaps, before an empty screen.
"""

import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context

__all__ = ["fresh_processes"]


@contextmanager
def fresh_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """So many workers, each a new Python; whatever is raised within, as by Ctrl-C, ends their jobs at once.

    A terminal sends Ctrl-C to the workers, too. There it ends them: as an exception it would fail the job in
    hand, and they would take the next one.
    """
    others = active_children()
    ended = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
    with ProcessPoolExecutor(count, get_context("spawn"), **ended) as pool:
        try:
            yield pool
        except BaseException:
            for each in active_children():
                if each not in others:
                    each.kill()
            raise
