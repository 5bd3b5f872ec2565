"""A decoder in other forms: in transformers, and with packed matrices."""

import copy
import tempfile

import torch
from torch import nn

from minicpm_lite.inference.packed import quantize_model
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.optional import require
from minicpm_lite.pretrained.checkpoints import save_pretrained

__all__ = ["packed_copy", "transformers_twin"]


def transformers_twin(model: Decoder) -> nn.Module:
    """The same weights in transformers' Granite, whose graph has MiniCPM's multipliers.

    No token ends its texts, so all write as many.
    """
    transformers = require("transformers", install="minicpm_lite[parity]", purpose="compare with it")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, f"{folder}/twin", model_type="granite")
        twin = transformers.GraniteForCausalLM.from_pretrained(f"{folder}/twin", dtype=torch.float32)
    twin.generation_config.eos_token_id = None
    return twin


def packed_copy(model: Decoder, type: str) -> Decoder:
    """A copy whose matrices are all of one type."""
    matrices = {name: type for name, parameter in model.named_parameters() if parameter.ndim == 2}
    return quantize_model(copy.deepcopy(model), matrices)
