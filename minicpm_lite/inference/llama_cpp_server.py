"""llama.cpp's server in a process of its own, which `minicpm_lite.inference.llama_cpp` starts and asks.

    python -m minicpm_lite.inference.llama_cpp_server '{"file": "a.gguf", "rows": 4, "room": 9, "threads": 2}'

prints one line, {"address": ...} or {"missing": a sentence}, and ends when its input does.

Why not in the process that asks: both llama.cpp and PyTorch compute with threads of GNU OpenMP, which counts
them together. Where there are more of them than cores, each that waits goes to sleep at once. llama.cpp's
wait for each other hundreds of times a token: beside PyTorch's, on two cores, a token took three times as
long.
"""

import json
import os
import sys

from ..optional import require


def main(file: str, rows: int, room: int, threads: int) -> None:
    """Serve a model until nothing more can be read."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    try:
        xllamacpp = require("xllamacpp", install="minicpm_lite[llama_cpp]", purpose="run llama.cpp")
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers, flush=True)
        return
    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_parallel, settings.n_ctx, settings.warmup = rows, rows * room, True
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)
    print(json.dumps({"address": server.listening_address}), file=answers, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
