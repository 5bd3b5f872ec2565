"""Processes: one alone needs no launcher, and errors of the first are everyone's."""

import threading
from contextlib import nullcontext

import pytest
import torch.distributed as dist

from minicpm_lite.training.processes import on_each, on_first, processes, raise_together


def test_one_process_stands_alone_and_leaves_nothing():
    for _ in range(2):  # also a second time
        with processes() as device:
            assert device.type in ("cpu", "cuda")
            assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        assert not dist.is_initialized()


def test_any_launcher_s_processes_join(monkeypatch):
    """Those of an MPI wrapper, too: taken for one alone, each would write the run of all."""
    asked = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: asked.append(how))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "there", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with processes():
        assert asked == [{}], "rank and number are those of the environment"


def test_the_group_ends_with_an_error_too():
    with pytest.raises(ValueError, match="this"), processes():
        raise ValueError("this")
    assert not dist.is_initialized()


def test_results_and_errors_come_through():
    with processes():
        assert on_first(lambda: {"step": 3}) == {"step": 3}
        with pytest.raises(OSError, match="full") as caught:
            on_first(lambda: (_ for _ in ()).throw(OSError(28, "full")))
        assert caught.value.errno == 28
        raise_together(None)
        with pytest.raises(ValueError, match="mine"):
            raise_together(ValueError("mine"))


@pytest.mark.parametrize("joined", [nullcontext, processes])
def test_results_and_errors_of_each_come_through(joined):
    with joined():
        assert on_each(lambda: 3) == [3]
        with pytest.raises(KeyError, match="mine"):
            on_each(lambda: {}["mine"])


class TwoWords(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} {other}")


def local():
    class Local(Exception):
        pass

    return Local("is damaged")


def with_a_lock():
    error = ValueError("is damaged")
    error.lock = threading.Lock()
    return error


@pytest.mark.parametrize("make", [local, with_a_lock, lambda: TwoWords("is", "damaged")])
def test_an_error_that_cannot_be_sent_is_everyone_s_by_its_text(make):
    name = type(make()).__name__

    def work():
        raise make()

    with processes():
        for go in (lambda: raise_together(make()), lambda: on_first(work), lambda: on_each(work)):
            with pytest.raises(RuntimeError, match=f"{name}: is damaged"):
                go()
    with pytest.raises(type(make()) if make is not local else Exception, match="is damaged"):
        raise_together(make())
