"""The wish to stop a run: a signal that is noted, until the run has saved what it has.

A cluster that takes a machine back sends SIGTERM and waits some seconds; a person types Ctrl-C, SIGINT; a
terminal that is closed, or a connection that breaks, says SIGHUP. Each may come in the middle of a step, and
to one process of many. So it is noted only. With the loss of the
step it is added up over the processes; then all of them save, and all of them end.

A Ctrl-C after that acts at once, as it would have acted without us. The others never do: a cluster that sends
it to every process sends it to torchrun, too, which passes it on, so each gets it twice; and whoever will not
wait has SIGKILL. A signal that the program ignores, as one begun in the background ignores SIGINT and one
under nohup SIGHUP, stays ignored.
"""

import signal
import threading
from types import FrameType
from typing import Self

import torch
from torch import Tensor

__all__ = ["Interruption"]

_NOTED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Interruption:
    """A context in which these signals are noted; in another thread than the main one, none is.

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
            for each in _NOTED:
                if signal.getsignal(each) is not signal.SIG_IGN:
                    self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore(*_NOTED)
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
        """Whether this process was told to stop, by each of the signals: numbers to add up."""
        return torch.tensor([self._wish == each for each in _NOTED], dtype=torch.float32)

    @staticmethod
    def error(wishes: Tensor) -> BaseException | None:
        """What ends the program if any process was told to stop: as these signals do, or None."""
        told = [each for each, wish in zip(_NOTED, wishes.tolist(), strict=True) if wish]
        if not told:
            return None
        return KeyboardInterrupt() if told[0] == signal.SIGINT else SystemExit(128 + told[0])
