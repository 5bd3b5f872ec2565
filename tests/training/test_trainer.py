"""The trainer learns, branches, and resumes bit for bit: any module, any objective, even after kill -9."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from minicpm_lite import ModelConfig
from minicpm_lite.config import MixtureConfig
from minicpm_lite.data.shards import write_shards
from minicpm_lite.data.windows import TokenWindows
from minicpm_lite.inference.packed import quantize_model
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.documents import loss_within_documents
from minicpm_lite.language.scoring import context_only, next_token_loss, predicted, token_losses
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.training.batches import WindowBatches
from minicpm_lite.training.branch import decay_schedule
from minicpm_lite.training.objective import Objective, next_token, within_documents
from minicpm_lite.training.optimizer import mup_groups
from minicpm_lite.training.processes import processes
from minicpm_lite.training.run_folder import RunFolder
from minicpm_lite.training.settings import Layout, TrainerConfig
from minicpm_lite.training.sharded_checkpoint import checkpoints, latest_checkpoint, load_weights
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

MODEL = ModelConfig(32, 80, 2, 4, 40, num_key_value_heads=2, max_position_embeddings=64, scale_emb=12,
                    scale_depth=1.4, dim_model_base=32, init_std=0.1)  # fmt: skip
CONFIG = TrainerConfig(batch_size=4, sequence_length=16)
SCHEDULE = WSD(peak_lr=0.01, warmup_steps=5, stable_steps=25, decay_steps=10)
ALL_AT_ONCE = Layout()
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
        window = run.batches[step]
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


def test_an_empty_name_is_no_folder(tmp_path, monkeypatch):
    """As of a variable of the environment that is not set: days of steps would be kept nowhere."""
    monkeypatch.chdir(tmp_path)
    for write in (lambda: make().train(2, folder="", progress=False), lambda: make().save("")):
        with pytest.raises(ValueError, match="folder is an empty name; expected a path"):
            write()
    assert not list(tmp_path.iterdir())
    make().train(2, folder=Path(""), progress=False)
    assert latest_checkpoint(tmp_path).name == "step-00000002"


def test_half_a_step_is_none():
    with pytest.raises(ValueError, match="until is 1.5; expected a whole number, the step to stop at"):
        make().train(1.5, progress=False)


def test_same_seed_same_run_other_seed_other_data():
    assert_same(trained(10), trained(10))
    assert trained(10).losses != trained(10, config=replace(CONFIG, seed=1)).losses


def test_stopping_and_going_on_changes_nothing():
    run = make()
    for until in (3, 4, 20, None):
        run.train(until, progress=False)
    assert_same(run, trained())


def test_resume_is_bit_for_bit(tmp_path):
    path = trained(17).save(tmp_path)
    resumed = make()
    resumed.load(path)
    resumed.train(progress=False)
    assert_same(resumed, trained())


KILLED = """
import sys
sys.path[:0] = {path!r}
from test_trainer import make
run = make()
run.train(folder={folder!r}, checkpoint_every=1, progress=False)
"""


@pytest.mark.slow  # a process starts; the quick test is the one above
def test_resume_after_kill_9(tmp_path):
    """A process is killed while it writes checkpoints; the run that goes on equals one that was never killed."""
    script = KILLED.format(path=[os.path.dirname(__file__)], folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.time() + 60
    while latest_checkpoint(tmp_path) is None and time.time() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = make()
    resumed.load(latest_checkpoint(tmp_path))
    assert 0 < resumed.step <= SCHEDULE.total_steps
    resumed.train(folder=tmp_path, progress=False)
    assert_same(resumed, trained())
    metrics = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in metrics] == resumed.losses
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert not left, "nothing of the killed process is left"


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


def test_a_checkpoint_can_be_decayed_under_another_schedule(tmp_path):
    path = trained(20).save(tmp_path)
    decay = WSD(0.01, 5, 15, 5)
    assert decay == decay_schedule(path, 5)
    for go_on in (Trainer.load, Trainer.branch_from):
        branch = make(schedule=decay)
        go_on(branch, path)
        branch.train(progress=False)
        assert_same(branch, trained(schedule=decay))


def test_bfloat16_trains_and_keeps_float32_weights():
    run, full = trained(config=replace(CONFIG, precision="bfloat16")), trained()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert run.losses != full.losses
    assert run.losses[-1] == pytest.approx(full.losses[-1], abs=0.1)


def test_evaluation_counts_every_window_once():
    run = make()
    windows = torch.stack([TOKENS[i : i + 17] for i in range(0, len(TOKENS) - 16, 16)])
    assert run.evaluate(TOKENS, batch_size=7) == pytest.approx(
        next_token_loss(run.model, windows).item(), rel=1e-5
    )


def test_evaluation_takes_any_ids_and_counts_what_is_predicted():
    run, held_out = make(), TOKENS[:161]  # ten windows
    whole = run.evaluate(held_out)
    assert run.evaluate(held_out.int()) == whole
    answers = torch.where(torch.arange(161) % 3 > 0, context_only(held_out), held_out)
    windows = torch.stack([answers[i : i + 17] for i in range(0, 160, 16)])
    assert run.evaluate(answers) == pytest.approx(next_token_loss(run.model, windows).item(), rel=1e-5)
    assert abs(run.evaluate(answers) - whole) > 1e-3 and run.evaluate(answers.int()) == run.evaluate(answers)


def test_evaluation_of_the_next_token_sums_and_divides_once():
    """The mean of batches of unequal numbers of predictions, without the rounding of each batch's mean."""
    run, marked = make(), torch.where(torch.arange(161) % 3 > 0, context_only(TOKENS[:161]), TOKENS[:161])
    windows = torch.stack([marked[i : i + 17] for i in range(0, 160, 16)])
    with torch.no_grad():
        total = sum(token_losses(run.model.eval(), part).sum().item() for part in windows.split(3))
    assert run.evaluate(marked, batch_size=3) == total / predicted(windows).sum().item()


