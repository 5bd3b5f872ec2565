"""The recorded runs of the chapter on two-stage pre-training, about 40 minutes on one core of a busy machine.

Run them with `python notebooks/training/recorded/two_stage.py`.

Prose is Austen; instructions are small talk and four tasks with exact answers. Models: A is `lite-1m`; B has
half its width. Each seed trains one stable stage on prose, and two decays from it:

- A-1, B-1: the decay on prose alone, then SFT;
- A-2, B-3: half of the decay's windows are instructions, then SFT, as long;
- B-2: as B-1, but SFT takes twice as long. B-2 and B-3 then have seen equally many instructions.

SFT goes on at the rate the decay ended with, as published. At A it is tried also with a decay of its own,
from a higher rate to the same end; the rate is chosen for each side on a seed that is not used again, by the
answer loss, mean over the tasks. The peak rate is not tuned here; see the chapter on WSD.

The rule, fixed before the runs: of two arms one is better in a figure if the mean over the seeds of their
difference is further from zero than twice its standard error.
"""

import math
import random
from dataclasses import asdict, dataclass, replace
from statistics import mean

import torch

from minicpm_lite import load_config
from minicpm_lite.data.conversations import ConversationWindows, EncodedExample
from minicpm_lite.data.instructions import TASKS, load_instruction_corpus
from minicpm_lite.data.mixtures import MixtureWindows
from minicpm_lite.data.windows import TokenWindows
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.runtime import seed_everything, tune_cpu
from minicpm_lite.training.curvature import watch_decay
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.two_stage import choice_accuracy, score_answers
from minicpm_lite.training.wsd import WSD

SEEDS = (0, 1, 2)
TUNING_SEED = 100
PEAK_LR = 0.01
WARMUP = 40
STABLE, DECAY, SFT = 400, 400, 200  # updates of 1,536 tokens
WEIGHT = 0.5  # of instructions in a mixed decay
FINAL_RATIO = 0.1  # the decay and SFT end at this part of the peak
SFT_RATIOS = (0.1, 0.3, 1.0)  # where SFT begins, parts of the peak
WATCH_EVERY = 10
CHOICES = 300
BATCH = TrainerConfig().batch_size


@dataclass(frozen=True)
class Job:
    """One model and seed: the stable stage, both decays and what follows them."""

    model: str  # "A" or "B"
    seed: int
    sft_ratios: tuple[tuple[float, ...], tuple[float, ...]]  # after the plain and after the mixed decay

    @property
    def name(self) -> str:
        return f"{self.model}/seed={self.seed}"


def new_model(name: str) -> Decoder:
    config = load_config("lite-1m")
    return Decoder(config if name == "A" else replace(config, hidden_size=64, intermediate_size=160))


def recipe(weight: float, seed: int) -> MixtureWindows:
    """All three stages as one sequence: prose; prose and instructions; instructions."""
    corpus = load_instruction_corpus()
    return MixtureWindows(
        {
            "prose": TokenWindows(corpus.prose, 128, seed),
            "instructions": ConversationWindows(corpus.train, 128, seed),
        },
        [
            (0, {"prose": 1}),
            (STABLE * BATCH, {"prose": 1 - weight, "instructions": weight}),
            ((STABLE + DECAY) * BATCH, {"instructions": 1}),
        ],
    )


def wsd(decay: int) -> WSD:
    return WSD(PEAK_LR, WARMUP, STABLE - WARMUP, decay, final_ratio=FINAL_RATIO)


def sft_schedule(ratio: float) -> WSD:
    """From this part of the peak down to where the decay ended; at that ratio itself, a constant."""
    return WSD(PEAK_LR * ratio, 0, STABLE + DECAY, SFT, final_ratio=FINAL_RATIO / ratio)


