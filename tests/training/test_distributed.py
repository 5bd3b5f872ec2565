"""Distributed training: one loss curve at any world size, exact means, and runs that go on where they stopped.

Most tests run in one process, which computes the same way as many. What needs two has two: `answers` are those
of three functions of this file.
"""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from minicpm_lite import ModelConfig
from minicpm_lite.config import LatentAttentionConfig, MixtureConfig
from minicpm_lite.data.windows import TokenWindows, batch_of
from minicpm_lite.inference.ternary import make_ternary
from minicpm_lite.language.chat import Chat
from minicpm_lite.language.decoder import Decoder, require_plain
from minicpm_lite.language.layers import replace_linears
from minicpm_lite.language.scoring import context_only, next_token_loss, token_losses
from minicpm_lite.training import distributed
from minicpm_lite.training.branch import decay_schedule
from minicpm_lite.training.distributed import initialise
from minicpm_lite.training.objective import Objective
from minicpm_lite.training.processes import processes
from minicpm_lite.training.settings import Layout, TrainerConfig
from minicpm_lite.training.sharded_checkpoint import latest_checkpoint, load_weights, read_facts
from minicpm_lite.training.state import updates_made
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD, Schedule

MODEL = ModelConfig(32, 80, 2, 4, 41, num_key_value_heads=2, max_position_embeddings=64, scale_emb=12,
                    scale_depth=1.4, dim_model_base=16, init_std=0.1)  # fmt: skip
MODELS = {
    "dense": MODEL,
    "untied": replace(MODEL, tie_word_embeddings=False),
    "latent": replace(MODEL, latent_attention=LatentAttentionConfig(16, 8, 8, 8, 8), head_dim=16),
    "mixture": replace(MODEL, mixture=MixtureConfig(4, 2)),
    "mixture without balance": replace(MODEL, mixture=MixtureConfig(4, 2, balance_loss_weight=0)),
}
CONFIG = TrainerConfig(batch_size=4, sequence_length=16, parametrization="mup")
SCHEDULE = WSD(0.01, 3, 7, 4)
TOKENS = (torch.arange(3000) * 7 // 3) % 41


class Masked:
    """Windows of which ever more is context only: the processes of a step predict very different numbers."""

    length = 16

    def __getitem__(self, index):
        window = WINDOWS[index].clone()
        context = 1 + 15 * (index % 4) // 3
        window[:context] = context_only(window[:context])
        return window

    def id_range(self):
        return WINDOWS.id_range()

    def identity(self):
        return WINDOWS.identity() | {"masked": True}


WINDOWS, MASKED = TokenWindows(TOKENS, 16, 0), Masked()


ALL_AT_ONCE = Layout()


def NOTHING(name: str) -> bool:
    return False


def make(
    model=MODEL, windows=WINDOWS, schedule=SCHEDULE, config=CONFIG, layout=ALL_AT_ONCE, frozen=NOTHING, **how
) -> Trainer:
    """Over all processes."""
    with torch.device("meta"):
        decoder = freeze(Decoder(model), frozen)
    return Trainer(decoder, windows, schedule, config, layout=replace(layout, sharded=True), **how)


def plain(model=MODEL, windows=WINDOWS, schedule=SCHEDULE, config=CONFIG, frozen=NOTHING, **how) -> Trainer:
    decoder = freeze(Decoder(model), frozen)
    initialise(decoder, config.seed)
    return Trainer(decoder, windows, schedule, config, **how)


def freeze(decoder, frozen) -> Decoder:
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(not frozen(name))
    return decoder


def trained(trainer, until=None, **how):
    trainer.train(until, progress=False, **how)
    return trainer


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are too small to share among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def alone():
    with processes() as device:
        yield device


# One process is the trainer of the other chapters.


@pytest.mark.parametrize("model", MODELS)
def test_a_model_cut_over_one_process_equals_a_whole_one(alone, model):
    one, other = trained(make(MODELS[model]), 6), trained(plain(MODELS[model]), 6)
    assert one.losses == pytest.approx(other.losses, abs=1e-6)
    assert one.grad_norms == pytest.approx(other.grad_norms, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "layout"),
    [("dense", Layout(1)), ("dense", Layout(3, True)), ("latent", Layout(2, True)),
     ("mixture without balance", Layout(2, True))],
)  # fmt: skip
def test_passes_and_recomputation_change_nothing(alone, model, layout):
    one, other = trained(make(MODELS[model], layout=layout), 4), trained(plain(MODELS[model]), 4)
    assert one.losses == pytest.approx(other.losses, abs=1e-5)
    assert one.grad_norms == pytest.approx(other.grad_norms, abs=1e-4)


def test_recomputation_under_a_balance_loss(alone):
    layout = Layout(None, True)
    one, other = trained(make(MODELS["mixture"], layout=layout), 4), trained(plain(MODELS["mixture"]), 4)
    assert one.losses == pytest.approx(other.losses, abs=1e-5)


def test_the_mean_is_over_predicted_tokens(alone):
    """Passes predict 15 to 0 tokens; a mean of their means is another number, which this would notice."""
    one, other = trained(make(windows=MASKED, layout=Layout(1)), 4), trained(plain(windows=MASKED), 4)
    assert one.losses == pytest.approx(other.losses, abs=1e-5)
    windows = batch_of(MASKED, 0, 3)  # the fourth predicts nothing: its mean would not even be a number
    model = plain().model
    wrong = sum(next_token_loss(model, window[None]).item() for window in windows) / 3
    assert abs(wrong - one.losses[0]) > 1e-3


