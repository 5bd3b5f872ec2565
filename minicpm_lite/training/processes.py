"""The processes of a run: how they meet, and how an error of one becomes everyone's.

Processes that train together wait for each other in every step. If one of them raises alone, the others wait
until someone kills them, and the sentence that says why may be anywhere in a log. So whatever one process
alone does or finds goes through `on_first`, `on_each` or `raise_together`.

A program that started no others may call all of them: it is the first of one.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "add_up",
    "local_device",
    "on_each",
    "on_first",
    "processes",
    "raise_together",
    "rank",
    "world_size",
]

Result = TypeVar("Result")


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join the processes that were started together, or be the only one; gives the device to compute on.

    torchrun says so in the environment: ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``; so may
    any other launcher. A GPU for each process where there are GPUs (NCCL), else the CPU (Gloo).

    >>> with processes() as device:
    ...     print(dist.get_world_size())
    1
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = local_device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def local_device() -> torch.device:
    """What this process computes on: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def rank() -> int:
    """The number of this process, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(numbers: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def on_first(work: Callable[[], Result]) -> Result:
    """Let the first process work; its result, or its error, is everyone's."""
    if not dist.is_initialized():
        return work()
    answer: list = [None, None]
    if rank() == 0:
        try:
            answer = [work(), None]
        except Exception as error:  # of any kind: raised below, in all processes
            answer = [None, _sendable(error)]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def on_each(work: Callable[[], Result]) -> list[Result]:
    """Let every process work; everyone gets the results of all, or the error of one."""
    found, error = None, None
    try:
        found = work()
    except Exception as caught:  # of any kind: raised below, in all processes
        error = caught
    raise_together(error)
    results = [found]
    if dist.is_initialized():
        results = [None] * world_size()
        dist.all_gather_object(results, found)
    return results


def raise_together(error: Exception | None) -> None:
    """Raise in all processes what one of them hands in; each hands in its own error, or None."""
    errors: list[Exception | None] = [error]
    if dist.is_initialized():
        errors = [None] * world_size()
        dist.all_gather_object(errors, None if error is None else _sendable(error))
    for each in errors:
        if each is not None:
            raise each


def _sendable(error: Exception) -> Exception:
    """The error, or where it does not survive the way to another process, its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the class of the error does when it is packed and unpacked
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
