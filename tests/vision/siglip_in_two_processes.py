"""The sigmoid loss of eight pairs in two processes, each with half of them, beside one with all."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from two_processes import exit_codes, start

from minicpm_lite.training.processes import processes
from minicpm_lite.vision.contrastive import sigmoid_loss


def leaves() -> list[torch.Tensor]:
    torch.manual_seed(0)
    vectors = [torch.randn(8, 5, dtype=torch.float64) for _ in range(2)]
    numbers = [torch.tensor(number, dtype=torch.float64) for number in (0.7, -1.3)]
    return [each.requires_grad_() for each in vectors + numbers]


def work() -> None:
    together = leaves()
    with processes():
        rank = dist.get_rank()
        mine = slice(4 * rank, 4 * rank + 4)
        loss = sigmoid_loss(together[0][mine], together[1][mine], *together[2:])
        loss.backward()
        for each in (loss, *(leaf.grad for leaf in together)):  # means over processes, as in training
            dist.all_reduce(each.detach())
    loss = loss.detach() / 2
    alone = leaves()
    expected = sigmoid_loss(*alone)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-12, rtol=0)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other.grad / 2, one.grad, atol=1e-12, rtol=0)


if __name__ == "__main__":
    sys.exit(max(exit_codes(start(work))))