def test_evaluation_measures_what_the_run_minimises():
    """Documents apart where they were in training; and any objective over windows, by its own units."""
    held_out = TOKENS[:161]
    windows = torch.stack([held_out[i : i + 17] for i in range(0, 160, 16)])
    run = make()
    run.objective = within_documents(end=6)
    with torch.no_grad():
        apart = loss_within_documents(run.model.eval(), windows, 6).item()
        mixed = next_token_loss(run.model, windows).item()
    assert run.evaluate(held_out, batch_size=3) == pytest.approx(apart, rel=1e-6)
    assert abs(apart - mixed) > 1e-3, "the two differ here"

    def largest(model, window):
        loss = token_losses(model, window).amax(dim=1).mean()
        return loss, loss.detach()

    run.objective = Objective("the worst token", largest, len)
    with torch.no_grad():
        worst = largest(run.model, windows)[0].item()
    assert run.evaluate(held_out, batch_size=3) == pytest.approx(worst, rel=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_another_objective_is_minimised_from_the_next_step_on(compiled, monkeypatch):
    monkeypatch.setattr("minicpm_lite.training.trainer._compiled", lambda loss: loss)
    run = trained(2, config=replace(CONFIG, compile=compiled))
    run.objective = Objective("ten", lambda model, window: (model(window[:, :-1]).sum() * 0 + 10,) * 2, len)
    run.train(3, progress=False)
    assert run.losses[-1] == 10 and run.grad_norms[-1] == 0


class Packed(nn.Module):
    """Computes with what it makes of a frozen weight, anew when its state is loaded, as a quantised layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(3, 3), requires_grad=False), nn.Linear(3, 3)
        self.register_buffer("packed", self.weight.detach().clone(), persistent=False)
        self.register_load_state_dict_post_hook(Packed.pack)

    def pack(self, keys) -> None:
        self.packed.copy_(self.weight)

    def forward(self, x):
        return self.linear(x @ self.packed)


class LeavesOut(nn.Module):
    """Shows what is trained alone, and that shortened, as adapters do; a checkpoint holds parameters all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.linear = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)  # whose state has a version, which it looks at when it is loaded

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {name: each.bfloat16() for name, each in state.items() if "frozen" not in name}

    def forward(self, x):
        return self.linear(self.norm(self.frozen(x)))


class LeavesOutAndPacks(LeavesOut, Packed):
    """Both."""


@pytest.mark.parametrize("kind", [Packed, LeavesOut, LeavesOutAndPacks])
def test_what_a_module_makes_of_its_weights_is_made_anew(tmp_path, kind):
    class Rows:
        def __getitem__(self, step):
            return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))

        def identity(self):
            return {}

    def run(seed):
        torch.manual_seed(seed)
        square = Objective("square", lambda model, rows: (model(rows).square().mean(),) * 2, len)
        return Trainer(kind(), Rows(), WSD(0.1, 0, 6, 0), CONFIG, square)

    whole, resumed = run(0), run(1)
    whole.train(3, tmp_path, progress=False)
    resumed.load(tmp_path / "step-00000003")
    for each in (whole, resumed):
        each.train(progress=False)
    assert resumed.losses == whole.losses


def test_weights_that_were_shortened_since_are_not_trained():
    run = trained(2)
    run.model.bfloat16()
    with pytest.raises(ValueError, match="embed_tokens.weight is trained and is in bfloat16, in which most"):
        run.train(progress=False)
    run.model.float()
    run.train(3, progress=False)


@pytest.mark.parametrize("name", ["model", "config", "layout"])
def test_what_the_optimizer_was_made_for_stays(name):
    run = make()
    before = getattr(run, name)
    with pytest.raises(AttributeError, match=f"property '{name}' of 'Trainer' object has no setter"):
        setattr(run, name, before)
    assert getattr(run, name) is before


def test_evaluation_refuses_what_it_cannot_measure():
    run = make()
    with pytest.raises(ValueError, match="ids from 0 to 96; the model knows 0 to 39"):
        run.evaluate(torch.arange(100))
    with pytest.raises(ValueError, match="batch_size is 0"):
        run.evaluate(TOKENS, batch_size=0)


def test_one_run_knows_one_tokenizer(tmp_path):
    """Ids that another one made mean other texts; so it is in evaluation, and where the data are replaced."""
    folders, shape = {}, replace(MODEL, vocab_size=300)
    for name, text in (("own", "the cat sat "), ("foreign", "a dog ran by ")):
        cutter = train_tokenizer(text * 9, 257)
        for part in ("read", "held out"):
            ids = torch.randint(0, 40, (500,))
            folders[name, part] = write_shards(tmp_path / name / part, [ids.numpy()], 300, cutter)
    run = Trainer(Decoder(shape), folders["own", "read"], SCHEDULE, CONFIG)
    run.train(2, progress=False)
    assert math.isfinite(run.evaluate(folders["own", "held out"]) + run.evaluate(TOKENS))
    sentence = "were cut with different tokenizers; one model knows one"
    with pytest.raises(ValueError, match=f"the held-out stream and the data of this run {sentence}"):
        run.evaluate(folders["foreign", "held out"])
    for batches in (folders["foreign", "read"], TokenWindows(folders["foreign", "read"], 16, 0)):
        before = run.batches
        with pytest.raises(ValueError, match=f"these batches and what this run has read {sentence}"):
            run.batches = batches
        assert run.batches is before
    for batches in (folders["own", "held out"], TOKENS):
        run.batches = batches
    new = Trainer(Decoder(shape), folders["own", "read"], SCHEDULE, CONFIG)
    new.batches = folders["foreign", "read"]  # of which nothing was read yet
    new.train(1, progress=False)


