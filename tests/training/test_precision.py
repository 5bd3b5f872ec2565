"""bfloat16: computed with rounded weights, by hand and by the trainer alike; what is kept stays whole."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minicpm_lite import ModelConfig
from minicpm_lite.config import LatentAttentionConfig, MixtureConfig
from minicpm_lite.data.windows import TokenWindows, batch_of
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.upcycling import balance_loss
from minicpm_lite.training.objective import Objective
from minicpm_lite.training.precision import rounded
from minicpm_lite.training.settings import Layout, TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

MODEL = ModelConfig(32, 80, 2, 4, 40, num_key_value_heads=2, max_position_embeddings=64, scale_emb=12,
                    scale_depth=1.4, dim_model_base=32, init_std=0.1)  # fmt: skip
MODELS = {
    "dense": MODEL,
    "untied": replace(MODEL, tie_word_embeddings=False),
    "latent": replace(MODEL, latent_attention=LatentAttentionConfig(16, 8, 8, 8, 8), head_dim=16),
    "mixture": replace(MODEL, mixture=MixtureConfig(4, 2)),
}
CONFIG = TrainerConfig(4, 16, precision="bfloat16")
SCHEDULE = WSD(0.01, 2, 8, 0)
TOKENS = (torch.arange(3000) * 7 // 3) % 40


def line(*weights: float) -> nn.Linear:
    layer = nn.Linear(len(weights), 1, bias=False)
    layer.weight.data = torch.tensor([weights])
    return layer


def backward(whole: nn.Module, *inputs: float) -> None:
    with rounded(whole):
        whole(torch.tensor([inputs], dtype=torch.bfloat16)).sum().backward()


def test_weights_are_rounded_anew_each_time():
    whole = line(1.001, 3.0)
    weight = whole.weight
    with rounded(whole):
        assert whole.weight.tolist() == [[1.0, 3.0]]
    whole.weight.data += 0.01
    with rounded(whole):
        assert whole.weight.tolist() == [[1.0078125, 3.015625]]
    assert whole.weight is weight and weight.dtype == torch.float32


def test_weights_come_back_from_a_pass_that_fails():
    whole = line(1.001)
    weight = whole.weight
    with pytest.raises(KeyboardInterrupt), rounded(whole):
        raise KeyboardInterrupt
    assert whole.weight is weight


def test_gradients_are_added_in_float32():
    """257 is no bfloat16: added there, the 1 would be lost."""
    whole = line(1.0)
    backward(whole, 256.0)
    backward(whole, 1.0)
    assert whole.weight.grad.item() == 257 and whole.weight.grad.dtype == torch.float32


def test_frozen_weights_are_rounded_and_have_no_gradient():
    whole = nn.Sequential(line(1.001), line(2.0))
    whole[0].requires_grad_(False)
    backward(whole, 3.0)
    with rounded(whole):
        assert whole[0].weight.item() == 1 and not whole[0].weight.requires_grad
    assert whole[0].weight.grad is None and whole[1].weight.grad.item() == 3


def test_tied_weights_stay_tied():
    whole = nn.Sequential(line(2.0), line(2.0))
    whole[1].weight = whole[0].weight
    backward(whole, 3.0)
    with rounded(whole):
        assert whole[0].weight is whole[1].weight
    assert whole[0].weight.grad.item() == 12


class Net(nn.Module):
    """With what people set on a module that is trained: an attribute, dropout, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout, self.gain = nn.Linear(1, 4), nn.Dropout(0.0), 1.0

    def forward(self, x):
        return self.dropout(self.layer(x.to(self.layer.weight.dtype))) * self.gain


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_set_on_the_module_acts(precision):
    config = replace(CONFIG, precision=precision, weight_decay=0.0)
    run = Trainer(Net(), Ones(), SCHEDULE, config, Objective("down", Downhill.loss, len))
    run.train(1, progress=False)
    seen, layer = [], run.model.layer
    layer.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    layer.weight.register_hook(lambda gradient: gradient * torch.tensor([[1.0], [0], [0], [0]]))
    run.model.gain = 100.0
    before = layer.weight.detach().clone()
    run.optimizer.state.clear()  # moments would move what has no gradient any more
    run.train(2, progress=False)
    assert (layer.weight != before).flatten().tolist() == [True, False, False, False]
    assert abs(run.losses[1]) > 50 * abs(run.losses[0]) and seen == [getattr(torch, precision)]
    run.model.dropout.p = 1.0
    run.train(3, progress=False)
    assert run.losses[2] == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_copied_run_trains_as_the_run_does(precision):
    run = Trainer(Decoder(MODEL), TOKENS, SCHEDULE, replace(CONFIG, precision=precision))
    run.train(2, progress=False)
    twin = copy.deepcopy(run)
    for each in (run, twin):
        each.train(5, progress=False)
    assert twin.losses == run.losses and twin.grad_norms[-1] > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_balance_loss_of_the_last_step_can_be_read(precision):
    config = replace(MODEL, mixture=MixtureConfig(4, 2))
    run = Trainer(Decoder(config), TOKENS, SCHEDULE, replace(CONFIG, precision=precision))
    run.train(1, progress=False)
    assert balance_loss(run.model).item() > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_another_config_counts_from_then_on(precision):
    """A decoder's config may be replaced, for a longer context."""
    torch.manual_seed(0)
    longer, plain = (
        Trainer(Decoder(MODEL), TOKENS, SCHEDULE, replace(CONFIG, precision=precision)) for _ in "ab"
    )
    plain.model.load_state_dict(longer.model.state_dict())
    for run in (longer, plain):
        run.train(2, progress=False)
    longer.model.config = replace(MODEL, rope_theta=100.0)
    for run in (longer, plain):
        run.train(3, progress=False)
    assert longer.losses[:2] == plain.losses[:2] and longer.losses[2] != plain.losses[2]


