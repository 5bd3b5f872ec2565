"""Where a decay may begin, and what it shares with the run it began from."""

from contextlib import nullcontext
from dataclasses import InitVar, dataclass, field

import pytest

from minicpm_lite.data.mixtures import MixtureWindows
from minicpm_lite.data.windows import TokenWindows
from minicpm_lite.training.branch import decay_schedule
from minicpm_lite.training.wsd import WSD, Cosine, Schedule


@pytest.mark.parametrize(("step", "decay_start"), [(4, 4), (6, 6)])
def test_a_decay_begins_at_a_stable_checkpoint(make, saved, step, decay_start):
    schedule = decay_schedule(saved / f"step-{step:08d}", 5, form="linear")
    assert (schedule.decay_start, schedule.total_steps, schedule.form) == (decay_start, step + 5, "linear")
    make(schedule=schedule).branch_from(saved / f"step-{step:08d}")


FORMS = [
    {},
    {"form": "linear", "final_ratio": 0.0},
    {"form": "sqrt"},
    {"form": "cosine", "final_ratio": 0.3},
    {"final_ratio": 0.05},
    {"half_life": 2},
]


@pytest.mark.parametrize("decay_steps", [0, 4])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_decay_has_the_form_that_its_run_names(make, tmp_path, form, decay_steps):
    """Rates of the branch are those of a run that was to decay there from the beginning."""
    path = make(schedule=WSD(0.01, 0, 9, decay_steps, **form)).save(tmp_path)
    asked = WSD(0.01, 0, 0, 5, **form)
    assert decay_schedule(path, 5) == asked
    for other in FORMS:
        if "half_life" in other and "form" in form:
            with pytest.raises(ValueError, match="half_life belongs to the exponential decay"):
                decay_schedule(path, 5, **other)
        elif other:
            kept = {} if "half_life" in form else form  # what is given would contradict a half-life
            assert decay_schedule(path, 5, **other) == WSD(0.01, 0, 0, 5, **kept | other)


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (1, "taken in the warm-up, at step 1 of 2"),
        (8, "at step 8, in or after the decay that began at step 6.*such as step-00000006"),
        (10, "at step 10, in or after the decay"),
    ],
)
def test_a_decay_does_not_begin_elsewhere(make, saved, step, sentence):
    path = saved / f"step-{step:08d}"
    with pytest.raises(ValueError, match=sentence):
        decay_schedule(path, 5)
    trainer = make()
    with pytest.raises(ValueError, match=sentence):
        trainer.branch_from(path)
    assert trainer.step == 0


class Cut(TokenWindows):
    """Windows that say who made their tokens, as those of shards do."""

    def __init__(self, windows: TokenWindows, tokenizer: int | None):
        super().__init__(windows.tokens, windows.length, windows.seed)
        object.__setattr__(self, "tokenizer", tokenizer)

    def identity(self):
        return super().identity() | {"tokenizer": self.tokenizer}


@pytest.mark.parametrize(("before", "after"), [(7, 7), (None, 7), (7, None), (7, 8)])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_branch_reads_what_the_same_tokenizer_cut(make, tmp_path, before, after, mixed):
    def run(tokenizer):
        trainer = make()
        plain = trainer.batches.windows
        cut = Cut(plain, tokenizer)
        mixture = MixtureWindows({"plain": plain, "cut": cut}, [(0, {"plain": 1, "cut": 1})])
        object.__setattr__(trainer.batches, "windows", mixture if mixed else cut)
        return trainer

    stable = run(before)
    stable.train(4, progress=False)
    path, branch = stable.save(tmp_path), run(after)
    if (before, after) == (7, 8):
        with pytest.raises(
            ValueError, match="the data of this run and what .*step-00000004 read were cut with different"
        ):
            branch.branch_from(path)
        assert branch.step == 0
    else:
        branch.branch_from(path)
        assert branch.step == 4
    if not stable.layout.sharded:
        differ = "the data of the branch and those of this run were cut with different tokenizers"
        with pytest.raises(ValueError, match=differ) if (before, after) == (7, 8) else nullcontext():
            assert stable.branch(stable.schedule, branch.batches.windows).step == 4


