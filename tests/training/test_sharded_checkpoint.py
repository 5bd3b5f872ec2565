"""Sharded checkpoints: no pickle, nothing half-written, and what does not fit is refused before anything changes."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from minicpm_lite import ModelConfig
from minicpm_lite.config import RopeScaling
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.layers import replace_linears
from minicpm_lite.training import trainer as trainer_module
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.sharded_checkpoint import (
    checkpoints,
    is_checkpoint,
    latest_checkpoint,
    load_weights,
    read_facts,
    run_of,
)
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

MODEL = ModelConfig(16, 40, 2, 2, 41, max_position_embeddings=64, scale_depth=1.4, dim_model_base=16)
CONFIG = TrainerConfig(batch_size=2, sequence_length=8)
SCHEDULE = WSD(0.01, 2, 4, 4)
TOKENS = (torch.arange(1000) * 7 // 3) % 41
SHARD = "shard-00001-model-00001-of-00001.safetensors"


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "step-00000004", tmp_path / "step-00000004")


def test_a_checkpoint_is_safetensors_and_json(make, saved):
    assert sorted(path.name for path in (saved / "step-00000004").iterdir()) == ["checkpoint.json", SHARD]
    tensors = load_file(saved / "step-00000004" / SHARD)
    parameters = dict(make().model.named_parameters())
    kinds = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    assert tensors.keys() == {f"{kind}.{name}" for kind in kinds for name in parameters} | {
        "losses",
        "grad_norms",
    }


def test_the_facts(make, saved):
    facts = read_facts(saved / "step-00000008")
    assert (facts["step"], facts["processes"], facts["torch"]) == (8, 1, torch.__version__)
    assert facts["model config"]["hidden_size"] == 16
    assert facts["trainer config"]["batch_size"] == 2
    assert facts["schedule"]["kind"] == "WSD" and facts["schedule"]["decay_steps"] == 4
    assert facts["text"]["tokens"] == 1000
    assert (
        set(facts["updates"].values()) == {8}
        and facts["updates"].keys() == dict(make().model.named_parameters()).keys()
    )


def test_the_newest_is_found_and_half_a_one_is_not(saved, tmp_path):
    assert latest_checkpoint(saved).name == "step-00000010"
    assert sorted(checkpoints(saved)) == [1, 4, 6, 8, 10]
    assert latest_checkpoint(tmp_path) is latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / ".step-00000012.writing").mkdir()
    (tmp_path / "step-00000013").mkdir()  # without its facts
    assert latest_checkpoint(tmp_path) is None


def test_weights_can_be_loaded_alone(make, saved):
    model = load_weights(saved / "step-00000010")
    trainer = make()
    trainer.load(saved / "step-00000010")
    for one, other in zip(model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, whole(other))
    assert model.config == MODEL and not any(module.training for module in model.modules())


class Ternary(nn.Linear):
    """Computes with -1, 0 and 1 in its weight's place; names and shapes are those of any linear layer."""

    def forward(self, x):
        size = self.weight.abs().mean()
        ternary = (self.weight / size).round().clamp(-1, 1) * size
        return F.linear(x, self.weight + (ternary - self.weight).detach())


class Adapted(nn.Linear):
    """Has weights of its own beside those of a linear layer."""

    def __init__(self, *sizes, **how) -> None:
        super().__init__(*sizes, **how)
        self.own = nn.Parameter(torch.zeros(self.out_features))

    def forward(self, x):
        return super().forward(x) + self.own


