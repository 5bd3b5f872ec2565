"""The recorded runs of the chapter on ternary weights, 37 minutes on one core of a busy machine.

Run them with `python notebooks/inference/recorded/ternary.py`.

A small decoder (0.1 million weights in its matrices) is trained on 614,400 tokens of Austen: in full
precision, with ternary weights from the first update, or in full precision first and ternary in
the last 10, 20, 40, 60 or 80 % of the same tokens. All runs of one seed share one trunk: the rate is constant
up to the last tenth, so a run can turn ternary at any update before; the decay stands in the last tenth of
every run. The peak rate of each is tuned on a seed of its own; then five seeds are compared. Results go to
`ternary.json` beside this file after each job; a run that is stopped goes on where it was.

The rules, fixed before the runs, differences seed by seed with 95 % intervals:

- Rounding after training loses to training with rounded weights if the interval of the best of four ways to
  round, minus that of training ternary from the first update, lies above 0.
- A share of tokens suffices if its loss is equal to that of 100 % within 0.02 nats, or lower. The published
  40 % is reproduced if 40 % suffices and 20 % does not; direction only if the loss falls with the share, and
  the first share that suffices is another.
- Ternary training is more sensitive to its rate if the loss at twice and at half its best rate rises by more
  than that of full precision, on the tuning seed (one seed, so a direction and no verdict).
- Smaller groups, each change of the layer, a checkpoint from behind a decay, and distillation are compared at
  a share of 40 %, at the rate of that share: better or worse if the interval leaves out 0.

The power: if differences vary by 0.01 nats from seed to seed, five seeds show 0.017 in four cases of five.
"""

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

import minicpm_lite
from minicpm_lite.data.assets import load_austen
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.inference.calibration import Statistics, walk_blocks
from minicpm_lite.inference.ternary import TernaryLinear, make_ternary, ternarize
from minicpm_lite.lab.recorded import run_jobs, tune_rates
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.layers import replace_linears
from minicpm_lite.language.scoring import token_losses
from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.objective import distillation
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD, Schedule

STEPS, WARMUP, DECAY = 400, 20, 40  # updates of 1,536 tokens
REWARM = 8  # updates in which the rate rises again where weights turn ternary
SHARES = (10, 20, 40, 60, 80)  # % of the tokens with ternary weights; 100 starts by itself
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100  # not among the seeds that are compared
FIRST_RATES = (0.01, 0.02, 0.04)  # extended by factors of 2 while the best lies at the edge
GROUPS = ("matrix", 32, 16)
CHANGED = (
    "scale frozen",
    "scale of least error",
    "gradient of the scale",
    "gradient clipped",
    "no decay of weights",
)
OTHERS = ("distilled in the decay", "distilled throughout", "from behind a decay")
WORKERS = 1

