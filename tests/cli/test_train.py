"""Training from the command line: dry runs, whole runs, decays, kill -9, and errors."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from shell import SHAPE, TEXT, damage, says
from tokenizers.processors import TemplateProcessing

from minicpm_lite import list_configs, load_config
from minicpm_lite.cli import main
from minicpm_lite.data.documents import encoded
from minicpm_lite.data.shards import Shards, write_shards
from minicpm_lite.data.windows import TokenWindows
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.sharded_checkpoint import checkpoints, load_weights, read_facts
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD, Cosine

STEP = ["--batch-tokens", "64", "--sequence-length", "16", "--micro-batch", "4"]
STEPS = [*STEP, "--steps", "12", "--warmup", "3", "--decay", "2", "--checkpoint-every", "10", "--keep", "99"]
LONG = [*STEP, "--steps", "60", "--warmup", "5", "--decay", "10", "--checkpoint-every", "10", "--keep", "99"]


def train(*words) -> list[str]:
    return ["train", "--config", "tiny.yaml", *words]


def cut(folder: str, learned_from: str, text: str = TEXT) -> None:
    """Shards of a text, with the tokenizer that was learned from another, or the same."""
    tokenizer = train_tokenizer(learned_from, 300)
    write_shards(folder, [tokenizer.encode(text).ids], 300, tokenizer)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder) -> list[float]:
    return [line["loss"] for line in lines(folder)]


def order(folder) -> list[tuple[int, int]]:
    return [(line["step"], line["data"]) for line in lines(folder)]


# Dry runs.


@pytest.mark.parametrize("name", list_configs())
def test_every_config_has_a_dry_run(capsys, name):
    assert main(["train", "--config", name, "--dry-run", "--gpus", "64"]) == 0
    said = capsys.readouterr().out
    for word in ("parameters", "memory a GPU", "tokens", "steps", "schedule", "warm-up", "FLOPs"):
        assert word in said
    command = said.splitlines()[-1]
    assert command.startswith("torchrun --nnodes 8 ") and f"--config {name}" in command


def test_a_dry_run_says_what_was_not_published(capsys):
    main(["train", "--config", "minicpm-2.4b", "--dry-run"])
    said = capsys.readouterr().out
    assert "2,724,880,896" in said and "0.01 (mup)" in said
    assert [line.split()[2] for line in said.splitlines() if line.startswith("Not published")] == [
        "sequence_length", "warmup_steps"
    ]  # fmt: skip


def test_the_command_of_a_dry_run_is_the_one_that_was_given(capsys):
    main(["train", "--config", "lite-1m", "--gpus", "4", "--dry-run", "--steps", "70", "--data", "my shards"])
    command = capsys.readouterr().out.splitlines()[-1]
    assert command == ("torchrun --nproc-per-node 4 -m minicpm_lite.cli train --config lite-1m --steps 70 "
                       "--data 'my shards' --out RUN")  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "nodes", "each"), [(1, 1, 1), (8, 1, 8), (12, 2, 6), (64, 8, 8), (11, 11, 1)]
)
def test_the_command_of_a_dry_run_starts_as_many_processes(capsys, gpus, nodes, each):
    main(["train", "--config", "lite-1m", "--dry-run", "--gpus", str(gpus)])
    command = capsys.readouterr().out.splitlines()[-1]
    assert f"--nproc-per-node {each} " in command and (f"--nnodes {nodes} " in command) == (nodes > 1)


def test_a_recipe_that_cannot_be_is_not_taken_for_none(at_home, capsys):
    content = {"model": SHAPE, "training": {"tokens": -1}}
    (at_home / "wrong.yaml").write_text(yaml.safe_dump(content))
    says(capsys, ["train", "--config", "wrong.yaml", "--dry-run"], "tokens is -1; expected a number")


def test_a_run_that_does_not_fit(capsys):
    main(["train", "--config", "minicpm4-8b", "--dry-run", "--gpus", "1"])
    assert "does not fit a GPU of 80 GB" in capsys.readouterr().out


# Training, in this process.


def test_a_run_and_its_decay(at_home, capsys):
    assert main(train("--data", "one", "--out", "run", *STEPS)) == 0
    assert "run: step 12, loss" in capsys.readouterr().out
    assert [line["step"] for line in lines(at_home / "run")] == list(range(1, 13))
    decayed = train("--data", "one:0.75", "--data", "two:0.25", "--out", "decayed", "--decay", "6")
    assert main([*decayed, "--micro-batch", "4", "--decay-from", "run/step-00000010"]) == 0
    found = lines(at_home / "decayed")
    assert [line["step"] for line in found] == list(range(11, 17))
    assert found[0]["lr"] < 0.01 and found[-1]["lr"] == pytest.approx(1e-3)
    facts = json.loads((at_home / "decayed" / "step-00000016" / "checkpoint.json").read_text())
    assert facts["trainer config"]["batch_size"] == 4, "taken from the checkpoint, not given again"
    read = json.loads((at_home / "run/step-00000010/checkpoint.json").read_text())["text"]
    text = facts["text"]
    one = text["sources"].index(read)
    assert [(start, shares[one], shares[1 - one]) for start, shares in text["stages"]] == [
        (0, 1, 0), (40, 3, 1)
    ], "10 steps of 4 windows were read"  # fmt: skip
    says(
        capsys,
        [*decayed[:-2], "--decay", "6", "--out", "x", "--decay-from", "run/step-00000012"],
        "in or after the decay",
    )


@pytest.mark.slow  # five runs; a decay and going on have quick tests of their own
def test_a_decay_is_stopped_and_goes_on(at_home, capsys):
    """The stable stage read a mixture, the decay reads another one with a folder more."""
    one_two = ["--data", "one:0.5", "--data", "two:0.5"]
    assert main(train(*one_two, "--out", "run", *STEPS, "--until", "8")) == 0
    write_shards("three", [np.arange(300)], 300)
    argv = train(*one_two, "--data", "three:1", "--decay-from", "run/step-00000008", "--decay", "6")
    assert main([*argv, "--out", "whole"]) == 0
    assert main([*argv, "--out", "stopped", "--until", "11"]) == 0
    assert main([*argv, "--out", "stopped", "--resume"]) == 0
    assert order(at_home / "stopped") == order(at_home / "whole")
    assert curve(at_home / "stopped") == curve(at_home / "whole")
    text = json.loads((at_home / "whole" / "step-00000014" / "checkpoint.json").read_text())["text"]
    assert [(start, sorted(shares)) for start, shares in text["stages"]] == [(0, [0, 1, 1]), (32, [1, 1, 2])]
    shutil.rmtree(at_home / "run")
    assert main([*argv, "--out", "stopped", "--resume"]) == 0, "it needs its own checkpoint alone"
    says(capsys, [*train(*one_two), "--out", "stopped", "--resume"], "belongs to another text")


def run_of(at_home, name, *words) -> tuple[list, list, dict]:
    """Order of the data, losses and identity of what a command reads."""
    capture = at_home / name
    assert main([*words, "--out", name]) == 0
    newest = max(capture.glob("step-*"))
    return order(capture), curve(capture), json.loads((newest / "checkpoint.json").read_text())["text"]


def data(*folders) -> list[str]:
    return [word for folder in folders for word in ("--data", folder)]


@pytest.mark.slow  # eleven runs; tests/data/test_mixtures.py looks at the same without a model
def test_neither_order_nor_spelling_nor_place_of_the_folders_decides(at_home):
    """A mixture, its resume and its decay read the same, whatever the options look like."""
    short = [*STEP, "--steps", "6", "--warmup", "2", "--decay", "0"]
    shutil.copytree(at_home / "two", at_home / "moved" / "elsewhere")
    spelt = [
        data("one", "two:2"),
        data("two:1", "./one/:0.5"),
        data("moved/elsewhere:2.0", str(at_home / "one")),
    ]
    runs = [run_of(at_home, f"run{i}", *train(*folders, *short)) for i, folders in enumerate(spelt)]
    assert all(run == runs[0] for run in runs)
    for number, folders in enumerate(spelt):  # resumed with the next one's words
        first = train(*folders, *short, "--out", f"stopped{number}", "--until", "3")
        assert main(first) == 0
        again = train(*spelt[number - 1], *short, "--resume")
        assert run_of(at_home, f"stopped{number}", *again) == runs[0]
    weights = [("one:3", "two"), ("two/", "./one:3"), ("moved/elsewhere:0.25", "one:0.75")]
    decays = [
        run_of(
            at_home,
            f"decay{i}",
            *train(*data(*each), "--decay", "4", "--decay-from", f"run{i}/step-00000006"),
        )
        for i, each in enumerate(weights)
    ]
    assert all(decay == decays[0] for decay in decays)


def test_a_decay_reads_each_folder_on_where_the_stable_stage_left_it(at_home, monkeypatch):
    """Under any spelling; a folder that is not read on counts as read, a new one begins at its start."""
    read = []
    monkeypatch.setattr(TokenWindows, "__getitem__", noted(read, TokenWindows.__getitem__))
    write_shards("three", [np.arange(300)], 300)
    stable = [*STEP, "--steps", "6", "--warmup", "2", "--decay", "0"]
    assert main(train(*data("one:3", "two:1"), *stable, "--out", "run")) == 0
    assert sorted(read) == [*(("one", i) for i in range(18)), *(("two", i) for i in range(6))]
    for name, folders, expected in (
        ("a", ["./one"], [("one", i) for i in range(18, 34)]),
        ("b", ["three", "two/:3"], [*(("three", i) for i in range(4)), *(("two", i) for i in range(6, 18))]),
        ("c", ["three"], [("three", i) for i in range(16)]),
    ):
        read.clear()
        decay = train(*data(*folders), "--decay", "4", "--decay-from", "run/step-00000006", "--out", name)
        assert main(decay) == 0
        assert sorted(read) == expected


def noted(read: list, get):
    """`TokenWindows.__getitem__` that notes the folder and the index."""

    def getitem(self, index):
        read.append((self.tokens.folder.name, index))
        return get(self, index)

    return getitem


def test_other_data_are_refused_on_resume(at_home, capsys):
    run = train(*data("one", "two"), *STEPS, "--out", "run")
    assert main([*run, "--until", "2"]) == 0
    write_shards("three", [np.arange(2000) % 300], 300)
    for folders in (data("one", "three"), data("one"), data("one:2", "two"), data("one", "two", "three")):
        says(capsys, train(*folders, *STEPS, "--out", "run", "--resume"), "belongs to another text")


def test_going_on_with_processes_that_cannot_share_a_step(at_home, capsys):
    """The plan is what every process makes first; a dry run asks for three of them."""
    assert main(train("--data", "one", "--out", "run", *STEPS, "--until", "5")) == 0
    dry = train("--out", "run", "--micro-batch", "4", "--resume", "--dry-run", "--gpus", "3")
    says(capsys, dry, "4 windows a step, which 3 processes cannot share evenly")


def test_stopping_and_going_on(at_home, capsys):
    start = train("--data", "one", "--out", "run", *STEPS)
    assert main([*start, "--until", "5"]) == 0
    assert main([*train("--data", "one", "--out", "run", "--micro-batch", "4"), "--resume"]) == 0, (
        "no flag is needed twice"
    )
    capsys.readouterr()
    assert main([*train("--data", "one", "--out", "run", "--micro-batch", "4"), "--resume"]) == 0
    assert capsys.readouterr().out.endswith("\nrun: step 12, where it was to stop already.\n")
    assert main(train("--data", "one", "--out", "whole", *STEPS)) == 0
    assert curve(at_home / "run") == curve(at_home / "whole")
    assert order(at_home / "run") == order(at_home / "whole")


def begun_in_python(schedule, **settings) -> None:
    """Five steps of a run whose settings no flag names."""
    config = TrainerConfig(batch_size=4, sequence_length=16, parametrization="mup", **settings)
    windows = TokenWindows(Shards("one", 300), 16, 0)
    trainer = Trainer(Decoder(load_config("tiny.yaml")), windows, schedule, config)
    trainer.train(5, "run", progress=False)


def test_what_no_flag_names_stays_as_it_was(at_home):
    """The form of the decay, weight decay, betas and clipping are the checkpoint's."""
    schedule = WSD(0.01, 3, 7, 2, form="linear", final_ratio=0.0)
    begun_in_python(schedule, weight_decay=0.02, betas=(0.8, 0.99), max_grad_norm=0.5)
    assert main(train("--data", "one", "--out", "run", "--resume")) == 0
    assert [line["lr"] for line in lines(at_home / "run")] == [schedule(step) for step in range(1, 13)]
    facts = json.loads((at_home / "run" / "step-00000012" / "checkpoint.json").read_text())
    kept = {"weight_decay": 0.02, "betas": [0.8, 0.99], "max_grad_norm": 0.5}
    assert kept.items() <= facts["trainer config"].items()


