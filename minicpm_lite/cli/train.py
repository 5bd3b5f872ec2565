"""``minicpm-lite train``: a model of the family, on one process or many; with --dry-run, what that takes."""

import json
import math
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..config import MissingBlockError, ModelConfig, TrainingRecipe, load_config, load_recipe
from .places import as_path

if TYPE_CHECKING:
    from ..data.shards import Shards
    from ..data.windows import Windows
    from ..training.objective import Objective
    from ..training.plan import TrainingPlan
    from ..training.settings import TrainerConfig
    from ..training.wsd import WSD

__all__ = ["train"]

_GPU_BYTES = 80e9


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run begins with.

    Attributes:
        checkpoint: its folder.
        facts: what it says about itself.
        decays: a decay begins there; else the run that it belongs to goes on.
    """

    checkpoint: Path
    facts: dict
    decays: bool


def train(
    context: typer.Context,
    config: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="a name of `minicpm-lite models`, or a YAML file")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR[:WEIGHT]",
            help="shards to read; given again, they are mixed by weight",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(parser=as_path, metavar="DIR", help="folder of the run")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest checkpoint in --out")
    ] = False,
    resume_from: Annotated[
        Path | None,
        typer.Option(
            parser=as_path,
            metavar="CHECKPOINT",
            help="go on from this one; what --out holds must not be later",
        ),
    ] = None,
    decay_from: Annotated[
        Path | None,
        typer.Option(
            parser=as_path,
            metavar="CHECKPOINT",
            help="begin at a checkpoint of a stable stage and decay from there; beside --resume, too, when "
            "the decay was stopped",
        ),
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(metavar="STEPS")] = 1000,
    keep: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="newest checkpoints that stay, beside the stable one; else 2, or as many as --out holds",
        ),
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write TensorBoard events, too")] = False,
    skip_non_finite: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="steps that may be passed over if their gradient is not finite"
        ),
    ] = 0,
    within_documents: Annotated[
        bool,
        typer.Option(
            "--within-documents",
            help="no token sees another document of its window; a run that began so goes on so",
        ),
    ] = False,
    until: Annotated[
        int | None,
        typer.Option(metavar="STEP", help="stop there; the schedule stays as it is", min=1),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="all of them; else as many as the recipe's tokens take"),
    ] = None,
    warmup: Annotated[int | None, typer.Option(metavar="STEPS")] = None,
    decay: Annotated[
        int | None,
        typer.Option(metavar="STEPS", help="down to a tenth of the peak, or as the run's schedule says"),
    ] = None,
    peak_lr: Annotated[float | None, typer.Option(metavar="RATE", help="of the stable stage")] = None,
    batch_tokens: Annotated[
        float | None,
        typer.Option(metavar="N", help="over all processes; 4e6 is 4 million"),
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(metavar="TOKENS")] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            metavar="WINDOWS",
            help="at once; else 1 on a GPU (raise it until its memory is full), all of them on a CPU; "
            "experts are balanced over as many",
        ),
    ] = None,
    activation_checkpointing: Annotated[
        bool | None, typer.Option(help="compute activations again, not keep them; else on a GPU only")
    ] = None,
    precision: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option(help="of the arithmetic; else bfloat16, on a CPU float32"),
    ] = None,
    parametrization: Annotated[
        Literal["mup", "standard"] | None,
        typer.Option(help="else mup, where the config has a dim_model_base"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of weights and data; else 0")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what the run takes, and the command")
    ] = False,
    gpus: Annotated[int | None, typer.Option(metavar="N", min=1, help="of the dry run; else 8")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the dry run for programs: one object")] = False,
) -> None:
    """Train a model of the family, on one process or on many.

    What is not given is taken from the model's published recipe, and what was not published from the
    defaults; --dry-run says which is which. It needs no data and no GPU:

    \b
      minicpm-lite train --config minicpm-1.2b --dry-run --gpus 64

    One process trains as it is. For several, torchrun starts this command once for each GPU:

    \b
      torchrun --nproc-per-node 8 -m minicpm_lite.cli train \\
          --config minicpm-1.2b --data shards --out run

    On several machines, give each the same command with torchrun's --nnodes and --rdzv-endpoint.

    A run that was stopped, or killed, goes on from its newest checkpoint, on any number of processes that
    can share a step's windows evenly:

    \b
      minicpm-lite train --config minicpm-1.2b --data shards --out run --resume

    From any checkpoint of the stable stage, the rate can be decayed in a run of its own, with other data
    mixed in; each folder is read on where the stable stage left it, and the stable run may go on meanwhile:

    \b
      minicpm-lite train --config minicpm-1.2b --data shards:0.7 \\
          --data instructions:0.3 --out decayed \\
          --decay-from run/step-00100000 --decay 16000

    --out then holds checkpoints (step-00001000, ...) and metrics.jsonl, a line for each step; what an attempt
    without a checkpoint left there is replaced. Ctrl-C, SIGTERM and a terminal that is closed end a run after
    its present step, with a checkpoint; a Ctrl-C after that ends it at once.
    """
    from ..training.processes import on_first, processes, rank, world_size
    from ..training.settings import Layout

    if decay_from and any(given is not None for given in (steps, warmup, peak_lr)):
        raise ValueError(
            "--decay-from goes on with the checkpoint's schedule; of the steps, give --decay only."
        )
    model, recipe = load_config(config), _published(config)
    asked = {
        "steps": steps, "warmup_steps": warmup, "decay_steps": decay, "peak_lr": peak_lr,
        "batch_tokens": batch_tokens, "sequence_length": sequence_length, "seed": seed,
        "precision": precision, "parametrization": parametrization,
    }  # fmt: skip
    asked = {name: value for name, value in asked.items() if value is not None}
    if decay_from and decay == 0:
        raise ValueError("--decay is 0, and --decay-from begins a decay; give it a step at least.")

    def layout(cuda: bool) -> Layout:
        again = cuda if activation_checkpointing is None else activation_checkpointing
        at_once = (1 if cuda else None) if micro_batch is None else micro_batch
        return Layout(at_once, again, sharded=True)

    if not dry_run and (gpus is not None or as_json):
        raise ValueError(
            "--gpus and --json are of --dry-run, which prints the command of the run itself: torchrun says "
            "how many processes there are."
        )
    if dry_run:
        gpus = 8 if gpus is None else gpus
        start = _start(out, resume, resume_from, decay_from)
        plan = _plan(model, recipe, asked, layout(cuda=True), start, until, gpus, cuda=True)
        command = _torchrun(context.obj, gpus, bool(data), bool(out))
        if as_json:
            print(json.dumps(_as_dict(plan, command), indent=1))
        else:
            _print_plan(config, plan, command)
        return
    if not data or not out:
        raise ValueError("Give --data and --out, or --dry-run to see what the run takes.")

    import torch

    from ..language.decoder import Decoder
    from ..language.writing import warn_of_ordinary_ends
    from ..pretrained.checkpoints import read_tokenizer
    from ..training.sharded_checkpoint import checkpoints, latest_checkpoint
    from ..training.trainer import Trainer

    with processes() as device:
        start = on_first(lambda: _start(out, resume, resume_from, decay_from))
        cuda = device.type == "cuda"
        plan = _plan(model, recipe, asked, layout(cuda), start, until, world_size(), cuda)
        shards, weights = _sources(data, model)
        windows = _windows(shards, weights, plan.trainer, start)
        objective = _objective(shards, within_documents, start)
        with torch.device("meta"):
            decoder = Decoder(_ended(model, shards, start))
        trainer = Trainer(decoder, windows, plan.schedule, plan.trainer, objective, plan.layout)
        if start is not None:
            (trainer.branch_from if start.decays else trainer.load)(start.checkpoint)
        first = trainer.step
        if rank() == 0:
            print(_announced(config, plan), flush=True)
            print(_not_an_end(shards, decoder.config), end="", file=sys.stderr)
        tokenizer = on_first(lambda: _tokenizer(shards))
        if tokenizer is not None:
            on_first(lambda: warn_of_ordinary_ends(read_tokenizer(tokenizer), decoder.config))
        if keep is None:  # what a run was begun with goes on
            keep = max(2, len(checkpoints(out).keys() - {plan.schedule.decay_start}))
        progress = sys.stderr.isatty()
        try:
            trainer.train(
                until, out, checkpoint_every, keep, tensorboard, progress, skip_non_finite, tokenizer
            )
        except (KeyboardInterrupt, SystemExit):
            if rank() == 0 and (saved := latest_checkpoint(out)):
                print(f"Stopped; {saved} is kept, and --resume goes on from there.", file=sys.stderr)
            raise
        if rank() == 0:
            stood = trainer.step == first
            made = "where it was to stop already" if stood else f"loss {trainer.losses[-1]:.4f}"
            print(f"{out}: step {trainer.step}, {made}.")


def _announced(config: str, plan: "TrainingPlan") -> str:
    """What begins now, in a line: whoever left out --batch-tokens sees what a step takes."""
    step = plan.trainer.batch_tokens
    return f"{config}: {plan.parameters:,} parameters; {_from(plan)}{plan.steps:,} steps of {step:,} tokens."


def _from(plan: "TrainingPlan") -> str:
    return f"from step {plan.made.start:,} on, " if plan.made.start else ""


def _published(config: str) -> TrainingRecipe | None:
    try:
        return load_recipe(config)
    except MissingBlockError:  # none was published
        return None


def _start(out: Path | None, resume: bool, resume_from: Path | None, decay_from: Path | None) -> Start | None:
    """The checkpoint a run starts from, if it does not start from nothing."""
    from ..training.sharded_checkpoint import latest_checkpoint, read_facts

    if resume and resume_from:
        raise ValueError("Give --resume for the newest checkpoint in --out, or --resume-from for another.")
    if resume_from and decay_from:
        raise ValueError(
            "Give --decay-from to begin a decay at that checkpoint, or --resume-from to go on with its run. "
            "A decay that was stopped goes on with --resume beside --decay-from."
        )
    checkpoint = resume_from or decay_from
    if resume:
        if out is None:
            raise ValueError("Give --out, the folder of the run that --resume goes on with.")
        checkpoint = latest_checkpoint(out)
        if checkpoint is None:
            raise ValueError(f"There is no checkpoint in {out} to resume from. Leave out --resume.")
    if checkpoint is None:
        return None
    return Start(checkpoint, read_facts(checkpoint), decays=checkpoint is decay_from)


def _plan(
    model: ModelConfig,
    recipe: TrainingRecipe | None,
    asked: dict[str, float | str],
    layout,
    start: Start | None,
    until: int | None,
    gpus: int,
    cuda: bool,
) -> "TrainingPlan":
    """The run in every number: what was asked for, the checkpoint it starts from, the recipe."""
    from ..training.plan import plan_training

    if start is None:
        settings = {"seed": 0, "precision": "bfloat16" if cuda else "float32"} | asked
        plan = plan_training(model, recipe, gpus=gpus, layout=layout, **settings)
    else:
        plan = _going_on(model, recipe, asked, layout, start, gpus)
    last = plan.schedule.total_steps
    if until is not None and until > last:
        raise ValueError(f"--until is {until}, and the schedule ends at step {last}.")
    return replace(plan, made=range(start.facts["step"] if start else 0, last if until is None else until))


def _going_on(
    model: ModelConfig,
    recipe: TrainingRecipe | None,
    asked: dict[str, float | str],
    layout,
    start: Start,
    gpus: int,
) -> "TrainingPlan":
    """The plan of the run that a checkpoint belongs to, or of a decay from there."""
    from ..training.plan import plan_training

    trainer, schedule = _saved(start, recipe, asked.get("decay_steps"), gpus)
    settings = {
        "steps": schedule.total_steps, "warmup_steps": schedule.warmup_steps,
        "decay_steps": schedule.decay_steps, "peak_lr": schedule.peak_lr,
        "batch_tokens": trainer.batch_tokens, "sequence_length": trainer.sequence_length,
        "seed": trainer.seed, "precision": trainer.precision, "parametrization": trainer.parametrization,
    }  # fmt: skip
    plan = plan_training(model, recipe, gpus=gpus, layout=layout, **settings | asked)
    return replace(  # what no flag names stays as it was: the form of the decay, the weight decay, ...
        plan,
        trainer=_with(
            trainer, plan.trainer, "batch_size", "sequence_length", "seed", "precision", "parametrization"
        ),
        schedule=_with(schedule, plan.schedule, "peak_lr", "warmup_steps", "stable_steps", "decay_steps"),
    )


def _saved(
    start: Start, recipe: TrainingRecipe | None, decay_steps: int | None, gpus: int
) -> tuple["TrainerConfig", "WSD"]:
    """Trainer config of the checkpoint a run starts from, and its schedule, or that of a decay from there."""
    from ..training.branch import decay_schedule, saved_schedule
    from ..training.plan import published_decay
    from ..training.settings import TrainerConfig
    from ..training.wsd import WSD

    facts = start.facts
    trainer = TrainerConfig(**facts["trainer config"])
    trainer = replace(trainer, betas=tuple(trainer.betas))  # JSON has lists
    if trainer.batch_size % gpus:
        raise ValueError(
            f"{start.checkpoint} was trained with {trainer.batch_size} windows a step, which {gpus} "
            "processes cannot share evenly. Go on with a number of processes that divides "
            f"{trainer.batch_size}."
        )
    if start.decays:
        if decay_steps is None:
            ninth = max(1, round(facts["step"] / 9))  # more, which is a tenth of all
            decay_steps = published_decay(recipe) or ninth
        return trainer, decay_schedule(start.checkpoint, decay_steps)
    if facts["schedule"]["kind"] != WSD.__name__:
        raise ValueError(
            f"{start.checkpoint} was trained with the schedule {facts['schedule']['kind']}, and this command "
            "knows WSD alone. Go on with it in Python, with Trainer.load."
        )
    return trainer, saved_schedule(facts)


def _with(settings, other, *names: str):
    """Settings with some of their numbers from others of their kind."""
    return replace(settings, **{name: getattr(other, name) for name in names})


def _sources(data: list[str], model: ModelConfig) -> tuple[dict[str, "Shards"], dict[str, float]]:
    """The shards that are read, and the weight of each, by their folders."""
    from ..data.shards import Shards

    shards, weights = {}, {}
    for folder, weight in map(_weighted, data):
        if folder in shards:
            raise ValueError(f"--data names {folder} twice.")
        shards[folder], weights[folder] = Shards(folder, model.vocab_size), weight
    return shards, weights


def _windows(
    shards: dict[str, "Shards"], weights: dict[str, float], trainer: "TrainerConfig", start: Start | None
) -> "Windows":
    """One folder's, or a mixture by weight; in a decay each goes on where the stable stage left it."""
    from ..data.mixtures import MixtureWindows, going_on
    from ..data.windows import TokenWindows

    windows = {
        folder: TokenWindows(each, trainer.sequence_length, trainer.seed) for folder, each in shards.items()
    }
    text, begin = {}, 0  # what was read in other proportions before, and how many windows of it
    if start is not None and start.decays:
        text, begin = start.facts["text"], start.facts["step"] * trainer.batch_size
    elif start is not None:
        text = start.facts["text"]
        begin = text["stages"][-1][0] if "stages" in text else 0
    if begin:
        return going_on(text, begin, windows, weights)
    return MixtureWindows(windows, [(0, weights)]) if len(windows) > 1 else windows.popitem()[1]