@pytest.mark.parametrize("kind", [Ternary, Adapted])
@pytest.mark.parametrize("which", ["", "layers.1.mlp.down_proj"])
def test_a_decoder_that_was_changed_inside_is_no_plain_one(make, layout, tmp_path, kind, which):
    """Its checkpoint is opened by one that was changed as it was, and by no other."""

    def changed(kind):
        torch.manual_seed(0)
        model = Decoder(MODEL)

        def change(name, linear):
            if not name.startswith(which):
                return linear
            return kind(linear.in_features, linear.out_features, bias=False)

        replace_linears(model, change)
        return Trainer(model, TOKENS, SCHEDULE, CONFIG, layout=layout)

    run = changed(kind)
    run.train(2, progress=False)
    path, plain = run.save(tmp_path / "changed"), make()
    with pytest.raises(
        ValueError, match=f"decoder that was changed inside: .*, of a built-in {kind.__name__}"
    ):
        load_weights(path)
    other = changed({Ternary: Adapted, Adapted: Ternary}[kind])
    for wrong in (plain, other):
        with pytest.raises(
            ValueError, match=f"another choice of parameters: .*of a built-in {kind.__name__}"
        ):
            wrong.load(path)
        assert wrong.step == 0
    with pytest.raises(ValueError, match="another choice of parameters: .*, this run's is .* of a built-in"):
        changed(kind).load(plain.save(tmp_path / "plain"))
    resumed = changed(kind)
    resumed.load(path)
    for each in (run, resumed):
        each.train(4, progress=False)
    assert resumed.losses == run.losses


def test_a_weight_that_a_plain_decoder_has_not_is_not_left_out(layout, tmp_path):
    """Though each module is of the class that stands there in a plain one."""
    torch.manual_seed(0)
    model = Decoder(MODEL)
    model.layers[1].self_attn.q_proj.bias = nn.Parameter(torch.ones(16))
    path = Trainer(model, TOKENS, SCHEDULE, CONFIG, layout=layout).save(tmp_path)
    with pytest.raises(
        ValueError, match="changed inside: layers.1.self_attn.q_proj.bias is trained in float32"
    ):
        load_weights(path)


def test_a_longrope_config_comes_back(make, tmp_path):
    scaling = RopeScaling("longrope", 32, short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 3.0, 4.0))
    config = replace(MODEL, rope_scaling=scaling)
    path = make(config).save(tmp_path)
    make(config).load(path)
    assert load_weights(path).config == config


def test_what_a_killed_save_left_is_removed_by_the_next_run(make, saved, tmp_path):
    (tmp_path / ".step-00000004.writing").mkdir()
    (tmp_path / ".step-00000004.writing" / "shard").write_bytes(b"half")
    trainer = make()
    trainer.train(2, tmp_path, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "step-00000002"]


def test_saving_twice_replaces(make, tmp_path):
    trainer = make()
    assert trainer.save(tmp_path) == trainer.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("at", ["tensors", "facts"])
def test_a_full_disk_leaves_the_old_checkpoints(make, tmp_path, monkeypatch, at):
    trainer = make()
    trainer.train(2, progress=False)
    before = trainer.save(tmp_path)
    trainer.train(3, progress=False)
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == {"tensors": 1, "facts": 2}[at]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="step-00000003 could not be written: No space left on device. Earlier"):
        trainer.save(tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [before]
    make().load(before)
    trainer.train(4, progress=False)  # and the run itself is whole


# What does not fit is refused, and nothing is changed.


@pytest.fixture
def refused(make):
    def refused(path, sentence, error=ValueError, **changes):
        trainer = make(**changes)
        weights = [whole(p).clone() for p in trainer.model.parameters()]
        with pytest.raises(error, match=sentence) as caught:
            trainer.load(path)
        assert "\n" not in str(caught.value)
        assert trainer.step == 0 and not trainer.optimizer.state and not trainer.losses
        parameters = trainer.model.parameters()
        assert all(torch.equal(whole(p), w) for p, w in zip(parameters, weights, strict=True))

    return refused


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(model=replace(MODEL, num_hidden_layers=3)), "another model config: its num_hidden_layers is 2, this run's is 3"),
        (dict(model=replace(MODEL, vocab_size=50)), "another model config: its vocab_size is 41, this run's is 50"),
        (dict(config=replace(CONFIG, batch_size=4)), "another trainer config: its batch_size is 2, this run's is 4"),
        (dict(config=replace(CONFIG, parametrization="mup")), "its parametrization is 'standard', this run's is 'mup'"),
        (dict(tokens=TOKENS.flip(0)), "belongs to another text: its checksum is"),
        (dict(config=replace(CONFIG, seed=3)), "its seed is 0, this run's is 3"),
        (dict(schedule=WSD(0.02, 2, 4, 4)), "another schedule: its rate at step 1 is 0.005, this run's is 0.01"),
        (dict(schedule=WSD(0.01, 2, 1, 4)), "another schedule: its rate at step 4 is 0.01, this"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_run(refused, saved, changes, sentence):
    refused(saved / "step-00000004", sentence, **changes)


def test_another_future_is_allowed(make, saved):
    for schedule in (WSD(0.01, 2, 2, 4), WSD(0.01, 2, 100, 0)):
        trainer = make(schedule=schedule)
        trainer.load(saved / "step-00000004")
        assert trainer.step == 4


def test_a_file_that_is_missing(refused, folder):
    (folder / SHARD).unlink()
    refused(folder, f"{SHARD} is missing; it was written with")


def test_a_file_that_is_truncated(refused, folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])
    refused(folder, f"{SHARD} is .* bytes long; it was written with .* Use an earlier checkpoint")


