"""A package in the place of xllamacpp, as a program's text: whoever tests writes it to a folder."""

PACKAGE = '''
"""Instead of llama.cpp's: writes 1, 2, 3, ... a token a line; some first tokens make something go wrong."""

import contextlib, json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace


def note(asked):
    with open(os.path.join(os.path.dirname(__file__), "asked"), "a") as file:
        file.write(json.dumps(asked) + "\\n")


class Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        note(asked)
        first = asked["prompt"][0]
        if first == 7:  # a connection that breaks within a piece
            self.wfile.write(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n40\\r\\ndata: ")
            return
        if first == 6:
            self.wfile.write(b"HTTP/1.1 200 OK\\r\\n\\r\\ndata: nonsense\\n")
            return
        self.send_response(400 if first == 9 else 200)
        self.end_headers()
        if first == 9:
            self.wfile.write(b"no such token")
            return
        for token in range(1, asked["n_predict"] + 1):
            self.say({"tokens": [token], "stop": False})
        if first != 8:
            self.say({"tokens": [], "stop": True})

    def say(self, told):
        with contextlib.suppress(BrokenPipeError):  # a request that was cancelled hears no more
            self.wfile.write(b"data: " + json.dumps(told).encode() + b"\\n\\n")

    def log_message(self, *given):
        pass


def CommonParams():
    return SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())


def Server(settings):
    print("what llama.cpp prints")
    if os.path.getsize(settings.model.path):
        raise RuntimeError("no model")
    note([settings.n_parallel, settings.n_ctx, settings.cpuparams.n_threads])
    http = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=http.serve_forever, daemon=True).start()
    return SimpleNamespace(listening_address=f"http://127.0.0.1:{http.server_port}")
'''