def test_a_step_without_a_token_to_predict(alone):
    class Silent(Masked):
        def __getitem__(self, index):
            return context_only(WINDOWS[index])

    with pytest.raises(ValueError, match="batch of step 1 holds nothing that is to be predicted"):
        trained(make(windows=Silent()))


def test_gradients_are_clipped(alone):
    config = replace(CONFIG, max_grad_norm=1e-3)
    one, other = trained(make(config=config), 4), trained(plain(config=config), 4)
    assert one.losses == pytest.approx(other.losses, abs=1e-6)
    assert min(one.grad_norms) > 1e-2, "what is recorded is the norm before clipping"


def test_bfloat16_keeps_float32_weights_and_angles(alone):
    trainer, full = make(config=replace(CONFIG, precision="bfloat16")), trained(plain(), 4)
    seen = {}
    trainer.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, inputs: seen.update(
            x=inputs[0].dtype, cos=inputs[1][0].dtype, w=module.q_proj.weight.dtype
        )
    )
    trained(trainer, 4)
    assert seen == {"x": torch.bfloat16, "cos": torch.float32, "w": torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.losses != full.losses
    assert trainer.losses == pytest.approx(full.losses, abs=0.05)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(  # slow: the third layout does what they do, and more
    "layout",
    [
        pytest.param(Layout(), marks=pytest.mark.slow),
        pytest.param(Layout(1), marks=pytest.mark.slow),
        Layout(2, True),
    ],
    ids=str,
)
def test_bfloat16_means_the_same_for_both(alone, model, layout):
    """Bit for bit: losses, norms, and the weights they lead to."""
    config = replace(CONFIG, precision="bfloat16")
    one = trained(make(MODELS[model], MASKED, config=config, layout=layout), 5)
    other = trained(plain(MODELS[model], MASKED, config=config, layout=layout), 5)
    assert one.losses == other.losses and one.grad_norms == other.grad_norms
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine.full_tensor(), theirs)


def test_bfloat16_is_not_autocast(alone):
    """The first edition's Trainer rounded the inputs of matrix products alone; that is another run."""
    config = replace(CONFIG, precision="bfloat16")
    model = plain(config=config).model
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(model, batch_of(WINDOWS, 0, 4)).item()
    assert loss != trained(make(config=config), 1).losses[0]


# Other objectives, and frozen weights.


def _brier(model, window):
    """Squared error of the probability of the right token, a mean over windows."""
    error = (1 - torch.exp(-token_losses(model, window))).square().mean()
    return error, error.detach()


BRIER = Objective("Brier score", _brier, len)


@pytest.mark.parametrize("layout", [Layout(), Layout(3, True)], ids=str)
def test_another_objective(alone, layout):
    one = trained(make(layout=layout, objective=BRIER), 5)
    other = trained(plain(objective=BRIER), 5)
    assert one.losses == pytest.approx(other.losses, abs=1e-6)
    assert one.losses[0] < 1 < trained(make(), 1).losses[0]


def _after_a_picture(model, window):
    """The next token, behind two features that stand where embeddings do."""
    picture = torch.linspace(-1, 1, 2 * MODEL.hidden_size).view(1, 2, -1).expand(len(window), -1, -1)
    text = model.embed(window[:, :-1])
    states = model.states(torch.cat([picture.to(text), text], dim=1))[-1]
    loss = F.cross_entropy(model.logits(states[:, 2:]).flatten(0, 1), window[:, 1:].flatten())
    return loss, loss.detach()


PICTURE = Objective("after a picture", _after_a_picture, lambda window: window[:, 1:].numel())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["dense", "untied"])
@pytest.mark.parametrize("layout", [Layout(), Layout(2, True)], ids=str)
def test_an_objective_that_calls_the_sockets_of_a_decoder(alone, model, layout, precision):
    how = dict(
        model=MODELS[model], layout=layout, objective=PICTURE, config=replace(CONFIG, precision=precision)
    )
    one, other = trained(make(**how), 5), trained(plain(**how), 5)
    assert one.losses == pytest.approx(other.losses, abs=1e-6)
    assert one.grad_norms == pytest.approx(other.grad_norms, abs=1e-5)
    assert one.losses[0] != trained(make(MODELS[model], config=how["config"]), 1).losses[0]


def test_a_checkpoint_of_another_objective(alone, tmp_path):
    path = trained(make(), 4).save(tmp_path)
    sentence = "another objective: its name is 'next token', this run's is 'Brier score'"
    for go_on in (lambda run: run.load(path), lambda run: run.branch_from(path)):
        run = make(objective=BRIER)
        with pytest.raises(ValueError, match=sentence):
            go_on(run)
        assert run.step == 0


def tables_and_norms(name: str) -> bool:
    return "proj" not in name


@pytest.mark.parametrize(  # slow: bfloat16 is computed so, too, and rounded
    "precision", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
@pytest.mark.parametrize(
    "frozen", [tables_and_norms, lambda name: "layers.0" in name], ids=["tables", "block"]
)
def test_frozen_weights_stay_and_resume(alone, tmp_path, frozen, precision):
    how = dict(config=replace(CONFIG, precision=precision), frozen=frozen)
    start = {name: p.full_tensor().clone() for name, p in make(**how).model.named_parameters()}
    whole = trained(make(**how), folder=tmp_path / "whole")
    trained(make(**how), 6, folder=tmp_path / "run")
    resumed = make(**how)
    resumed.load(latest_checkpoint(tmp_path / "run"))
    assert trained(resumed).losses == whole.losses
    assert whole.losses == pytest.approx(trained(plain(**how)).losses, abs=1e-6)
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter.full_tensor(), start[name]) == frozen(name), name
    with pytest.raises(ValueError, match="another choice of parameters: its .* is 'frozen in"):
        make(config=how["config"]).load(latest_checkpoint(tmp_path / "run"))


