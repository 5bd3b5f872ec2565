"""llama.cpp's server with an engine's requests, to be compared with an engine.

    server = LlamaCpp("model.gguf", rows=4, room=512)
    answer = server.submit(Request(prompt, max_new_tokens=100))
    server.run()
    answer.tokens

The package xllamacpp holds the whole server of llama.cpp, which batches requests continuously as an `Engine`
does. It has no call that reads a token or checks a guess, and a server's answers hold no scores of a whole
vocabulary. So it can be no `Executor`; what can be compared are whole requests: their tokens, and when they
came.

Choices, and the traps behind them:

- Prompts and answers are token ids, in a file of our own weights: so nothing depends on a tokenizer.
- The token that ends a text is not told, so an answer that ended by itself has one token less than ours.
- Left alone, llama.cpp draws by other rules: no token below a smallest probability, repetitions counted in
  the last 64 tokens. Both are set to what `Sampling` says. What is drawn is drawn by its own luck.
- With few rows it multiplies in other order than with many, as all do; a tie may fall the other way.
- It computes in a process of its own: its threads and PyTorch's stand in each other's way (see
  `minicpm_lite.inference.llama_cpp_server`).
"""

import json
import os
import subprocess
import sys
import time
import weakref
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request as Post
from urllib.request import urlopen

from ..config import require_positive_integer
from ..language.sampling import Sampling, require_sampling
from ..runtime import require_seed
from .engine import Answer, Request

__all__ = ["LlamaCpp"]


class LlamaCpp:
    """The server of llama.cpp, which ends with this object.

    Args:
        file: a GGUF file.
        rows: requests at work at once, at most.
        room: the most tokens of one text.
        threads: of the processor; left out, as many as there are cores.

    Raises:
        ImportError: the package xllamacpp is missing.
        FileNotFoundError: there is no such file.
        ValueError: rows, room or threads that are not positive, or a file that llama.cpp cannot open.
    """

    def __init__(self, file: str | Path, rows: int = 8, room: int = 512, threads: int | None = None) -> None:
        threads = (os.cpu_count() or 1) if threads is None else threads
        for name, value in (("rows", rows), ("room", room), ("threads", threads)):
            require_positive_integer(name, value)
        if not Path(file).is_file():
            raise FileNotFoundError(f"There is no file {file}; give a model in GGUF.")
        asked = {"file": str(file), "rows": rows, "room": room, "threads": threads}
        server = subprocess.Popen(
            [sys.executable, "-m", "minicpm_lite.inference.llama_cpp_server", json.dumps(asked)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        weakref.finalize(self, _end, server)
        told = json.loads(server.stdout.readline() or "{}")
        if "missing" in told:
            raise ImportError(told["missing"])
        if "address" not in told:
            raise ValueError(f"llama.cpp cannot open {file}; why, it has printed above.")
        self.room, self._address = room, told["address"]
        self._threads: list[Thread] = []

    def submit(self, request: Request) -> Answer:
        """Give it a request; it begins at once, or when a row is free.

        Raises:
            ValueError: there is no room for the text, or it should end with ids of its own, which the server
                cannot be told; no tokens are asked for, or sampling or a seed are none.
        """
        require_positive_integer("max_new_tokens", request.max_new_tokens)
        require_sampling(request.sampling)
        require_seed(request.seed)
        most = len(request.prompt) + request.max_new_tokens
        if most > self.room:
            raise ValueError(f"A text of {most} tokens does not fit: there is room for {self.room}.")
        if request.stop_ids:
            raise ValueError(
                f"stop_ids is {request.stop_ids}; llama.cpp takes None, for those of the file, or ()."
            )
        answer = Answer(request, submitted=time.perf_counter())
        self._threads.append(Thread(target=self._serve, args=(answer,), daemon=True))
        self._threads[-1].start()
        return answer

    def cancel(self, answer: Answer) -> None:
        """Write no more of it; what was written stays. Nothing happens to what is over."""
        if not answer.over:
            answer.state = "cancelled"

    def run(self) -> None:
        """Wait until nothing is left to do."""
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _serve(self, answer: Answer) -> None:
        asked = json.dumps(_asked(answer.request)).encode()
        post = Post(f"{self._address}/completion", asked, {"Content-Type": "application/json"})
        try:
            with urlopen(post) as lines:
                for line in lines:
                    if answer.over:  # who leaves, ends it
                        return
                    if line.startswith(b"data: "):
                        _hear(answer, json.loads(line.removeprefix(b"data: ")))
        except HTTPError as error:
            answer.state, answer.why = "failed", error.read().decode()
        except (OSError, HTTPException, ValueError) as error:  # cut off, or not what a server says
            answer.state, answer.why = "failed", f"llama.cpp's answer broke off: {error!r}"
        if not answer.over:
            answer.state, answer.why = "failed", "llama.cpp ended it without a word."


def _end(server: subprocess.Popen) -> None:
    server.stdin.close()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    server.stdout.close()


def _asked(request: Request) -> dict[str, object]:
    """A request in the words of llama.cpp's server."""
    sampling: Sampling = request.sampling
    return {
        "prompt": list(request.prompt),
        "n_predict": request.max_new_tokens,
        "stream": True,
        "return_tokens": True,
        "ignore_eos": request.stop_ids == (),
        "seed": request.seed,
        "samplers": ["penalties", "temperature", "top_k", "top_p"],
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "min_p": 0.0,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": len(request.prompt) + request.max_new_tokens,
    }


def _hear(answer: Answer, told: dict) -> None:
    """Take what the server says in one line."""
    if tokens := told.get("tokens"):
        answer.state = "writing"
        answer.tokens += tokens
        answer.last = time.perf_counter()
        answer.first = answer.first or answer.last
    if told.get("stop"):
        answer.state = "done"
