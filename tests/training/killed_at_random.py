"""Run by test_trainer: trains in processes that are killed at random moments, until it is done often enough.

Each process is forked, so that none has to import torch again, nor its compiler, which the first update loads.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo
from test_trainer import make

from minicpm_lite.training.branch import decay_schedule
from minicpm_lite.training.sharded_checkpoint import latest_checkpoint

KILLS, REFUSED = 25, 3


def trunk(folder: Path) -> None:
    run = make()
    if newest := latest_checkpoint(folder / "trunk"):
        run.load(newest)
    run.train(folder=folder / "trunk", checkpoint_every=1, keep=2, progress=False)


def decay(folder: Path) -> None:
    """From step 30, which the pruning of the run must have left."""
    start = folder / "trunk" / "step-00000030"
    run = make(schedule=decay_schedule(start, 8))
    if newest := latest_checkpoint(folder / "decay"):
        run.load(newest)
    else:
        run.branch_from(start)
    run.train(folder=folder / "decay", checkpoint_every=1, keep=2, progress=False)


def started(work, folder: Path) -> int:
    if child := os.fork():
        return child
    try:
        work(folder)
    except (OSError, ValueError):  # another has the folder, or has just pruned what this one was reading
        os._exit(REFUSED)
    os._exit(0)


def ended(child: int) -> str:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {-signal.SIGKILL: "killed", REFUSED: "refused", 0: "done"}[status]


def until_done(work, folder: Path, draw: random.Random) -> list[str]:
    """Two programs start, and are killed; again and again until one comes to the end."""
    seen = []
    while "done" not in seen:
        children = [started(work, folder) for _ in range(2)]
        time.sleep(draw.uniform(0.01, 0.4))
        for child in children:
            os.kill(child, signal.SIGKILL)
        seen += map(ended, children)
    return seen


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    draw, seen, folders = random.Random(0), [], []
    while seen.count("killed") < KILLS:
        folders.append(folder / str(len(folders)))
        folders[-1].mkdir()
        seen += until_done(trunk, folders[-1], draw) + until_done(decay, folders[-1], draw)
    print(json.dumps([seen.count("killed"), seen.count("refused"), [str(each) for each in folders]]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