def test_a_flag_changes_what_it_names_alone(at_home):
    begun_in_python(WSD(0.01, 3, 7, 2, half_life=1.5))
    assert main(train("--data", "one", "--out", "run", "--resume", "--steps", "10", "--decay", "3")) == 0
    longer = WSD(0.01, 3, 4, 3, half_life=1.5)
    assert [line["lr"] for line in lines(at_home / "run")] == [longer(step) for step in range(1, 11)]


def test_another_schedule_is_not_taken_for_wsd(at_home, capsys):
    begun_in_python(Cosine(0.01, 3, 12))
    argv = train("--data", "one", "--out", "run", "--resume")
    says(capsys, argv, "was trained with the schedule Cosine, and this command knows WSD alone")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "one"], "Give --data and --out"),
        (["--data", "none", "--out", "x"], "There is no shards.json in none"),
        *(
            (
                ["--data", f"one:{weight}", *more, "--out", "x"],
                f"--data one:{weight} has the weight {weight};",
            )
            for weight in ("0", "-1", "nan", "inf", "-inf", "0.0")
            for more in ([], ["--data", "two"])
        ),
        (["--data", "one", "--data", "one:2", "--out", "x"], "--data names one twice"),
        *(
            (["--data", "one", "--data", again, "--out", "x"], f"'one' and '{again}' hold the same windows")
            for again in ("./one", "one/", "again")
        ),
        (["--data", "one", "--out", "x", "--resume"], "There is no checkpoint in x to resume from"),
        (["--data", "one", "--out", "x", "--decay-from", "run"], "of the steps, give --decay only"),
        (
            ["--data", "one", "--out", "x", "--sequence-length", "65"],
            "sequence_length is 65; the model was made for 64",
        ),
        (["--data", "one", "--out", "novel.txt"], "novel.txt: File exists"),
        (["--data", "one", "--out", "x", "--steps", "5", "--warmup", "9"], "9 steps of warm-up"),
        (["--data", "one", "--out", "x", "--until", "13"], "--until is 13, and the schedule ends at step 12"),
        (["--data", "one", "--out", "x", "--until", "0"], "Invalid value for '--until'"),
        (["--data", "one", "--out", "x", "--micro-batch", "0"], "micro_batch is 0"),
        (["--dry-run", "--resume"], "Give --out, the folder of the run that --resume goes on with"),
        (["--data", "one", "--out", "x", "--resume", "--resume-from", "y"], "Give --resume for the newest"),
        (
            ["--data", "wide", "--out", "x"],
            "wide was written for a vocabulary of 999 ids; this model's has 300",
        ),
        (["--data", "wide", "--out", "x"], "its table was rounded up, with vocab_size=300 (--vocab-size)"),
        (
            ["--data", "one", "--out", "x", "--gpus", "8"],
            "--gpus and --json are of --dry-run, which prints the",
        ),
        (["--data", "one", "--out", "x", "--json"], "--gpus and --json are of --dry-run"),
        (
            ["--data", "other", "--data", "text", "--out", "x"],
            "other and text were cut with different tokenizers",
        ),
    ],
)
def test_runs_that_cannot_be(at_home, capsys, words, sentence):
    shutil.copytree(at_home / "one", at_home / "again")
    write_shards(at_home / "wide", [[1] * 300], 999)
    cut("other", learned_from=TEXT, text=TEXT)
    cut("text", learned_from=TEXT[::-1], text=TEXT[::-1])
    says(capsys, train(*STEPS, *words), sentence)
    assert not (at_home / "x").exists()


