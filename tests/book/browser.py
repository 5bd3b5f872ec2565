"""Find a Chromium that starts, whatever the machine calls it."""

import os
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, Error, Playwright

MISSING = (
    "No browser for the page tests was found. Install one with `python -m playwright install chromium`, "
    "or set CHROMIUM to the path of a Chromium or Chrome."
)
ARGUMENTS = [
    "--no-sandbox",  # it does not start for root, as in a container
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no name leads anywhere
]


def candidates(playwright: Playwright) -> Iterator[str]:
    """Paths to try: $CHROMIUM alone if it is set, else the system's Chromium, then playwright's own."""
    if chosen := os.environ.get("CHROMIUM"):
        yield chosen
        return
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            yield path
    yield playwright.chromium.executable_path


def launch(playwright: Playwright) -> Browser | None:
    """Start the first browser that can be started; None if there is none. A stub that only prints is none."""
    for path in candidates(playwright):
        if os.path.exists(path):
            try:
                return playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
            except Error:
                continue
    return None