def test_evaluation_refuses_what_is_no_stream(monkeypatch):
    run = make()
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a reader
    with pytest.raises(ValueError, match=r"of type torch.float32; expected int64"):
        run.evaluate(TOKENS + 0.7)
    for ids in (TOKENS.tolist(), TOKENS.numpy()):
        with pytest.raises(TypeError, match=r"expected a tensor of token ids, torch.as_tensor"):
            run.evaluate(ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_are_too_short_to_be_trained(dtype):
    model = Decoder(MODEL).to(dtype)
    with pytest.raises(
        ValueError, match=rf"embed_tokens.weight is trained and is in {str(dtype)[6:]}, in which"
    ):
        Trainer(model, TOKENS, SCHEDULE, CONFIG)
    model.requires_grad_(False)
    model.norm.float().requires_grad_()
    Trainer(model, TOKENS, SCHEDULE, CONFIG)  # what is frozen may be short


# Files that do not fit are refused with a sentence, and the run is left as it was.


def test_checkpoint_of_another_objective(tmp_path):
    path = trained(2).save(tmp_path)
    run = Trainer(Decoder(MODEL), TOKENS, SCHEDULE, CONFIG, replace(next_token, name="last token"))
    with pytest.raises(ValueError, match="another objective: its name is 'next token', this run's is 'last"):
        run.load(path)
    assert run.step == 0


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


def test_an_evaluation_that_fails_leaves_the_mode_as_it_was():
    run = make()
    for mode in (True, False):
        run.model.train(mode)
        with pytest.raises(ZeroDivisionError):
            run.objective = Objective("none", lambda model, window: 1 / 0, next_token.weight)
            run.evaluate(TOKENS)
        run.objective = next_token
        with pytest.raises(ValueError, match="holds nothing that is to be predicted"):
            run.evaluate(context_only(TOKENS))
        assert run.model.training is mode


def test_shards_are_a_stream_too(tmp_path):
    shards = write_shards(tmp_path / "shards", [TOKENS.tolist()], 40)
    windows = TokenWindows(shards, CONFIG.sequence_length, CONFIG.seed)
    one, other = (Trainer(make().model, batches, SCHEDULE, CONFIG) for batches in (shards, windows))
    for run in (one, other):
        run.train(3, progress=False)
    assert one.losses == other.losses and one.branch(SCHEDULE, shards).step == 3


@pytest.mark.parametrize("batches", [[TOKENS], iter([TOKENS]), torch.utils.data.DataLoader(TOKENS)], ids=type)
def test_what_gives_no_batch_of_a_step(batches):
    with pytest.raises(
        ValueError, match=f"The batches are a {type(batches).__name__}; expected tokens, shar"
    ):
        Trainer(Decoder(MODEL), batches, SCHEDULE, CONFIG)


def test_a_model_without_weights():
    with torch.device("meta"):
        model = Decoder(MODEL)
    with pytest.raises(
        ValueError, match="The Decoder is on the meta device and has no weights.*sharded=True"
    ):
        Trainer(model, TOKENS, SCHEDULE, CONFIG)


def test_a_compiled_model_is_refused():
    """Its checkpoints would name weights as nobody else does."""
    compiled = torch.compile(Decoder(MODEL), backend="eager")
    with pytest.raises(ValueError, match=r"what torch.compile made of one.*TrainerConfig\(compile=True\)"):
        Trainer(compiled, TOKENS, SCHEDULE, CONFIG)


def test_a_cut_needs_processes():
    with pytest.raises(ValueError, match="none were joined. Make and train it within `with processes"):
        Trainer(Decoder(MODEL), TOKENS, SCHEDULE, CONFIG, layout=Layout(sharded=True))


def test_a_checkpoint_is_written_at_the_end_into_a_new_folder(tmp_path):
    folder = tmp_path / "new" / "folder"
    run = make()
    run.train(3, folder=folder, progress=False)
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "step-00000003"}
    for name in ("checkpoint_every", "keep"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            run.train(5, folder=folder, **{name: 0})
    assert run.step == 3


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
    ],
)
def test_text_and_lengths_that_do_not_fit_the_model(make_it, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_it()


KINDS = {
    "tokens": lambda windows, size: windows.tokens,
    "windows": lambda windows, size: windows,
    "batches": WindowBatches,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_may_be_given_as_any_kind_at_the_door_and_later(kind):
    """The updates are the same; and what does not fit is refused at both places."""

    other = TOKENS.flip(0)

    def given(tokens=other, length=16, size=4):
        return KINDS[kind](TokenWindows(tokens, length, 0), size)

    whole, changed = Trainer(make().model, given(), SCHEDULE, CONFIG), make()
    changed.batches = given()
    assert changed.batches.identity() == whole.batches.identity() != make().batches.identity()
    for run in (whole, changed):
        run.train(3, progress=False)
    assert_same(whole, changed)
    refused = {"ids from 1 to 40; the model knows 0 to 39": lambda: given(TOKENS + 1)}
    if kind != "tokens":
        refused["windows predict 8 tokens each, and sequence_length is 16"] = lambda: given(length=8)
    if kind == "batches":
        refused["batches are of 8 windows, and batch_size is 4"] = lambda: given(size=8)
    for sentence, wrong in refused.items():
        with pytest.raises(ValueError, match=sentence):
            Trainer(make().model, wrong(), SCHEDULE, CONFIG)
        before = changed.batches
        with pytest.raises(ValueError, match=sentence):
            changed.batches = wrong()
        assert changed.batches is before


def test_what_is_read_is_none_of_these_kinds():
    run = make()
    for wrong in (TOKENS.tolist(), "text", None):
        with pytest.raises(
            ValueError, match=f"batches are a {type(wrong).__name__}; expected tokens, shards"
        ):
            run.batches = wrong


def test_a_run_that_blows_up_says_where():
    run = make(schedule=WSD(1e30, 0, 10, 0))
    with pytest.raises(FloatingPointError, match=r"gradient of step \d+ is not finite.*lower peak"):
        run.train(progress=False)


def test_too_short_held_out_text():
    with pytest.raises(ValueError, match="has 5 tokens; at least 17"):
        make().evaluate(TOKENS[:5])


def test_a_branch_may_go_on_with_another_text():
    run = trained(10)
    other = run.branch(SCHEDULE, TOKENS.flip(0))
    assert torch.equal(other.batches.windows.tokens, TOKENS.flip(0))
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
        next_token_loss(plain, run.batches[step]).backward()
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


# Passes, in one process.


class Conversations:
    """Windows of which ever more is context only, so that passes predict very different numbers."""

    length = 16

    def __init__(self, silent=()):
        self.windows, self.silent = TokenWindows(TOKENS, 16, 0), silent

    def __getitem__(self, index):
        window, read = self.windows[index].clone(), 1 + 16 * (index % 4) // 3
        if index // CONFIG.batch_size in self.silent:
            read = 17
        window[:read] = context_only(window[:read])
        return window

    def id_range(self):
        return self.windows.id_range()

    def identity(self):
        return self.windows.identity() | {"conversations": True}


@pytest.mark.parametrize(
    "layout", [Layout(1), Layout(3), Layout(9), Layout(None, True), Layout(2, True)], ids=str
)
def test_passes_and_recomputation_change_nothing(layout):
    runs = []
    for how in (Layout(), layout):
        torch.manual_seed(0)
        runs.append(Trainer(Decoder(MODEL), Conversations(), SCHEDULE, CONFIG, layout=how))
        runs[-1].train(8, progress=False)
    assert runs[1].losses == pytest.approx(runs[0].losses, abs=1e-5)
    assert runs[1].grad_norms == pytest.approx(runs[0].grad_norms, abs=1e-4)
    batch = runs[0].batches[0]
    means = [next_token.loss(make().model, part)[1].item() for part in batch.split(1)]
    assert abs(sum(means) / 4 - runs[0].losses[0]) > 1e-3, "a mean of means would be noticed"


def test_branches_of_a_run_that_computes_blocks_again():
    trunk, plain = (
        Trainer(make().model, TOKENS, SCHEDULE, CONFIG, layout=Layout(None, again)) for again in (True, False)
    )
    for run in (trunk, plain):
        run.train(3, progress=False)
    branch = trunk.branch(SCHEDULE)
    branch.train(6, progress=False)
    plain.train(6, progress=False)
    assert_same(branch, plain)
    assert trunk.step == 3 and trunk.losses == plain.losses[:3]


def test_a_step_that_predicts_nothing_is_refused(tmp_path):
    """The first edition recorded nan and went on; what was made before is kept."""
    run = Trainer(Decoder(MODEL), Conversations(silent=[3]), SCHEDULE, CONFIG)
    with pytest.raises(ValueError, match="batch of step 4 holds nothing that is to be predicted"):
        run.train(folder=tmp_path, progress=False)
    assert run.step == len(run.losses) == 3 and list(checkpoints(tmp_path)) == [3]


# Any module, any objective, any batches.


class Ranker(nn.Module):
    """Scores a text: a frozen table, layers that learn, one that nothing uses, and a count that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.score, self.idle = nn.Embedding(40, 8), nn.Linear(8, 1, bias=False), nn.Linear(8, 8)
        self.mix = nn.Linear(8, 8)
        self.table.requires_grad_(False)
        self.register_buffer("texts_read", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, ids):
        state = self.mix(self.table(ids)).tanh().mean(dim=1)
        if self.training:
            self.texts_read += len(ids)
            self.mean.lerp_(state.detach().mean(dim=0).float(), 0.1)
        return self.score(state - self.mean.to(state.dtype)).squeeze(1).float()


class Pairs:
    """Two texts a row, of which the first is the better one."""

    def __init__(self, seed=0):
        self.seed = seed

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        worse = torch.randint(40, (6, 5), generator=generator)
        return {"better": worse // 2, "worse": (worse,)}

    def identity(self):
        return {"pairs": self.seed}


def _prefer(model, batch):
    loss = -F.logsigmoid(model(batch["better"]) - model(batch["worse"][0])).mean()
    return loss, loss.detach()


PREFERENCE = Objective("the better of two", _prefer, lambda batch: len(batch["better"]))


class Adapter(nn.Module):
    """A frozen linear layer with a low-rank change that is trained, as LoRA has it."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, 2, bias=False)
        self.up = nn.Linear(2, frozen.out_features, bias=False)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(x))


def ranker(**how) -> Trainer:
    torch.manual_seed(0)
    return Trainer(Ranker(), Pairs(), WSD(0.1, 5, 25, 10), objective=PREFERENCE, **how)


def adapted(**how) -> Trainer:
    torch.manual_seed(0)
    model = Decoder(MODEL).requires_grad_(False)
    for block in model.layers:
        block.self_attn.q_proj = Adapter(block.self_attn.q_proj)
    return Trainer(model, TOKENS, SCHEDULE, **{"config": CONFIG} | how)


def half_frozen(**how) -> Trainer:
    torch.manual_seed(0)
    model = Decoder(MODEL)
    model.embed_tokens.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    return Trainer(model, Conversations(), SCHEDULE, **{"config": CONFIG} | how)


BFLOAT16 = dict(config=replace(CONFIG, precision="bfloat16"))
RUNS = {
    "ranker": ranker,
    "ranker in passes": lambda: ranker(layout=Layout(4)),
    "ranker in bfloat16": lambda: ranker(**BFLOAT16),
    "adapted": adapted,
    "adapted in bfloat16, in passes": lambda: adapted(layout=Layout(1, True), **BFLOAT16),
    "half frozen": half_frozen,
    "half frozen, mup, bfloat16": lambda: half_frozen(
        config=replace(CONFIG, precision="bfloat16", parametrization="mup")
    ),
    "mixture in passes": lambda: Trainer(
        mixture(), Conversations(), SCHEDULE, CONFIG, layout=Layout(2)
    ),
}  # fmt: skip


def mixture() -> Decoder:
    torch.manual_seed(0)
    return Decoder(replace(MODEL, mixture=MixtureConfig(4, 2)))


def everything(run: Trainer) -> dict:
    state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    moments = {
        f"{name} {moment}": value.clone()
        for name, parameter in run.model.named_parameters()
        for moment, value in run.optimizer.state.get(parameter, {}).items()
    }
    return state | moments


def assert_all_the_same(one: Trainer, other: Trainer) -> None:
    assert (one.step, one.losses, one.grad_norms) == (other.step, other.losses, other.grad_norms)
    mine, theirs = everything(one), everything(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow  # every kind of run; one is resumed below
@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_resumes_bit_for_bit(tmp_path, name):
    """Stopped and taken up again in a new trainer at several steps, as after a kill."""
    whole, stopped = RUNS[name](), RUNS[name]()
    whole.train(12, progress=False)
    for until in (0, 1, 4, 5, 12):
        stopped.train(until, progress=False)
        path = stopped.save(tmp_path)
        torch.manual_seed(until)  # what is drawn anew must not matter
        stopped = RUNS[name]()
        with torch.no_grad():
            for parameter in stopped.model.parameters():
                parameter += 1  # all of them come from the file
        stopped.load(path)
    assert_all_the_same(stopped, whole)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_frozen_or_unused_stays_and_the_rest_moves(name):
    run = RUNS[name]()
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    run.train(10, progress=False)
    for parameter_name, parameter in run.model.named_parameters():
        stays = not parameter.requires_grad or "idle" in parameter_name
        assert torch.equal(parameter, before[parameter_name]) == stays, parameter_name
        assert (parameter in run.optimizer.state) != stays


def test_any_objective_learns():
    run = ranker()
    run.train(progress=False)
    assert run.losses[0] == pytest.approx(0.69, abs=0.1) and run.losses[-1] < 0.6 * run.losses[0]
    assert run.model.texts_read == 40 * 12 and run.model.mean.any()


def test_passes_of_pairs_are_the_whole():
    """The module counts what it reads, so its mean moves more often; without that, passes change nothing."""
    one, other = ranker(), ranker(layout=Layout(4))
    for run in (one, other):
        run.model.eval()
        run._update(*run._read(), started=0.0, skip_non_finite=0)
    assert other.losses == pytest.approx(one.losses, abs=1e-6)


def test_a_branch_of_any_module_leaves_its_trunk_alone():
    trunk, whole = ranker(), ranker()
    trunk.train(5, progress=False)
    before = everything(trunk)
    branch = trunk.branch(WSD(0.01, 5, 0, 10), Pairs(1))
    branch.train(progress=False)
    after = everything(trunk)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert branch.objective is PREFERENCE and branch.losses[5:] != trunk.losses[5:]
    trunk.train(9, progress=False)
    whole.train(9, progress=False)
    assert_all_the_same(trunk, whole)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (lambda: Trainer(Ranker(), Pairs(1), SCHEDULE, objective=PREFERENCE), "another text: its pairs is 0, this run's is 1"),
        (lambda: Trainer(Ranker().requires_grad_(True), Pairs(), SCHEDULE, objective=PREFERENCE),
         "another choice of parameters: its table.weight is 'frozen in float32', this run's is 'trained in float32'"),
        (lambda: Trainer(nn.Linear(8, 1), Pairs(), SCHEDULE, objective=PREFERENCE), "another model: its class is 'Ranker'"),
        (lambda: make(), "another model config"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_module(tmp_path, other, sentence):
    run = ranker()
    run.train(2, progress=False)
    path = run.save(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        other().load(path)
    with pytest.raises(ValueError, match="holds a Ranker, which is no decoder"):
        load_weights(path)


@pytest.mark.parametrize("name", ["model.texts_read", "model.table.weight", "optimizer.exp_avg.mix.bias"])
def test_a_checkpoint_that_lacks_a_buffer_a_frozen_weight_or_a_moment(tmp_path, name, reseal):
    run = ranker()
    run.train(2, progress=False)
    path = run.save(tmp_path)
    (file,) = path.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    assert not any("idle" in each or "table" in each for each in tensors if each.startswith("optimizer"))
    assert "model.scratch" not in tensors
    del tensors[name]
    save_file(tensors, file, metadata)
    reseal(path)
    fresh = ranker()
    with pytest.raises(ValueError, match=f"does not fit this run: {name} is missing"):
        fresh.load(path)
    assert_all_the_same(fresh, ranker())


def test_the_metrics_of_any_run(tmp_path):
    """Units are what the objective counts; tokens are said where windows of tokens are read."""
    run = ranker()
    run.train(3, folder=tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["units"] for line in lines] == [6, 6, 6] and not any("tokens" in line for line in lines)
    assert len({line["data"] for line in lines}) == 3, "each step sees other pairs"
    assert [line["loss"] for line in lines] == run.losses


def test_nothing_to_train():
    with pytest.raises(ValueError, match="nothing to train: every parameter of the model is frozen"):
        Trainer(Decoder(MODEL).requires_grad_(False), TOKENS, SCHEDULE, CONFIG)


def test_checks_of_a_vocabulary_are_for_decoders():
    """Another module may give ids a meaning of its own; the windows must still have the length of the config."""

    def bigram_loss(model, window):
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        return loss, loss.detach()

    bigram, objective = (
        nn.Embedding(60, 60),
        Objective("bigrams", bigram_loss, lambda window: window[:, 1:].numel()),
    )
    run = Trainer(bigram, TOKENS + 15, SCHEDULE, CONFIG, objective)
    run.train(9, progress=False)
    assert run.losses[8] < run.losses[0]
    with pytest.raises(ValueError, match="predict 8 tokens each, and sequence_length is 16"):
        Trainer(bigram, TokenWindows(TOKENS, 8, 0), SCHEDULE, CONFIG, objective)


def test_hooks_of_gradients_act_or_are_refused():
    """As of a mask that trains the rows of new tokens alone."""
    mask = (torch.arange(40) >= 30).float()[:, None]
    model = Decoder(MODEL)
    model.embed_tokens.weight.register_hook(lambda gradient: gradient * mask)
    with pytest.raises(
        ValueError, match="embed_tokens.weight has a hook of its gradient, .* is cut over proc"
    ):
        Trainer(model, TOKENS, SCHEDULE, CONFIG, layout=Layout(sharded=True))
    run, before = Trainer(model, TOKENS, SCHEDULE, CONFIG), model.embed_tokens.weight.detach().clone()
    run.train(2, progress=False)
    assert (model.embed_tokens.weight != before).any(dim=1).tolist() == [False] * 30 + [True] * 10
    with pytest.raises(ValueError, match="hook of its gradient, .* is copied. Save the run, make a Trainer"):
        run.branch(SCHEDULE)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_loss_of_another_module_is_refused(precision, sharded):
    other, config = Decoder(MODEL), replace(CONFIG, precision=precision)
    objective = Objective("other", lambda model, batch: next_token.loss(other, batch), next_token.weight)
    refused = pytest.raises(ValueError, match="loss was computed by another module. Let")
    with processes() if sharded else nullcontext(), refused:
        run = Trainer(Decoder(MODEL), TOKENS, SCHEDULE, config, objective, Layout(sharded=sharded))
        run.train(progress=False)
    assert run.step == 0


@pytest.mark.parametrize("kind", ["a second parameter", "a buffer", "a transposed buffer"])
def test_tensors_that_share_memory_are_refused(kind):
    """They could not be saved, and what is trained would be moved twice. One parameter at two places is tied."""
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 40, bias=False))
    objective = Objective("none", lambda model, batch: None, len)
    if "buffer" in kind:
        weight = model[0].weight.data
        model[1].register_buffer("before", weight.t() if "transposed" in kind else weight)
    else:
        model[1].weight = nn.Parameter(model[0].weight)
    with pytest.raises(ValueError, match=r"^0.weight and 1.(weight|before) share memory. To tie them, give"):
        Trainer(model, TOKENS, SCHEDULE, CONFIG, objective)
    tied = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 40, bias=False))
    tied[1].weight = tied[0].weight
    Trainer(tied, TOKENS, SCHEDULE, CONFIG, objective)


