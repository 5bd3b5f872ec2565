"""Worker processes that end with the program that wants their results.

A pool of Python's own, when Ctrl-C comes, first does all the jobs that it was given, and nobody takes what
they give: hours, perhaps, before an empty screen.
"""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process

__all__ = ["fresh_processes"]


@contextmanager
def fresh_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """So many workers, each a new Python; whatever is raised within, as by Ctrl-C, ends their jobs at once.

    So does the end of the program, also when it is killed: what it was doing is not done behind its back.
    """
    others = active_children()
    with ProcessPoolExecutor(count, get_context("spawn"), initializer=_depend) as pool:
        try:
            yield pool
        except BaseException:
            for each in active_children():
                if each not in others:
                    each.kill()
            raise


def _depend() -> None:
    """In a worker: end with the program, and at Ctrl-C, which a terminal sends to the workers, too.

    As an exception it would fail the job in hand, and the worker would take the next one.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def end() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
