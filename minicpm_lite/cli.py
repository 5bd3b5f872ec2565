"""The command line: ``minicpm-lite models | shards | verify | train``.

    minicpm-lite models
    minicpm-lite shards novels.txt web.jsonl --tokenizer tokenizer.json --out shards
    minicpm-lite verify shards
    minicpm-lite train --config minicpm-1.2b --dry-run --gpus 64
    torchrun --nproc-per-node 8 -m minicpm_lite.cli train --config minicpm-1.2b --data shards --out run

What goes wrong is said in one sentence on the error output, once, and the exit code is 2. torchrun adds a
report of its own; the sentence stands in it, too.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path

from .config import ModelConfig, TrainingRecipe, list_configs, load_config, load_recipe

__all__ = ["main"]

_EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)
_GPU_BYTES = 80e9

_TRAIN_HELP = """\
Train a model of the family, on one process or on many.

What is not given is taken from the model's published recipe, and what was not published from the defaults;
--dry-run says which is which. It needs no data and no GPU:

  minicpm-lite train --config minicpm-1.2b --dry-run --gpus 64

One process trains as it is. For several, torchrun starts this command once for each GPU:

  torchrun --nproc-per-node 8 -m minicpm_lite.cli train --config minicpm-1.2b --data shards --out run

On several machines, give each the same command with torchrun's --nnodes and --rdzv-endpoint.

A run that was stopped, or killed, goes on from its newest checkpoint, on any number of processes that can
share a step's windows evenly:

  minicpm-lite train --config minicpm-1.2b --data shards --out run --resume

From any checkpoint of the stable stage, the rate can be decayed in a run of its own, with other data mixed
in; each folder is read on where the stable stage left it, and the stable run may go on meanwhile:

  minicpm-lite train --config minicpm-1.2b --data shards:0.7 --data instructions:0.3 --out decayed \\
      --decay-from run/step-00100000 --decay 16000

--out then holds checkpoints (step-00001000, ...) and metrics.jsonl, a line for each step.
"""

_SHARDS_HELP = """\
Cut texts into tokens and write them as shards, the data of `minicpm-lite train`.

  minicpm-lite shards novels.txt web.jsonl --tokenizer tokenizer.json --out shards