def test_a_cosine_has_no_stable_stage(make, tmp_path):
    schedule = Cosine(0.01, 2, 10)
    path = make(schedule=schedule).save(tmp_path)
    make(schedule=schedule).load(path)
    with pytest.raises(ValueError, match="with the schedule Cosine, which has no stable stage"):
        decay_schedule(path, 5)


def test_a_schedule_that_no_checkpoint_could_bring_back(make, tmp_path):
    class Constant(Schedule):
        peak_lr, total_steps = 0.01, 10

        def __call__(self, step):
            return self.peak_lr

    run = make(schedule=Constant())
    for use in (lambda: run.train(folder=tmp_path), lambda: run.save(tmp_path)):
        with pytest.raises(
            ValueError, match="is a Constant, which a checkpoint could not bring back. Use WSD"
        ):
            use()
    assert run.step == 0 and not list(tmp_path.iterdir())
    run.train(progress=False)  # and without one any schedule does
    assert run.step == 10


@dataclass(frozen=True)
class Steady(Schedule):
    peak_lr: float
    total_steps: int = 10

    def __call__(self, step):
        return self.peak_lr


def test_a_schedule_of_one_s_own_comes_back(make, tmp_path):
    path = make(schedule=Steady(0.01)).save(tmp_path)
    make(schedule=Steady(0.01)).load(path)
    with pytest.raises(ValueError, match="with the schedule Steady; only WSD, Cosine are known"):
        make(schedule=Cosine(0.01, 2, 10)).load(path)
    with pytest.raises(ValueError, match="with the schedule Steady, which has no stable stage"):
        decay_schedule(path, 5)


def test_a_schedule_made_from_a_half_life_comes_back(make, tmp_path):
    schedule = WSD(0.01, 0, 4, 4, half_life=2)
    path = make(schedule=schedule).save(tmp_path)
    make(schedule=schedule).load(path)
    assert decay_schedule(path, 3, half_life=3).final_ratio == 0.5


@dataclass(frozen=True)
class Halving(Schedule):
    peak_lr: float
    half_life: float
    total_steps: int = 10

    def __call__(self, step):
        return self.peak_lr * 0.5 ** (step / self.half_life)


def test_fields_of_a_schedule_of_one_s_own_are_its_own(make, tmp_path):
    """A half-life means to it what it likes; only WSD's decides a final ratio."""
    run = make(schedule=Halving(0.01, 5.0))
    run.train(2, progress=False)
    make(schedule=Halving(0.01, 5.0)).load(run.save(tmp_path))


@dataclass(frozen=True)
class Computed(Steady):
    warmup_steps: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "warmup_steps", self.total_steps // 4)


@dataclass(frozen=True)
class Unknown(Steady):
    doubled: InitVar[int] = 0

    def __post_init__(self, doubled):
        if not doubled:
            raise ValueError("doubled is needed")


def test_what_a_schedule_computes_of_its_fields_comes_back(make, tmp_path):
    run = make(schedule=Computed(0.01))
    run.train(2, tmp_path, progress=False)
    make(schedule=Computed(0.01)).load(tmp_path / "step-00000002")


def test_a_schedule_that_is_made_of_more_than_its_fields(make, tmp_path):
    with pytest.raises(ValueError, match="is a Unknown, which a checkpoint could not bring back"):
        make(schedule=Unknown(0.01, doubled=1)).train(2, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Odd(Steady):
    field: object = None


@pytest.mark.parametrize(
    "field", [abs, float("nan"), (1, 2), {1: 2}, 1j, b"x", {"a"}, [Steady(1.0)]], ids=str
)
def test_fields_that_a_checkpoint_would_change_or_lose(make, tmp_path, field):
    """Said before the first step, not at the first checkpoint."""
    run = make(schedule=Odd(0.01, field=field))
    with pytest.raises(ValueError, match="is a Odd, which a checkpoint could not bring back"):
        run.train(folder=tmp_path / "run", progress=False)
    assert run.step == 0 and not (tmp_path / "run").exists()
