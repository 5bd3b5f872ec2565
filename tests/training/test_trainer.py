"""The trainer learns, clips, branches, and resumes bit for bit even after kill -9."""

import ast
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from minicpm_lite import ModelConfig
from minicpm_lite.config import RopeScaling
from minicpm_lite.data.corpora import TokenWindows, batch_of
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.training.checkpoint import load_checkpoint, save_checkpoint
from minicpm_lite.training.trainer import Trainer, TrainerConfig, next_token_loss
from minicpm_lite.training.wind_tunnel import mup_groups
from minicpm_lite.training.wsd import WSD

MODEL = ModelConfig(32, 80, 2, 4, 40, num_key_value_heads=2, max_position_embeddings=64, scale_emb=12,
                    scale_depth=1.4, dim_model_base=32, init_std=0.1)  # fmt: skip
CONFIG = TrainerConfig(batch_size=4, sequence_length=16)
SCHEDULE = WSD(peak_lr=0.01, warmup_steps=5, stable_steps=25, decay_steps=10)
TOKENS = (torch.arange(3000) * 7 // 3) % 40  # a pattern that can be learned


def make(schedule=SCHEDULE, config=CONFIG, model=MODEL) -> Trainer:
    torch.manual_seed(0)
    return Trainer(Decoder(model), TOKENS, schedule, config)


def trained(until=None, **changes) -> Trainer:
    run = make(**changes)
    run.train(until, progress=False)
    return run


def assert_same(one: Trainer, other: Trainer) -> None:
    assert (one.step, one.losses, one.grad_norms) == (other.step, other.losses, other.grad_norms)
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_it_learns():
    run = trained()
    assert run.step == SCHEDULE.total_steps == len(run.losses)
    assert run.losses[0] > 3.5
    assert run.losses[-1] < 0.7 * run.losses[0]
    assert run.evaluate(TOKENS) == pytest.approx(run.losses[-1], abs=0.3)


def test_equal_to_the_loop_one_would_write():
    """Same weights as plain PyTorch with AdamW and the schedule as a torch scheduler."""
    run, model = make(), make().model
    tables = {id(model.embed_tokens.weight)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    others = [p for p in model.parameters() if p.ndim < 2 or id(p) in tables]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=SCHEDULE.peak_lr, betas=(0.9, 0.95),
    )  # fmt: skip
    scheduler = SCHEDULE.scheduler(optimizer)
    for step in range(12):
        window = batch_of(run.windows, step, CONFIG.batch_size)
        logits = model(window[:, :-1])
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), window[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    run.train(12, progress=False)
    for mine, plain in zip(run.model.parameters(), model.parameters(), strict=True):
        assert_close(mine, plain, atol=1e-5, rtol=1e-4)


def test_gradients_are_clipped():
    run = make(config=replace(CONFIG, max_grad_norm=1e-3))
    seen = []
    step = run.optimizer.step
    run.optimizer.step = lambda: (
        seen.append(sum(p.grad.norm() ** 2 for p in run.model.parameters()).sqrt().item()), step()
    )  # fmt: skip
    run.train(3, progress=False)
    assert seen == pytest.approx([1e-3] * 3, rel=1e-2)
    assert min(run.grad_norms) > 1e-2, "what is recorded is the norm before clipping"


def test_same_seed_same_run_other_seed_other_data():
    assert_same(trained(10), trained(10))
    assert trained(10).losses != trained(10, config=replace(CONFIG, seed=1)).losses


def test_stopping_and_going_on_changes_nothing():
    run = make()
    for until in (3, 4, 20, None):
        run.train(until, progress=False)
    assert_same(run, trained())


def test_resume_is_bit_for_bit(tmp_path):
    trained(17).save(tmp_path / "run.safetensors")
    resumed = make()
    resumed.load(tmp_path / "run.safetensors")
    resumed.train(progress=False)
    assert_same(resumed, trained())


KILLED = """
import sys
sys.path[:0] = {path!r}
from test_trainer import make
run = make()
run.train(checkpoint={checkpoint!r}, checkpoint_every=1, progress=False)
"""


def test_resume_after_kill_9(tmp_path):
    """A process is killed while it writes checkpoints; the run that goes on equals one that was never killed."""
    checkpoint = tmp_path / "run.safetensors"
    script = KILLED.format(path=[os.path.dirname(__file__)], checkpoint=str(checkpoint))
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.time() + 60
    while not checkpoint.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = make()
    resumed.load(checkpoint)
    assert 0 < resumed.step <= SCHEDULE.total_steps
    resumed.train(checkpoint=checkpoint, progress=False)
    assert_same(resumed, trained())
    assert list(tmp_path.iterdir()) == [checkpoint], "nothing of the killed process is left"


def test_a_branch_leaves_its_trunk_alone():
    trunk = trained(20)
    before = [p.clone() for p in trunk.model.parameters()]
    decay = WSD(0.01, 5, 15, 5)
    branch = trunk.branch(decay)
    branch.train(progress=False)
    assert branch.step == 25 and trunk.step == 20 and len(trunk.losses) == 20
    assert all(torch.equal(p, b) for p, b in zip(trunk.model.parameters(), before, strict=True))
    assert_same(branch, trained(schedule=decay))
    trunk.train(progress=False)
    assert_same(trunk, trained())


def test_a_file_can_be_decayed_under_another_schedule(tmp_path):
    trained(20).save(tmp_path / "stable.safetensors")
    decay = WSD(0.01, 5, 15, 5)
    branch = make(schedule=decay)
    branch.load(tmp_path / "stable.safetensors")
    branch.train(progress=False)
    assert_same(branch, trained(schedule=decay))


def test_bfloat16_trains_and_keeps_float32_weights():
    run, full = trained(config=replace(CONFIG, precision="bfloat16")), trained()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert run.losses != full.losses
    assert run.losses[-1] == pytest.approx(full.losses[-1], abs=0.1)


COMPILED = """
import sys
sys.path[:0] = {path!r}
from test_trainer import CONFIG, replace, trained
print(trained(5, config=replace(CONFIG, compile=True)).losses)
"""


@pytest.mark.slow  # about 20 s: the compiler starts; in a process without the shape checks, which it cannot compile
def test_compiled_training_equals_eager():
    script = COMPILED.format(path=[os.path.dirname(__file__)])
    printed = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    assert ast.literal_eval(printed) == pytest.approx(trained(5).losses, abs=1e-4)


def test_loss_of_a_uniform_model_is_known():
    model = Decoder(MODEL)
    torch.nn.init.zeros_(model.embed_tokens.weight)
    assert next_token_loss(model, TOKENS[None, :17]).item() == pytest.approx(
        torch.tensor(40.0).log().item(), rel=1e-5
    )


def test_evaluation_counts_every_window_once():
    run = make()
    windows = torch.stack([TOKENS[i : i + 17] for i in range(0, len(TOKENS) - 16, 16)])
    assert run.evaluate(TOKENS, batch_size=7) == pytest.approx(
        next_token_loss(run.model, windows).item(), rel=1e-5
    )


# Files that do not fit are refused with a sentence, and the run is left as it was.


def test_truncated_file(tmp_path):
    path = tmp_path / "run.safetensors"
    trained(2).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file.*truncated"):
        make().load(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        make().load(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of minicpm_lite"):
        make().load(path)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at"):
        make().load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (dict(model=replace(MODEL, num_hidden_layers=3)), "another model config: its num_hidden_layers is 2, this run's is 3"),
        (dict(config=replace(CONFIG, batch_size=8)), "another trainer config: its batch_size is 4, this run's is 8"),
        (dict(config=replace(CONFIG, seed=5)), "its seed is 0, this run's is 5"),
    ],
)  # fmt: skip
def test_checkpoint_of_another_config(tmp_path, other, sentence):
    trained(2).save(tmp_path / "run.safetensors")
    run = make(**other)
    with pytest.raises(ValueError, match=sentence):
        run.load(tmp_path / "run.safetensors")
    assert run.step == 0


@pytest.mark.parametrize("name", ["model.norm.weight", "optimizer.exp_avg.norm.weight", "losses"])
@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen"])
def test_checkpoint_with_other_tensors(tmp_path, damage, name):
    path = tmp_path / "run.safetensors"
    trained(2).save(path)
    tensors, facts = load_checkpoint(path)
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name + ".extra" if damage == "extra" else name] = torch.zeros(3)
    save_checkpoint(path, tensors, facts)
    run = make()
    with pytest.raises(ValueError, match=f"does not fit this run: {name}"):
        run.load(path)
    assert_same(run, make())