class TwoMatrices(nn.Module):
    def __init__(self, one: torch.Tensor, other: torch.Tensor) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(one), nn.Parameter(other)

    def forward(self, x):
        return x @ self.one @ self.other


class Rows:
    def __getitem__(self, step):
        return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))

    def identity(self):
        return {"rows": 8}


def _copied(model, rows):
    loss = (model(rows) - rows).square().mean()
    return loss, loss.detach()


@pytest.mark.parametrize(
    "slices",
    [
        lambda table: (table[:8, :8], table[8:16, :8]),
        lambda table: (table[:8, ::2], table[8:16, ::2]),
        lambda table: (table[:8, 4:12].t(), table[8:16, 4:12]),
        lambda table: (table[0:16:2, 8:], table[16:, 8:]),
        lambda table: (table[:8, :1].expand(8, 8), table[8:16, :8]),
        lambda table: (table[:8, :8], table[8:16, :8].clone().t()),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_slices_of_larger_tensors_are_trained_as_their_copies_are(slices, late):
    """As of a smaller model that was cut out of a larger one; and what lies beside them stays."""
    table = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)) / 4
    before, objective = table.clone(), Objective("copied", _copied, len)
    model, plain = (TwoMatrices(*(each.clone() for each in slices(table))) for _ in range(2))
    optimizer = torch.optim.AdamW(plain.parameters(), 0.01, (0.9, 0.95), weight_decay=0.1, fused=False)
    trainer = Trainer(model, Rows(), WSD(0.01, 0, 9, 0), CONFIG, objective) if late else None
    model.one.data, model.other.data = slices(table)
    trainer = trainer or Trainer(model, Rows(), WSD(0.01, 0, 9, 0), CONFIG, objective)
    trainer.train(progress=False)
    for step in range(9):
        optimizer.zero_grad()
        _copied(plain, Rows()[step])[0].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(mine, theirs)
    assert torch.equal(table, before)