class Captioner(nn.Module):
    """An eye before a decoder, as a model of images has it, with a count of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.eye, self.decoder = nn.Linear(6, MODEL.hidden_size), Decoder(MODEL)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, image, text):
        self.seen += len(text)
        tokens = self.decoder.embed(text)
        features = self.eye(image.to(self.eye.weight.dtype)).to(tokens.dtype)
        states = self.decoder.states(torch.cat([features, tokens], dim=1))[-1]
        return self.decoder.logits(states[:, image.shape[1] :])


class Captions:
    """Images of two patches and six tokens that name them."""

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step)
        text = torch.randint(41, (4, 1), generator=generator) + torch.arange(7)
        return {"image": text[:, :2, None] * torch.linspace(-0.1, 0.1, 6), "text": text % 41}

    def identity(self):
        return {"captions": 1}


def _caption(model, batch):
    text = batch["text"]
    loss = F.cross_entropy(model(batch["image"], text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    return loss, loss.detach()


CAPTION = Objective("captions", _caption, lambda batch: batch["text"][:, 1:].numel())


def captioner(layout=ALL_AT_ONCE, config=CONFIG, batches=None) -> Trainer:
    torch.manual_seed(0)
    return Trainer(Captioner(), batches or Captions(), SCHEDULE, config, CAPTION, layout)


@pytest.mark.parametrize(  # slow: bfloat16 is computed so, too, and rounded
    "precision", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
@pytest.mark.parametrize(  # slow: the other layout does what it does, and more
    "layout", [pytest.param(Layout(), marks=pytest.mark.slow), Layout(1, True)], ids=str
)
def test_any_module_with_its_own_weights_is_cut_as_it_is(alone, tmp_path, layout, precision):
    config = replace(CONFIG, precision=precision)
    one, other = captioner(replace(layout, sharded=True), config), captioner(layout, config)
    assert torch.equal(one.model.eye.weight.full_tensor(), other.model.eye.weight)
    trained(one, 5, folder=tmp_path)
    trained(other, 5)
    assert one.losses == pytest.approx(other.losses, abs=1e-6)
    assert one.losses[-1] < one.losses[0]
    resumed = captioner(layout, config)  # whole, from what was cut
    resumed.load(latest_checkpoint(tmp_path))
    assert resumed.model.seen == one.model.seen == other.model.seen == 20
    assert trained(resumed).losses == pytest.approx(trained(other).losses, abs=1e-6)


def test_what_cannot_be_cut(alone):
    with torch.device("meta"):
        module = Captioner()
    with pytest.raises(
        ValueError, match="eye.weight of the Captioner is on the meta device, and only a decoder's own"
    ):
        Trainer(module, Captions(), SCHEDULE, CONFIG, CAPTION, Layout(sharded=True))
    with pytest.raises(ValueError, match="cut over processes is not copied.*let it branch_from"):
        make().branch(SCHEDULE)


@pytest.mark.parametrize(  # slow: bfloat16 is computed so, too, and rounded
    "precision", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_what_is_read_or_written_after_a_forward_pass_alone(alone, tmp_path, precision):
    """An evaluation, a loss that fails and a look from outside leave weights gathered."""
    config, failing = replace(CONFIG, precision=precision), [True]

    def loss(model, window):
        both = BRIER.loss(model, window)
        if failing[0]:
            raise RuntimeError("in the loss")
        return both

    def once_failed():
        run, failing[0] = make(config=config, objective=replace(BRIER, loss=loss)), False
        trained(run, 3)
        failing[0] = True
        with pytest.raises(RuntimeError, match="in the loss"):
            trained(run, 4)
        failing[0] = False
        return run

    def evaluated():
        run = trained(make(config=config, objective=BRIER), 3)
        run.evaluate(TOKENS)
        assert all(isinstance(parameter, DTensor) for parameter in run.model.parameters())
        return run

    def looked_at():
        run = trained(make(config=config, objective=BRIER), 3)
        with torch.no_grad():
            run.model(TOKENS[None, :8])
        return run

    whole = trained(make(config=config, objective=BRIER), 6)
    for number, run in enumerate((once_failed(), evaluated(), looked_at())):
        path = run.save(tmp_path / str(number))
        assert len(read_facts(path)["updates"]) == len(list(run.model.parameters()))
        fresh, other = make(config=config, objective=BRIER), make(config=config, objective=BRIER)
        other.evaluate(TOKENS)
        for each in (fresh, other):
            each.load(path)
        for each in (run, fresh, other):
            assert trained(each, 6).losses == whole.losses


class Sighted(Captioner):
    """Looks where there is an image, and has an ear that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.ear = nn.Linear(6, 6)

    def forward(self, image, text):
        tokens = self.decoder.embed(text)
        if image.any():
            features = self.eye(image.to(self.eye.weight.dtype)).to(tokens.dtype)
            seen = torch.where(image.any(dim=2, keepdim=True), features, 0)
            tokens = torch.cat([tokens[:, :2] + seen, tokens[:, 2:]], dim=1)
        return self.decoder.logits(self.decoder.states(tokens)[-1])


class SomeCaptions(Captions):
    """Every second step has no image, the others have some in their first half."""

    def __getitem__(self, step):
        batch = super().__getitem__(step)
        batch["image"][0 if step % 2 else 2 :] = 0
        return batch