A .txt file is one document. A .jsonl file has one document in each line, under "text" unless --field names
another. The tokenizer is a tokenizer.json as published with the models; texts are read whole, whatever it
says about cutting or padding them, and a special token that a text spells is text.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code.

    >>> main(["train", "--config", "no-such-model", "--dry-run"])
    2
    """
    first = "WORLD_SIZE" not in os.environ or os.environ.get("RANK") == "0"  # as `processes` sees it
    with nullcontext() if first else redirect_stderr(None):
        args = _parser().parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    try:
        args.command(args)
    except _EXPECTED as error:
        sentence = _sentence(error)
        if first:
            print(f"minicpm-lite: {sentence}", file=sys.stderr, flush=True)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # for torchrun's report
            report = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
            content = {"message": {"message": sentence, "extraInfo": report}}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}."
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "minicpm-lite", description="Models of the MiniCPM family: list, prepare data, train."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    models = commands.add_parser("models", help="list the models and their sizes")
    models.set_defaults(command=_models)

    shards = commands.add_parser(
        "shards",
        help="cut texts into tokens, the data of train",
        description=_SHARDS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shards.set_defaults(command=_shards)
    shards.add_argument("texts", nargs="+", metavar="FILE", help=".txt or .jsonl files")
    shards.add_argument("--tokenizer", required=True, metavar="FILE", help="a tokenizer.json")
    shards.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    shards.add_argument("--field", default="text", help="of a .jsonl line (default: text)")
    shards.add_argument("--end", metavar="TOKEN", help="put this token behind each document, such as </s>")
    shards.add_argument("--vocab-size", type=int, metavar="N",
                        help="ids of the model, if it has more than the tokenizer")  # fmt: skip
    shards.add_argument("--shard-tokens", type=int, default=1 << 28, metavar="N",
                        help="tokens in a file (default: 268,435,456)")  # fmt: skip

    verify = commands.add_parser(
        "verify",
        help="read shards whole and compare their checksums",
        description="Read shards whole and compare their checksums, after a copy for instance. "
        "Training checks them, too, but only what it reads.",
    )
    verify.set_defaults(command=_verify)
    verify.add_argument("folders", nargs="+", metavar="DIR", help="shards")

    train = commands.add_parser(
        "train",
        help="train a model, on one process or many; --dry-run says what it takes",
        description=_TRAIN_HELP,
        allow_abbrev=False,  # the command of a dry run leaves out flags by their names
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.set_defaults(command=_train)
    train.add_argument("--config", required=True, metavar="NAME|FILE",
                       help="a name of `minicpm-lite models`, or a YAML file of your own")  # fmt: skip
    run = train.add_argument_group("data and results")
    run.add_argument("--data", action="append", default=[], metavar="DIR[:WEIGHT]",
                     help="shards to read; given several times, they are mixed by weight")  # fmt: skip
    run.add_argument("--out", metavar="DIR", help="folder of the run")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    run.add_argument("--decay-from", metavar="CHECKPOINT",
                     help="start at a checkpoint of a stable stage and decay from there; stands beside "
                          "--resume, too, when the decay was stopped")  # fmt: skip
    run.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS", help="default: 1000")
    run.add_argument("--keep", type=int, default=2, metavar="N",
                     help="newest checkpoints that stay (default: 2), beside the stable one")  # fmt: skip
    run.add_argument("--tensorboard", action="store_true", help="write TensorBoard events, too")
    run.add_argument("--until", type=int, metavar="STEP", help="stop there; the schedule stays as it is")
    steps = train.add_argument_group("schedule: warm-up, stable, decay")
    steps.add_argument("--steps", type=int, help="all of them (default: as many as the recipe's tokens take)")
    steps.add_argument("--warmup", type=int, metavar="STEPS")
    steps.add_argument("--decay", type=int, metavar="STEPS", help="down to a tenth of the peak")
    steps.add_argument("--peak-lr", type=float, metavar="RATE", help="of the stable stage")
    batch = train.add_argument_group("a step")
    batch.add_argument("--batch-tokens", type=float, metavar="N", help="over all processes; 4e6 is 4 million")
    batch.add_argument("--sequence-length", type=int, metavar="TOKENS")
    batch.add_argument("--micro-batch", type=int, default=1, metavar="WINDOWS",
                       help="at once on a GPU (default: 1); raise it until its memory is full")  # fmt: skip
    batch.add_argument("--activation-checkpointing", action=argparse.BooleanOptionalAction, default=True,
                       help="compute activations again, not keep them (default: on)")  # fmt: skip
    batch.add_argument("--precision", choices=["bfloat16", "float32"],
                       help="of the arithmetic (default: bfloat16; on a CPU float32)")  # fmt: skip
    batch.add_argument("--parametrization", choices=["mup", "standard"],
                       help="default: mup, where the config has a dim_model_base")  # fmt: skip
    batch.add_argument("--seed", type=int, help="of weights and data (default: 0)")
    dry = train.add_argument_group("without training")
    dry.add_argument("--dry-run", action="store_true", help="print what the run takes, and the command")
    dry.add_argument("--gpus", type=int, default=8, metavar="N", help="of the dry run (default: 8)")
    return parser


def _models(args: argparse.Namespace) -> None:
    import torch

    from .language.decoder import Decoder
    from .language.upcycling import num_active_parameters

    heads = ("parameters", "a token uses", "layers", "width", "ids", "context")
    widths = (16, 16, 8, 7, 9, 9)
    print(f"{'model':<18}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
    for name in list_configs():
        config = load_config(name)
        with torch.device("meta"):
            model = Decoder(config)
        numbers = (model.num_parameters(True), num_active_parameters(model, True), config.num_hidden_layers,
                   config.hidden_size, config.vocab_size, config.max_position_embeddings)  # fmt: skip
        print(f"{name:<18}" + "".join(f"{n:>{width},}" for n, width in zip(numbers, widths, strict=True)))


def _shards(args: argparse.Namespace) -> None:
    from tokenizers import Tokenizer

    from .data.shards import write_shards
    from .language.tokenizer import fast_tokenizer

    for text in args.texts:
        if Path(text).suffix not in (".txt", ".jsonl"):
            raise ValueError(f"{text} is neither .txt nor .jsonl, so its documents cannot be told apart.")
        if not Path(text).is_file():
            raise FileNotFoundError(f"There is no file {text}.")
    if not Path(args.tokenizer).is_file():
        raise FileNotFoundError(f"There is no tokenizer at {args.tokenizer}.")
    try:
        tokenizer = fast_tokenizer(Tokenizer.from_file(args.tokenizer))
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{args.tokenizer} is not a tokenizer.json: {error}") from None
    tokenizer.encode_special_tokens = True  # as text
    end = []
    if args.end is not None:
        if tokenizer.token_to_id(args.end) is None:
            raise ValueError(f"The tokenizer has no token {args.end!r} to end a document with.")
        end = [tokenizer.token_to_id(args.end)]
    documents = (text for path in args.texts for text in _documents(Path(path), args.field))
    ids = (tokenizer.encode(text, add_special_tokens=False).ids + end for text in documents)
    vocab_size = tokenizer.get_vocab_size() if args.vocab_size is None else args.vocab_size
    shards = write_shards(args.out, ids, vocab_size, tokenizer, args.shard_tokens)
    print(f"{args.out}: {len(shards):,} tokens, vocabulary of {shards.vocab_size:,}.")


def _verify(args: argparse.Namespace) -> None:
    from .data.shards import Shards

    for folder in args.folders:
        shards = Shards(folder)
        shards.verify()
        print(f"{folder}: {len(shards):,} tokens, all as they were written.")


def _documents(path: Path, field: str) -> Iterator[str]:
    """The texts of a file; its byte order mark, and blank lines between the others, are none."""
    before = 0  # bytes
    with path.open("rb") as file:
        for number, line in enumerate([file.read()] if path.suffix == ".txt" else file, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8 text: byte {before + error.start} cannot be read."
                ) from None
            before += len(line)
            text = text.removeprefix("\ufeff") if number == 1 else text
            if path.suffix == ".txt":
                yield text.replace("\r\n", "\n").replace("\r", "\n")
            elif text.strip():
                yield _text_in(text, field, f"Line {number} of {path}")


def _text_in(line: str, field: str, place: str) -> str:
    try:
        text = json.loads(line)[field]
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} holds half a character, U+{ord(text[error.start]):04X}, which no UTF-8 text can."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{place} is no JSON object with a text under {field!r}.") from None
    return text


def _train(args: argparse.Namespace) -> None:
    model, recipe = load_config(args.config), _recipe(args.config)
    if args.decay_from and any(given is not None for given in (args.steps, args.warmup, args.peak_lr)):
        raise ValueError(
            "--decay-from goes on with the checkpoint's schedule; of the steps, give --decay only."
        )
    if args.dry_run:
        _print_plan(args, _plan(args, model, recipe, args.gpus, cuda=True, start=_start(args)))
        return
    if not args.data or not args.out:
        raise ValueError("Give --data and --out, or --dry-run to see what the run takes.")

    import torch

    from .language.decoder import Decoder
    from .training.processes import processes, rank, world_size
    from .training.trainer import Trainer

    with processes() as device:
        start = _start(args)
        plan = _plan(args, model, recipe, world_size(), device.type == "cuda", start)
        windows = _windows(args, model, plan.trainer, start)
        with torch.device("meta"):
            decoder = Decoder(model)
        trainer = Trainer(decoder, windows, plan.schedule, plan.trainer, layout=plan.layout)
        if args.resume:
            trainer.load(start)
        elif args.decay_from:
            trainer.branch_from(args.decay_from)
        first = trainer.step
        trainer.train(
            args.until, args.out, args.checkpoint_every, args.keep, args.tensorboard, sys.stderr.isatty()
        )
        if rank() == 0:
            stood = trainer.step == first
            made = "where it was to stop already" if stood else f"loss {trainer.losses[-1]:.4f}"
            print(f"{args.out}: step {trainer.step}, {made}.")


def _start(args: argparse.Namespace) -> str | Path | None:
    """The checkpoint a run starts from, if it does not start from nothing."""
    from .training.sharded_checkpoint import latest_checkpoint

    if not args.resume:
        return args.decay_from
    newest = latest_checkpoint(args.out) if args.out else None
    if newest is None:
        raise ValueError(f"There is no checkpoint in {args.out} to resume from. Leave out --resume.")
    return newest


def _recipe(name: str) -> TrainingRecipe | None:
    try:
        return load_recipe(name)
    except ValueError as error:
        if "has no 'training' block" in str(error):  # none was published
            return None
        raise


def _plan(args, model: ModelConfig, recipe: TrainingRecipe | None, gpus: int, cuda: bool, start=None):
    """The run in every number: from the flags, the checkpoint it starts from, the recipe, in this order."""
    from .training.plan import plan_training
    from .training.settings import Layout

    flags = {
        "steps": args.steps, "warmup_steps": args.warmup, "decay_steps": args.decay, "peak_lr": args.peak_lr,
        "batch_tokens": args.batch_tokens, "sequence_length": args.sequence_length, "seed": args.seed,
        "precision": args.precision, "parametrization": args.parametrization,
    }  # fmt: skip
    flags = {name: value for name, value in flags.items() if value is not None}
    layout = Layout(args.micro_batch, args.activation_checkpointing, sharded=True)
    if start is None:
        settings = {"seed": 0, "precision": "bfloat16" if cuda else "float32"} | flags
        return plan_training(model, recipe, gpus=gpus, layout=layout, **settings)
    trainer, schedule = _saved(args, recipe, gpus, start)
    settings = {
        "steps": schedule.total_steps, "warmup_steps": schedule.warmup_steps,
        "decay_steps": schedule.decay_steps, "peak_lr": schedule.peak_lr,
        "batch_tokens": trainer.batch_tokens, "sequence_length": trainer.sequence_length,
        "seed": trainer.seed, "precision": trainer.precision, "parametrization": trainer.parametrization,
    }  # fmt: skip
    plan = plan_training(model, recipe, gpus=gpus, layout=layout, **settings | flags)
    return replace(  # what no flag names stays as it was: the form of the decay, the weight decay, ...
        plan,
        trainer=_with(
            trainer, plan.trainer, "batch_size", "sequence_length", "seed", "precision", "parametrization"
        ),  # fmt: skip
        schedule=_with(schedule, plan.schedule, "peak_lr", "warmup_steps", "stable_steps", "decay_steps"),
    )


def _saved(args: argparse.Namespace, recipe: TrainingRecipe | None, gpus: int, start):
    """Trainer config of the checkpoint a run starts from, and its schedule, or that of a decay from there."""
    from .training.branch import decay_schedule, saved_schedule
    from .training.plan import published_decay
    from .training.settings import TrainerConfig
    from .training.sharded_checkpoint import read_facts
    from .training.wsd import WSD

    facts = read_facts(start)
    trainer = TrainerConfig(**facts["trainer config"])
    trainer = replace(trainer, betas=tuple(trainer.betas))  # JSON has lists
    if trainer.batch_size % gpus:
        raise ValueError(
            f"{start} was trained with {trainer.batch_size} windows a step, which {gpus} processes "
            f"cannot share evenly. Go on with a number of processes that divides {trainer.batch_size}."
        )
    if args.decay_from and not args.resume:
        ninth = max(1, round(facts["step"] / 9))  # more, which is a tenth of all
        return trainer, decay_schedule(start, args.decay or published_decay(recipe) or ninth)
    if facts["schedule"]["kind"] != WSD.__name__:
        raise ValueError(
            f"{start} was trained with the schedule {facts['schedule']['kind']}, and this command knows WSD "
            "alone. Go on with it in Python, with Trainer.load."
        )
    return trainer, saved_schedule(facts)


def _with(settings, other, *names: str):
    """Settings with some of their numbers from others of their kind."""
    return replace(settings, **{name: getattr(other, name) for name in names})


def _windows(args: argparse.Namespace, model: ModelConfig, trainer, start):
    """Shards, or a mixture of several by weight; in a decay each goes on where the stable stage left it."""
    from .data.mixtures import MixtureWindows, going_on
    from .data.shards import Shards
    from .data.windows import TokenWindows
    from .training.sharded_checkpoint import read_facts

    windows, weights = {}, {}
    for folder, weight in map(_weighted, args.data):
        if folder in windows:
            raise ValueError(f"--data names {folder} twice.")
        shards = Shards(folder, model.vocab_size)
        windows[folder] = TokenWindows(shards, trainer.sequence_length, trainer.seed)
        weights[folder] = weight
    made_by = {folder: each.tokens.tokenizer for folder, each in windows.items()}
    text, begin = {}, 0  # what was read in other proportions before, and how many windows of it
    if args.resume:
        text = read_facts(start)["text"]
        begin = text["stages"][-1][0] if "stages" in text else 0
    elif args.decay_from:
        facts = read_facts(start)
        text, begin = facts["text"], facts["step"] * trainer.batch_size
        for source in text.get("sources", [text]):
            made_by["what the stable stage read"] = source.get("tokenizer")
    known = {name: tokenizer for name, tokenizer in made_by.items() if tokenizer is not None}
    if len(set(known.values())) > 1:
        raise ValueError(f"{' and '.join(known)} were cut with different tokenizers; one model knows one.")
    if begin:
        return going_on(text, begin, windows, weights)
    return MixtureWindows(windows, [(0, weights)]) if len(windows) > 1 else windows.popitem()[1]


def _weighted(source: str) -> tuple[str, float]:
    """Folder and weight of ``folder:weight``; a folder may have a colon in its name."""
    folder, colon, given = source.rpartition(":")
    try:
        weight = float(given) if colon else 1.0
    except ValueError:
        colon, weight = "", 1.0
    if not 0 < weight < math.inf:
        raise ValueError(
            f"--data {source} has the weight {given}; expected a finite number above 0. Leave a folder out "
            "that is not to be read."
        )
    return folder if colon else source, weight


def _print_plan(args: argparse.Namespace, plan) -> None:
    memory, schedule, trainer = plan.memory, plan.schedule, plan.trainer
    gb = 1e9
    rows = [
        ("model", f"{args.config}: {plan.parameters:,} parameters, a token uses {plan.active_parameters:,}"),
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
        ("steps", f"{plan.steps:,} of {trainer.batch_tokens:,} tokens: {trainer.batch_size:,} windows of "
                  f"{trainer.sequence_length:,}, {plan.layout.micro_batch} at once on a GPU"),
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
    print("\n" + _torchrun(args.given, plan.gpus, bool(args.data), bool(args.out)))


def _torchrun(given: list[str], gpus: int, data: bool, out: bool) -> str:
    """The command of a dry run, without the dry run."""
    kept, drop = [], False
    for word in given:
        if not drop and word != "--dry-run" and not word.startswith("--gpus"):
            kept.append(shlex.quote(word))
        drop = word == "--gpus"  # and the number behind it
    kept += ([] if data else ["--data", "SHARDS"]) + ([] if out else ["--out", "RUN"])
    per_node = max(count for count in range(1, 9) if gpus % count == 0)  # every node starts as many
    nodes = gpus // per_node
    several = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29400 " if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {per_node} -m minicpm_lite.cli {' '.join(kept)}"


if __name__ == "__main__":
    sys.exit(main())