def work(job: Job) -> dict:
    tune_cpu()
    torch._dynamo.reset()  # another model follows in this process
    seed_everything(job.seed)
    config = TrainerConfig(seed=job.seed, compile=True)
    stable = Trainer(new_model(job.model), recipe(0.0, job.seed), wsd(0), config)
    result = asdict(job) | {"readings": {"stable": [], "decay": []}}
    stable.train(STABLE // 2, progress=False)
    result["readings"]["stable"] = [asdict(r) for r in watch_decay(stable, STABLE, WATCH_EVERY)]
    result["stable"] = evaluate(stable)
    for arm, weight, ratios in zip(("plain", "mixed"), (0.0, WEIGHT), job.sft_ratios, strict=True):
        decay = stable.branch(wsd(DECAY), recipe(weight, job.seed))
        if arm == "plain":
            result["readings"]["decay"] = [
                asdict(r) | {"curvature": r.curvature}
                for r in watch_decay(decay, STABLE + DECAY, WATCH_EVERY)
            ]
        else:
            decay.train(STABLE + DECAY, progress=False)
        result[arm] = {"decayed": evaluate(decay), "sft": {}}
        for ratio in ratios:
            sft = decay.branch(sft_schedule(ratio))
            sft.train(STABLE + DECAY + SFT, progress=False)
            result[arm]["sft"][ratio] = evaluate(sft)
            if job.model == "B" and arm == "plain":
                sft.train(STABLE + DECAY + 2 * SFT, progress=False)
                result[arm]["longer"] = evaluate(sft)
        result[arm]["losses"] = sft.losses
    return result


def evaluate(run: Trainer) -> dict:
    """Held-out prose in bits per byte; of each task, answer loss and part answered exactly."""
    corpus = load_instruction_corpus()
    scores = {task: score_answers(run.model, corpus.held_out[task]) for task in TASKS}
    return {
        "prose": run.evaluate(corpus.prose_held_out) / math.log(2) / corpus.bytes_per_token,
        "loss": {task: score.loss for task, score in scores.items()},
        "exact": {task: score.accuracy for task, score in scores.items()},
        "choice": choice_accuracy(run.model, reply_choices(corpus.held_out["chat"][:CHOICES])),
    }


def reply_choices(chats: tuple[EncodedExample, ...]) -> list[list[EncodedExample]]:
    """Each message with its reply and with the replies to three other messages."""
    generator = random.Random(0)
    return [
        [chat]
        + [
            EncodedExample(chat.question, other.answer)
            for other in generator.sample([c for c in chats if c.answer != chat.answer], 3)
        ]
        for chat in chats
    ]


def best_ratio(sft: dict[str, dict]) -> float:
    return float(min(sft, key=lambda ratio: mean(sft[ratio]["loss"].values())))


def main() -> None:
    facts = {
        "data": "austen and instructions",
        "batch_tokens": TrainerConfig().batch_tokens,
        "seeds": SEEDS,
        "tuning_seed": TUNING_SEED,
        "peak_lr": PEAK_LR,
        "final_ratio": FINAL_RATIO,
        "sft_ratios": SFT_RATIOS,
        "warmup": WARMUP,
        "stable": STABLE,
        "decay": DECAY,
        "sft": SFT,
        "weight": WEIGHT,
        "choices": CHOICES,
    }

    def run(jobs: list[Job]) -> dict[str, dict]:
        return run_jobs(__file__, jobs, work, facts, workers=1)

    tuning = Job("A", TUNING_SEED, (SFT_RATIOS, SFT_RATIOS))
    tuned = run([tuning])[tuning.name]
    best = tuple(tuple(sorted({FINAL_RATIO, best_ratio(tuned[arm]["sft"])})) for arm in ("plain", "mixed"))
    print(f"tuned: {best}", flush=True)
    published = ((FINAL_RATIO,), (FINAL_RATIO,))
    run([Job("A", seed, best) for seed in SEEDS] + [Job("B", seed, published) for seed in SEEDS])


if __name__ == "__main__":
    main()