def sighted(layout=ALL_AT_ONCE, precision="float32") -> Trainer:
    torch.manual_seed(0)
    config = replace(CONFIG, precision=precision, weight_decay=0.5)
    return Trainer(Sighted(), SomeCaptions(), SCHEDULE, config, CAPTION, layout)


@pytest.mark.slow  # each kind of model, cut and whole
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [Layout(), Layout(2, True)], ids=str)
def test_what_a_step_does_not_reach_stays(alone, tmp_path, layout, precision):
    """Neither weight decay nor old moments move it, cut or whole."""
    whole, cut = sighted(layout, precision), sighted(replace(layout, sharded=True), precision)
    for run in (whole, cut):
        trained(run, 7)
    assert cut.losses == pytest.approx(whole.losses, abs=1e-6)
    facts = read_facts(cut.save(tmp_path))["updates"]
    assert facts == read_facts(whole.save(tmp_path / "whole"))["updates"]
    assert facts["eye.weight"] == 4 and facts["decoder.norm.weight"] == 7 and "ear.weight" not in facts
    for name in ("ear.weight", "eye.weight"):
        assert_close(cut.model.get_parameter(name).full_tensor(), whole.model.get_parameter(name))


class LowRank(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.down = linear, nn.Parameter(torch.ones(2, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, 2))
        self.register_buffer("scale", torch.tensor(2.0))

    @property
    def weight(self):
        return self.linear.weight + self.scale * self.up @ self.down

    def forward(self, x):
        return self.linear(x) + self.scale * x @ self.down.T @ self.up.T


def test_only_what_is_on_the_meta_device_is_drawn(alone):
    with torch.device("meta"):
        model = Decoder(MODEL)
    replace_linears(model, lambda name, linear: LowRank(linear) if "q_proj" in name else linear)
    run = Trainer(model, WINDOWS, SCHEDULE, CONFIG, layout=Layout(sharded=True))
    adapter, plain_model = run.model.layers[0].self_attn.q_proj, plain().model
    assert adapter.down.full_tensor().eq(1).all() and adapter.up.full_tensor().eq(0).all()
    assert adapter.scale == 2 and adapter.linear.weight.full_tensor().std() > 0.01
    assert torch.equal(run.model.norm.weight.full_tensor(), plain_model.norm.weight)
    assert torch.equal(run.model.embed_tokens.weight.full_tensor(), plain_model.embed_tokens.weight)
    trained(run, 2)


@pytest.mark.parametrize("place", ["parameter", "buffer", "adapter"])
def test_what_nobody_draws_is_refused(alone, place):
    torch.manual_seed(0)
    model = Decoder(MODEL)
    if place == "parameter":
        model.layers[1].extra = nn.Parameter(torch.empty(3, device="meta"))
    elif place == "buffer":
        model.layers[1].register_buffer("extra", torch.empty(3, device="meta"))
    else:
        with torch.device("meta"):
            model.layers[1].extra = nn.LayerNorm(3)
    weights = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"layers.1.extra\S* of the Decoder is on the meta device, and only"):
        Trainer(model, WINDOWS, SCHEDULE, CONFIG, layout=Layout(sharded=True))
    assert all(
        a is b or a.is_meta or torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True)
    )


# Weights.


@pytest.mark.parametrize("tied", [True, False])
def test_weights_start_as_the_decoder_s_do(tied):
    """The same distributions as Decoder draws from, parameter by parameter."""
    config = replace(MODEL, hidden_size=256, intermediate_size=512, vocab_size=900, tie_word_embeddings=tied,
                     head_dim=64)  # fmt: skip
    torch.manual_seed(0)
    drawn, expected = Decoder(config), Decoder(config)
    initialise(drawn, 0)
    for (name, mine), theirs in zip(drawn.named_parameters(), expected.parameters(), strict=True):
        assert_close(mine.std(unbiased=False), theirs.std(unbiased=False), rtol=0.03, atol=0, msg=name)
        assert abs(mine.mean() - theirs.mean()) < 0.01


def test_weights_depend_on_the_seed_and_not_on_each_other():
    def weights(seed, layers=2):
        model = Decoder(replace(MODEL, num_hidden_layers=layers))
        initialise(model, seed)
        return dict(model.named_parameters())

    one, again, deeper = weights(0), weights(0), weights(0, layers=3)
    assert all(torch.equal(one[name], again[name]) and torch.equal(one[name], deeper[name]) for name in one)
    name = "layers.0.self_attn.q_proj.weight"
    assert not torch.equal(one[name], weights(1)[name])
    assert not torch.equal(one[name], one["layers.1.self_attn.q_proj.weight"])


# A run's folder.


def test_resume_is_bit_for_bit(alone, tmp_path):
    whole = trained(make(), folder=tmp_path / "whole")
    trained(make(), 6, folder=tmp_path / "run")
    resumed = make()
    resumed.load(latest_checkpoint(tmp_path / "run"))
    trained(resumed, folder=tmp_path / "run")
    assert resumed.losses == whole.losses and resumed.grad_norms == whole.grad_norms
    timeless = [
        [{k: v for k, v in line.items() if "second" not in k} for line in lines(tmp_path / name)]
        for name in ("whole", "run")
    ]
    assert timeless[0] == timeless[1]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one.to_local(), other.to_local())


def test_a_step_0_checkpoint(alone, tmp_path):
    path = make().save(tmp_path)
    fresh = make(config=CONFIG)
    fresh.load(path)
    assert trained(fresh).losses == trained(make()).losses


