"""The command line: ``minicpm-lite models | tokenizer | shards | verify | train | generate | chat | export``.

From a text to a model of one's own that others can open:

    minicpm-lite tokenizer novel.txt --out tokenizer.json
    minicpm-lite shards novel.txt --tokenizer tokenizer.json --out shards
    minicpm-lite train --config lite-1m --data shards --out run
    minicpm-lite generate run "It was"
    minicpm-lite export run --out my-model

A file a command. Each loads what it needs when it is called, so that a listing does not wait for a trainer.

What goes wrong is said in one sentence on the error output, under torchrun once a machine; it stands in
torchrun's own report, too. Exit codes: 0 done, 2 refused or failed, 130 interrupted, 143 ended by SIGTERM,
129 by a terminal that was closed.
"""

import json
import os
import sys
import time
from pathlib import Path

import typer

from . import chat, export, generate, models, shards, tokenizer, train, verify

__all__ = ["main"]

UsageError = typer.BadParameter.__base__  # of click, which typer brings under a name of its own
_EXPECTED = (ValueError, OSError, FloatingPointError, ImportError, UsageError)

app = typer.Typer(
    help="Models of the MiniCPM family: list, prepare data, train, use, export.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (models.models, tokenizer.tokenizer, shards.shards, verify.verify, train.train,
                generate.generate, chat.chat, export.export):  # fmt: skip
    app.command()(command)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code.

    >>> main(["train", "--config", "no-such-model", "--dry-run"])
    2
    """
    _open_closed_streams()
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # torchrun starts the same command several times
    try:
        argv = sys.argv[1:] if argv is None else argv
        return app(argv, prog_name="minicpm-lite", standalone_mode=False, obj=argv) or 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if not isinstance(error, _EXPECTED) and not _out_of_memory(error):
            raise  # a fault of ours, which its traceback helps to find
        sentence = _sentence(error)
        if first:
            print(f"minicpm-lite: {sentence}", file=sys.stderr, flush=True)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # for torchrun's report
            report = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
            content = {"message": {"message": sentence, "extraInfo": report}}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content))
    return 2


def _open_closed_streams() -> None:
    """Let what a daemon or a scheduler closed be empty instead; else the next file would get its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, for as long as the program runs


def _sentence(error: Exception) -> str:
    if _out_of_memory(error):
        return (
            "There is not enough memory. In training, a smaller --micro-batch takes less, and --dry-run says "
            "how much a run takes."
        )
    if isinstance(error, UsageError):
        said = error.format_message()
        said = said if said.endswith((".", "?")) else f"{said}."
        return f"{said} See: {error.ctx.command_path} --help." if error.ctx else said
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}."
    return str(error)


def _out_of_memory(error: Exception) -> bool:
    """On a GPU torch has a class for it; on a CPU only its allocator's name in a RuntimeError says so."""
    torch = sys.modules.get("torch")  # without it, it cannot have raised
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or on_gpu or on_cpu