MODEL = replace(
    minicpm_lite.load_config("lite-1m"),
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=192,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
FACTS = {
    "model": asdict(MODEL),
    "steps": STEPS,
    "warmup": WARMUP,
    "decay": DECAY,
    "rewarm": REWARM,
    "batch_tokens": TrainerConfig().batch_tokens,
    "seeds": SEEDS,
    "tuning_seed": TUNING_SEED,
}


@dataclass(frozen=True)
class Job:
    """One run; `name` is its key in the results.

    Attributes:
        arm: "full precision", a share such as "40 %", one of GROUPS, CHANGED or OTHERS, or "watched …".
        peak_lr: of the run, or of its ternary part.
        trunk_lr: of the part in full precision before it.
        seed: of weights and data.
    """

    arm: str
    peak_lr: float
    trunk_lr: float | None
    seed: int

    @property
    def name(self) -> str:
        before = "" if self.trunk_lr is None else f" after {self.trunk_lr:g}"
        return f"{self.arm}/lr={self.peak_lr:g}{before}/seed={self.seed}"


@dataclass(frozen=True)
class Rewarmed(Schedule):
    """The end of a WSD run that begins at ``start`` with a short warm-up of its own."""

    peak_lr: float
    start: int
    total_steps: int = STEPS

    def __call__(self, step: float) -> float:
        rate = WSD(self.peak_lr, 0, STEPS - DECAY, DECAY)(step)
        return rate * min(1.0, max(step - self.start, 0) / REWARM)


class ScaleFrozen(TernaryLinear):
    """The scale of each group is that of the weights it began with."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("scale", ternarize(linear.weight.detach())[1])

    @property
    def weight(self) -> Tensor:
        latent = self.latent.detach()
        codes = (latent / self.scale).round().clamp(-1, 1)
        return codes * self.scale + (self.latent - latent)


class ScaleOfLeastError(TernaryLinear):
    """The scale with which rounding changes the weights least, instead of the mean size."""

    @property
    def weight(self) -> Tensor:
        latent = self.latent.detach()
        return _of_least_error(latent) + (self.latent - latent)


class GradientOfTheScale(TernaryLinear):
    """What a change of the scale does to all weights of its group reaches the gradient, too."""

    @property
    def weight(self) -> Tensor:
        scale = self.latent.abs().mean(1, keepdim=True).clamp(min=1e-5)
        scaled = self.latent / scale
        codes = scaled.round().clamp(-1, 1).detach()
        return scale * (codes + (scaled - scaled.detach()))


class GradientClipped(TernaryLinear):
    """Weights beyond 1 scale get no gradient, as by a clamp in front of the rounding.

    That of the equation stands behind it, and cuts what is rounded to more than 1, beyond 1.5 scales.
    """

    @property
    def weight(self) -> Tensor:
        latent = self.latent.detach()
        codes, scale = ternarize(latent)
        inside = (latent.abs() <= scale).to(latent.dtype)
        return codes * scale + inside * (self.latent - latent)


@lru_cache(maxsize=8)
def trunk(seed: int, rate: float) -> dict[int, Trainer]:
    """A run in full precision, up to the decay: as it was where runs leave it, by update."""
    seed_everything(seed)
    schedule = WSD(rate, WARMUP, STEPS - DECAY - WARMUP, DECAY)
    run = Trainer(Decoder(MODEL), load_corpus().train, schedule, TrainerConfig(seed=seed))
    left = {}
    for step in sorted({STEPS * (100 - share) // 100 for share in SHARES} | {STEPS * 60 // 100 - DECAY}):
        run.train(step, progress=False)
        left[step] = run.branch(schedule)
    return left


@lru_cache(maxsize=8)
def finished(seed: int, rate: float) -> Trainer:
    """The same run with its decay."""
    end = trunk(seed, rate)[STEPS - DECAY]
    run = end.branch(end.schedule)
    run.train(progress=False)
    return run


def from_checkpoint(job: Job, share: int) -> Trainer:
    """The trunk where so many % of its tokens are left, turned ternary. The moments of Adam go on."""
    start = STEPS * (100 - share) // 100
    run = trunk(job.seed, job.trunk_lr)[start].branch(Rewarmed(job.peak_lr, start))
    make_ternary(run.model)  # the weights stay the parameters that the optimiser moves
    return run


def from_scratch(job: Job) -> Trainer:
    seed_everything(job.seed)
    schedule = WSD(job.peak_lr, WARMUP, STEPS - DECAY - WARMUP, DECAY)
    config = TrainerConfig(seed=job.seed)
    return Trainer(make_ternary(Decoder(MODEL)), load_corpus().train, schedule, config)


def rebuilt(model: Decoder, kind: type[TernaryLinear], *options: object) -> None:
    """Ternary layers of another kind, around the same parameters."""

    def change(name: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, TernaryLinear):
            return layer
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = layer.latent
        return kind(linear, *options)

    replace_linears(model, change)


def held_out(model: Decoder, run: Trainer) -> float:
    """The loss of a model on the text that a run is scored on."""
    return Trainer(model, run.batches, run.schedule, run.config).evaluate(load_corpus().validation)


@torch.no_grad()
def rounded(run: Trainer) -> dict[str, float]:
    """The loss after rounding a finished model to three values, in four ways."""

    def largest(weight: Tensor) -> Tensor:  # what a ternary file of an ordinary model would hold
        scale = weight.abs().amax(1, keepdim=True)
        return (weight / scale).round() * scale

    def absmean(weight: Tensor) -> Tensor:
        codes, scale = ternarize(weight)
        return codes * scale

    losses = {}
    for way in (largest, absmean, _of_least_error):
        model = copy.deepcopy(run.model)
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(way(parameter))
        losses[way.__name__.removeprefix("_").replace("_", " ")] = held_out(model, run)
    model = copy.deepcopy(run.model).eval()
    walk_blocks(model, load_corpus().train[: 64 * 128].view(64, 128), _gptq)
    losses["GPTQ"] = held_out(model, run)
    return losses


def _of_least_error(weight: Tensor) -> Tensor:
    """The ternary row of least squared error: codes for a scale and a scale for codes, in turn."""
    scale = weight.abs().mean(1, keepdim=True)
    for _ in range(20):
        codes = (weight / scale).round().clamp(-1, 1)
        scale = (weight * codes).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True).clamp(min=1)
    return codes * scale


def _gptq(index: int, block: nn.Module, statistics: dict[str, Statistics]) -> None:
    """Round each row column by column to its fitted ternary grid; later columns make up for the errors."""
    for name, seen in statistics.items():
        weight, hessian = block.get_submodule(name).weight, seen.hessian.clone()
        hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
        factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        left = weight.detach().to(hessian.dtype).clone()
        scale = left.abs().mean(1)
        for _ in range(20):
            codes = (left / scale[:, None]).round().clamp(-1, 1)
            scale = (left * codes).sum(1) / codes.square().sum(1).clamp(min=1)
        for j in range(left.shape[1]):
            value = (left[:, j] / scale).round().clamp(-1, 1) * scale
            error = (left[:, j] - value) / factor[j, j]
            left[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
            left[:, j] = value
        weight.copy_(left)


@torch.no_grad()
def watched(run: Trainer) -> dict[str, list]:
    """Every 25 updates to the end: what rounding does to the weights, and to the loss."""
    text = load_corpus().validation[: 128 * 128 + 1]
    seen = {"step": [], "loss": [], "loss_rounded": [], "error": [], "zeros": [], "flipped": []}
    before = None
    while True:
        matrices = {name: p for name, p in run.model.named_parameters() if "_proj." in name and p.ndim == 2}
        codes, errors = [], []
        for matrix in matrices.values():
            code, scale = ternarize(matrix)
            codes.append(code.flatten())
            errors.append(((matrix - code * scale).norm() / matrix.norm()).item())
        codes = torch.cat(codes)
        plain = not any(isinstance(part, TernaryLinear) for part in run.model.modules())
        seen["step"].append(run.step)
        seen["loss"].append(run.evaluate(text))
        seen["error"].append(sum(errors) / len(errors))
        seen["zeros"].append((codes == 0).float().mean().item())
        seen["flipped"].append(None if before is None else (codes != before).float().mean().item())
        if plain:
            model = make_ternary(copy.deepcopy(run.model))
            seen["loss_rounded"].append(Trainer(model, run.batches, run.schedule, run.config).evaluate(text))
        before = codes
        if run.step >= run.schedule.total_steps:
            return seen
        with torch.enable_grad():
            run.train(min(run.step + 25, run.schedule.total_steps), progress=False)


@torch.no_grad()
def smollm2() -> dict[str, list[float]]:
    """The losses of SmolLM2-135M, rounded to four bits once, on four texts of 256 tokens: as it is, and with
    its matrices rounded to three values."""
    model, tokenizer = load_pretrained(smollm2_file()).eval(), load_tokenizer(smollm2_file())
    ids = torch.tensor(tokenizer.encode(load_austen()[20_000:40_000]).ids)[: 4 * 257].view(4, 257)

    def absmean(weight: Tensor, group: int | str) -> Tensor:
        codes, scale = ternarize(weight, group)
        return (codes.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)

    kept = {name: p.clone() for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    losses = {"as it is": token_losses(model, ids).mean(1).tolist()}
    for way, change in {
        "absmean, row": lambda weight: absmean(weight, "row"),
        "absmean, 32": lambda weight: absmean(weight, 32),
        "least error, row": _of_least_error,
    }.items():
        for name, weight in kept.items():
            model.get_parameter(name).copy_(change(weight))
        losses[way] = token_losses(model, ids).mean(1).tolist()
    return losses


def work(job: Job) -> dict:
    if job.arm == "SmolLM2":
        return {"losses": smollm2()}
    if job.arm.startswith("watched"):
        return asdict(job) | {"watched": watched(_watched_run(job))}
    if job.arm == "full precision":
        run = finished(job.seed, job.peak_lr)
        found = {"loss": held_out(run.model, run)}
        return asdict(job) | found | ({} if job.seed == TUNING_SEED else {"rounded": rounded(run)})
    run = _prepared(job)
    if job.arm == "distilled in the decay":
        run.train(STEPS - DECAY, progress=False)
        run.objective = distillation(finished(job.seed, job.trunk_lr).model)
    run.train(progress=False)
    return asdict(job) | {"loss": held_out(run.model, run)}


def _watched_run(job: Job) -> Trainer:
    if job.arm == "watched full precision":
        seed_everything(job.seed)
        schedule = WSD(job.peak_lr, WARMUP, STEPS - DECAY - WARMUP, DECAY)
        return Trainer(Decoder(MODEL), load_corpus().train, schedule, TrainerConfig(seed=job.seed))
    return from_scratch(job) if job.arm == "watched 100 %" else from_checkpoint(job, 40)


def _prepared(job: Job) -> Trainer:
    """The run of an arm, at its first ternary update."""
    if job.arm == "100 %":
        return from_scratch(job)
    if job.arm.endswith(" %"):
        return from_checkpoint(job, int(job.arm.removesuffix(" %")))
    if job.arm == "from behind a decay":
        start = STEPS * 60 // 100
        end = trunk(job.seed, job.trunk_lr)[start - DECAY]
        run = end.branch(WSD(job.trunk_lr, WARMUP, start - DECAY - WARMUP, DECAY))
        run.train(progress=False)
        run = run.branch(Rewarmed(job.peak_lr, start))
        make_ternary(run.model)
        return run
    run = from_checkpoint(job, 40)
    if job.arm == "scale frozen":
        rebuilt(run.model, ScaleFrozen)
    elif job.arm == "scale of least error":
        rebuilt(run.model, ScaleOfLeastError)
    elif job.arm == "gradient of the scale":
        rebuilt(run.model, GradientOfTheScale)
    elif job.arm == "gradient clipped":
        rebuilt(run.model, GradientClipped)
    elif job.arm == "no decay of weights":
        for group in run.optimizer.param_groups:
            group["weight_decay"] = 0.0
    elif job.arm == "distilled throughout":
        run.objective = distillation(finished(job.seed, job.trunk_lr).model)
    elif job.arm.startswith("group "):
        size = job.arm.removeprefix("group ")
        rebuilt(run.model, TernaryLinear, "matrix" if size == "matrix" else int(size))
    return run


def run_all(jobs: Iterable[Job]) -> dict[str, dict]:
    return run_jobs(__file__, jobs, work, FACTS, WORKERS)


def tuned(arms: Iterable[str], trunk_lr: float | None) -> dict[str, float]:
    def losses_of(pairs: list[tuple[str, float]]) -> dict[tuple[str, float], float]:
        jobs = {
            (arm, rate): Job(arm, rate, None if arm in ("full precision", "100 %") else trunk_lr, TUNING_SEED)
            for arm, rate in pairs
        }
        runs = run_all(jobs.values())
        return {pair: runs[job.name]["loss"] for pair, job in jobs.items()}

    return tune_rates(arms, FIRST_RATES, losses_of)


if __name__ == "__main__":
    torch.set_num_threads(1)
    best = tuned(["full precision"], None)
    full = best["full precision"]
    best |= tuned(["100 %", *(f"{share} %" for share in SHARES)], full)
    print(f"tuned: {best}", flush=True)
    shares = [
        Job(arm, rate, None if arm in ("full precision", "100 %") else full, seed)
        for seed in SEEDS
        for arm, rate in best.items()
    ]
    at_40 = best["40 %"]
    others = [
        Job(arm, at_40, full, seed)
        for arms in (OTHERS, [f"group {group}" for group in GROUPS], CHANGED)
        for seed in SEEDS
        for arm in arms
    ]
    watch = [
        Job("watched full precision", full, None, SEEDS[0]),
        Job("watched 100 %", best["100 %"], None, SEEDS[0]),
        Job("watched 40 %", at_40, full, SEEDS[0]),
    ]
    run_all([*shares, *watch, *others, Job("SmolLM2", 0.0, None, 0)])
