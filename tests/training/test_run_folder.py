"""The folder of a run: a line for each step, the checkpoints that stay, and errors before anything is changed."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models

from minicpm_lite import ModelConfig
from minicpm_lite.data.mixtures import MixtureWindows
from minicpm_lite.data.shards import write_shards
from minicpm_lite.data.windows import TokenWindows
from minicpm_lite.files import locked
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.training import run_folder
from minicpm_lite.training.branch import decay_schedule
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.sharded_checkpoint import checkpoints, latest_checkpoint
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

CONFIG = TrainerConfig(batch_size=2, sequence_length=8)


def trained(trainer, until=None, **how):
    trainer.train(until, progress=False, **how)
    return trainer


def tokenizer_of(word: str) -> str:
    return Tokenizer(models.WordLevel({word: 0}, word)).to_str()


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow  # whole runs
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


def test_lines_of_an_attempt_without_a_checkpoint_are_no_other_run_s(make, tmp_path):
    """Also where the other begins later: it branched, or it goes on from elsewhere."""
    trunk, decay = make(schedule=WSD(0.01, 2, 100, 0)), tmp_path / "decay"
    trained(trunk, 6, folder=tmp_path / "trunk")
    start = latest_checkpoint(tmp_path / "trunk")
    for go_on in (Trainer.branch_from, Trainer.load):
        decay.mkdir()
        (decay / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": n, "units": 16}) + "\n" for n in range(1, 5))
        )
        run = make(schedule=decay_schedule(start, 4))
        go_on(run, start)
        trained(run, 8, folder=decay)
        trained(run, folder=decay)
        assert [line["step"] for line in lines(decay)] == [7, 8, 9, 10]
        shutil.rmtree(decay)


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


DAMAGES = ["{}", "[]", "7", "null", '{"step": "x"}', '{"step": null}', '{"step": 3', "\0\0\0}", "\x80}", "",
           "[" * 100_000 + "}", '{"step": 9}']  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage[:12])
@pytest.mark.parametrize(  # slow: runs that differ from a quick one in the place alone
    "place", [pytest.param(0, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_damaged_line_of_metrics_blocks_no_resume(make, saved, tmp_path, damage, place):
    """It is dropped with those behind it, wherever it stands."""
    shutil.copytree(saved / "step-00000006", tmp_path / "step-00000006")
    whole = [json.dumps({"step": step}) for step in range(1, 7)]
    whole[place] = damage
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(whole).encode("latin-1") + b"\n")
    resumed = make()
    resumed.load(tmp_path / "step-00000006")
    trained(resumed, 7, folder=tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, place + 1), 7]


def listing(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(config=replace(CONFIG, weight_decay=0.2)), "another trainer config: its weight_decay is 0.1"),
        (dict(config=replace(CONFIG, seed=1)), "another text: its seed is 0|another trainer config: its seed is 0"),
        (dict(schedule=WSD(0.02, 2, 4, 4)), "another schedule: its rate at step 1 is 0.005, this run's is 0.01"),
    ],
)  # fmt: skip
def test_the_folder_of_another_run(make, tmp_path, changes, sentence):
    trained(make(), 3, folder=tmp_path)
    before = listing(tmp_path), (tmp_path / "metrics.jsonl").read_bytes()
    other = trained(make(**changes), 4)
    with pytest.raises(FileExistsError, match=f"{sentence}.*Choose another folder for this run"):
        trained(other, folder=tmp_path, keep=1)
    assert (listing(tmp_path), (tmp_path / "metrics.jsonl").read_bytes()) == before


def test_the_folder_holds_the_tokenizer_of_its_run(make, tmp_path):
    """Whatever an attempt that came to no checkpoint left; and a refused run leaves what is there."""
    run, kept = tmp_path / "run", tmp_path / "run" / "tokenizer.json"
    first, second = tokenizer_of("first"), tokenizer_of("second")
    (tmp_path / "first").write_text(first)
    (tmp_path / "second").write_text(second)
    trained(make(), 2, folder=run, tokenizer=tmp_path / "first")
    assert kept.read_text() == first
    shutil.rmtree(run / "step-00000002")  # as if it had been killed before
    trained(make(), 2, folder=run, tokenizer=tmp_path / "second")
    assert kept.read_text() == second
    with pytest.raises(FileExistsError, match="belongs to another"):
        other = make(config=replace(CONFIG, seed=1))
        trained(trained(other, 2), 4, folder=run, tokenizer=tmp_path / "first")
    assert kept.read_text() == second
    again = make()
    again.load(latest_checkpoint(run))
    for until, tokenizer in ((4, None), (6, tmp_path / "first")):
        trained(again, until, folder=run, tokenizer=tokenizer)
        assert kept.read_text() == second, "its own, since there are checkpoints of it"


@pytest.mark.parametrize("mixed", [False, True])
def test_a_tokenizer_that_did_not_make_the_ids_is_refused(layout, tmp_path, mixed):
    """Where shards note which did; in a run that begins and in one that goes on."""
    made, run = train_tokenizer("the cat sat on a mat " * 9, 290), tmp_path / "run"
    made.add_special_tokens(["<wrong>"])
    made.save(str(tmp_path / "wrong.json"))
    made = train_tokenizer("the cat sat on a mat " * 9, 290)
    shards = write_shards(tmp_path / "shards", [made.encode("the cat sat on a mat " * 99).ids], 300, made)
    windows = TokenWindows(shards, CONFIG.sequence_length, CONFIG.seed)
    if mixed:
        other = TokenWindows(torch.arange(99), CONFIG.sequence_length, CONFIG.seed)
        windows = MixtureWindows({"shards": windows, "other": other}, [(0, {"shards": 1, "other": 1})])
    trainer = Trainer(
        Decoder(ModelConfig(16, 16, 1, 2, 300)), windows, WSD(0.01, 2, 4, 4), CONFIG, layout=layout
    )
    for until in (2, 4):
        with pytest.raises(ValueError, match="wrong.json is not the tokenizer that made the ids of this run"):
            trained(trainer, until, folder=run, tokenizer=tmp_path / "wrong.json")
        trained(trainer, until, folder=run, tokenizer=shards.tokenizer_file())
        assert (run / "tokenizer.json").read_bytes() == shards.tokenizer_file().read_bytes()


def test_a_tokenizer_that_is_spelled_otherwise_is_the_same(layout, tmp_path):
    """As the tokenizers package saves it, with indents, and as many are released, with a limit of length."""
    made = train_tokenizer("the cat sat on a mat " * 9, 290)
    shards = write_shards(tmp_path / "shards", [made.encode("the cat sat on a mat " * 99).ids], 300, made)
    (tmp_path / "half.json").write_text("{")
    made.save(str(tmp_path / "indented.json"))
    made.enable_truncation(64)
    made.save(str(tmp_path / "limited.json"), pretty=False)
    trainer = Trainer(
        Decoder(ModelConfig(16, 16, 1, 2, 300)), shards, WSD(0.01, 2, 4, 4), CONFIG, layout=layout
    )
    with pytest.raises(ValueError, match="half.json is not a tokenizer.json of the tokenizers package"):
        trained(trainer, 1, folder=tmp_path / "run", tokenizer=tmp_path / "half.json")
    for spelled in ("indented.json", "limited.json"):
        file = tmp_path / spelled
        assert file.read_bytes() != shards.tokenizer_file().read_bytes()
        trained(trainer, 1, folder=tmp_path / spelled[:-5], tokenizer=file)
        assert (tmp_path / spelled[:-5] / "tokenizer.json").read_bytes() == file.read_bytes()


def test_what_is_no_tokenizer_is_refused_where_none_is_noted(make, tmp_path):
    (tmp_path / "novel.txt").write_text("It was a dark night")
    with pytest.raises(ValueError, match=r"novel.txt is not a tokenizer.json of the tokenizers package"):
        trained(make(), 1, folder=tmp_path / "run", tokenizer=tmp_path / "novel.txt")


def test_a_tokenizer_of_who_knows_what_run_is_refused(make, tmp_path):
    (tmp_path / "tokenizer.json").write_text("of an earlier attempt")
    (tmp_path / "metrics.jsonl").write_text("its metrics")
    with pytest.raises(
        FileExistsError, match=r"tokenizer.json lies beside no checkpoint, perhaps of an earlier"
    ):
        trained(make(), folder=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "its metrics"


@pytest.mark.parametrize(
    ("files", "foreign"),
    [
        ({"metrics.jsonl": '{"epoch": 1, "eval": 0.7}\n{"ep'}, "metrics.jsonl"),
        ({"metrics.jsonl": '{"step": 1, "eval": 0.7}\n'}, "metrics.jsonl"),
        ({"metrics.jsonl": '{"epoch": 1}\n', "tokenizer.json": "a model's"}, "metrics.jsonl"),
        ({"config.json": "{}", "tokenizer.json": "a model's"}, "tokenizer.json"),
        ({"tokenizer.json": tokenizer_of("the run's")}, None),
        ({"metrics.jsonl": '{"step": 1, "units": 16}\n{"st', "tokenizer.json": "an attempt's"}, None),
        ({"metrics.jsonl": '{"st', "tokenizer.json": "an attempt's"}, None),
        ({"metrics.jsonl": "", "notes.txt": "mine"}, None),
    ],
)
def test_what_no_attempt_left_is_not_replaced(make, tmp_path, files, foreign):
    (tmp_path / "given").write_text(tokenizer_of("the run's"))
    folder = tmp_path / "run"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    if foreign:
        with pytest.raises(FileExistsError, match=f"{foreign} lies beside no checkpoint and is not what an"):
            trained(make(), 1, folder=folder, tokenizer=tmp_path / "given")
        assert {path.name: path.read_text() for path in folder.iterdir()} == files
    else:
        trained(make(), 1, folder=folder, tokenizer=tmp_path / "given")
        assert len(lines(folder)) == 1 and (folder / "tokenizer.json").read_text() == tokenizer_of(
            "the run's"
        )


def test_a_decay_does_not_write_into_its_trunk(make, tmp_path):
    """Whether it has just branched or is resumed, and whatever the trunk has pruned."""
    trunk = make(schedule=WSD(0.01, 2, 100, 0))
    trained(trunk, 6, folder=tmp_path / "trunk", checkpoint_every=2, keep=9)
    start = tmp_path / "trunk" / "step-00000006"
    decay = decay_schedule(start, 4)

    def refused(run):
        with pytest.raises(
            FileExistsError, match="branched from another one at step 6. Choose another folder"
        ):
            trained(run, folder=tmp_path / "trunk", keep=1)
        assert sorted(checkpoints(tmp_path / "trunk")) == [2, 4, 6]

    branch = make(schedule=decay)
    branch.branch_from(start)
    refused(branch)
    if not trunk.layout.sharded:
        refused(trunk.branch(decay))
    trained(branch, 8, folder=tmp_path / "decay")
    resumed = make(schedule=decay)
    resumed.load(tmp_path / "decay" / "step-00000008")
    refused(resumed)
    trained(resumed, folder=tmp_path / "decay")
    assert sorted(checkpoints(tmp_path / "decay")) == [8, 10]
    trained(trunk, 8, folder=tmp_path / "trunk", keep=9)
    assert sorted(checkpoints(tmp_path / "trunk")) == [2, 4, 6, 8], "the trunk goes on"


def test_a_run_that_began_with_other_weights_is_another_one(make, reseal, tmp_path):
    """Though all its settings are the same. To go on, nobody needs the weights of the beginning."""
    one, model = make(), Decoder(make().model.config)
    other = Trainer(model, one.batches, one.schedule, one.config, layout=one.layout)  # drawn from elsewhere
    for name, run in (("one", one), ("other", other)):
        trained(run, 6, folder=tmp_path / name)
    mixed = make()
    mixed.load(tmp_path / "one" / "step-00000006")
    sentence = "step-00000006 is of a run that began with other weights than this one. Choose another folder"
    for write in (lambda: trained(mixed, folder=tmp_path / "other"), lambda: mixed.save(tmp_path / "other")):
        with pytest.raises(FileExistsError, match=sentence):
            write()
    again = make()
    again.load(tmp_path / "other" / "step-00000006")
    trained(again, folder=tmp_path / "other")
    assert again.losses == trained(other).losses
    reseal(tmp_path / "other" / "step-00000010", start_weights=None)  # as of one that does not say
    again.save(tmp_path / "other")
    old = make()
    old.load(tmp_path / "one" / "step-00000006")
    reseal(tmp_path / "one" / "step-00000006", start_weights=None)
    trained(old, folder=tmp_path / "one")


@pytest.mark.parametrize("what", ["text", "seed", "branch"])
def test_a_save_by_hand_replaces_no_other_run_s(make, tmp_path, what):
    run = trained(make(schedule=WSD(0.01, 2, 100, 0)), 3)
    path = run.save(tmp_path)
    before = (path / "checkpoint.json").read_bytes()
    if what == "branch":
        other = make(schedule=decay_schedule(path, 4))
        other.branch_from(path)
    else:
        how = {"text": dict(tokens=torch.arange(900) % 40), "seed": dict(config=replace(CONFIG, seed=1))}
        other = trained(make(schedule=run.schedule, **how[what]), 3)
    with pytest.raises(FileExistsError, match="Choose another folder"):
        other.save(tmp_path)
    assert (path / "checkpoint.json").read_bytes() == before
    assert run.save(tmp_path) == path, "its own is replaced"


def test_a_save_by_hand_goes_into_no_other_run_s_folder(make, tmp_path):
    """Also at a step of which that has no checkpoint: its next prune would remove it."""
    run = trained(make(), 4, folder=tmp_path)
    for step in (3, 4, 5):
        other = trained(make(config=replace(CONFIG, seed=1)), step)
        with pytest.raises(FileExistsError, match="belongs to another .*Choose another folder"):
            other.save(tmp_path)
    assert sorted(checkpoints(tmp_path)) == [4]
    trained(run, 6).save(tmp_path)
    early = trained(make(), 2)
    early.save(tmp_path)
    assert sorted(checkpoints(tmp_path)) == [2, 4, 6]


def test_two_programs_do_not_share_a_folder(make, tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(FileExistsError, match="is being written by another program. Wait for"),
    ):
        trained(make(), folder=tmp_path)
    assert listing(tmp_path) == []
    trained(make(), 2, folder=tmp_path)
    assert listing(tmp_path) == ["metrics.jsonl", "step-00000002"]


def test_a_checkpoint_that_lies_elsewhere_is_pruned_by_its_link(make, tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    trained(make(), 2, folder=folder)
    (folder / "step-00000002").rename(elsewhere)
    (folder / "step-00000002").symlink_to(elsewhere)
    (folder / ".step-00000001.pruned").symlink_to(elsewhere)  # of one that was killed
    run = make()
    run.load(folder / "step-00000002")
    trained(run, 5, folder=folder, checkpoint_every=1, keep=2)
    assert listing(folder) == ["metrics.jsonl", "step-00000004", "step-00000005"]
    run.load(elsewhere)


def test_what_a_process_killed_as_it_pruned_left_is_no_checkpoint(make, tmp_path, monkeypatch):
    trained(make(), 2, folder=tmp_path)
    run = make()
    run.load(tmp_path / "step-00000002")

    def killed(path):
        next(path.glob("*.safetensors")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.shutil, "rmtree", killed)
        trained(run, 4, folder=tmp_path, keep=1)
    assert sorted(checkpoints(tmp_path)) == [4]
    trained(run, 6, folder=tmp_path)
    assert listing(tmp_path) == ["metrics.jsonl", "step-00000004", "step-00000006"]
