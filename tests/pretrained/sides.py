"""Both sides of a comparison: what transformers and this library compute from the same folder."""

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor

from minicpm_lite.pretrained.checkpoints import load_pretrained

SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    vocab_size=99,
    max_position_embeddings=64,
    initializer_range=0.1,
)
MORE = {  # what a family needs beside the shape for this library to read it
    "granite": dict(attention_multiplier=0.25, embedding_multiplier=12.0, residual_multiplier=1.4, logits_scaling=2.0),
    "mistral": dict(num_key_value_heads=2),
    "mixtral": dict(num_key_value_heads=2, num_local_experts=3, head_dim=16),  # it multiplies None otherwise
    "minicpm3": dict(
        dim_model_base=32, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=12
    ),
}  # fmt: skip
IDS = torch.arange(80).view(2, 40)


@dataclass(frozen=True)
class Sides:
    """Logits of both; None where transformers cannot make the model, a sentence where we refuse it."""

    theirs: Tensor | None
    ours: Tensor | str

    def agree(self) -> bool:
        """We refuse it, or compute the same."""
        if self.theirs is None or isinstance(self.ours, str):
            return True
        return torch.allclose(self.ours, self.theirs, atol=1e-5, rtol=1e-5)


@cache
def _written(family: str) -> tuple[tempfile.TemporaryDirectory, dict, dict[str, Tensor]]:
    """A model of the family in a folder, with what its ``config.json`` says and its weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SHAPE, **MORE.get(family, {}))
    model = transformers.AutoModelForCausalLM.from_config(config)
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name)
    return folder, json.loads(Path(folder.name, "config.json").read_text()), model.state_dict()


@torch.no_grad()
def both_sides(family: str, **changes: object) -> Sides:
    """What both compute when fields of ``config.json`` change and the weights do not."""
    place, values, weights = _written(family)
    folder = Path(place.name)
    (folder / "config.json").write_text(json.dumps(values | changes))
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.load_state_dict(weights)
        theirs = model(IDS).logits
    except Exception:  # of many kinds
        theirs = None
    try:
        ours = load_pretrained(folder)(IDS)
    except ValueError as error:
        ours = str(error)
    return Sides(theirs, ours)
