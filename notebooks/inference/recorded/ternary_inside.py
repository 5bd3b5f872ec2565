"""Controls of rounding, and what latent weights do while they learn: some ten minutes on one core.

Run them with `python notebooks/inference/recorded/ternary_inside.py`.

The finished models of `ternary.py`, made again: five seeds in full precision and ternary from the first
update, at their best rates. Each model in full precision is rounded to the codes of absmean, with scales of
three kinds: absmean; the one that gives the rounded row the length of the row; and the one that fits these
codes best (least squares). Each ternary model is read as if its latent weights were the model. In both,
latent weights over their scale are counted in bins of 0.05 every 50 updates. SmolLM2-135M is rounded in
three ways that were left out before: by its largest weight, and with the two other scales. Of the first seed,
the models write after the same words.

The rules, fixed before the run, differences seed by seed with 95 % intervals:

- Absmean fails in rounding by its scale, and not by its codes, if the same codes with the length given back
  come within 0.1 nats of the scale of least error, or below, by the whole interval.
- Latent weights are no model if their loss, minus that of the ternary weights behind them, lies above 0 by
  the whole interval.
- Latent weights gather at the thresholds if at the end the share of them within 0.05 of a threshold (0.45 to
  0.55 of the scale, of either sign) is larger in the ternary model than in full precision, by the whole
  interval; they avoid them if it is smaller.
- A way to round SmolLM2 keeps something if the loss stays below that of a guess, 10.8 nats.

The traces are of the three weights of one layer whose codes flip most in updates 200 to 360, so they are no
sample: what share of all codes flips is counted in `ternary.py`.

The power: absmean lies some two nats above the others, so that five seeds see 0.1 many times over.
"""

import copy
from dataclasses import dataclass

import torch
from ternary import (
    DECAY,
    SEEDS,
    STEPS,
    Job,
    _gptq,
    _of_least_error,
    finished,
    from_scratch,
    held_out,
)
from torch import Tensor

from minicpm_lite.data.assets import load_austen
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.inference.calibration import walk_blocks
from minicpm_lite.inference.ternary import ternarize
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate
from minicpm_lite.language.scoring import token_losses
from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer
from minicpm_lite.training.trainer import Trainer

RATE = 0.01  # the best rate of both, from `ternary.json`
EVERY, BINS, WIDEST = 50, 120, 3.0  # bins of 0.05 from -3 to 3 scales; what lies beyond is in the outer ones
TRACED, FROM, TO = "layers.0.mlp.up_proj", 200, STEPS
PROMPT, WRITTEN, TEMPERATURE = "She was", 40, 0.7
FACTS = {"seeds": SEEDS, "peak_lr": RATE, "every": EVERY, "bins": BINS, "widest": WIDEST, "prompt": PROMPT}


@dataclass(frozen=True)
class Part:
    """One job; `name` is its key in the results."""

    what: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.what}/seed={self.seed}"


def absmean(weight: Tensor) -> Tensor:
    codes, scale = ternarize(weight)
    return codes * scale


def of_its_length(weight: Tensor) -> Tensor:
    """The codes of absmean, as long as the row was."""
    codes = ternarize(weight)[0].float()
    return codes * weight.norm(dim=1, keepdim=True) / codes.norm(dim=1, keepdim=True).clamp(min=1)


def fitted(weight: Tensor) -> Tensor:
    """The codes of absmean, with the scale that fits them best."""
    codes = ternarize(weight)[0].float()
    return codes * (weight * codes).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True).clamp(min=1)


def largest(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True)
    return (weight / scale).round() * scale


