"""The folder of a run: a line for each step, the checkpoints that stay, and errors before anything is changed."""

import json

import pytest

from minicpm_lite.training import run_folder
from minicpm_lite.training.sharded_checkpoint import latest_checkpoint


def trained(trainer, until=None, **how):
    trainer.train(until, progress=False, **how)
    return trainer


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_metrics(make, tmp_path):
    trainer = trained(make(), folder=tmp_path, tensorboard=True)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(1, 11))
    assert [line["loss"] for line in found] == trainer.losses
    assert [line["lr"] for line in found] == [trainer.schedule(step) for step in range(1, 11)]
    assert found[4]["tokens"] == 5 * 16
    assert len({line["data"] for line in found}) == 10, "each step sees other windows"
    assert all(line["seconds"] > 0 and line["tokens_per_second"] > 0 for line in found)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_metrics_after_the_checkpoint_are_dropped_and_half_a_line_too(make, tmp_path):
    trained(make(), 6, folder=tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    resumed = make()
    resumed.load(latest_checkpoint(tmp_path))
    trained(resumed, folder=tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 11))


def test_which_checkpoints_stay(make, tmp_path):
    trained(make(), folder=tmp_path, checkpoint_every=3, keep=1)
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == ["step-00000006", "step-00000010"], "the newest, and where the decay begins"


def test_a_folder_with_a_later_run_is_not_overwritten(make, tmp_path):
    trained(make(), 6, folder=tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="holds a checkpoint of step 6, and this run is at step 0"):
        trained(make(), folder=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_full_disk_while_metrics_are_written(make, tmp_path, monkeypatch):
    def full(self, line):
        raise OSError(28, f"{self.path}/metrics.jsonl could not be written: No space left on device")

    trainer = make()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="jsonl could not be written: No space"):
        patch.setattr(run_folder.RunFolder, "add", full)
        trained(trainer, folder=tmp_path)
    assert trainer.step == 1
    trained(trainer, folder=tmp_path)  # there is room again
    assert trainer.losses == trained(make()).losses
    assert [line["step"] for line in lines(tmp_path)] == list(range(2, 11))


def test_metrics_that_cannot_be_opened_are_everyone_s_error(make, tmp_path, monkeypatch):
    """Raised by the first process alone, it would leave the others waiting."""
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "nowhere" / "metrics.jsonl")
    told = []

    def on_first(work):
        try:
            return processes_on_first(work)
        except OSError as error:
            told.append(error)
            raise

    processes_on_first = run_folder.on_first
    monkeypatch.setattr(run_folder, "on_first", on_first)
    with pytest.raises(FileNotFoundError, match="metrics.jsonl") as raised:
        trained(make(), folder=tmp_path)
    assert told == [raised.value]
