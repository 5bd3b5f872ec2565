"""The command line, as a user meets it: help, tables, shards, dry runs, whole runs, kill -9, and errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import yaml

from minicpm_lite import cli, list_configs, load_config
from minicpm_lite.cli import main
from minicpm_lite.data.shards import Shards, write_shards
from minicpm_lite.language.tokenizer import train_tokenizer

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 40
SHAPE = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
             max_position_embeddings=64, scale_depth=1.4, dim_model_base=16)  # fmt: skip
STEP = ["--batch-tokens", "64", "--sequence-length", "16", "--micro-batch", "4"]
STEPS = [*STEP, "--steps", "12", "--warmup", "3", "--decay", "2", "--checkpoint-every", "10", "--keep", "99"]
LONG = [*STEP, "--steps", "60", "--warmup", "5", "--decay", "10", "--checkpoint-every", "10", "--keep", "99"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A config, a tokenizer, texts and two folders of shards."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.yaml").write_text(yaml.safe_dump({"model": SHAPE}))
    (home / "novel.txt").write_text(TEXT)
    (home / "web.jsonl").write_text("".join(json.dumps({"text": TEXT[i:]}) + "\n" for i in range(5)))
    train_tokenizer(TEXT, 300).save(str(home / "tokenizer.json"))
    random = np.random.default_rng(0)
    for name in ("one", "two"):
        write_shards(home / name, [random.integers(0, 300, 2000)], 300, shard_tokens=700)
    return home


@pytest.fixture
def at_home(home, tmp_path, monkeypatch):
    """In a folder of its own, with what is at home under its name."""
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # slow on a busy disk
    return tmp_path


def train(*words) -> list[str]:
    return ["train", "--config", "tiny.yaml", *words]


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder) -> list[float]:
    return [line["loss"] for line in lines(folder)]


def order(folder) -> list[tuple[int, int]]:
    return [(line["step"], line["data"]) for line in lines(folder)]


def says(capsys, argv, sentence) -> None:
    """The command fails with exit code 2 and this one sentence."""
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("minicpm-lite: ") and said.err.count("\n") == 1
    assert sentence in said.err


# Help and tables.


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["models", "--help"], ["shards", "--help"], ["verify", "--help"], ["train", "--help"]],
)
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "usage: minicpm-lite" in said
    if argv[0] == "train":
        for word in ("torchrun", "--decay-from", "--resume", "metrics.jsonl", "--dry-run"):
            assert word in said


def test_no_command_shows_how(capsys):
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_models(capsys):
    assert main(["models"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:]] == list_configs()
    assert any("2,724,880,896" in row for row in rows)
    assert len({len(row) for row in rows}) == 1, "the columns stand under each other"


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


def test_flags_are_not_shortened(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", "lite-1m", "--dry-run", "--gpu", "4"])
    assert "unrecognized arguments: --gpu 4" in capsys.readouterr().err


def test_a_recipe_that_cannot_be_is_not_taken_for_none(at_home, capsys):
    content = {"model": SHAPE, "training": {"tokens": -1}}
    (at_home / "wrong.yaml").write_text(yaml.safe_dump(content))
    says(capsys, ["train", "--config", "wrong.yaml", "--dry-run"], "tokens is -1; expected a number")


def test_a_run_that_does_not_fit(capsys):
    main(["train", "--config", "minicpm4-8b", "--dry-run", "--gpus", "1"])
    assert "does not fit a GPU of 80 GB" in capsys.readouterr().out


# Shards.


def test_texts_become_shards(at_home, capsys):
    argv = ["shards", "novel.txt", "web.jsonl", "--tokenizer", "tokenizer.json", "--out", "made"]
    assert main([*argv, "--vocab-size", "320", "--shard-tokens", "500"]) == 0
    shards = Shards("made", vocab_size=320)
    from tokenizers import Tokenizer

    text = Tokenizer.from_file("tokenizer.json").decode(shards[:].tolist(), skip_special_tokens=False)
    assert text == TEXT + "".join(TEXT[i:] for i in range(5))
    assert f"made: {len(shards):,} tokens" in capsys.readouterr().out
    assert len(list((at_home / "made").glob("*.npy"))) > 1


def test_documents_can_be_ended(at_home):
    token = next(iter(train_tokenizer(TEXT, 300).get_vocab()))
    argv = ["shards", "web.jsonl", "--tokenizer", "tokenizer.json", "--out", "ended", "--end", token]
    assert main(argv) == 0
    from tokenizers import Tokenizer

    assert Shards("ended")[:][-1] == Tokenizer.from_file("tokenizer.json").token_to_id(token)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["novel.pdf"], "novel.pdf is neither .txt nor .jsonl"),
        (["none.txt"], "There is no file none.txt"),
        (["novel.txt", "--tokenizer", "none.json"], "There is no tokenizer at none.json"),
        (["novel.txt", "--tokenizer", "tiny.yaml"], "tiny.yaml is not a tokenizer.json"),
        (["novel.txt", "--end", "<nothing>"], "The tokenizer has no token '<nothing>'"),
        (
            ["web.jsonl", "--field", "content"],
            "Line 1 of web.jsonl is no JSON object with a text under 'content'",
        ),
        (["novel.txt", "--vocab-size", "100"], "The tokenizer has 300 ids and vocab_size is 100"),
        (["novel.txt", "--out", "one"], "one already holds something"),
        (["latin.txt"], "latin.txt is not UTF-8 text: byte 3"),
    ],
)
def test_texts_that_cannot_be_cut(at_home, capsys, change, sentence):
    (at_home / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    argv = ["shards", "--tokenizer", "tokenizer.json", "--out", "made"]
    says(capsys, [*argv, *change], sentence)
    assert not (at_home / "made").exists()


def test_verify(at_home, capsys):
    assert main(["verify", "one", "two"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{name}: 2,000 tokens, all as they were written." for name in ("one", "two")
    ]
    shutil.copytree(at_home / "one", at_home / "bad")
    damage(at_home / "bad")
    says(capsys, ["verify", "bad"], "tokens-00000.npy is damaged")


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
    stages = facts["text"]["stages"]
    assert stages == [[0, {"one": 1, "two": 0}], [40, {"one": 3, "two": 1}]], (
        "10 steps of 4 windows were read"
    )
    rest = facts["text"]["sources"]
    assert rest["one"] == json.loads((at_home / "run/step-00000010/checkpoint.json").read_text())["text"]
    says(
        capsys,
        [*decayed[:-2], "--decay", "6", "--out", "x", "--decay-from", "run/step-00000012"],
        "in or after the decay",
    )


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
    facts = json.loads((at_home / "whole" / "step-00000014" / "checkpoint.json").read_text())
    assert facts["text"]["stages"][0] == [0, {"one": 1, "two": 1, "three": 0}]
    assert facts["text"]["stages"][1] == [32, {"one": 1, "two": 1, "three": 2}]
    says(capsys, [*train(*one_two), "--out", "stopped", "--resume"], "belongs to another text")


def test_going_on_with_processes_that_cannot_share_a_step(at_home, capsys):
    """The plan is what every process makes first; here it is asked for three of them."""
    assert main(train("--data", "one", "--out", "run", *STEPS, "--until", "5")) == 0
    argv = train("--data", "one", "--out", "run", "--micro-batch", "4", "--resume")
    args = cli._parser().parse_args(argv)
    with pytest.raises(ValueError, match="4 windows a step, which 3 processes cannot share evenly"):
        cli._plan(args, load_config("tiny.yaml"), None, 3, False, at_home / "run" / "step-00000005")


def test_stopping_and_going_on(at_home, capsys):
    start = train("--data", "one", "--out", "run", *STEPS)
    assert main([*start, "--until", "5"]) == 0
    assert main([*train("--data", "one", "--out", "run", "--micro-batch", "4"), "--resume"]) == 0, (
        "no flag is needed twice"
    )
    assert main(train("--data", "one", "--out", "whole", *STEPS)) == 0
    assert curve(at_home / "run") == curve(at_home / "whole")
    assert order(at_home / "run") == order(at_home / "whole")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "one"], "Give --data and --out"),
        (["--data", "none", "--out", "x"], "There is no shards.json in none"),
        (["--data", "one:0", "--data", "two:0", "--out", "x"], "weight"),
        (["--data", "one", "--data", "one:2", "--out", "x"], "--data names one twice"),
        (["--data", "one", "--out", "x", "--resume"], "There is no checkpoint in x to resume from"),
        (["--data", "one", "--out", "x", "--decay-from", "run"], "of the steps, give --decay only"),
        (
            ["--data", "one", "--out", "x", "--sequence-length", "65"],
            "sequence_length is 65; the model was made for 64",
        ),
        (["--data", "one", "--out", "novel.txt"], "novel.txt: File exists"),
        (["--data", "one", "--out", "x", "--steps", "5", "--warmup", "9"], "9 steps of warm-up"),
        (
            ["--data", "wide", "--out", "x"],
            "wide was written for a vocabulary of 999 ids; this model's has 300",
        ),
        (
            ["--data", "other", "--data", "text", "--out", "x"],
            "other and text were cut with different tokenizers",
        ),
    ],
)
def test_runs_that_cannot_be(at_home, capsys, words, sentence):
    write_shards(at_home / "wide", [[1] * 300], 999)
    for name, text in (("other", TEXT), ("text", TEXT[::-1])):
        tokenizer = train_tokenizer(text, 300)
        write_shards(at_home / name, [tokenizer.encode(text).ids], 300, tokenizer)
    says(capsys, train(*STEPS, *words), sentence)
    assert not (at_home / "x").exists()


def test_the_dry_run_of_a_decay(at_home, capsys):
    assert main(train("--data", "one", "--out", "run", *STEPS, "--until", "10")) == 0
    dry = train("--decay-from", "run/step-00000010", "--decay", "6", "--micro-batch", "4", "--dry-run")
    assert main([*dry, "--gpus", "2"]) == 0
    said = capsys.readouterr().out
    assert "3 steps of warm-up" in said and "7 stable, 6 of decay" in said
    says(capsys, train("--decay-from", "nowhere", "--dry-run"), "There is no checkpoint at nowhere")
    says(capsys, train("--out", "nowhere", "--resume", "--dry-run"), "no checkpoint in nowhere to resume")


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


def damage(folder) -> None:
    """Flip a bit in every shard."""
    for path in folder.glob("*.npy"):
        content = bytearray(path.read_bytes())
        content[-7] ^= 1
        path.write_bytes(content)


def test_a_damaged_shard(at_home, capsys):
    shutil.copytree(at_home / "one", at_home / "bad")
    damage(at_home / "bad")
    says(capsys, train("--data", "bad", "--out", "run", *STEPS), "is damaged: its tokens 0 to")


# Several processes.


def torchrun(*argv, home, wait=True, count=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
               "-m", "minicpm_lite.cli", *argv]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if not wait:
        return process
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.mark.slow  # two processes start four times, about 40 s
def test_two_processes_kill_9_and_other_world_sizes(at_home):
    run = train("--data", "one", "--data", "two:3", *LONG)
    assert main([*run, "--out", "alone"]) == 0
    code, out, err = torchrun(*run, "--out", "pair", home=at_home)
    assert code == 0, err
    assert out.count("pair: step 60") == 1, "one process speaks"
    assert order(at_home / "pair") == order(at_home / "alone")
    assert curve(at_home / "pair") == pytest.approx(curve(at_home / "alone"), abs=1e-4)

    # kill -9 of the second process, in the middle
    long = [*run, "--out", "killed"]
    process = torchrun(*long, home=at_home, wait=False)
    metrics, deadline = at_home / "killed" / "metrics.jsonl", time.time() + 120
    while (not metrics.exists() or metrics.read_text().count("\n") < 23) and time.time() < deadline:
        time.sleep(0.005)
    psutil.Process(process.pid).children()[1].send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert 23 <= len((at_home / "killed" / "metrics.jsonl").read_text().splitlines()) < 60, (
        "it was in the middle"
    )
    code, _, err = torchrun(*long, "--resume", home=at_home)
    assert code == 0, err
    assert order(at_home / "killed") == order(at_home / "pair"), "bit-identical order of the data"
    assert curve(at_home / "killed") == curve(at_home / "pair"), "and the same losses"

    # 2 -> 1 and 1 -> 2, from step 30
    for source, name in (("pair", "fewer"), ("alone", "more")):
        (at_home / name).mkdir()
        shutil.copytree(at_home / source / "step-00000030", at_home / name / "step-00000030")
        shutil.copy(at_home / source / "metrics.jsonl", at_home / name)
    assert main([*run, "--out", "fewer", "--resume"]) == 0
    code, _, err = torchrun(*run, "--out", "more", "--resume", home=at_home)
    assert code == 0, err
    for name in ("fewer", "more"):
        assert order(at_home / name) == order(at_home / "alone")
        assert curve(at_home / name) == pytest.approx(curve(at_home / "alone"), abs=1e-4)


@pytest.mark.slow  # two processes start, about 10 s
def test_torchrun_s_report_does_not_hide_the_sentence(at_home):
    shutil.copytree(at_home / "one", at_home / "bad")
    damage(at_home / "bad")
    code, out, err = torchrun(*train("--data", "bad", "--out", "run", *STEPS), home=at_home)
    assert code != 0 and out == ""
    spoken = [line for line in err.splitlines() if line.startswith("minicpm-lite: ")]
    assert len(spoken) == 1 and "is damaged: its tokens 0 to" in spoken[0]
    root_cause = err[err.index("Root Cause") :]
    assert spoken[0].removeprefix("minicpm-lite: ") in root_cause, "it stands at the end of the report, too"
