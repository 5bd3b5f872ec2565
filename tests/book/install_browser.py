"""Make sure that the page tests find a browser: ``python tests/book/install_browser.py``.

Silent where one starts. Else it asks playwright to install one; then, as root on Debian or Ubuntu, apt-get; if
that does not help either, it says in one sentence what to do.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

from browser import MISSING, launch
from playwright.sync_api import sync_playwright


def usable() -> bool:
    """Whether a browser can be started now."""
    with sync_playwright() as playwright:
        found = launch(playwright)
        if found:
            found.close()
        return found is not None


def install_commands() -> list[list[str]]:
    """What to try, one after the other."""
    commands = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        commands += [["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]]
    return commands


def main(usable: Callable[[], bool] = usable, run: Callable = subprocess.run) -> int:
    """Return 0 once a browser starts, 1 if nothing helped."""
    if usable():
        return 0
    for command in install_commands():
        done = run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        if done.returncode == 0 and usable():
            return 0
    print(MISSING, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