def test_a_gradient_that_is_not_finite(alone):
    trainer = make(schedule=WSD(1e30, 0, 10, 0))
    with pytest.raises(FloatingPointError, match=r"gradient of step \d+ is not finite.*lower peak"):
        trained(trainer)
    assert len(trainer.losses) == trainer.step


# Branches.


def test_a_branch_decays_a_stable_checkpoint(alone, tmp_path):
    trunk = plain()
    trained(trunk, 8)
    trained(make(), folder=tmp_path, checkpoint_every=8, keep=9)
    decay = decay_schedule(tmp_path / "step-00000008", 5)
    assert (decay.decay_start, decay.total_steps) == (8, 13)
    for windows in (WINDOWS, MASKED):
        branch = make(schedule=decay, windows=windows)
        branch.branch_from(tmp_path / "step-00000008")
        expected = trained(trunk.branch(decay, windows))
        assert trained(branch).losses == pytest.approx(expected.losses, abs=1e-6)
    assert latest_checkpoint(tmp_path).name == "step-00000014", "the trunk stays as it was"


def test_a_branch_can_be_resumed(alone, tmp_path):
    trained(make(), 8, folder=tmp_path / "trunk")
    decay = decay_schedule(tmp_path / "trunk" / "step-00000008", 5)
    whole = make(schedule=decay, windows=MASKED)
    whole.branch_from(tmp_path / "trunk" / "step-00000008")
    trained(whole, folder=tmp_path / "branch", checkpoint_every=2, keep=9)
    resumed = make(schedule=decay, windows=MASKED)
    resumed.load(tmp_path / "branch" / "step-00000010")
    assert trained(resumed).losses == whole.losses


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(windows=TokenWindows(TOKENS + 1, 16, 0)), "ids from 1 to 41; the model knows 0 to 40"),
        (
            dict(windows=TokenWindows(TOKENS, 8, 0)),
            "windows predict 8 tokens each, and sequence_length is 16",
        ),
    ],
)
def test_windows_that_do_not_fit(alone, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**change)


# Two processes.


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, list]:
    """What each of two processes returns from each of three functions, and the folders they ran in."""
    folders = {work.__name__: tmp_path_factory.mktemp(work.__name__) for work in WORK}
    with processes():
        trained(make(MODELS["untied"]), 6, folder=folders["a_checkpoint"] / "one")
    script = ANSWERS.format(path=os.path.dirname(__file__), folders=list(map(str, folders.values())))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return {
        name: [folder, *(json.loads((folder / f"answer-{rank}.json").read_text()) for rank in range(2))]
        for name, folder in folders.items()
    }


ANSWERS = """
import sys
sys.path[:0] = [{path!r}]
from test_distributed import answer
from two_processes import exit_codes, start
assert exit_codes(start(lambda: answer({folders!r}))) == [0, 0]
"""


def answer(folders: list[str]) -> None:
    with processes():
        for work, folder in zip(WORK, map(Path, folders), strict=True):
            (folder / f"answer-{torch.distributed.get_rank()}.json").write_text(json.dumps(work(folder)))


def curves(folder) -> dict:
    def run(**how):
        trainer = trained(make(**how))
        return trainer.losses, trainer.grad_norms

    return {
        "dense": run(),
        "untied": run(model=MODELS["untied"]),
        "passes": run(layout=Layout(1, True)),
        "masked": run(windows=MASKED, layout=Layout(1)),
        "mixture": run(model=MODELS["mixture without balance"]),
        "balanced": run(model=MODELS["mixture"]),
        "picture": run(objective=PICTURE),
        "frozen": run(windows=MASKED, frozen=tables_and_norms),
        "bfloat16": run(windows=MASKED, config=replace(CONFIG, precision="bfloat16")),
        "captions": captions(folder),
        "evaluated": evaluated(folder),
        "sighted": somewhere_reached(folder),
        "poisoned": poisoned(folder),
        "signalled": signalled(folder),
    }


def captions(folder):
    run = trained(
        captioner(Layout(1, True, sharded=True)), folder=folder / "captions", checkpoint_every=6, keep=9
    )
    return run.losses, run.grad_norms


def evaluated(folder):
    run = trained(make(), 3)
    run.evaluate(TOKENS)
    path = run.save(folder / "evaluated")
    other = make()
    other.evaluate(TOKENS)
    other.load(path)
    return trained(other).losses, trained(run).losses


def somewhere_reached(folder):
    run = trained(sighted(Layout(sharded=True)), 7)
    run.save(folder / "sighted")
    return run.losses, run.grad_norms


class Poisoned(Masked):
    """The second process reads windows of steps 3 and 5 that make its loss infinite: see `_burst`."""

    def __getitem__(self, index):
        window = WINDOWS[index]
        return torch.full_like(window, 40) if index in (11, 19) else window


def _burst(model, window):
    loss = next_token_loss(model, window)
    return loss / float(not (window == 40).all(dim=1).any()), loss.detach()


def poisoned(folder):
    run = make(windows=Poisoned(), objective=Objective("burst", _burst, lambda window: window[:, 1:].numel()))
    run.train(folder=folder / "poisoned", progress=False, skip_non_finite=2)
    return repr(run.losses), int(run.optimizer.state[run.model.norm.weight]["step"])


def signalled(folder):
    """One process is told to stop while it reads step 5; both have saved it, and both end."""

    class Signalled(Masked):
        def __getitem__(self, index):
            if index == 18 and not told:
                told.append(True)
                signal.raise_signal(signal.SIGTERM)
            return WINDOWS[index]

        def identity(self):
            return WINDOWS.identity()

    told = []
    run = make(windows=Signalled())
    try:
        trained(run, folder=folder / "signalled")
    except SystemExit as end:
        code = end.code
    resumed = make()
    resumed.load(latest_checkpoint(folder / "signalled"))
    return code, run.step, trained(resumed).losses


