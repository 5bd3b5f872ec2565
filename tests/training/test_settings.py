"""Settings refuse what cannot be."""

from dataclasses import replace

import pytest

from minicpm_lite.training.settings import Layout, TrainerConfig

CONFIG = TrainerConfig(batch_size=4, sequence_length=16)


def test_the_tokens_of_a_step():
    assert CONFIG.batch_tokens == 64


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(precision="fp8"), "precision is 'fp8'; choose float32 or bfloat16"),
        (dict(parametrization="ntk"), "parametrization is 'ntk'; choose standard or mup"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(sequence_length=-1), "sequence_length is -1"),
        (dict(betas=(0.9, 1)), r"betas is \(0.9, 1\); expected two numbers from 0 to below 1"),
        (dict(betas=(0.9,)), r"betas is \(0.9,\)"),
        (dict(betas=0.9), "betas is 0.9; expected two numbers"),
        (dict(betas=("0.9", 0.9)), "betas is .*; expected two numbers"),
        (dict(seed=1.5), "seed is 1.5; expected a whole number from 0 to 4294967295"),
        (dict(seed="7"), "seed is '7'"),
        (dict(seed=1 << 32), "seed is 4294967296"),
        (dict(seed=-1), "seed is -1"),
        (dict(max_grad_norm=-1), "max_grad_norm is -1"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1"),
    ],
)
def test_impossible_trainers(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(CONFIG, **change)


def test_no_pass_is_larger_than_a_process_s_part():
    assert Layout(64).rows_at_once(16, 8) == 2 and Layout(2).rows_at_once(16, 1) == 2
    assert Layout().rows_at_once(16, 8) == 2 and Layout().rows_at_once(16, 1) == 16


def test_an_impossible_layout():
    with pytest.raises(ValueError, match="micro_batch is 0"):
        Layout(0)