@pytest.mark.parametrize("slices", [lambda w: (w[:8], w[4:]), lambda w: (w[:8], w[:8].t())])
def test_parameters_that_overlap_are_refused(slices):
    model = TwoMatrices(*slices(torch.randn(12, 8)))
    with pytest.raises(ValueError, match="^one and other share memory. To tie them, give"):
        Trainer(model, Rows(), SCHEDULE, CONFIG, Objective("copied", _copied, len))


@pytest.mark.parametrize("curve", ["losses", "grad_norms"])
def test_what_is_done_to_a_curve_goes_into_no_checkpoint(tmp_path, curve):
    run, resumed = trained(2), make()
    whole = getattr(run, curve)
    getattr(run, curve)[0] = 123.0
    getattr(run, curve).clear()
    for name in ("step", curve):
        with pytest.raises(AttributeError):
            setattr(run, name, [1.0])
    resumed.load(run.save(tmp_path))
    assert getattr(run, curve) == getattr(resumed, curve) == whole and resumed.step == 2


def test_a_run_that_is_done_is_kept_once_a_folder_is_given(tmp_path):
    run, resumed = trained(), make()
    run.train(folder=tmp_path, progress=False)
    assert list(checkpoints(tmp_path)) == [SCHEDULE.total_steps]
    written = checkpoints(tmp_path)[SCHEDULE.total_steps].stat()
    run.train(folder=tmp_path, progress=False)
    assert checkpoints(tmp_path)[SCHEDULE.total_steps].stat() == written, "it is there already"
    resumed.load(latest_checkpoint(tmp_path))
    assert_same(run, resumed)


