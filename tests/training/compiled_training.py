"""Train compiled models and plain ones: a script, because the shape checks of the tests cannot be compiled.

Prints what the kinds of run found, compiled and plain; all in one process, which loads the compiler once.
"""

import json
from unittest import mock

import test_distributed as distributed
import test_experts as experts
import test_trainer as whole
import torch
import torch._dynamo
from test_trainer import replace

from minicpm_lite.training import trainer
from minicpm_lite.training.processes import processes
from minicpm_lite.training.settings import Layout


def blocks() -> dict:
    """Block by block, also where blocks are computed again."""
    with processes():
        found = {"plain": distributed.trained(distributed.make(), 3).losses}
        for again in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            config = replace(distributed.CONFIG, compile=True)
            run = distributed.trained(distributed.make(config=config, layout=Layout(2, again)), 3)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            found["computed again" if again else "kept"] = [run.losses, graphs]
    return found


def mixture() -> list:
    configs = experts.TRAINER, replace(experts.TRAINER, compile=True)
    return [[run.losses, run.grad_norms] for run in (experts.trained(0.5, 6, config) for config in configs)]


def dense(**how) -> list:
    configs = whole.CONFIG, replace(whole.CONFIG, compile=True)
    return [whole.trained(5, config=replace(config, **how)).losses for config in configs]


def bfloat16() -> list:
    """Traced once, with torch's own kernels, which round as they do when nothing is compiled."""
    traced = mock.patch.object(trainer, "_compiled", lambda loss: torch.compile(loss, backend="aot_eager"))
    with traced, torch._dynamo.config.patch(error_on_recompile=True):
        return dense(precision="bfloat16")


def main() -> None:
    found = {}
    for kind in (blocks, mixture, dense, bfloat16):
        torch._dynamo.reset()
        found[kind.__name__] = kind()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
