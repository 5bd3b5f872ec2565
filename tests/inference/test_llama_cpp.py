"""llama.cpp's server is asked as it wants to be asked, and answers become ours; its package may be missing."""

import contextlib
import importlib.util
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest

from minicpm_lite.inference.engine import Request
from minicpm_lite.inference.llama_cpp import LlamaCpp
from minicpm_lite.language.sampling import Sampling


class _Answers(BaseHTTPRequestHandler):
    """Writes 1, 2, 3, ... as the server does, a token a line; a prompt that begins with 9 is refused."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        wrong = asked["prompt"][0] == 9
        if asked["prompt"][0] == 7:  # a connection that breaks within a piece
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\ndata: ")
            return
        if asked["prompt"][0] == 6:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\ndata: nonsense\n")
            return
        self.send_response(400 if wrong else 200)
        self.end_headers()
        if wrong:
            self.wfile.write(b"no such token")
            return
        for token in range(1, asked["n_predict"] + 1):
            self._say({"tokens": [token], "stop": False})
        if asked["prompt"][0] != 8:
            self._say({"tokens": [], "stop": True})

    def _say(self, told):
        with contextlib.suppress(BrokenPipeError):  # a request that was cancelled hears no more
            self.wfile.write(b"data: " + json.dumps(told).encode() + b"\n\n")

    def log_message(self, *given):
        pass


@pytest.fixture
def asked(monkeypatch):
    """The package with a server of ours in it; what it was asked."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    http.asked = []
    Thread(target=http.serve_forever, daemon=True).start()

    def parameters():
        processor = SimpleNamespace
        return SimpleNamespace(model=SimpleNamespace(), cpuparams=processor(), cpuparams_batch=processor())

    def server(settings):
        http.asked.append(settings)
        return SimpleNamespace(listening_address=f"http://127.0.0.1:{http.server_port}")

    monkeypatch.setitem(sys.modules, "xllamacpp", SimpleNamespace(CommonParams=parameters, Server=server))
    yield http.asked
    http.shutdown()


@pytest.fixture
def file(tmp_path):
    (tmp_path / "model.gguf").touch()
    return tmp_path / "model.gguf"


def test_requests_become_answers(asked, file):
    server = LlamaCpp(file, rows=3, room=64, threads=1)
    assert (asked[0].n_parallel, asked[0].n_ctx, asked[0].cpuparams.n_threads) == (3, 192, 1)
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
    assert asked[-1] == wanted


@pytest.mark.parametrize("none", [(), [], iter(()), set()])
def test_no_stop_ids_are_none_however_they_are_given(none, asked, file, unchecked):
    server, prompt = LlamaCpp(file, room=64), [5, 6]
    server.submit(Request(iter(prompt), 3, stop_ids=none))
    server.run()
    assert asked[-1]["ignore_eos"] is True and asked[-1]["prompt"] == prompt


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
    monkeypatch.delitem(sys.modules, "xllamacpp")
    if importlib.util.find_spec("xllamacpp") is None:
        with pytest.raises(
            ImportError, match="The package 'xllamacpp' is needed to run llama.cpp. Install it"
        ):
            LlamaCpp(file)
