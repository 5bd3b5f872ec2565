"""SIGTERM, SIGHUP and SIGINT: the step is finished, a checkpoint is there, and the run goes on from it as if nothing was."""

import signal
import threading

import pytest

from minicpm_lite.training.interruption import Interruption
from minicpm_lite.training.sharded_checkpoint import checkpoints


class Signalled:
    """Windows during whose reading signals arrive."""

    def __init__(self, windows, at: int, *numbers: int) -> None:
        self.windows, self.at, self.numbers, self.length = windows, at, numbers, windows.length

    def __getitem__(self, index):
        if index == self.at:
            for number in self.numbers:
                signal.raise_signal(number)
        return self.windows[index]

    def id_range(self):
        return self.windows.id_range()

    def identity(self):
        return self.windows.identity()


@pytest.fixture
def signalled(make):
    def signalled(at, *numbers):
        run = make()
        object.__setattr__(run.batches, "windows", Signalled(run.batches.windows, at, *numbers))
        return run

    return signalled


HANDLERS = signal.default_int_handler, signal.getsignal(signal.SIGTERM)
ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit, signal.SIGHUP: SystemExit}


@pytest.fixture(autouse=True)
def as_in_the_foreground():
    """A program that is begun in the background ignores SIGINT, and one under nohup SIGHUP."""
    theirs = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in theirs.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(make):
    """A run that nothing interrupts."""
    run = make()
    run.train(progress=False)
    return run


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize(  # slow: runs that differ from a quick one in the step alone
    "step", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(9, marks=pytest.mark.slow)]
)
def test_the_step_is_finished_and_saved(make, whole, signalled, tmp_path, number, step):
    run = signalled(2 * step - 1, number)  # two windows a step
    with pytest.raises(ENDS[number]) as ended:
        run.train(folder=tmp_path, progress=False)
    assert number == signal.SIGINT or ended.value.code == {signal.SIGTERM: 143, signal.SIGHUP: 129}[number]
    assert run.step == step and max(checkpoints(tmp_path)) == step
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == HANDLERS
    resumed = make()
    resumed.load(tmp_path / f"step-{step:08d}")
    for each in (resumed, run):  # a new program, or the same one
        each.train(folder=tmp_path if each is resumed else None, progress=False)
        assert (each.losses, each.grad_norms) == (whole.losses, whole.grad_norms)


def test_in_the_last_step_too(signalled, tmp_path):
    run = signalled(19, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run.train(folder=tmp_path, progress=False)
    assert run.step == max(checkpoints(tmp_path)) == 10


@pytest.mark.parametrize("first", ENDS)
def test_a_ctrl_c_after_a_signal_acts_at_once(signalled, tmp_path, first):
    run = signalled(7, first, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.train(folder=tmp_path, progress=False)
    assert run.step == 3 and not checkpoints(tmp_path)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM] * 3, [signal.SIGINT, signal.SIGTERM]])
def test_a_cluster_may_say_it_more_than_once(signalled, tmp_path, numbers):
    """Slurm says it to each process, and torchrun, to which it is said as well, passes it on."""
    run = signalled(7, *numbers)
    with pytest.raises(SystemExit):
        run.train(folder=tmp_path, progress=False)
    assert run.step == max(checkpoints(tmp_path)) == 4
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == HANDLERS


def test_what_the_program_ignores_stays_ignored(signalled, tmp_path):
    """As SIGINT of a program that was begun in the background, which a Ctrl-C in its terminal is not for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = signalled(7, signal.SIGINT, signal.SIGINT)
    run.train(folder=tmp_path, progress=False)
    assert run.step == 10 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    run = signalled(7, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run.train(folder=tmp_path / "other", progress=False)
    assert run.step == max(checkpoints(tmp_path / "other")) == 4


@pytest.mark.parametrize("number", ENDS)
def test_without_a_folder_the_step_is_finished_too(make, signalled, number):
    """So that nobody's Ctrl-C, in a notebook for instance, falls into the middle of the optimizer's step."""
    run, whole = signalled(7, number), make()
    step = run.optimizer.step

    def interrupted(*how):
        if run.step == 8:
            signal.raise_signal(number)
        return step(*how)

    run.optimizer.step = interrupted
    for stopped_at in (4, 10):  # the second comes behind the sum over the processes
        with pytest.raises(ENDS[number]):
            run.train(progress=False)
        assert run.step == stopped_at
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == HANDLERS
    whole.train(progress=False)
    assert (run.losses, run.grad_norms) == (whole.losses, whole.grad_norms)


def test_another_thread_notes_no_signals(make, tmp_path):
    run = make()
    thread = threading.Thread(target=run.train, args=(3, tmp_path), kwargs={"progress": False})
    thread.start()
    thread.join()
    assert run.step == 3 and 3 in checkpoints(tmp_path)


def test_what_comes_after_the_last_step_is_not_lost():
    with pytest.raises(KeyboardInterrupt), Interruption():
        signal.raise_signal(signal.SIGINT)
    assert Interruption.error(Interruption().wishes()) is None