def test_a_run_keeps_the_tokenizer_of_its_shards(at_home, capsys):
    """Also where an attempt with another one was given up; and one that is refused leaves nothing."""
    cut("first", learned_from=TEXT)
    cut("second", learned_from=TEXT[::-1])
    short = [*STEP, "--steps", "2", "--warmup", "1", "--decay", "0"]
    assert main(train("--data", "first", *short, "--out", "run")) == 0
    shutil.rmtree(at_home / "run" / "step-00000002")
    assert main(train("--data", "second", "--data", "one", *short, "--out", "run")) == 0
    assert (at_home / "run/tokenizer.json").read_bytes() == (at_home / "second/tokenizer.json").read_bytes()
    assert main(train("--data", "one", *short, "--out", "plain")) == 0
    says(capsys, train("--data", "second", *short, "--out", "plain"), "plain holds a checkpoint of step 2")
    assert not (at_home / "plain/tokenizer.json").exists()
    (at_home / "second/tokenizer.json").write_text("{}")
    says(
        capsys, train("--data", "second", *short, "--out", "x"), "second/tokenizer.json is not the tokenizer"
    )
    assert not (at_home / "x").exists()


def test_a_decay_with_another_tokenizer(at_home, capsys):
    cut("text", learned_from=TEXT)
    cut("other", learned_from=TEXT[::-1])
    stable = [*STEP, "--steps", "6", "--warmup", "2", "--decay", "0"]
    assert main(train("--data", "text", *stable, "--out", "run")) == 0
    decay = ["--decay", "4", "--decay-from", "run/step-00000006", "--out", "decayed"]
    sentence = "other and what was read before were cut with different tokenizers"
    says(capsys, train("--data", "other", *decay), sentence)
    assert not (at_home / "decayed").exists()


