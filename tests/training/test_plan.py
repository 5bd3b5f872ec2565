"""The plan of a run: what was published, what is given, what is a default, and what cannot be."""

import math
from dataclasses import replace

import pytest

from minicpm_lite import ModelConfig, list_configs, load_config
from minicpm_lite.config import TrainingRecipe, load_recipe
from minicpm_lite.training.plan import DEFAULTS, plan_training, published_decay

MODEL = ModelConfig(64, 160, 3, 4, 501, num_key_value_heads=2, scale_depth=1.4, dim_model_base=32)


def test_the_published_run_of_minicpm():
    """1.1T tokens in steps of 3.93M, and a decay that begins near step 263,000, as the team reported."""
    plan = plan_training(load_config("minicpm-2.4b"), load_recipe("minicpm-2.4b"), gpus=8)
    assert plan.trainer.batch_tokens == 960 * 4096
    assert plan.tokens == pytest.approx(1.1e12, rel=1e-5)
    assert plan.schedule.decay_start == pytest.approx(263_000, rel=0.002)
    assert plan.schedule(plan.steps) == pytest.approx(1e-3)
    assert plan.flops == 6 * 2_724_880_896 * plan.tokens
    assert plan.hours(gpu_flops=1e15, utilisation=0.5) == pytest.approx(plan.flops / 8 / 5e14 / 3600)
    assert len(plan.assumptions) == 2, "only length and warm-up are not published"


def test_experts_that_are_not_visited_cost_memory_and_no_arithmetic():
    plan = plan_training(load_config("minicpm-moe-8x2b"), gpus=64)
    assert plan.parameters == 13_590_468_864 + 122_753 * 2304
    assert plan.active_parameters == 4_035_320_064 + 122_753 * 2304


def test_untied_tables_are_counted_once_in_the_arithmetic():
    plan = plan_training(load_config("minicpm4-8b"), gpus=64)
    assert plan.parameters - plan.active_parameters == 73_448 * 4096


@pytest.mark.parametrize("name", list_configs())
def test_every_model_can_be_planned(name):
    plan = plan_training(load_config(name), gpus=64)
    assert plan.memory.total > 0 and plan.steps > 0
    assert plan.schedule.total_steps == plan.steps
    assert plan.trainer.batch_size % 64 == 0
    assert all(sentence.endswith(".") for sentence in plan.assumptions)


def test_what_is_given_counts_then_the_recipe_then_the_default():
    recipe = TrainingRecipe(tokens=1e9, batch_tokens=1e6, peak_learning_rate=0.02)
    plan = plan_training(MODEL, recipe, gpus=2, batch_tokens=2e6)
    assert plan.trainer.batch_tokens == pytest.approx(2e6, rel=2e-3)
    assert plan.schedule.peak_lr == 0.02
    assert plan.steps == math.ceil(1e9 / plan.trainer.batch_tokens)
    assert plan.trainer.parametrization == "mup"
    assert (
        plan_training(replace(MODEL, dim_model_base=None), recipe, batch_tokens=2e6).trainer.parametrization
        == "standard"
    )
    named = " ".join(plan.assumptions)
    assert "decay_steps" in named and "peak_lr" not in named and "batch_tokens" not in named
    assert f"{DEFAULTS['peak_lr'][0]:g}" in " ".join(plan_training(load_config("lite-1m")).assumptions)


def test_a_decay_to_a_tenth_by_its_half_life():
    recipe = TrainingRecipe(tokens=1e9, batch_tokens=1e6, peak_learning_rate=0.02, decay_half_life_steps=30)
    assert published_decay(recipe) == plan_training(MODEL, recipe).schedule.decay_steps == 100
    assert 0.5 ** (100 / 30) <= 0.1 < 0.5 ** (99 / 30)
    assert published_decay(replace(recipe, decay_half_life_steps=None)) is published_decay(None) is None
    with pytest.raises(ValueError, match="of decay do not fit into 1,000 steps"):
        plan_training(MODEL, replace(recipe, decay_half_life_steps=1e308), steps=1000)


def test_the_reason_of_a_length_is_the_one_that_decided():
    short, long = (replace(MODEL, max_position_embeddings=length) for length in (512, 8192))
    assert (
        "sequence_length 512 is a default: all that the model was made for."
        in plan_training(short).assumptions
    )
    assert any(
        "4,096 is a default: MiniCPM's pre-" in sentence for sentence in plan_training(long).assumptions
    )


def test_defaults_fit_into_one_step():
    plan = plan_training(MODEL, steps=1)
    assert (plan.schedule.warmup_steps, plan.schedule.decay_steps) == (1, 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(gpus=0), "gpus is 0"),
        (
            dict(steps=100, warmup_steps=60, decay_steps=50),
            "60 steps of warm-up and 50 of decay do not fit into 100",
        ),
        (dict(precision="fp8"), "precision is 'fp8'"),
        (dict(steps=0), "steps is 0"),
        (dict(steps=10**30), "more tokens than 63 bits count"),
        (dict(batch_tokens=1e300), "more tokens than 63 bits count"),
        (dict(sequence_length=0), "sequence_length is 0"),
        (dict(batch_tokens=0.0), "batch_tokens is 0.0"),
        (dict(batch_tokens=math.nan), "batch_tokens is nan"),
        (dict(batch_tokens=math.inf), "batch_tokens is inf"),
        (dict(peak_lr=math.inf), "peak_lr is inf"),
        (dict(warmup_steps=0.01), "warmup_steps is 0.01; expected a whole number"),
        (dict(decay_steps=0.1), "decay_steps is 0.1; expected a whole number"),
        (dict(decay_steps=True), "decay_steps is True"),
        (dict(warmup_steps=-1), "warmup_steps is -1"),
    ],
)
def test_impossible_plans(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan_training(MODEL, **change)