def test_a_file_that_is_damaged(refused, folder):
    size = (folder / SHARD).stat().st_size
    (folder / SHARD).write_bytes(b"\xff" * size)
    refused(folder, "A file of .* is damaged")


def rewritten(folder, change, reseal):
    with safe_open(folder / SHARD, framework="pt") as file:
        metadata = file.metadata()
    sharding = json.loads(metadata["DCP_SHARDING_INFO"])
    tensors = load_file(folder / SHARD)
    change(tensors)
    metadata["DCP_SHARDING_INFO"] = json.dumps(
        {name: sharding.get(name, {"saved_offsets": [0] * tensor.ndim}) for name, tensor in tensors.items()}
    )
    save_file(tensors, folder / SHARD, metadata)
    reseal(folder)


def test_a_read_that_fails_on_the_way_changes_nothing(make, saved, monkeypatch):
    """What was checked can still be unreadable; half of it may have been read by then."""
    trainer, untouched = make(), make()
    for each in (trainer, untouched):
        each.train(2, progress=False)

    def broken(checkpoint, facts, state):
        for tensor in state.values():
            tensor.fill_(7.0)
        raise ValueError("a file could not be read")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="could not be read"):
        patch.setattr(trainer_module, "read_tensors", broken)
        trainer.load(saved / "step-00000004")
    assert trainer.step == 2
    for each in (trainer, untouched):
        each.train(progress=False)
    assert trainer.losses == untouched.losses, "weights and moments are those of step 2"


@pytest.mark.parametrize("name", ["model.norm.weight", "optimizer.exp_avg.norm.weight", "losses"])
def test_tensors_that_are_missing_extra_or_of_another_shape(refused, folder, name, reseal):
    for change in (
        lambda tensors: tensors.pop(name),
        lambda tensors: tensors.update({name + "x": torch.zeros(3), name: torch.zeros(16)}),
        lambda tensors: tensors.update({name: torch.zeros(3)}) or tensors.pop(name + "x"),
    ):
        rewritten(folder, change, reseal)
        refused(folder, f"does not fit this run: {name}")


def test_a_piece_that_is_missing(refused, folder, reseal):
    """As if the file of one of two processes were gone: the rest would be filled with what was there before."""
    rewritten(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(15)}), reseal)
    refused(folder, "does not fit this run: model.norm.weight")