class Headed(nn.Module):
    """A decoder with a head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.head = Decoder(MODEL), nn.Linear(MODEL.hidden_size, MODEL.vocab_size, bias=False)

    def forward(self, ids):
        return self.head(self.decoder.states(self.decoder.embed(ids))[-1])


def head_tied(model):
    model.head.weight = model.decoder.embed_tokens.weight


def one_matrix(model):
    model.decoder.layers[1].mlp.up_proj.weight = model.decoder.layers[0].mlp.up_proj.weight


def one_network(model):
    model.decoder.layers[1].mlp = model.decoder.layers[0].mlp


def one_block(model):
    model.decoder.layers[1] = model.decoder.layers[0]


@pytest.mark.parametrize("tie", [head_tied, one_matrix, one_network, one_block])
def test_a_weight_in_two_parts_that_are_gathered_apart_is_not_cut(tie):
    """A whole model trains with it."""
    model, layout = Headed(), Layout(sharded=True)
    tie(model)
    objective = Objective("scores", lambda model, ids: (model(ids).square().mean(),) * 2, len)
    with (
        processes(),
        pytest.raises(ValueError, match=r"\S+ and \S+ are one Parameter, in parts .* Give Layout"),
    ):
        Trainer(model, TOKENS, SCHEDULE, CONFIG, objective, layout)
    Trainer(model, TOKENS, SCHEDULE, CONFIG, objective).train(1, progress=False)


def test_a_chat_with_a_model_that_is_cut_equals_a_new_one(alone):
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(41)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    run = make(schedule=WSD(0.1, 3, 7, 4))
    chat = Chat(run.model, tokenizer, lambda said: " ".join(each["content"] for each in said))
    for until in (3, 6):
        trained(run, until)
        fresh = Chat(run.model, tokenizer, chat.template)
        fresh.messages = list(chat.messages)
        expected = "".join(fresh.answer("w1 w2 w3", 8))
        assert "".join(chat.answer("w1 w2 w3", 8)) == expected


def test_a_weight_that_is_shared_within_a_block_is_cut():
    model = Decoder(MODEL)
    model.layers[0].mlp.gate_proj.weight = model.layers[0].mlp.up_proj.weight
    whole = copy.deepcopy(model)
    with processes():
        cut = Trainer(model, TOKENS, SCHEDULE, CONFIG, layout=Layout(sharded=True))
        cut.train(2, progress=False)
    alone = Trainer(whole, TOKENS, SCHEDULE, CONFIG)
    alone.train(2, progress=False)
    assert cut.losses == pytest.approx(alone.losses, abs=1e-5)


def test_a_model_that_is_cut_is_taken_by_no_second_trainer():
    model = Decoder(MODEL)
    with processes():
        Trainer(model, TOKENS, SCHEDULE, CONFIG, layout=Layout(sharded=True))
        with pytest.raises(ValueError, match="is cut over the processes already, by another Trainer"):
            Trainer(model, TOKENS, SCHEDULE, CONFIG, layout=Layout(sharded=True))
        with pytest.raises(ValueError, match="The model is cut over processes.*load_weights makes a whole"):
            require_plain(model)


@pytest.mark.parametrize("more", [0, 1])
def test_a_weight_that_one_process_has_alone_is_named(monkeypatch, more):
    found = [{"a": 1}, {"a": 1}]
    found[more] = {"a": 1, "b": 2}
    monkeypatch.setattr(distributed, "on_each", lambda work: found)
    with pytest.raises(ValueError, match="^b of the Linear differs between the processes"):
        distributed._require_the_same(nn.Linear(1, 1))


@pytest.mark.slow  # two processes start, about 20 s for all that they answer
def test_two_processes_train_as_one(answers):
    folder, one, other = answers["curves"]
    assert one == other, "every process knows the loss of all"
    expected = {
        "dense": plain(), "untied": plain(MODELS["untied"]), "passes": plain(), "masked": plain(windows=MASKED),
        "mixture": plain(MODELS["mixture without balance"]), "picture": plain(objective=PICTURE),
        "frozen": plain(windows=MASKED, frozen=tables_and_norms), "captions": captioner(),
    }  # fmt: skip
    for name, trainer in expected.items():
        trained(trainer)
        assert one[name][0] == pytest.approx(trainer.losses, abs=1e-5), name
        assert one[name][1] == pytest.approx(trainer.grad_norms, abs=1e-4), name
    fewer = captioner()
    fewer.load(folder / "captions" / "step-00000006")
    assert trained(fewer).losses == pytest.approx(expected["captions"].losses, abs=1e-5)
    rounded = trained(plain(windows=MASKED, config=replace(CONFIG, precision="bfloat16"))).losses
    assert one["bfloat16"][0] == pytest.approx(rounded, abs=0.01), (
        "a pass of two windows rounds other sums than one of four"
    )
    assert one["evaluated"][0] == one["evaluated"][1] == one["dense"][0]
    reached = trained(sighted(), 7)
    assert one["sighted"][0] == pytest.approx(reached.losses, abs=1e-5)
    assert one["sighted"][1] == pytest.approx(reached.grad_norms, abs=1e-4)
    facts = read_facts(folder / "sighted" / "step-00000007")["updates"]
    assert facts == updates_made(reached.model, reached.optimizer)
    losses, updates = one["poisoned"]
    assert losses.count("nan") == 2 and updates == SCHEDULE.total_steps - 2
    assert [line["step"] for line in lines(folder / "poisoned") if line.get("skipped")] == [3, 5]
    assert one["signalled"] == [143, 5, one["dense"][0]]
    balanced = trained(plain(MODELS["mixture"])).losses
    assert one["balanced"][0] == pytest.approx(balanced, abs=0.01), "the balance is that of each process"


class Falling(Schedule):
    """A kind that no checkpoint brings back."""

    def __init__(self, peak_lr, total_steps, fall):
        self.peak_lr, self.total_steps, self.fall = peak_lr, total_steps, fall

    def __call__(self, step):
        return self.peak_lr if step <= self.fall else self.peak_lr / 10


def failures(folder) -> dict:
    """Errors that one process alone meets; each must reach both, and leave nothing behind."""
    rank, said = torch.distributed.get_rank(), {}

    def note(name, work):
        try:
            work()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    class Damaged(Masked):
        def __getitem__(self, index):
            if index == 18:  # step 5, the second process
                raise ValueError("tokens-00001.npy is damaged")
            return WINDOWS[index]

    note("damaged", lambda: trained(make(windows=Damaged())))
    trainer = make()
    trained(trainer, 3, folder=folder / "run")
    real = os.fsync

    def full(descriptor):
        if rank == 1:
            raise OSError(28, "No space left on device")
        real(descriptor)

    os.fsync = full
    note("full", lambda: trained(trainer, 5, folder=folder / "run"))
    os.fsync = real
    said["left"] = sorted(path.name for path in (folder / "run").iterdir())
    resumed = make()
    resumed.load(folder / "run" / "step-00000003")
    said["goes on"] = trained(resumed, 5).losses
    if rank == 0:
        (folder / "linked").mkdir()
        (folder / "linked" / "metrics.jsonl").symlink_to(folder / "nowhere" / "metrics.jsonl")
    note("linked", lambda: trained(make(), folder=folder / "linked"))
    note("odd", lambda: make(config=replace(CONFIG, batch_size=3)))
    note("infinite", lambda: trained(make(schedule=WSD(1e30, 0, 10, 0))))
    note("whole", plain)
    other_text = TokenWindows(TOKENS + rank, 16, 0)  # as of an older copy on another machine
    note("other text", lambda: make(windows=other_text, model=replace(MODEL, vocab_size=42)))
    placed = make(model=replace(MODEL, vocab_size=42))
    placed.batches = other_text
    note("other text in its place", lambda: trained(placed, 1))
    note("other model", lambda: make(model=replace(MODEL, hidden_size=32 + 8 * rank)))
    note("other seed", lambda: make(config=replace(CONFIG, seed=rank)))
    torch.manual_seed(rank)
    note(
        "other weights",
        lambda: Trainer(Decoder(MODEL), WINDOWS, SCHEDULE, CONFIG, layout=Layout(sharded=True)),
    )
    note("other rate", lambda: trained(make(schedule=WSD(0.01 + rank, 0, 10, 0)), folder=folder / "rate"))
    note("other rate without a folder", lambda: trained(make(schedule=WSD(0.01 + rank, 0, 10, 0))))
    note("other decay of one's own", lambda: trained(make(schedule=Falling(0.01, 10, 5 - rank))))
    note("other end", lambda: trained(make(), 3 + rank))
    note("other passes", lambda: make(layout=Layout(2 - rank)))
    note("other recomputation", lambda: make(layout=Layout(None, rank == 0)))
    note("other compilation", lambda: make(config=replace(CONFIG, compile=rank == 0)))
    note("other held-out text", lambda: make().evaluate(TOKENS[: 500 + 100 * rank]))
    note("other held-out text of the same length", lambda: make().evaluate(TOKENS[rank : 500 + rank]))

    class Odd(Captions):
        def __getitem__(self, step):
            if step == 2 and rank == 1:
                raise KeyError("no such image")
            return {name: part[: 4 - step] for name, part in super().__getitem__(step).items()}

    class Unsent(Captions):
        def __getitem__(self, step):
            class Local(Exception):
                pass

            if step == 1 and rank == 1:
                raise Local("picture 7 is truncated")
            return super().__getitem__(step)

    note("of a class of its own", lambda: trained(captioner(Layout(sharded=True), batches=Unsent())))
    note("odd batch", lambda: trained(captioner(Layout(sharded=True), batches=Odd())))
    home = Path.cwd()
    for name, work in {  # each with a folder "run" on a disk of its own
        "own disks": lambda: trained(make(), folder="run"),
        "own disks in a save": lambda: make().save("run"),
    }.items():
        own = folder / name / str(rank)
        own.mkdir(parents=True)
        os.chdir(own)
        note(name, work)
        said[f"left on {name}"] = sorted(str(path) for path in (folder / name).rglob("run/*"))
        os.chdir(home)
        torch.distributed.barrier()
    note("absent", lambda: make().load(folder / "nowhere"))
    note("foreign", lambda: trained(trained(make(objective=BRIER), 6), folder=folder / "run"))
    others = make()
    with torch.no_grad():
        others.model.norm.weight.mul_(2)
    other, step = trained(others, 3).save(folder / "other"), folder / "run" / "step-00000003"
    note("other checkpoint", lambda: make().load(other if rank == 1 else step))
    said["other checkpoint"] = said["other checkpoint"].replace(str(other), str(step))
    copy = shutil.copytree(step, folder / "copies" / str(rank))
    copied = make()
    copied.load(copy)
    said["copies"] = trained(copied, 5).losses
    if rank == 1:
        flip(copy / "shard-00001-model-00001-of-00001.safetensors")
    note("flipped in a copy", lambda: make().load(copy))
    if rank == 0:
        flip(step / "shard-00002-model-00001-of-00001.safetensors")
    torch.distributed.barrier()
    note("flipped", lambda: make().load(step))
    return said


def flip(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"?")


@pytest.mark.slow  # two processes start, about 20 s for all that they answer
def test_an_error_of_one_process_is_everyone_s(answers):
    _, one, other = answers["failures"]
    assert one == other
    assert one["damaged"] == "ValueError: tokens-00001.npy is damaged"
    assert (
        "step-00000005 could not be written: No space left on device. Earlier checkpoints stand."
        in one["full"]
    )
    assert one["left"] == ["metrics.jsonl", "step-00000003"]
    assert one["goes on"] == pytest.approx(trained(plain(), 5).losses, abs=1e-5)
    assert "FileNotFoundError" in one["linked"] and "metrics.jsonl" in one["linked"]
    assert "A step has 3 rows, which 2 processes cannot share evenly" in one["odd"]
    assert "is not finite" in one["infinite"]
    assert "A step has 3 rows, which 2 processes cannot share evenly" in one["odd batch"]
    assert "2 processes were started, and the layout keeps the model whole in each" in one["whole"]
    for name in ("own disks", "own disks in a save"):
        assert "run is another folder for process 1 than for process 0. Give one on" in one[name]
        assert one[f"left on {name}"] == []
    for name, sentence in {
        "text": "What process 1 was given belongs to another text: its checksum is",
        "text in its place": "What process 1 was given belongs to another text: its checksum is",
        "model": "What process 1 was given belongs to another model config: its hidden_size is 40, this run's is 32.",
        "seed": "What process 1 was given belongs to another trainer config: its seed is 1, this run's is 0.",
        "weights": "embed_tokens.weight of the Decoder differs between the processes",
        "rate": "What process 1 was given belongs to another schedule: its peak_lr is 1.01, this run's is 0.01.",
        "rate without a folder": "What process 1 was given belongs to another schedule: its rate at step 1 is 1.01,",
        "decay of one's own": "What process 1 was given belongs to another schedule: its rate at step 5 is 0.001,",
        "end": "What process 1 was given belongs to another call of train: its until is 4, this run's is 3.",
        "passes": "What process 1 was given belongs to another layout: its micro_batch is 1, this run's is 2.",
        "recomputation": "What process 1 was given belongs to another layout: its activation_checkpointing is",
        "compilation": "What process 1 was given belongs to another trainer config: its compile is False,",
        "held-out text": "What process 1 was given belongs to another held-out stream: its tokens is",
        "held-out text of the same length": "What process 1 was given belongs to another held-out stream: its",
    }.items():
        assert one[f"other {name}"].startswith(f"ValueError: {sentence}")
    assert "FileNotFoundError: There is no checkpoint at" in one["absent"]
    assert one["of a class of its own"] == "RuntimeError: Local: picture 7 is truncated"
    assert "FileExistsError" in one["foreign"] and "belongs to another objective" in one["foreign"]
    assert "step-00000003 is another checkpoint for process 1 than for process 0" in one["other checkpoint"]
    assert one["copies"] == one["goes on"]
    assert "copies/1/shard-00001-model-00001-of-00001.safetensors is damaged" in one["flipped in a copy"]
    assert "step-00000003/shard-00002-model-00001-of-00001.safetensors is damaged" in one["flipped"]


def a_checkpoint(folder) -> dict:
    trainer = trained(make(MODELS["untied"]), 6, folder=folder / "two")
    alone = make(MODELS["untied"])
    alone.load(folder / "one" / "step-00000006")
    return {"before": trainer.losses, "after": trained(alone).losses}


WORK = (curves, a_checkpoint, failures)  # failures at the end: what they leave behind harms no other


@pytest.mark.slow  # two processes start, about 20 s for all that they answer
def test_a_run_goes_on_with_more_or_fewer_processes(answers, reseal):
    """41 ids over 2 processes: the parts are of different size."""
    folder, more, _ = answers["a_checkpoint"]
    with processes():
        whole = trained(make(MODELS["untied"])).losses
    assert more["before"] == pytest.approx(whole[:6], abs=1e-5)
    assert more["after"] == pytest.approx(whole, abs=1e-5)
    with processes():
        fewer = make(MODELS["untied"])
        fewer.load(folder / "two" / "step-00000006")
        assert trained(fewer).losses == pytest.approx(whole, abs=1e-5)
    two = folder / "two" / "step-00000006"
    weights = load_weights(two)
    assert_close(weights.lm_head.weight, load_weights(folder / "one" / "step-00000006").lm_head.weight)

    # the part of the first process is lost, and the facts do not know of it
    gone = "shard-00001-model-00001-of-00001.safetensors"
    (two / gone).unlink()
    with pytest.raises(ValueError, match=f"{gone} is missing; it was written with"):
        load_weights(two)
    reseal(two)
    with pytest.raises(ValueError, match="holds 640 of the 1312 values of model.embed_tokens.weight"):
        load_weights(two)


def test_matrices_that_a_plain_decoder_lacks_are_not_set_to_one():
    model = make_ternary(Decoder(ModelConfig(16, 24, 1, 2, 23)))
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.latent is a matrix that a plain decoder"):
        initialise(model, 0)
    assert all(map(torch.equal, model.parameters(), before))
