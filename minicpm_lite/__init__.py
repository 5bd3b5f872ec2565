"""Readable, tested, fast PyTorch of what makes the MiniCPM family efficient.

>>> import minicpm_lite
>>> minicpm_lite.load_config("minicpm-2.4b").hidden_size
2304
"""

from importlib.metadata import version

from .config import ModelConfig, list_configs, load_config

__version__ = version("minicpm_lite")
__all__ = ["ModelConfig", "__version__", "list_configs", "load_config"]