def test_checkpoint_without_moments_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    trained(2).save(path)
    tensors, facts = load_checkpoint(path)
    save_checkpoint(path, {n: t for n, t in tensors.items() if not n.startswith("optimizer")}, facts)
    with pytest.raises(ValueError, match="does not fit this run: optimizer"):
        make().load(path)


def test_checkpoint_of_another_text(tmp_path):
    trained(2).save(tmp_path / "run.safetensors")
    run = Trainer(Decoder(MODEL), TOKENS.flip(0), SCHEDULE, CONFIG)
    with pytest.raises(ValueError, match="belongs to another text: its checksum is"):
        run.load(tmp_path / "run.safetensors")


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_update_leaves_the_run_as_it_was(monkeypatch, stopped_by):
    run = trained(10)

    def interrupted():
        raise stopped_by

    with monkeypatch.context() as patch, pytest.raises(stopped_by):
        patch.setattr(run.optimizer, "step", interrupted)
        run.train(progress=False)
    run.train(progress=False)
    assert_same(run, trained())


def test_evaluation_leaves_the_mode_as_it_was():
    run = make()
    for mode in (True, False):
        run.model.train(mode)
        run.evaluate(TOKENS)
        assert run.model.training is mode


def test_a_checkpoint_is_written_at_the_end_into_a_new_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "run.safetensors"
    run = make()
    run.train(3, checkpoint=path, progress=False)
    assert load_checkpoint(path)[1]["step"] == 3
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="checkpoint_every is 0"):
        run.train(5, checkpoint=path, checkpoint_every=0)


