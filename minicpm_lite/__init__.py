"""Readable, tested, fast PyTorch of what makes the MiniCPM family efficient.

>>> import minicpm_lite
>>> minicpm_lite.load_config("minicpm-2.4b").hidden_size
2304
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from .config import ModelConfig, list_configs, load_config

if TYPE_CHECKING:
    from .pretrained.checkpoints import load_pretrained

__version__ = version("minicpm_lite")
__all__ = ["ModelConfig", "__version__", "list_configs", "load_config", "load_pretrained"]


def __getattr__(name: str) -> object:
    """Import `load_pretrained` when it is first asked for (PEP 562).

    It needs torch, which takes seconds to import; who reads a config or asks for ``--help`` should not wait.
    """
    if name == "load_pretrained":
        from .pretrained.checkpoints import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
