"""What the experiment ran on: the device in words, and how much memory the process has used at most."""

import os
import resource
import sys
from pathlib import Path


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> str:
    """The processor in words, for evidence and run records.

    >>> device().startswith("CPU, ")
    True
    """
    return f"CPU, {cores()} core{'s' if cores() != 1 else ''}"


def peak_memory_mb() -> int:
    """The most memory (resident set, in MB of 10^6 bytes) that this process has held so far.

    On Linux the figure comes from /proc, because ``ru_maxrss`` also counts the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return round(int(line.split()[1]) * 1024 / 1e6)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)
