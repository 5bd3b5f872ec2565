"""Where a decay may begin, and what it shares with the run it began from."""

import pytest
import torch

from minicpm_lite import ModelConfig
from minicpm_lite.data.windows import TokenWindows
from minicpm_lite.training.branch import decay_schedule
from minicpm_lite.training.distributed import DistributedTrainer
from minicpm_lite.training.processes import processes
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.wsd import WSD, Cosine, Schedule

MODEL = ModelConfig(16, 40, 2, 2, 41, max_position_embeddings=64, scale_depth=1.4, dim_model_base=16)
SCHEDULE = WSD(0.01, 2, 4, 4)
WINDOWS = TokenWindows((torch.arange(1000) * 7 // 3) % 41, 8, 0)


def make(schedule=SCHEDULE) -> DistributedTrainer:
    return DistributedTrainer(MODEL, WINDOWS, schedule, TrainerConfig(batch_size=2, sequence_length=8))


@pytest.fixture(scope="module", autouse=True)
def alone():
    with processes():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1, 4 (stable), 6 (the decay begins), 8 and 10."""
    folder, trainer = tmp_path_factory.mktemp("run"), make()
    for step in (1, 4, 6, 8, 10):
        trainer.train(step, progress=False)
        trainer.save(folder)
    return folder


@pytest.mark.parametrize(("step", "decay_start"), [(4, 4), (6, 6)])
def test_a_decay_begins_at_a_stable_checkpoint(saved, step, decay_start):
    schedule = decay_schedule(saved / f"step-{step:08d}", 5, form="linear")
    assert (schedule.decay_start, schedule.total_steps, schedule.form) == (decay_start, step + 5, "linear")
    make(schedule=schedule).branch_from(saved / f"step-{step:08d}")


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (1, "taken in the warm-up, at step 1 of 2"),
        (8, "at step 8, in or after the decay that began at step 6.*such as step-00000006"),
        (10, "at step 10, in or after the decay"),
    ],
)
def test_a_decay_does_not_begin_elsewhere(saved, step, sentence):
    path = saved / f"step-{step:08d}"
    with pytest.raises(ValueError, match=sentence):
        decay_schedule(path, 5)
    trainer = make()
    with pytest.raises(ValueError, match=sentence):
        trainer.branch_from(path)
    assert trainer.step == 0


def test_a_cosine_has_no_stable_stage(tmp_path):
    schedule = Cosine(0.01, 2, 10)
    path = make(schedule=schedule).save(tmp_path)
    make(schedule=schedule).load(path)
    with pytest.raises(ValueError, match="with the schedule Cosine, which has no stable stage"):
        decay_schedule(path, 5)


def test_a_schedule_that_no_checkpoint_could_bring_back():
    class Constant(Schedule):
        peak_lr, total_steps = 0.01, 10

        def __call__(self, step):
            return self.peak_lr

    with pytest.raises(ValueError, match="is a Constant, which no checkpoint could bring back. Use WSD or"):
        make(schedule=Constant())


def test_a_schedule_made_from_a_half_life_comes_back(tmp_path):
    schedule = WSD(0.01, 0, 4, 4, half_life=2)
    path = make(schedule=schedule).save(tmp_path)
    make(schedule=schedule).load(path)
    assert decay_schedule(path, 3, half_life=2).final_ratio == 0.5**1.5