# A long run as the command line starts it, for each signal, forked so that torch is imported once.
STOPPED = """
import json, os, runpy, signal, sys, time
from pathlib import Path
import torch._dynamo, minicpm_lite.cli.train, minicpm_lite.training.trainer

codes = []
for name, number, words in {runs!r}:
    run = os.fork()
    if not run:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in the foreground
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
        for stream, kept in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{{name}}.{{kept}}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv[1:] = words
        runpy.run_module("minicpm_lite.cli", run_name="__main__", alter_sys=True)
    metrics = Path(name, "metrics.jsonl")
    while not metrics.exists() or "\\n" not in metrics.read_text():
        assert os.waitpid(run, os.WNOHANG) == (0, 0), Path(f"{{name}}.err").read_text()
        time.sleep(0.05)
    os.kill(run, number)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]))
print(json.dumps(codes))
"""


@pytest.mark.slow  # four processes; within one, tests/training/test_interruption.py looks at the same
def test_a_run_that_is_stopped_says_what_is_kept(at_home):
    long = [word.replace("60", "100000") for word in LONG]
    signals = {"int": signal.SIGINT, "term": signal.SIGTERM, "hup": signal.SIGHUP}
    runs = [
        (name, int(number), train("--data", "one", "--out", name, *long)) for name, number in signals.items()
    ]
    script = [sys.executable, "-c", STOPPED.format(runs=runs)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[130, 143, 129]\n", "")
    for name in signals:
        saved = f"step-{len(lines(at_home / name)):08d}"
        out = Path(f"{name}.out").read_text()
        assert out.startswith("tiny.yaml: ") and out.endswith("100,000 steps of 64 tokens.\n")
        assert (
            Path(f"{name}.err").read_text()
            == f"Stopped; {name}/{saved} is kept, and --resume goes on from there.\n"
        )


@pytest.mark.slow  # six runs; tests/training/test_objective.py looks at the same in one
def test_documents_are_kept_apart_if_asked_for(at_home, capsys):
    """In a run that goes on so, too, and in its decay; what does not end documents is refused."""
    documents = [np.arange(start, start + 9) % 290 for start in range(60)]
    for name, end in (("ended", 299), ("other", 298), ("open", None)):
        write_shards(name, [[*ids.tolist(), *([end] if end else [])] for ids in documents], 300, end=end)
    short = [*STEP, "--steps", "6", "--warmup", "2", "--decay", "0", "--checkpoint-every", "2", "--keep", "9"]
    apart = ["--data", "ended", *short, "--within-documents"]
    assert main(train("--data", "ended", *short, "--out", "plain")) == 0
    assert main(train(*apart, "--out", "whole")) == 0
    assert main(train(*apart, "--until", "3", "--out", "apart")) == 0
    assert main(train("--data", "ended", "--out", "apart", "--resume")) == 0
    assert curve(at_home / "apart") == curve(at_home / "whole")
    assert order(at_home / "plain") == order(at_home / "whole")
    assert curve(at_home / "plain") != curve(at_home / "whole")
    decay = ["--decay-from", "whole/step-00000004", "--decay", "2", "--out", "decayed"]
    assert main(train("--data", "ended", *decay)) == 0
    facts = read_facts("decayed/step-00000006")
    assert facts["objective"]["name"] == "next token within documents that end with 299"
    says(capsys, train("--data", "ended", "--out", "plain", "--resume", "--within-documents"), "objective")
    asked = [*short, "--within-documents", "--out", "none"]
    says(
        capsys,
        train("--data", "open", *asked),
        "documents needs one token that ends each document, and open notes none",
    )
    says(
        capsys, train("--data", "ended", "--data", "other", *asked), "and ended and other note different ones"
    )
    assert not (at_home / "none").exists()


def test_documents_that_begin_with_what_ends_them_are_not_kept_apart(at_home, capsys):
    """The start token would be a document of its own, and no text would see it."""
    cutter = train_tokenizer(TEXT, 298)
    cutter.add_special_tokens(["<s>", "</s>"])
    for name, end in (("same", "<s>"), ("other", "</s>")):
        cutter.post_processor = TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", cutter.token_to_id("<s>"))]
        )
        documents = list(encoded([TEXT[:400], TEXT[7:500]], cutter, cutter.token_to_id(end)))
        write_shards(name, documents, 300, cutter, end=cutter.token_to_id(end))
    short = [*STEP, "--steps", "2", "--warmup", "0", "--decay", "0", "--within-documents"]
    says(
        capsys,
        train("--data", "same", *short, "--out", "none"),
        "tokenizer of same puts the token that ends documents in front of each, too, so --within-documents",
    )
    assert not (at_home / "none").exists()
    assert main(train("--data", "other", *short, "--out", "run")) == 0


