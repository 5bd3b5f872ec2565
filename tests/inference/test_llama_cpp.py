"""llama.cpp's server is asked as it wants to be asked, and answers become ours; its package may be missing."""

import gc
import importlib.util
import json
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from llama_cpp_package import PACKAGE

from minicpm_lite.inference.engine import Request
from minicpm_lite.inference.llama_cpp import LlamaCpp
from minicpm_lite.language.sampling import Sampling


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The package with a server of ours in it; what it was asked."""
    (tmp_path / "xllamacpp.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda: [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "model.gguf").touch()
    return tmp_path / "model.gguf"


def test_requests_become_answers(asked, file):
    server = LlamaCpp(file, rows=3, room=64, threads=1)
    assert asked()[0] == [3, 192, 1]
    answers = [server.submit(Request((5, 6), number, stop_ids=())) for number in (2, 3, 4)]
    server.run()
    assert [answer.tokens for answer in answers] == [[1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert all(a.state == "done" and 0 < a.submitted <= a.first <= a.last for a in answers)


def test_what_it_is_asked(asked, file):
    server = LlamaCpp(file, room=64)
    server.submit(Request((5, 6), 3, Sampling(0.7, top_k=9, repetition_penalty=1.1), seed=4))
    server.run()
    wanted = {"prompt": [5, 6], "n_predict": 3, "temperature": 0.7, "top_k": 9, "top_p": 1.0, "min_p": 0.0,
              "repeat_penalty": 1.1, "repeat_last_n": 5, "seed": 4, "ignore_eos": False, "stream": True,
              "return_tokens": True, "samplers": ["penalties", "temperature", "top_k", "top_p"]}  # fmt: skip
    assert asked()[-1] == wanted


@pytest.mark.parametrize("none", [(), [], iter(()), set()])
def test_no_stop_ids_are_none_however_they_are_given(none, asked, file, unchecked):
    server, prompt = LlamaCpp(file, room=64), [5, 6]
    server.submit(Request(iter(prompt), 3, stop_ids=none))
    server.run()
    assert asked()[-1]["ignore_eos"] is True and asked()[-1]["prompt"] == prompt


def test_the_server_ends_with_its_object(asked, file):
    server = LlamaCpp(file, room=64)
    address = server._address
    del server
    gc.collect()
    with pytest.raises(URLError):
        urlopen(address, timeout=5)


def test_what_fails_fails_alone(asked, file):
    server = LlamaCpp(file, room=64)
    good, wrong, cut = (server.submit(Request((first,), 2)) for first in (5, 9, 8))
    gone = server.submit(Request((5,), 2))
    server.cancel(gone)
    server.run()
    server.cancel(good)
    assert (good.state, wrong.state, cut.state) == ("done", "failed", "failed")
    assert gone.state in ("cancelled", "done"), "It may have been ready before."
    assert wrong.why == "no such token" and "without a word" in cut.why


@pytest.mark.parametrize("first", [7, 6], ids=["cut off", "not JSON"])
def test_an_answer_that_breaks_off_is_over_and_says_so(first, asked, file):
    server = LlamaCpp(file, room=64)
    answer = server.submit(Request((first,), 2))
    server.run()
    assert answer.state == "failed" and answer.over and "broke off" in answer.why


def test_refusals(asked, file, monkeypatch, unchecked):
    server = LlamaCpp(file, room=64)
    with pytest.raises(ValueError, match="A text of 65 tokens does not fit: there is room for 64"):
        server.submit(Request((1,) * 60, 5))
    with pytest.raises(ValueError, match=r"stop_ids is \(3,\); llama.cpp takes None"):
        server.submit(Request((1,), 5, stop_ids=(3,)))
    for wrong in ({"max_new_tokens": 0}, {"sampling": None}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            server.submit(Request(**{"prompt": (1,), "max_new_tokens": 5} | wrong))
    with pytest.raises(FileNotFoundError, match="There is no file nowhere.gguf"):
        LlamaCpp("nowhere.gguf")
    for wrong in ({"rows": 0}, {"room": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match="expected a whole number of at least 1"):
            LlamaCpp(file, **wrong)
    file.write_text("no model")
    with pytest.raises(ValueError, match="llama.cpp cannot open .*model.gguf; why, it has printed above"):
        LlamaCpp(file)
    file.with_name("xllamacpp.py").unlink()
    importlib.invalidate_caches()
    if importlib.util.find_spec("xllamacpp") is None:
        with pytest.raises(
            ImportError, match="The package 'xllamacpp' is needed to run llama.cpp. Install it"
        ):
            LlamaCpp(file)