@pytest.mark.parametrize(
    ("make_it", "sentence"),
    [
        (
            lambda: Trainer(Decoder(MODEL), TOKENS + 1, SCHEDULE, CONFIG),
            "ids from 1 to 40; the model knows 0 to 39",
        ),
        (
            lambda: make(config=replace(CONFIG, sequence_length=65)),
            "sequence_length is 65; the model was made for 64",
        ),
        (
            lambda: Trainer(Decoder(MODEL), TokenWindows(TOKENS, 8, 0), SCHEDULE, CONFIG),
            "windows predict 8 tokens each, and sequence_length is 16",
        ),
        (
            lambda: replace(CONFIG, parametrization="ntk"),
            "parametrization is 'ntk'; choose standard or mup",
        ),
    ],
)
def test_text_and_lengths_that_do_not_fit_the_model(make_it, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_it()


def test_a_run_with_longrope_factors_resumes(tmp_path):
    """JSON has no tuples, and the factors are one."""
    scaling = RopeScaling("longrope", 32, short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 3.0, 4.0))
    config = replace(MODEL, rope_scaling=scaling)
    run = Trainer(Decoder(config), TOKENS, SCHEDULE, CONFIG)
    run.train(2, progress=False)
    run.save(tmp_path / "run.safetensors")
    resumed = Trainer(Decoder(config), TOKENS, SCHEDULE, CONFIG)
    resumed.load(tmp_path / "run.safetensors")
    assert resumed.step == 2


def test_nothing_is_lost_when_writing_fails(tmp_path, monkeypatch):
    """A full disk in the middle of a save: the old checkpoint stands, and no half file is left."""
    path = tmp_path / "run.safetensors"
    run = trained(2)
    run.save(path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="run.safetensors could not be written: No space left"):
        run.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_blows_up_says_where():
    run = make(schedule=WSD(1e30, 0, 10, 0))
    with pytest.raises(FloatingPointError, match=r"gradient of step \d+ is not finite.*lower peak"):
        run.train(progress=False)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(precision="fp8"), "precision is 'fp8'; choose float32 or bfloat16"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(max_grad_norm=-1), "max_grad_norm is -1"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1"),
    ],
)
def test_impossible_trainers(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(CONFIG, **change)


def test_too_short_held_out_text():
    with pytest.raises(ValueError, match="has 5 tokens; at least 17"):
        make().evaluate(TOKENS[:5])


def test_a_complement_is_read_and_not_predicted():
    model = make().model
    window = TOKENS[:34].view(2, 17).clone()
    losses = torch.nn.functional.cross_entropy(
        model(window[:, :-1]).transpose(1, 2), window[:, 1:], reduction="none"
    )
    context = torch.zeros_like(window, dtype=torch.bool)
    context[0, :9] = True
    context[1, [0, 4, 16]] = True
    counted = losses[~context[:, 1:]]
    masked = torch.where(context, ~window, window)
    assert_close(next_token_loss(model, masked), counted.mean())
    assert_close(next_token_loss(model, masked, "sum"), counted.sum())


def test_a_branch_may_go_on_with_another_text():
    run = trained(10)
    other = run.branch(SCHEDULE, TOKENS.flip(0))
    assert torch.equal(other.windows.tokens, TOKENS.flip(0))
    assert_same(run, other)
    other.train(12, progress=False)
    run.train(12, progress=False)
    assert other.losses[:10] == run.losses[:10] and other.losses[10:] != run.losses[10:]


def test_mup_gives_matrices_a_smaller_rate():
    """As two plain AdamW groups would, with the schedule as a torch scheduler."""
    model = replace(MODEL, dim_model_base=8)
    config = replace(CONFIG, parametrization="mup")
    run, plain = make(config=config, model=model), make(model=model).model
    optimizer = torch.optim.AdamW(mup_groups(plain, SCHEDULE.peak_lr, 0.1), betas=(0.9, 0.95))
    scheduler = SCHEDULE.scheduler(optimizer)
    for step in range(12):
        next_token_loss(plain, batch_of(run.windows, step, CONFIG.batch_size)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    run.train(12, progress=False)
    rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
    assert min(rates.values()) == pytest.approx(SCHEDULE(12) / 4) and max(rates.values()) == SCHEDULE(12)
    for mine, theirs in zip(run.model.parameters(), plain.parameters(), strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    with pytest.raises(AssertionError):
        for mine, theirs in zip(trained(12, model=model).model.parameters(), plain.parameters(), strict=True):
            assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