def test_updates_too_small_for_bfloat16_are_not_lost():
    """A step of 1e-4 from a weight of 1 is nothing in bfloat16, and counts after a hundred of them."""
    run = Trainer(line(1.0), Ones(), WSD(1e-4, 0, 200, 0), replace(CONFIG, weight_decay=0), Downhill)
    run.train(progress=False)
    assert run.model.weight.item() == pytest.approx(1 - 200e-4, rel=1e-3)


class Ones:
    def __getitem__(self, step):
        return torch.ones(2, 1, dtype=torch.bfloat16)

    def identity(self):
        return {}


class Downhill:
    @staticmethod
    def loss(model, batch):
        out = model(batch).float().mean()
        return out, out.detach()

    @staticmethod
    def weight(batch):
        return len(batch)


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_the_loop_one_would_write(name):
    """Round all weights, forward and backward, move the whole ones: the same numbers, bit for bit."""
    config = replace(
        MODELS[name], mixture=MODELS[name].mixture and MixtureConfig(4, 2, balance_loss_weight=0)
    )
    torch.manual_seed(0)
    run, whole = Trainer(Decoder(config), TOKENS, SCHEDULE, CONFIG), Decoder(config)
    whole.load_state_dict(run.model.state_dict())
    tables = {id(table) for table in whole.tables}
    matrices = [p for p in whole.parameters() if p.ndim == 2 and id(p) not in tables]
    others = [p for p in whole.parameters() if p.ndim < 2 or id(p) in tables]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=SCHEDULE.peak_lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    scheduler = SCHEDULE.scheduler(optimizer)
    for step in range(6):
        window = batch_of(TokenWindows(TOKENS, 16, 0), step, 4)
        rounded = Decoder(config)
        rounded.load_state_dict(whole.state_dict())
        logits = rounded.bfloat16()(window[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten()).backward()
        for mine, theirs in zip(whole.parameters(), rounded.parameters(), strict=True):
            mine.grad = theirs.grad.float()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    run.train(6, progress=False)
    for mine, plain in zip(run.model.parameters(), whole.parameters(), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, plain)


def test_angles_stay_in_float32():
    run, seen = Trainer(Decoder(MODEL), TOKENS, SCHEDULE, CONFIG), {}
    attention = run.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda module, inputs: seen.update(
            x=inputs[0].dtype, cos=inputs[1][0].dtype, weight=module.q_proj.weight.dtype
        )
    )
    run.train(1, progress=False)
    assert seen == {"x": torch.bfloat16, "cos": torch.float32, "weight": torch.bfloat16}


def test_the_evaluation_is_that_of_the_whole_weights():
    run = Trainer(Decoder(MODEL), TOKENS, SCHEDULE, CONFIG)
    run.train(3, progress=False)
    full = Trainer(run.model, TOKENS, SCHEDULE, replace(CONFIG, precision="float32"))
    assert run.evaluate(TOKENS) == full.evaluate(TOKENS)


def test_passes_and_recomputation_change_nothing_but_by_rounding():
    losses = []
    for layout in (Layout(), Layout(1), Layout(None, True)):
        torch.manual_seed(0)
        run = Trainer(Decoder(MODEL), TOKENS, SCHEDULE, CONFIG, layout=layout)
        run.train(4, progress=False)
        losses.append(run.losses)
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert losses[2] == losses[0]


class Follower(nn.Module):
    """Subtracts a running mean, which it assigns anew in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        out = self.layer(x.to(self.layer.weight.dtype)).float()
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * out.detach().mean(dim=0)
        return out - self.mean


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_buffer_that_is_assigned_anew_is_kept_and_resumed(tmp_path, precision):
    def make():
        torch.manual_seed(0)
        config = replace(CONFIG, precision=precision)
        return Trainer(Follower(), Ones(), SCHEDULE, config, Objective("down", Downhill.loss, len))

    whole, run = make(), make()
    whole.train(6, progress=False)
    run.train(3, progress=False)
    assert run.model.mean.abs() > 0.1
    resumed = make()
    resumed.load(run.save(tmp_path))
    for each in (run, resumed):
        each.train(6, progress=False)
        assert each.losses == whole.losses and torch.equal(each.model.mean, whole.model.mean)
