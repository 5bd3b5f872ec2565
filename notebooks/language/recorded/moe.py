"""The recorded runs of the chapter on experts, about 40 minutes on one core of a busy machine.

Run them with `python notebooks/language/recorded/moe.py`.

For each of three seeds a dense `lite-1m` is trained on Austen in the stable stage of WSD. Its weights are
then trained on in four ways, all with the same fresh order of data, a fresh optimiser, the same peak rate and
a decay over the last quarter:

- upcycled: 8 experts, 2 for each token, balance loss times 0.01;
- unbalanced: the same without a balance loss;
- dense: as it is, for as many updates;
- dense, equal FLOPs: as it is, for as many FLOPs as the upcycled model had.

Nothing is tuned. Results go to `moe.json` beside this file after each seed, and the stable weights of seed 0
go to `moe.safetensors`.

The rule, fixed before the runs: of two arms one is better if the mean over the seeds of their difference in
held-out bits per byte is further from zero than twice its standard error. An expert is idle if fewer than 1 %
of the held-out tokens visit it at the end, where an even load is 25 %.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minicpm_lite import load_config
from minicpm_lite.config import MixtureConfig
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.moe import load_balance_loss
from minicpm_lite.language.scoring import next_token_loss
from minicpm_lite.language.upcycling import expert_load, router_probabilities, upcycle
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.checkpoint import save_checkpoint
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

SEEDS = (0, 1, 2)
PEAK_LR = 0.01
WARMUP = 20
STABLE_STEPS = 600  # updates of 1,536 tokens, of the dense model before it is upcycled
STEPS = 400  # further updates
PROBE_EVERY = 25
PROBE_TOKENS = 2048
BALANCED = MixtureConfig(num_experts=8, num_experts_per_token=2, balance_loss_weight=0.01)
UNBALANCED = MixtureConfig(num_experts=8, num_experts_per_token=2, balance_loss_weight=0)
WEIGHTS = Path(__file__).with_suffix(".safetensors")


@dataclass(frozen=True)
class Job:
    """One seed: the dense run and the four runs that go on from it."""

    seed: int

    @property
    def name(self) -> str:
        return f"seed={self.seed}"


def run_seed(job: Job) -> dict:
    stable = Trainer(
        dense_model(job.seed),
        load_corpus().train,
        WSD(PEAK_LR, WARMUP, STABLE_STEPS - WARMUP, 0),
        TrainerConfig(seed=job.seed, compile=True),
    )
    stable.train(progress=False)
    if job.seed == SEEDS[0]:
        weights = {name: weight.half() for name, weight in stable.model.named_parameters()}
        save_checkpoint(WEIGHTS, weights, {"model": "lite-1m", "data": "austen", "steps": stable.step})
    result = {"stable": {"losses": stable.losses, "bits_per_byte": bits_per_byte(stable)}}
    factor = flops_of_an_update(upcycle(stable.model, BALANCED)) / flops_of_an_update(stable.model)
    for arm, mixture, steps in (
        ("upcycled", BALANCED, STEPS),
        ("unbalanced", UNBALANCED, STEPS),
        ("dense", None, STEPS),
        ("dense, equal FLOPs", None, round(factor * STEPS)),
    ):
        result[arm] = go_on(stable.model, mixture, steps, job.seed)
    return result | {"flops_factor": factor}


def dense_model(seed: int) -> Decoder:
    seed_everything(seed)
    return Decoder(load_config("lite-1m"))


def go_on(dense: Decoder, mixture: MixtureConfig | None, steps: int, seed: int) -> dict:
    seed_everything(seed)
    model = dense_copy(dense) if mixture is None else upcycle(dense, mixture)
    decay = steps // 4
    run = Trainer(
        model,
        load_corpus().train,
        WSD(PEAK_LR, WARMUP, steps - WARMUP - decay, decay),
        TrainerConfig(seed=seed + 10, compile=True),
    )
    probes = []
    for step in [*range(0, steps, PROBE_EVERY), steps]:
        run.train(step, progress=False)
        probes.append({"step": step} | probe(run))
    return {"losses": run.losses, "bits_per_byte": bits_per_byte(run), "probes": probes}


def dense_copy(dense: Decoder) -> Decoder:
    copy = Decoder(dense.config)
    copy.load_state_dict(dense.state_dict())
    return copy


def bits_per_byte(run: Trainer, tokens: int | None = None) -> float:
    corpus = load_corpus()
    return run.evaluate(corpus.validation[:tokens]) / math.log(2) / corpus.bytes_per_token


@torch.no_grad()
def probe(run: Trainer) -> dict:
    """Held-out quality and, with experts, what the routers do; all on the same held-out tokens."""
    result: dict = {"bits_per_byte": bits_per_byte(run, 8 * PROBE_TOKENS)}
    if run.model.config.mixture is None:
        return result
    run.model.eval()
    ids = load_corpus().validation[:PROBE_TOKENS].view(-1, run.config.sequence_length)
    probabilities = router_probabilities(run.model, ids).flatten(1, 2)  # (layers, tokens, experts)
    visits = run.model.config.mixture.num_experts_per_token
    return result | {
        "load": expert_load(run.model, ids).tolist(),
        "balance": [load_balance_loss(p, p.topk(visits).indices).item() for p in probabilities],
        "entropy": torch.special.entr(probabilities).sum(-1).mean(-1).tolist(),  # nats, at most ln 8
        "apart": [distance_of_experts(layer.mlp.experts) for layer in run.model.layers],
    }


def distance_of_experts(experts: torch.nn.ModuleList) -> float:
    """How far neighbours lie apart, relative to their length: 0 for copies, about sqrt(2) for strangers."""

    def flat(expert: torch.nn.Module) -> Tensor:
        return torch.cat([weight.flatten() for weight in expert.parameters()])

    apart = [(flat(a) - flat(b)).norm() / flat(a).norm() for a, b in pairwise(experts)]
    return torch.stack(apart).mean().item()


def flops_of_an_update(model: Decoder) -> int:
    """Of all products with weights, forward and backward, of one batch, as PyTorch counts them.

    The products of queries with keys are not in the count; they are the same in all arms.
    """
    window = load_corpus().train[: 12 * 129].view(12, 129)
    with FlopCounterMode(display=False) as counter:
        next_token_loss(model, window).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


if __name__ == "__main__":
    facts = {
        "data": "austen",
        "batch_tokens": TrainerConfig().batch_tokens,
        "seeds": SEEDS,
        "peak_lr": PEAK_LR,
        "warmup": WARMUP,
        "stable_steps": STABLE_STEPS,
        "steps": STEPS,
        "probe_tokens": PROBE_TOKENS,
        "experts": BALANCED.num_experts,
        "visits": BALANCED.num_experts_per_token,
    }
    run_jobs(__file__, [Job(seed) for seed in SEEDS], run_seed, facts, workers=1)