def _objective(shards: dict[str, "Shards"], within_documents: bool, start: Start | None) -> "Objective":
    """The next token, given what stands before it: in its document, if that is asked for or was so before."""
    from ..training import objective

    ends = {each.end for each in shards.values()}
    end = ends.pop() if len(ends) == 1 else None
    if end is not None:
        apart = objective.within_documents(end)
        began_so = start is not None and start.facts["objective"]["name"] == apart.name
        if within_documents and not began_so:
            _require_own_beginning(shards, end)
        return apart if within_documents or began_so else objective.next_token
    if within_documents:
        raise ValueError(
            f"--within-documents needs one token that ends each document, and {' and '.join(shards)} "
            f"{'note different ones' if ends else 'notes none'}. Write shards with --end."
        )
    return objective.next_token


def _require_own_beginning(shards: dict[str, "Shards"], end: int) -> None:
    """Refuse documents that begin with the token that ends them: it would be read as one by itself."""
    from ..pretrained.checkpoints import read_tokenizer

    for folder, each in shards.items():
        file = each.tokenizer_file()
        if file is not None and end in read_tokenizer(file).encode("").ids:
            raise ValueError(
                f"The tokenizer of {folder} puts the token that ends documents in front of each, too, so "
                "--within-documents would cut each text off from its beginning. Leave it out, or write "
                "shards with another --end."
            )


