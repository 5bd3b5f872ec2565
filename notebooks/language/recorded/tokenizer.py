"""The recorded runs of the tokenizer chapter, 20 tuning runs and 15 longer ones on one core.

Run them with `python notebooks/language/recorded/tokenizer.py`.

One body, the proportions of `lite-1m`, is trained on Austen with four vocabularies, each for the same number
of FLOPs: a larger vocabulary pays for its output layer with fewer tokens. One of them is trained untied, too.
The peak learning rate of each is tuned on a seed of its own, with a quarter of the budget; then three seeds
are compared. Results go to `tokenizer.json` beside this file after each run; a script that is
stopped goes on where it was.
"""

import math
from dataclasses import asdict, dataclass, replace

from minicpm_lite import load_config
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.lab.recorded import run_jobs, tune_rates
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

VOCABULARIES = (256, 1024, 4096, 16384)
UNTIED = 4096  # this one also with a second table
MODELS = [(size, True) for size in VOCABULARIES] + [(UNTIED, False)]
BUDGET = 2.7e12  # FLOPs of one run, six for each token and parameter that is multiplied
FIRST_RATES = (0.005, 0.01, 0.02)  # extended by factors of 2 while the best lies at the edge
TUNING_SEED, TUNING_PART = 100, 0.25
SEEDS = (0, 1, 2)
BATCH = 6  # sequences of 128 tokens


@dataclass(frozen=True)
class Run:
    """One model, trained once; `name` is its key in the results."""

    vocab_size: int
    tied: bool
    peak_lr: float
    seed: int
    budget: float

    @property
    def name(self) -> str:
        tables = "tied" if self.tied else "untied"
        return f"{self.vocab_size}/{tables}/lr={self.peak_lr:g}/seed={self.seed}/budget={self.budget:g}"


def train(run: Run) -> dict:
    """Train on as many tokens as the budget pays for, and measure bits per byte on held-out text."""
    corpus = load_corpus(run.vocab_size)
    shape = replace(load_config("lite-1m"), vocab_size=run.vocab_size, tie_word_embeddings=run.tied)
    seed_everything(run.seed)
    model = Decoder(shape)
    config = TrainerConfig(batch_size=BATCH, compile=True, seed=run.seed)
    output_layer = shape.vocab_size * shape.hidden_size  # looking a row up costs nothing
    flops_a_token = 6 * (model.num_parameters() + output_layer)
    steps = round(run.budget / flops_a_token / config.batch_tokens)
    warmup, decay = steps // 10, steps // 10
    trainer = Trainer(model, corpus.train, WSD(run.peak_lr, warmup, steps - warmup - decay, decay), config)
    trainer.train(progress=False)
    nats = trainer.evaluate(corpus.validation)
    return asdict(run) | {
        "steps": steps,
        "tokens": steps * config.batch_tokens,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "body": model.num_parameters(),
        "bytes_per_token": corpus.bytes_per_token,
        "train_tokens": len(corpus.train),
        "nats_per_token": nats,
        "bits_per_byte": nats / math.log(2) / corpus.bytes_per_token,
    }


def tune(facts: dict) -> dict[tuple[int, bool], float]:
    """The best peak rate of each model on the tuning seed."""

    def losses_of(pairs: list) -> dict:
        jobs = {(model, rate): Run(*model, rate, TUNING_SEED, TUNING_PART * BUDGET) for model, rate in pairs}
        runs = run_jobs(__file__, jobs.values(), train, facts, workers=1)
        return {pair: runs[job.name]["bits_per_byte"] for pair, job in jobs.items()}

    return tune_rates(MODELS, FIRST_RATES, losses_of)


def main() -> None:
    """Tune, then compare."""
    facts = {"body": "lite-1m", "budget": BUDGET, "seeds": SEEDS, "tuning_seed": TUNING_SEED}
    best = tune(facts)
    facts["peak_lr"] = {f"{size}/{'tied' if tied else 'untied'}": rate for (size, tied), rate in best.items()}
    compared = [Run(*model, best[model], seed, BUDGET) for seed in SEEDS for model in MODELS]
    run_jobs(__file__, compared, train, facts, workers=1)


if __name__ == "__main__":
    main()
