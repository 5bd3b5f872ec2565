"""Optional packages: imported where they are used, and one clear sentence when they are missing."""

from importlib import import_module
from types import ModuleType


def require(module: str, install: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: the name that is imported, e.g. ``"transformers"``.
        install: what pip is asked for, e.g. ``"minicpm_lite[parity]"``.
        purpose: what the package is needed for; it ends the sentence "… is needed to …".

    Raises:
        ImportError: the package is missing; the message names the command that installs it.

    >>> require("no_package", install="no-package", purpose="show this")
    Traceback (most recent call last):
    ImportError: The package 'no_package' is needed to show this. Install it with: pip install "no-package"
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:  # the package is there, but something it imports is not
            raise
        raise ImportError(
            f'The package {module!r} is needed to {purpose}. Install it with: pip install "{install}"'
        ) from None