def _ended(model: ModelConfig, shards: dict[str, "Shards"], start: Start | None) -> ModelConfig:
    """The shape, with the tokens that end its texts: the checkpoint's, else the config's.

    Where all shards say how their texts end, and it is not as that, the model learns it: in a decay beside
    what it has learned, from nothing instead of what the config says.
    """
    learned: tuple[int, ...] = ()
    if start is not None:
        saved = start.facts.get("model config", {})  # of another module there are none, which `load` refuses
        learned = tuple(saved.get("eos_token_id", ()))
        model = replace(model, eos_token_id=learned)
        if not start.decays:
            return model
    ends = {each.end for each in shards.values()}
    if None in ends or ends <= set(model.eos_token_id):
        return model
    return replace(model, eos_token_id=tuple(sorted(ends.union(learned))))


def _not_an_end(shards: dict[str, "Shards"], model: ModelConfig) -> str:
    """A line that says so, where the model will not end its texts as some of the shards do."""
    ended = [folder for folder, each in shards.items() if each.end not in (None, *model.eos_token_id)]
    if not ended:
        return ""
    return (
        f"The model will not stop at the token that ends the texts of {' and '.join(ended)}. It would if all "
        "shards noted an end: write them with --end.\n"
    )


def _weighted(source: str) -> tuple[str, float]:
    """Folder and weight of ``folder:weight``; a folder may have a colon in its name, and is taken first."""
    if source and Path(source).is_dir():
        return source, 1.0
    folder, colon, given = source.rpartition(":")
    try:
        weight = float(given) if colon else 1.0
    except ValueError:
        colon, weight = "", 1.0
    if not (folder if colon else source):
        raise ValueError(f"--data {shlex.quote(source)} names no folder; expected shards to read.")
    if not 0 < weight < math.inf:
        raise ValueError(
            f"--data {source} has the weight {given}; expected a finite number above 0. Leave a folder out "
            "that is not to be read."
        )
    return folder if colon else source, weight


