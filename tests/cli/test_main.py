"""The command line as a whole: help, exit codes, one sentence for what goes wrong."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
from shell import says

from minicpm_lite.cli import main

COMMANDS = ["models", "tokenizer", "shards", "verify", "train", "generate", "chat", "export"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_holds_an_example(capsys, command):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"Usage: minicpm-lite {command}" in said and f"\n    minicpm-lite {command}" in said


def test_help_of_all(capsys):
    assert main(["--help"]) == 0
    listed = re.findall(r"^  (\w+)  ", capsys.readouterr().out.split("Commands:")[1], re.MULTILINE)
    assert listed == COMMANDS


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "Missing command. See: minicpm-lite --help."),
        (["trian"], "No such command 'trian'. Did you mean 'train'? See: minicpm-lite --help."),
        (["train", "--config", "lite-1m", "--dry-run", "--gpu", "4"], "No such option: --gpu"),
        (["train", "--config", "lite-1m", "--steps", "x"], "Invalid value for '--steps'"),
        (["train"], "Missing option '--config'"),
        (["models", "lite-1m"], "unexpected extra argument(s) (lite-1m)"),
    ],
)
def test_what_was_typed_wrongly(capsys, argv, sentence):
    says(capsys, argv, sentence)


@pytest.mark.parametrize("local, sentences", [(None, 1), ("0", 1), ("1", 0)])
def test_one_process_of_a_machine_says_it(monkeypatch, capsys, local, sentences):
    """Whatever else a cluster sets; what joins no processes has no other to say it."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert main(["verify", "nowhere"]) == 2
    assert capsys.readouterr().err.count("minicpm-lite: ") == sentences


def test_an_interrupted_command(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("minicpm_lite.cli.models.list_configs", interrupted)
    assert main(["models"]) == 130


@pytest.mark.parametrize(
    "ask", [lambda: [0] * (1 << 62), lambda: torch.empty(1 << 60)], ids=["list", "tensor"]
)
def test_want_of_memory_is_one_sentence(monkeypatch, capsys, ask):
    monkeypatch.setattr("minicpm_lite.cli.models.list_configs", ask)
    says(capsys, ["models"], "There is not enough memory")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def faulty():
        raise KeyError("ours")

    monkeypatch.setattr("minicpm_lite.cli.models.list_configs", faulty)
    with pytest.raises(KeyError):
        main(["models"])


def test_completion():
    """For the shell that asks, as the package finds it among the programs above."""
    ask = f"{shlex.quote(sys.executable)} -m minicpm_lite.cli --show-completion; exit $?"
    shown = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert shown.returncode == 0 and "complete" in shown.stdout


@pytest.mark.slow  # three processes start
def test_exit_codes_of_the_process():
    for argv, code in ((["models", "--json"], 0), (["verify", "nowhere"], 2), (["nonsense"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "minicpm_lite.cli", *argv], capture_output=True, text=True
        )
        assert done.returncode == code
        assert (done.stderr == "") == (code == 0)
