"""Work in two processes that know of each other as torchrun's do, for programs that tests start.

They are forked, so that torch is imported once, and the compiler, which the first update loads.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable

import torch._dynamo  # noqa: F401


def start(work: Callable[[], int | None]) -> list[int]:
    """Begin, and give the numbers of the processes; what the work returns is their exit code."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    children = []
    for rank in "01":
        children.append(os.fork())
        if not children[-1]:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            _end(work)
    return children


def _end(work: Callable[[], int | None]) -> None:
    code = 1
    try:
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_codes(children: list[int]) -> list[int]:
    """When both have ended."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