def _tokenizer(shards: dict[str, "Shards"]) -> Path | None:
    """The tokenizer of the shards, for `generate` and `export`: one that an index notes before others."""
    noted_first = sorted(shards.values(), key=lambda each: each.tokenizer is None)
    return next((file for each in noted_first if (file := each.tokenizer_file())), None)


def _as_dict(plan: "TrainingPlan", command: str) -> dict:
    """The plan for programs: bytes, tokens and steps as whole numbers."""
    return {
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "gpus": plan.gpus,
        "bytes_a_gpu": asdict(plan.memory) | {"total": plan.memory.total},
        "tokens": plan.tokens,
        "steps": plan.steps,
        "from_step": plan.made.start,
        "trainer": asdict(plan.trainer),
        "schedule": asdict(plan.schedule),
        "flops": plan.flops,
        "hours": plan.hours(),
        "not_published": list(plan.assumptions),
        "command": command,
    }


def _print_plan(config: str, plan: "TrainingPlan", command: str) -> None:
    memory, schedule, trainer = plan.memory, plan.schedule, plan.trainer
    at_once = plan.layout.rows_at_once(trainer.batch_size, plan.gpus)
    gb = 1e9
    rows = [
        ("model", f"{config}: {plan.parameters:,} parameters, a token uses {plan.active_parameters:,}"),
        ("GPUs", f"{plan.gpus}"),
        ("memory a GPU", f"{memory.total / gb:.2f} GB"),
        ("  weights", f"{memory.weights / gb:.2f} GB, its part, float32"),
        ("  gradients", f"{memory.gradients / gb:.2f} GB, its part, float32"),
        ("  moments", f"{memory.moments / gb:.2f} GB, its part, float32"),
        ("  gathered", f"{memory.gathered / gb:.2f} GB, blocks at work and tables, {trainer.precision}"),
        ("  activations", f"{memory.activations / gb:.2f} GB, "
                          f"{'computed again' if plan.layout.activation_checkpointing else 'kept'}"),
        ("  logits", f"{memory.logits / gb:.2f} GB"),
        ("tokens", f"{plan.tokens:,}"),
        ("steps", f"{_from(plan)}{plan.steps:,} of {trainer.batch_tokens:,} tokens: "
                  f"{trainer.batch_size:,} windows of {trainer.sequence_length:,}, {at_once} at once on a "
                  "GPU"),
        ("schedule", f"{schedule.warmup_steps:,} steps of warm-up to {schedule.peak_lr:g} "
                     f"({trainer.parametrization}), {schedule.stable_steps:,} stable, "
                     f"{schedule.decay_steps:,} of decay to {schedule(schedule.total_steps):.3g}"),
        ("arithmetic", f"{plan.flops:.3g} FLOPs; {plan.hours():,.1f} hours if each GPU does 40 % of 989e12 a "
                       "second"),
    ]  # fmt: skip
    for name, value in rows:
        print(f"{name:<15}{value}")
    if memory.total * 1.1 > _GPU_BYTES:
        print("This does not fit a GPU of 80 GB: take more of them, or a smaller --micro-batch.")
    for assumption in plan.assumptions:
        print(f"Not published: {assumption}")
    print("\n" + command)


def _torchrun(given: list[str], gpus: int, data: bool, out: bool) -> str:
    """The command of a dry run, without the dry run."""
    kept, drop = [], False
    for word in given:
        if not drop and word not in ("--dry-run", "--json") and not word.startswith("--gpus"):
            kept.append(shlex.quote(word))
        drop = word == "--gpus"  # and the number behind it
    kept += ([] if data else ["--data", "SHARDS"]) + ([] if out else ["--out", "RUN"])
    per_node = max(count for count in range(1, 9) if gpus % count == 0)  # every node starts as many
    nodes = gpus // per_node
    several = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29400 " if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {per_node} -m minicpm_lite.cli {' '.join(kept)}"