def test_the_dry_run_of_a_decay(at_home, capsys):
    assert main(train("--data", "one", "--out", "run", *STEPS, "--until", "10")) == 0
    dry = train("--decay-from", "run/step-00000010", "--decay", "6", "--micro-batch", "4", "--dry-run")
    assert main([*dry, "--gpus", "2"]) == 0
    said = capsys.readouterr().out
    assert "3 steps of warm-up" in said and "7 stable, 6 of decay" in said
    assert "\nsteps          from step 10 on, 6 of 64 tokens" in said
    says(capsys, train("--decay-from", "nowhere", "--dry-run"), "There is no checkpoint at nowhere")
    says(capsys, train("--out", "nowhere", "--resume", "--dry-run"), "no checkpoint in nowhere to resume")


@pytest.mark.parametrize(
    ("words", "behind"),
    [
        ([*STEPS, "--out", "other"], 0),
        ([*STEPS, "--out", "other", "--until", "9"], 0),
        (["--out", "run", "--resume"], 10),
        (["--out", "run", "--resume", "--until", "10"], 10),
        (["--resume-from", "run/step-00000005", "--out", "run"], 5),
        (["--out", "decayed", "--decay-from", "run/step-00000005", "--decay", "2"], 5),
    ],
)
def test_a_dry_run_counts_the_steps_that_are_made(at_home, capsys, words, behind):
    kept = ["--checkpoint-every", "5"]
    assert main(train("--data", "one", "--out", "run", *STEPS, *kept, "--until", "10")) == 0
    capsys.readouterr()
    argv = train("--data", "one", *words)
    assert main([*argv, "--dry-run", "--json", "--gpus", "1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    if "--resume-from" in words:  # which what the folder holds must not be later than
        shutil.rmtree("run/step-00000010")
    assert main(argv) == 0
    steps = [line["step"] for line in lines(at_home / words[words.index("--out") + 1])]
    made = [step for step in steps if step > behind]
    assert (plan["steps"], plan["tokens"], plan["from_step"]) == (len(made), 64 * len(made), behind)
    assert plan["flops"] == 6 * plan["active_parameters"] * plan["tokens"]


def test_a_model_knows_where_its_texts_end(at_home, capsys):
    """If all of its shards say so; at any of their tokens."""
    for name, end, ids in (
        ("ended", 7, np.arange(300)),
        ("too", 7, np.arange(299)),
        ("other", 8, np.arange(298)),
    ):
        write_shards(name, [ids], 300, end=end)
    short = [*STEP, "--steps", "2", "--warmup", "1", "--decay", "0"]
    for number, (folders, end) in enumerate(
        [
            (["ended"], (7,)),
            (["ended", "too"], (7,)),
            (["ended", "other"], (7, 8)),
            (["ended", "one"], ()),
            (["one"], ()),
        ]
    ):
        capsys.readouterr()
        assert main(train(*data(*folders), *short, "--out", f"run{number}")) == 0
        assert load_weights(at_home / f"run{number}" / "step-00000002").config.eos_token_id == end
        said = (
            "The model will not stop at the token that ends the texts of ended. It would if all shards noted"
        )
        assert capsys.readouterr().err.startswith(said) == (folders == ["ended", "one"])
    named = yaml.safe_load(Path("tiny.yaml").read_text())
    for folders, says_config, end in [
        (["ended"], [2, 7], (2, 7)),  # 2 ends a turn, perhaps
        (["ended"], [2, 9], (7,)),
        (["ended", "other"], [7], (7, 8)),
        (["one"], [2, 9], (2, 9)),
    ]:
        named["model"]["eos_token_id"] = says_config
        Path("named.yaml").write_text(yaml.safe_dump(named))
        words = [*train(*data(*folders), *short, "--out", "named"), "--config", "named.yaml"]
        assert main(words) == main([*words, "--resume"]) == 0
        assert load_weights(at_home / "named" / "step-00000002").config.eos_token_id == end
        shutil.rmtree("named")
    decay = ["--decay-from", "run0/step-00000002", "--decay", "2", "--out", "decayed"]
    assert main(train(*data("ended", "one"), *decay)) == 0, "what the model is does not change with its texts"
    assert main(train(*data("ended", "other"), *decay[:-1], "more", "--until", "3")) == 0
    assert load_weights(at_home / "more" / "step-00000003").config.eos_token_id == (7, 8)
    assert main(train(*data("ended", "other"), "--out", "more", "--resume")) == 0
    assert load_weights(at_home / "more" / "step-00000004").config.eos_token_id == (7, 8)


def test_ends_of_another_tokenizer_are_named(at_home):
    """Those of a released shape, say, trained on shards that note none."""
    cut("pages", TEXT)
    named = yaml.safe_load(Path("tiny.yaml").read_text())
    named["model"]["eos_token_id"] = [2, 299]
    Path("named.yaml").write_text(yaml.safe_dump(named))
    words = [
        *train("--data", "pages", *STEP, "--steps", "2", "--warmup", "1", "--decay", "0", "--out", "run")
    ]
    with pytest.warns(
        UserWarning, match=r"ends texts at '#' \(id 2\) and .*of which ordinary texts are made"
    ):
        assert main([*words, "--config", "named.yaml"]) == 0


def test_a_folder_with_a_colon_in_its_name(at_home):
    for folder, tokens in (("own", 290), ("own:2", 280), ("half:way", 270)):
        write_shards(folder, [np.arange(tokens)], 300)
    short = [*STEP, "--steps", "2", "--warmup", "1", "--decay", "0"]
    for number, (source, tokens) in enumerate(
        [("own:2", 280), ("own:2:3", 280), ("own:3", 290), ("half:way", 270)]
    ):
        assert main(train("--data", source, *short, "--out", f"run{number}")) == 0
        assert read_facts(f"run{number}/step-00000002")["text"]["tokens"] == tokens


def test_a_run_goes_on_from_a_named_step(at_home, capsys):
    """In a folder of its own; the one it came from is left as it is, and refuses what is later."""
    run = train("--data", "one", "--micro-batch", "4")
    assert main([*run, *STEPS, "--out", "run"]) == 0
    before = lines(at_home / "run")
    named = [*run, "--resume-from", "run/step-00000010"]
    assert main([*named, "--out", "again"]) == 0
    assert order(at_home / "again") == order(at_home / "run")[10:]
    assert curve(at_home / "again") == curve(at_home / "run")[10:]
    says(capsys, [*named, "--out", "run"], "holds a checkpoint of step 12, and this run is at step 10")
    assert lines(at_home / "run") == before
    facts = json.loads((at_home / "again" / "step-00000012" / "checkpoint.json").read_text())
    assert facts["schedule"]["decay_steps"] == 2


def test_a_run_goes_on_with_as_many_checkpoints_as_it_was_begun_with(at_home):
    run = train("--data", "one", "--out", "run")
    often = [*STEP, "--steps", "12", "--warmup", "3", "--decay", "0", "--checkpoint-every", "1"]
    assert main([*run, *often, "--until", "6", "--keep", "5"]) == 0
    assert main([*run, "--resume", "--checkpoint-every", "1", "--until", "9"]) == 0
    assert sorted(checkpoints("run")) == [5, 6, 7, 8, 9]
    assert main([*run, "--resume", "--keep", "1"]) == 0
    assert sorted(checkpoints("run")) == [12]


def test_a_decay_of_no_step(at_home, capsys):
    assert main(train("--data", "one", "--out", "run", *STEPS, "--until", "10")) == 0
    argv = train("--data", "one", "--out", "x", "--decay-from", "run/step-00000010", "--decay", "0")
    says(capsys, argv, "--decay is 0, and --decay-from begins a decay")


def test_a_checkpoint_is_gone_on_with_or_decayed(at_home, capsys):
    both = "--resume-from", "run/step-00000010", "--decay-from", "run/step-00000010"
    for more in (["--dry-run"], ["--data", "one", "--out", "x"]):
        says(capsys, train(*more, *both, "--decay", "6"), "Give --decay-from to begin a decay at that")


def test_a_decay_from_nowhere(at_home, capsys):
    argv = train("--data", "one", "--out", "x", "--decay-from", "nowhere")
    says(capsys, argv, "There is no checkpoint at nowhere")


def test_a_checkpoint_of_another_config(at_home, capsys):
    assert main([*train("--data", "one", "--out", "run", *STEPS), "--until", "2"]) == 0
    (at_home / "deep.yaml").write_text(yaml.safe_dump({"model": SHAPE | {"num_hidden_layers": 3}}))
    argv = ["train", "--config", "deep.yaml", "--data", "one", "--out", "run", "--resume"]
    says(capsys, argv, "another model config: its num_hidden_layers is 2, this run's is 3")
    says(capsys, [*train("--data", "two", "--out", "run"), "--resume"], "another text: its checksum is")
    says(
        capsys,
        [*train("--data", "one", "--out", "run", "--batch-tokens", "32"), "--resume"],
        "its batch_size is 4, this run's is 2",
    )
    assert [line["step"] for line in lines(at_home / "run")] == [1, 2], "nothing was lost"


def test_a_damaged_shard(at_home, capsys):
    shutil.copytree(at_home / "one", at_home / "bad")
    damage(at_home / "bad")
    says(capsys, train("--data", "bad", "--out", "run", *STEPS), "is damaged: its tokens 0 to")


# Several processes.


def torchrun(*argv, home):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "minicpm_lite.cli", *argv]  # fmt: skip
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


# Commands, each in two processes; the second one may be killed, by kill -9, when a number of steps is made.
PAIRS = """
import json, os, signal, sys, time
from pathlib import Path
sys.path[:0] = [{path!r}]
import minicpm_lite.cli.train, minicpm_lite.training.trainer
from minicpm_lite.cli import main
from two_processes import exit_codes, start

ends = []
for words, killed_at in {commands!r}:
    children = start(lambda: main(words))
    metrics = Path(words[words.index("--out") + 1], "metrics.jsonl")
    while killed_at and (not metrics.exists() or metrics.read_text().count("\\n") < killed_at):
        time.sleep(0.005)
    if killed_at:
        os.kill(children[1], signal.SIGKILL)
    ends.append([*exit_codes(children), metrics.read_text().count("\\n")])
print(json.dumps(ends))
"""


def in_pairs(*commands: tuple[list[str], int | None], home: Path) -> tuple[list[list[int]], str]:
    """How each ended: the exit codes of its processes and its steps; and what was printed."""
    script = PAIRS.format(path=str(Path(__file__).parents[1] / "training"), commands=commands)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=home, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    *said, ends = done.stdout.splitlines()
    return json.loads(ends), "\n".join(said)


@pytest.mark.slow  # two processes start four times, about 15 s
def test_two_processes_kill_9_and_other_world_sizes(at_home):
    """2 -> 1 and 1 -> 2 from step 30, and a run that goes on after its second process was killed."""
    run = train("--data", "one", "--data", "two:3", *LONG)
    assert main([*run, "--out", "alone"]) == 0
    at_step_30("alone", "more")
    killed = [*run, "--out", "killed"]
    ends, out = in_pairs(
        ([*run, "--out", "pair"], None),
        (killed, 23),
        ([*killed, "--resume"], None),
        ([*run, "--out", "more", "--resume"], None),
        home=at_home,
    )
    survivor, dead, steps = ends.pop(1)
    assert ends == [[0, 0, 60]] * 3 and dead == -signal.SIGKILL and survivor > 0
    assert 23 <= steps < 60, "it was in the middle"
    assert out.count("pair: step 60") == 1, "one process speaks"
    at_step_30("pair", "fewer")
    assert main([*run, "--out", "fewer", "--resume"]) == 0
    for name in ("pair", "more", "fewer"):
        assert order(at_home / name) == order(at_home / "alone")
        assert curve(at_home / name) == pytest.approx(curve(at_home / "alone"), abs=1e-4)
    assert order(at_home / "killed") == order(at_home / "pair"), "bit-identical order of the data"
    assert curve(at_home / "killed") == curve(at_home / "pair"), "and the same losses"


def at_step_30(source: str, name: str) -> None:
    """A folder with the checkpoint of step 30 alone."""
    shutil.copytree(f"{source}/step-00000030", f"{name}/step-00000030")
    shutil.copy(f"{source}/metrics.jsonl", name)


@pytest.mark.slow  # two processes start, about 10 s
def test_torchrun_s_report_does_not_hide_the_sentence(at_home):
    shutil.copytree(at_home / "one", at_home / "bad")
    damage(at_home / "bad")
    code, out, err = torchrun(*train("--data", "bad", "--out", "run", *STEPS), home=at_home)
    assert code != 0 and out.endswith(" tokens.\n") and out.count("\n") == 1, "what was to begin, once"
    spoken = [line for line in err.splitlines() if line.startswith("minicpm-lite: ")]
    assert len(spoken) == 1 and "is damaged: its tokens 0 to" in spoken[0]
    root_cause = err[err.index("Root Cause") :]
    assert spoken[0].removeprefix("minicpm-lite: ") in root_cause, "it stands at the end of the report, too"
