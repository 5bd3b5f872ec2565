"""The browser and the served site, once for all page tests."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "book" / "_ext"))


class _Quiet(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # one connection for many files

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[Path], str]]:
    """Serve a folder from localhost and return its address."""
    servers = []

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def context(browser):
    """One browser context for the whole session."""
    context = browser.new_context(service_workers="block")
    context.set_default_timeout(120_000)  # a busy machine is slow, which is no fault of the page
    return context


@pytest.fixture
def page(context):
    """A fresh page in the shared context."""
    page = context.new_page()
    yield page
    page.close()


@pytest.fixture(scope="module")
def tab(context):
    """One page for many addresses, one after the other; making a fresh one takes as long as opening it."""
    page = context.new_page()
    yield page
    page.close()
