"""The wish to stop a run: a signal that is noted, until the run has saved what it has.

A cluster that takes a machine back sends SIGTERM and waits some seconds; a person types Ctrl-C, SIGINT.
Either may come in the middle of a step, and to one process of many. So it is noted only. With the loss of the
step it is added up over the processes; then all of them save, and all of them end.

A Ctrl-C after that acts at once, as it would have acted without us. SIGTERM never does: a cluster that sends
it to every process sends it to torchrun, too, which passes it on, so each gets it twice; and whoever will not
wait has SIGKILL. A signal that the program ignores, as one begun in the background ignores SIGINT, stays
ignored.
"""

import signal
import threading
from types import FrameType
from typing import Self

import torch
from torch import Tensor

__all__ = ["Interruption"]


class Interruption:
    """A context in which SIGTERM and SIGINT are noted; in another thread than the main one, neither is.

    If a signal was noted and nothing else is raised within, the context ends as the signal would have it.

    >>> with Interruption():
    ...     signal.raise_signal(signal.SIGTERM)
    ...     finished = True
    Traceback (most recent call last):
    SystemExit: 143
    >>> finished
    True
    """

    def __init__(self) -> None:
        self._wish: int | None = None
        self._before: dict = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(each) is not signal.SIG_IGN:
                    self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore(signal.SIGINT, signal.SIGTERM)
        if self._wish is not None and error[0] is None:  # it came after the last step
            raise self.error(self.wishes())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._wish = number
        self._restore(signal.SIGINT)

    def _restore(self, *numbers: int) -> None:
        for each in numbers:
            if each in self._before:
                signal.signal(each, self._before.pop(each))

    def wishes(self) -> Tensor:
        """Whether this process was told to stop by SIGINT, and whether by SIGTERM: numbers to add up."""
        return torch.tensor([self._wish == signal.SIGINT, self._wish == signal.SIGTERM], dtype=torch.float32)

    @staticmethod
    def error(wishes: Tensor) -> BaseException | None:
        """What ends the program if any process was told to stop: as these signals do, or None."""
        interrupted, terminated = wishes.tolist()
        if terminated:
            return SystemExit(128 + signal.SIGTERM)
        return KeyboardInterrupt() if interrupted else None
