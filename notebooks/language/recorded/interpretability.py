"""The recorded runs of the chapter on looking inside, about 2 minutes on one thread.

Run them with `python notebooks/language/recorded/interpretability.py`.

Texts of 6 to 12 random tokens, and the same tokens once more. Nothing can be known of the first copy, and
everything of the second by whoever finds the earlier copy of a word and takes what followed it. Decoders of
one and of two blocks, of equal width, learn to continue the second copy, on fresh texts in each update.

Said before the runs. Claim (Olsson et al., 2022): models of two blocks grow heads that do this, induction
heads, and models of one block do not. Of each model we keep the loss of the second copy, in texts of 12
tokens twice, and of its best head the share that it gives to the token after the earlier copy.
Rule: *reproduced* if in all five models of two blocks the best share is above 0.5 and the loss of the second
copy below half of ln 32, which is the loss of who guesses, and if both hold in none of one block. *Direction
only* if not so, and two blocks have the larger share in each pair of seeds; *not at this scale* otherwise.
It could fail: two blocks may go on guessing, and one block might find a way by positions. Against the
simplest of these, to look a fixed number of tokens back, the number is drawn anew in each update.
Power: if two blocks grew such heads in half of all runs, five of five would be seen once in 32.
The rate, the batch and the number of updates were found in trials with seed 77, on two blocks.
"""

import math
from dataclasses import dataclass, replace

import torch

from minicpm_lite.config import load_config
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.interpretability import Watched
from minicpm_lite.language.scoring import token_losses
from minicpm_lite.runtime import seed_everything

VOCABULARY, LONGEST, SHORTEST = 32, 12, 6
STEPS, BATCH, RATE, WARMUP = 800, 32, 0.003, 100
SEEDS = (0, 1, 2, 3, 4)
SHAPE = replace(
    load_config("lite-1m"), hidden_size=64, intermediate_size=160, head_dim=16, vocab_size=VOCABULARY
)
TESTS = 64  # texts

FACTS = {
    "vocabulary": VOCABULARY, "longest": LONGEST, "shortest": SHORTEST, "steps": STEPS, "batch": BATCH,
    "rate": RATE, "warmup": WARMUP, "seeds": SEEDS, "width": SHAPE.hidden_size, "tests": TESTS,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    blocks: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.blocks} blocks/seed={self.seed}"


def repeated(rows: int, period: int, generator: torch.Generator) -> torch.Tensor:
    """Random tokens, twice; within a copy no token comes twice, so that each has one earlier copy."""
    once = torch.rand(rows, VOCABULARY, generator=generator).argsort(dim=1)[:, :period]
    return torch.cat([once, once], dim=1)


def measured(model: Decoder) -> dict:
    """The loss of both copies, and what each head gives to the token after the earlier copy."""
    ids = repeated(TESTS, LONGEST, torch.Generator().manual_seed(10_000))
    seen, asking = Watched(), torch.arange(LONGEST, 2 * LONGEST - 1)
    with torch.no_grad():
        losses = token_losses(model, ids)
        model(ids, seen)
    shares = [seen.weights[block][:, :, asking, asking - LONGEST + 1].mean(dim=(0, 2)).tolist()
              for block in sorted(seen.weights)]  # fmt: skip
    first, second = losses[:, : LONGEST - 1].mean(), losses[:, LONGEST:].mean()
    return {"first": first.item(), "second": second.item(), "shares": shares}


def work(job: Job) -> dict:
    seed_everything(job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    model = Decoder(replace(SHAPE, num_hidden_layers=job.blocks))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    curve = []
    for step in range(STEPS + 1):
        if step % 50 == 0:
            found = measured(model)
            curve.append([step, found["second"], max(map(max, found["shares"]))])
        if step == STEPS:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARMUP)
        period = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
        loss = token_losses(model, repeated(BATCH, period, generator))[:, period:].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {"blocks": job.blocks, "seed": job.seed, "guess": math.log(VOCABULARY), "curve": curve, **found}


if __name__ == "__main__":
    run_jobs(__file__, [Job(blocks, seed) for seed in SEEDS for blocks in (2, 1)], work, FACTS, workers=1)