def changed(model: Decoder, way: object) -> Decoder:
    """A copy whose matrices were rounded."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.copy_(way(parameter))
    return model


def histogram(model: torch.nn.Module) -> list[int]:
    """Counts of latent weights over the scale of their row."""
    counts = torch.zeros(BINS)
    for name, weight in model.named_parameters():
        if "_proj." in name and weight.ndim == 2:
            ratio = weight.detach() / weight.detach().abs().mean(1, keepdim=True)
            counts += ratio.clamp(-WIDEST + 1e-4, WIDEST - 1e-4).histc(BINS, -WIDEST, WIDEST)
    return counts.int().tolist()


def near(model: torch.nn.Module) -> float:
    """The share of latent weights within 0.05 scales of a threshold."""
    close = total = 0
    for name, weight in model.named_parameters():
        if "_proj." in name and weight.ndim == 2:
            ratio = weight.detach().abs() / weight.detach().abs().mean(1, keepdim=True)
            close += ((ratio - 0.5).abs() < 0.05).sum().item()
            total += weight.numel()
    return close / total


def text_of(model: Decoder) -> str:
    tokenizer = load_corpus().tokenizer
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    generator = torch.Generator().manual_seed(0)
    written = generate(model.eval(), ids, WRITTEN, TEMPERATURE, generator=generator)
    return tokenizer.decode(written[0].tolist())


def watched(run: Trainer, traced: bool) -> dict:
    """Train to the end; histograms on the way, and the traces of the weights that flip most."""
    counts, trace = {"0": histogram(run.model)}, []
    for step in range(1, STEPS + 1):
        if not traced and step % EVERY:
            continue
        run.train(step, progress=False)
        if step % EVERY == 0 or step == STEPS - DECAY:
            counts[str(step)] = histogram(run.model)
        if traced and step >= FROM:
            latent = run.model.get_submodule(TRACED).latent.detach()
            trace.append((latent / latent.abs().mean(1, keepdim=True)).flatten())
    found = {"counts": counts, "near": near(run.model)}
    if traced:
        trace = torch.stack(trace)
        codes = trace[: TO - FROM - DECAY].round().clamp(-1, 1)
        flips = (codes[1:] != codes[:-1]).sum(0)
        most = flips.argsort(descending=True)[:3]
        found |= {
            "flips": flips[most].tolist(),
            "trace": [[round(value, 3) for value in trace[:, each].tolist()] for each in most],
        }
    return found


def plain(job: Part) -> dict:
    run = finished(job.seed, RATE)
    found = {"loss": held_out(run.model, run), "near": near(run.model), "counts": histogram(run.model)}
    with torch.no_grad():
        ways = {
            "absmean": absmean,
            "of its length": of_its_length,
            "fitted": fitted,
            "least error": _of_least_error,
        }
        found["rounded"] = {name: held_out(changed(run.model, way), run) for name, way in ways.items()}
        if job.seed == SEEDS[0]:
            model = copy.deepcopy(run.model).eval()
            walk_blocks(model, load_corpus().train[: 64 * 128].view(64, 128), _gptq)
            found["texts"] = {
                "full precision": text_of(run.model),
                "rounded by absmean": text_of(changed(run.model, absmean)),
                "rounded by GPTQ": text_of(model),
            }
    return found


def ternary(job: Part) -> dict:
    run = from_scratch(Job("100 %", RATE, None, job.seed))
    found = watched(run, traced=job.seed == SEEDS[0])
    read = Decoder(run.model.config)
    weights = {name.replace(".latent", ".weight"): each for name, each in run.model.state_dict().items()}
    read.load_state_dict(weights)
    found |= {"loss": held_out(run.model, run), "latent": held_out(read, run)}
    if job.seed == SEEDS[0]:
        found["text"] = text_of(run.model)
    return found


@torch.no_grad()
def smollm2(job: Part) -> dict:
    """As `ternary.py` does, in the ways that it leaves out."""
    model, tokenizer = load_pretrained(smollm2_file()).eval(), load_tokenizer(smollm2_file())
    ids = torch.tensor(tokenizer.encode(load_austen()[20_000:40_000]).ids)[: 4 * 257].view(4, 257)
    kept = {name: p.clone() for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    losses = {}
    for way in (largest, of_its_length, fitted):
        for name, weight in kept.items():
            model.get_parameter(name).copy_(way(weight))
        losses[way.__name__.replace("_", " ")] = token_losses(model, ids).mean(1).tolist()
    return {"losses": losses}


def work(job: Part) -> dict:
    return {"full precision": plain, "100 %": ternary, "SmolLM2": smollm2}[job.what](job)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = [Part(what, seed) for seed in SEEDS for what in ("full precision", "100 %")]
    run_jobs(__file__, [*parts, Part("SmolLM2")], work, FACTS, 1)