@pytest.mark.slow  # eighty damaged checkpoints; the tests above damage one
def test_one_flipped_bit_anywhere_is_noticed(make, refused, folder):
    """In values, headers and facts alike, whatever the file looks like afterwards."""
    for file in (folder / SHARD, folder / "checkpoint.json"):
        content = file.read_bytes()
        for place in [*range(0, len(content), len(content) // 40), len(content) - 1]:
            damaged = bytearray(content)
            damaged[place] ^= 0x10
            file.unlink()  # where a file is cut and written again, some systems wait for the disk
            file.write_bytes(damaged)
            refused(folder, "damaged|is not that of a checkpoint|does not fit this run|could not be read")
        file.write_bytes(content)
    make().load(folder)
    file = folder / SHARD
    file.write_bytes(file.read_bytes()[:-5] + b"\x00" + file.read_bytes()[-4:])
    refused(folder, f"{SHARD} is damaged: it is not as it was written. Use an earlier checkpoint")
    with pytest.raises(ValueError, match=f"{SHARD} is damaged"):
        load_weights(folder)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One byte changed, a stretch cut out, doubled or overwritten, or the end lost."""
    place, length = draw.randrange(len(content)), draw.choice((1, 8, 200))
    stretch = content[place : place + length]
    return draw.choice((
        content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :],
        content[:place] + content[place + length :],
        content[:place] + stretch + content[place:],
        content[:place] + draw.randbytes(len(stretch)) + content[place + length :],
        content[:place],
    ))  # fmt: skip


@pytest.mark.slow  # about 10 s: 600 damaged checkpoints, twice
def test_a_damaged_checkpoint_is_refused_or_is_the_same(make, folder):
    """Always with a sentence, whatever is damaged; what loads nevertheless has the weights that were saved."""
    weights, draw, refused = load_weights(folder).state_dict(), random.Random(0), 0
    for file in (folder / SHARD, folder / "checkpoint.json"):
        content = file.read_bytes()
        for _ in range(300):
            file.unlink()
            file.write_bytes(mutated(content, draw))
            try:
                found = load_weights(folder).state_dict()
            except ValueError as error:
                refused += 1
                assert str(folder) in str(error)
                continue
            assert all(torch.equal(found[name], weights[name]) for name in weights)
        file.write_bytes(content)
    assert refused > 580


def test_whoever_interrupts_a_read_or_a_write_is_heard(make, saved, tmp_path, monkeypatch):
    def interrupted(*call, **how):
        raise KeyboardInterrupt

    trainer = make()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dcp.HuggingFaceStorageReader, "read_data", interrupted)
        trainer.load(saved / "step-00000004")
    assert trainer.step == 0 and not trainer.optimizer.state
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dcp.HuggingFaceStorageWriter, "write_data", interrupted)
        trainer.save(tmp_path)
    assert latest_checkpoint(tmp_path) is None
    trainer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "other", "version": 1}'])
def test_foreign_facts(refused, folder, text):
    (folder / "checkpoint.json").write_text(text)
    refused(folder, "checkpoint.json is not that of a checkpoint of minicpm_lite")
    with pytest.raises(ValueError, match="is not that of a checkpoint"):
        load_weights(folder)


def test_no_checkpoint(refused, tmp_path):
    refused(tmp_path / "none", "There is no checkpoint at", FileNotFoundError)


def test_a_home_stands_for_its_folder_everywhere(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(saved, tmp_path / "run")
    newest = latest_checkpoint(saved)
    assert latest_checkpoint("~/run") == tmp_path / "run" / newest.name
    assert [path.name for path in checkpoints("~/run").values()] == [
        path.name for path in checkpoints(saved).values()
    ]
    place = f"~/run/{newest.name}"
    assert is_checkpoint(place) and run_of(place) == tmp_path / "run"
    one, other = (load_weights(each).state_dict() for each in (place, newest))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_the_run_of_a_checkpoint_that_a_link_names(tmp_path, monkeypatch):
    """A link of another name leads to the run of its checkpoint; one named like a checkpoint is its own run's."""
    step = tmp_path / "run" / "step-00000010"
    for folder in (step, tmp_path / "models", tmp_path / "other"):
        folder.mkdir(parents=True)
    (tmp_path / "models" / "best").symlink_to(step)
    (tmp_path / "other" / "step-00000010").symlink_to(step)
    assert run_of(tmp_path / "models" / "best") == run_of(step) == (tmp_path / "run").resolve()
    assert run_of(tmp_path / "other" / "step-00000010") == tmp_path / "other"
    monkeypatch.chdir(step)
    assert run_of(".") == (tmp_path / "run").resolve()
