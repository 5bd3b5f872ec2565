"""Training models with experts: balanced, resumed bit for bit and in bfloat16."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from minicpm_lite.config import MixtureConfig, ModelConfig
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.scoring import next_token_loss
from minicpm_lite.language.upcycling import balance_loss, upcycle
from minicpm_lite.training.objective import next_token
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

FIVE_EXPERTS = MixtureConfig(num_experts=5, num_experts_per_token=2)
DENSE = ModelConfig(
    32, 48, 2, 4, 50, max_position_embeddings=64, scale_emb=12, scale_depth=1.4, dim_model_base=16, init_std=0.1
)  # fmt: skip
TOKENS = (torch.arange(3000) * 7 // 3) % 50
SCHEDULE = WSD(peak_lr=0.01, warmup_steps=2, stable_steps=10, decay_steps=3)
TRAINER = TrainerConfig(batch_size=4, sequence_length=16)


def dense() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DENSE).eval()


def trained(weight: float, until: int, config: TrainerConfig = TRAINER) -> Trainer:
    mixture = replace(FIVE_EXPERTS, balance_loss_weight=weight)
    run = Trainer(upcycle(dense(), mixture, router_std=1.0), TOKENS, SCHEDULE, config)
    run.train(until, progress=False)
    return run


def test_the_trainer_adds_the_balance_loss_and_does_not_report_it():
    window = TOKENS[None, :17]
    model = upcycle(dense(), FIVE_EXPERTS).train()
    minimised, reported = next_token.loss(model, window)
    assert reported == next_token_loss(model, window)
    assert_close(minimised, reported + 0.01 * balance_loss(model))
    model.config = replace(model.config, mixture=replace(FIVE_EXPERTS, balance_loss_weight=0))
    assert next_token.loss(model, window)[0] == reported
    plain = dense()
    assert next_token.loss(plain, window)[0] == next_token_loss(plain, window)

    without, heavy = trained(0, 12), trained(10.0, 12)
    assert without.losses[0] == heavy.losses[0], "what is reported is the next-token loss alone"
    assert without.losses[1:] != heavy.losses[1:]
    for run in (without, heavy):
        run.model.train()(TOKENS[:320].view(5, 64))
    assert balance_loss(heavy.model) < balance_loss(without.model) - 0.02
    heavy.model.layers[0].mlp.balance_loss = None
    heavy.evaluate(TOKENS[:100])
    assert heavy.model.layers[0].mlp.balance_loss is None, "evaluation neither computes nor adds it"


def test_a_mixture_resumes_bit_for_bit_and_branches(tmp_path):
    whole = trained(0.01, 8)
    path = trained(0.01, 3).save(tmp_path)
    resumed = trained(0.01, 0)
    resumed.load(path)
    branch = resumed.branch(SCHEDULE)
    for run in (resumed, branch):
        run.train(8, progress=False)
        assert run.losses == whole.losses
        for mine, theirs in zip(run.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_bfloat16_trains_experts_like_float32():
    """Router and sums stay in float32; the experts' products round to three digits."""
    half = trained(0.01, 4, replace(TRAINER, precision="bfloat16"))
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert half.losses == pytest.approx(trained(0.01, 4).losses, rel=0.02)