def test_a_run_does_not_go_back(tmp_path):
    run = trained(10)
    with pytest.raises(ValueError, match="^until is 3, and the run is at step 10 already"):
        run.train(3, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="^The schedule ends at step 8, and the run is at step 10 already"):
        run.branch(WSD(0.01, 5, 1, 2)).train(progress=False)
    assert run.step == 10 and not list(tmp_path.iterdir())


def _unit_sums(model, window):
    wrong = token_losses(model, window).sum() / len(window)
    return wrong, wrong.detach()


@pytest.mark.parametrize(
    "wrong",
    [
        Objective("sums", _unit_sums, next_token.weight),  # a sum over tokens, said to be a mean
        Objective("means of means", next_token.loss, len),  # the mean of the passes' means
        Objective("miscounted", next_token.loss, lambda window: int(predicted(window).sum()) + 1),
    ],
    ids=lambda wrong: wrong.name,
)
def test_objectives_that_count_wrongly_are_seen_in_passes(wrong):
    losses = []
    for layout in (Layout(), Layout(1)):
        torch.manual_seed(0)
        run = Trainer(Decoder(MODEL), Conversations(), SCHEDULE, CONFIG, wrong, layout)
        run.train(1, progress=False)
        losses.append(run.losses[0])
    assert losses[0] != pytest.approx(losses[1], abs=1e-5)


