"""Both sides of a comparison: what transformers and this library compute from the same folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
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


@pytest.fixture(scope="session")
def both_sides(tmp_path_factory) -> Callable[..., Sides]:
    """A function of a family and changes to its ``config.json``; the weights stay those of the family."""
    import transformers

    folders = {}

    @torch.no_grad()
    def compare(family: str, **changes: object) -> Sides:
        if family not in folders:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(family, **SHAPE, **MORE.get(family, {}))
            model = transformers.AutoModelForCausalLM.from_config(config)
            folder = folders[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            values = json.loads((folder / "config.json").read_text())
            (folder / "original.json").write_text(json.dumps(values))
            torch.save(model.state_dict(), folder / "weights.pt")
        folder = folders[family]
        values = json.loads((folder / "original.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            model.load_state_dict(torch.load(folder / "weights.pt"))
            theirs = model(IDS).logits
        except Exception:  # of many kinds
            theirs = None
        try:
            ours = load_pretrained(folder)(IDS)
        except ValueError as error:
            ours = str(error)
        return Sides(theirs, ours)

    return compare