class Strided(nn.Module):
    """Parameters and buffers of which memory holds the numbers in another order, or fewer of them."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(8, 3).t())
        self.convolution = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.register_buffer("repeated", torch.ones(1).expand(4))

    def forward(self, ids):
        image = (ids[:, :, None, None] * self.turned.t()[:5, :]).float().permute(0, 3, 1, 2) / 40
        if self.training:
            self.repeated += 0.5
        return (self.convolution(image.contiguous()).mean(dim=(2, 3)) * self.repeated).mean(dim=1)


@pytest.mark.parametrize("layout", [Layout(), Layout(sharded=True)], ids=["whole", "sharded"])
def test_parameters_in_any_order_of_memory_are_saved_and_resumed(tmp_path, layout):
    class Images(Pairs):
        def __getitem__(self, step):
            return {name: part[0][:, :, None] if isinstance(part, tuple) else part
                    for name, part in super().__getitem__(step).items()}  # fmt: skip

    def loss(model, batch):
        minimised = F.softplus(model(batch["better"])).mean()
        return minimised, minimised.detach()

    def strided():
        torch.manual_seed(0)
        objective = Objective("images", loss, lambda batch: len(batch["better"]))
        return Trainer(Strided(), Images(), SCHEDULE, CONFIG, objective, layout)

    with processes() if layout.sharded else nullcontext():
        whole, run = strided(), strided()
        whole.train(6, progress=False)
        run.train(3, progress=False)
        resumed = strided()
        resumed.load(run.save(tmp_path))
        resumed.train(6, progress=False)
        assert resumed.losses == whole.losses and resumed.model.repeated.tolist() == [4.0] * 4
        for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


# Steps that are not finite.


class Poisoned:
    """Pairs of which single steps hold a number that is none, in one row."""

    def __init__(self, *steps: int, row: int = 0, value: float = math.nan) -> None:
        self.steps, self.row, self.value = steps, row, value

    def __getitem__(self, step):
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        if step + 1 in self.steps:
            batch[self.row, 1] = self.value
        return batch

    def identity(self):
        return {"poisoned": [*self.steps, self.row, str(self.value)]}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False)

    def forward(self, x):
        return self.norm(self.layer(x.to(self.layer.weight.dtype)).float())


def _spread(model, batch):
    loss = (model(batch) - 1).square().mean()
    return loss, loss.detach()


def poisoned(*steps, precision="float32", layout=ALL_AT_ONCE, **how) -> Trainer:
    torch.manual_seed(0)
    config = replace(CONFIG, precision=precision)
    return Trainer(
        Normed(), Poisoned(*steps, **how), WSD(0.1, 2, 6, 2), config,
        Objective("spread", _spread, len), layout,
    )  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("step", [1, 2, 7, 10])
def test_a_step_that_is_not_finite_changes_nothing(step, row, value):
    """Refused, the run is as it was; skipped, weights, moments and buffers are."""
    for layout in (ALL_AT_ONCE, Layout(2)):
        before, refused = poisoned(layout=layout), poisoned(step, row=row, value=value, layout=layout)
        before.train(step - 1, progress=False)
        with pytest.raises(FloatingPointError, match=f"gradient of step {step} is not finite"):
            refused.train(progress=False)
        assert_all_the_same(refused, before)
        refused.train(step, progress=False, skip_non_finite=1)
        state = everything(refused)
        assert all(torch.equal(value, state[name]) for name, value in everything(before).items())
        assert refused.step == step and math.isnan(refused.losses[-1]) and math.isnan(refused.grad_norms[-1])
        refused.train(progress=False, skip_non_finite=1)
        assert refused.step == 10 and sum(map(math.isnan, refused.losses)) == 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_skipped_steps_are_counted_said_and_replayed(tmp_path, precision):
    steps = (3, 4, 8)
    with pytest.raises(ValueError, match="skip_non_finite is -1"):
        poisoned().train(progress=False, skip_non_finite=-1)
    few = poisoned(*steps, precision=precision)
    with pytest.raises(FloatingPointError, match="gradient of step 8 is not finite"):
        few.train(folder=tmp_path / "few", progress=False, skip_non_finite=2)
    assert few.step == 7
    whole = poisoned(*steps, precision=precision)
    whole.train(folder=tmp_path / "whole", progress=False, tensorboard=True, skip_non_finite=3)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("skipped")] == [*steps]
    for line, loss in zip(lines, whole.losses, strict=True):
        nothing = line["loss"] is line["grad_norm"] is None
        assert nothing == math.isnan(loss) == (line["step"] in steps)
    for until in (2, 3, 6, 8):
        run = poisoned(*steps, precision=precision)
        run.train(until, progress=False, skip_non_finite=3)
        resumed = poisoned(*steps, precision=precision)
        resumed.load(run.save(tmp_path / "parts"))
        resumed.train(progress=False, skip_non_finite=3)
        assert repr(resumed.losses) == repr(whole.losses)
        assert repr(resumed.grad_norms) == repr(whole.grad_norms)
        mine, theirs = everything(resumed), everything(whole)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_was_made_before_a_step_that_is_not_finite_is_kept(tmp_path):
    """The checkpoint is that of the step before, and the run goes on from it as if the step had been passed over."""
    run = poisoned(6)
    with pytest.raises(FloatingPointError, match="gradient of step 6 is not finite"):
        run.train(folder=tmp_path, progress=False)
    resumed, whole = poisoned(6), poisoned(6)
    resumed.load(latest_checkpoint(tmp_path))
    assert resumed.step == 5
    for each, folder in ((resumed, tmp_path), (whole, None)):
        each.train(folder=folder, progress=False, skip_non_finite=1)
    assert repr(resumed.losses) == repr(whole.losses)


class Unreadable(Poisoned):
    """Pairs of which a step cannot be read."""

    def __getitem__(self, step):
        if step + 1 in self.steps:
            raise self.value
        return super().__getitem__(step)


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError, KeyError])
@pytest.mark.parametrize("sharded", [False, True])
def test_what_was_made_before_a_batch_that_cannot_be_read_is_kept(tmp_path, error, sharded):
    with processes() if sharded else nullcontext():
        run, whole = (poisoned(layout=Layout(sharded=sharded)) for _ in "ab")
        run.batches, whole.batches = Unreadable(6, value=error("a disk")), Unreadable(value=error("a disk"))
        run.batches.identity = whole.batches.identity
        with pytest.raises(error, match="a disk"):
            run.train(folder=tmp_path, progress=False)
        assert list(checkpoints(tmp_path)) == [5]
        whole.load(latest_checkpoint(tmp_path))
        whole.train(folder=tmp_path, progress=False)
        run.batches = whole.batches  # mended
        run.train(progress=False)
        assert run.losses == whole.losses and run.step == 10


@pytest.mark.parametrize("error", [FloatingPointError, RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize("sharded", [False, True])
def test_what_was_made_before_an_error_of_the_objective_is_kept(tmp_path, error, sharded):
    """One process need not ask others whether they save, too."""

    def failing(model, batch):
        if run.step == 5 and not mended:
            raise error("of one's own")
        return _spread(model, batch)

    with processes() if sharded else nullcontext():
        run, whole = (poisoned(layout=Layout(sharded=sharded)) for _ in "ab")
        run.objective, mended = replace(run.objective, loss=failing), False
        with pytest.raises(error, match="of one's own"):
            run.train(folder=tmp_path, progress=False)
        assert run.step == 5 and list(checkpoints(tmp_path)) == [5]
        mended = True
        whole.load(latest_checkpoint(tmp_path))
        for each in (run, whole):
            each.train(progress=False)
        assert run.losses == whole.losses


@pytest.mark.parametrize("first", [Poisoned(1), Unreadable(1, value=OSError("a disk"))])
def test_an_attempt_that_made_no_step_leaves_no_checkpoint(tmp_path, first):
    """So that another, with other settings, may begin in the folder."""
    run = poisoned()
    run.batches = first
    with pytest.raises((FloatingPointError, OSError)):
        run.train(folder=tmp_path, progress=False)
    assert not checkpoints(tmp_path)
    poisoned(precision="bfloat16").train(folder=tmp_path, progress=False)


@pytest.mark.parametrize("saved", [False, True])
def test_a_branch_that_stopped_at_its_first_step_goes_on(tmp_path, saved):
    """Whether or not a checkpoint of its first moment was taken, which is its own and not the trunk's."""
    trunk = poisoned(7)
    trunk.train(6, folder=tmp_path / "trunk", progress=False)

    def branch(*steps) -> Trainer:
        run = poisoned(7)
        run.batches = Poisoned(*steps)
        run.branch_from(tmp_path / "trunk" / "step-00000006")
        return run

    stopped, whole = branch(7), branch()
    with pytest.raises(FloatingPointError, match="gradient of step 7"):
        stopped.train(folder=tmp_path / "decay", progress=False)
    assert not checkpoints(tmp_path / "decay")
    if saved:
        whole.save(tmp_path / "decay")
    whole.train(folder=tmp_path / "decay", progress=False)
    assert whole.step == 10


def test_a_branch_counts_the_steps_that_it_skips_itself(tmp_path):
    trunk = poisoned(3, 8)
    trunk.train(6, progress=False, skip_non_finite=1)
    branch, other = trunk.branch(trunk.schedule), poisoned(8)
    other.branch_from(trunk.save(tmp_path))
    for each in (branch, other):
        each.train(progress=False, skip_non_finite=1)
        assert each.step == 10 and math.isnan(each.losses[7])
    with pytest.raises(FloatingPointError, match="gradient of step 8"):
        trunk.train(progress=False, skip_non_finite=1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_trained_is_chosen_before(precision, sharded, tmp_path):
    """A weight that is frozen later would move in bfloat16, and one that is set free would move in neither."""
    config, layout = replace(CONFIG, precision=precision), Layout(sharded=sharded)
    with processes() if sharded else nullcontext():
        run = Trainer(Decoder(MODEL), TOKENS, SCHEDULE, config, layout=layout)
        run.train(2, progress=False)
        run.model.layers[0].requires_grad_(False)
        with pytest.raises(ValueError, match="layers.0.*was frozen since the trainer was made"):
            run.train(4, progress=False)
        with pytest.raises(ValueError, match="layers.0.*was frozen since the trainer was made"):
            run.save(tmp_path)  # with the moments of weights that it would call frozen
        if not sharded:
            run.model.layers[1].requires_grad_(False)
            run.model.layers[0].requires_grad_(True)  # whose place is that of others
            with pytest.raises(ValueError, match="layers.1.*was frozen since the trainer was made"):
                run.branch(SCHEDULE)
            run.model.layers[1].requires_grad_(True)
        run.model.layers[0].requires_grad_(True)
        run.train(4, progress=False)
        model = Decoder(MODEL)
        model.layers[0].requires_grad_(False)
        run = Trainer(model, TOKENS, SCHEDULE, config, layout=layout)
        run.model.layers[0].requires_grad_(True)
        with pytest.raises(ValueError, match="layers.0.*was set free since the trainer was made"):
            run.train(2, progress=False)


# Killed, and killed again.


def test_what_was_to_be_pruned_when_a_run_was_killed_goes_the_next_time(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "prune", lambda run: None)  # killed before, behind its last step
        make().train(folder=tmp_path, checkpoint_every=13, progress=False)
    assert sorted(checkpoints(tmp_path)) == [13, 26, 30, 39, 40]
    run = make()
    run.load(latest_checkpoint(tmp_path))
    run.train(folder=tmp_path, progress=False)
    assert sorted(checkpoints(tmp_path)) == [30, 39, 40]


@pytest.mark.slow  # about 20 s: processes are killed until it has happened 25 times
def test_killed_at_random_moments(tmp_path):
    """Two programs at once in one folder, pruning, and a decay from the run: the curves are the unkilled run's."""
    script = os.path.join(os.path.dirname(__file__), "killed_at_random.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kills, refusals, folders = json.loads(done.stdout.splitlines()[-1])
    assert kills >= 25 and refusals >= 5
    plain = make()
    plain.train(progress=False)
    for folder in folders:
        trunk, decayed = Path(folder, "trunk"), Path(folder, "decay")
        last = make()
        last.load(latest_checkpoint(trunk))
        assert_same(last, plain)
        decay = decay_schedule(trunk / "step-00000030", 8)
        branch, expected = make(schedule=decay), make(schedule=decay)
        branch.load(latest_checkpoint(decayed))
        expected.train(progress=False)
        assert_same(branch, expected)
        for place, run, first, stay in ((trunk, last, 1, [30, 39, 40]), (decayed, branch, 31, [37, 38])):
            metrics = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
            assert [line["step"] for line in metrics] == list(range(first, run.step + 1))
            assert [line["loss"] for line in metrics] == run.losses[first - 1 :]
            names = {f"step-{step:08d}" for step in stay} | {"metrics.jsonl"}
            assert {path.name for path in place.iterdir()} == names, "nothing of the killed is left"


def test_a_model_that_was_packed_since_is_not_trained():
    run = trained(2)
    quantize_model(run.model, {"embed_tokens.weight": "INT8"})
    with pytest.raises(
        ValueError, match="parameters that this trainer was made for are not in the model any"
    ):
        run.train(progress=False)


def test_the_home_directory_has_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = make()
    run.train(2, "~/run", progress=False)
    run.save("~/run")
    assert not (tmp_path / "~").exists()
    other = make()
    other.load("~/run/step-00000002")
    assert_same(run, other)
