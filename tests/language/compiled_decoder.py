"""Compile decoders of several kinds: a script, because the shape checks of the tests cannot be compiled.

Prints a line for each kind that is right; raises where a graph breaks or a number differs.
"""

import torch
import torch._dynamo
from torch.testing import assert_close

from minicpm_lite.config import LatentAttentionConfig, ModelConfig, RopeScaling
from minicpm_lite.language.context import Int8Cache, KVCache, Tree
from minicpm_lite.language.decoder import Decoder

SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
    max_position_embeddings=40, scale_emb=4.0, scale_depth=1.4, dim_model_base=16, init_std=0.3,
)  # fmt: skip
CONFIGS = {
    "grouped": ModelConfig(**SHAPE, num_key_value_heads=2),
    "latent": ModelConfig(**SHAPE, head_dim=16, latent_attention=LatentAttentionConfig(24, 16, 8, 8, 8)),
    "yarn": ModelConfig(**SHAPE, rope_scaling=RopeScaling("yarn", 10, factor=4.0)),
}
CLOSE = dict(atol=2e-5, rtol=1e-4)


def train(model: Decoder, ids: torch.Tensor) -> None:
    """One graph for the whole of a forward pass, and the gradients of before."""
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the graphs count, not the code
    gradients = []
    for each in (model, compiled):
        each(ids).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    assert_close(gradients[1], gradients[0], **CLOSE)


@torch.no_grad()
def decode(model: Decoder, ids: torch.Tensor, kind: type[KVCache]) -> None:
    """Prefill, steps and a tree without a break, and not a graph for every length."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    cache, other = kind(36), kind(36)
    for part in ids.split([5, *[1] * 25], dim=1):
        assert_close(compiled(part, cache), model(part, other), **CLOSE)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 4, f"{graphs} graphs for 26 calls"
    guesses, parents = ids[:, :4], [-1, 0, 0, 2]
    assert_close(compiled(guesses, Tree(cache, parents)), model(guesses, Tree(other, parents)), **CLOSE)


def main() -> None:
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model, ids = Decoder(config), torch.randint(50, (2, 30))
        torch._dynamo.reset()
        train(model.train(), ids)
        print(f"{name}: training is one graph")
        for kind in (KVCache, Int8Cache):
            torch._dynamo.reset()
            decode(model.eval(), ids, kind)
            print(f"{name}: decoding with {kind.__name__} has no break")


if __name__ == "__main__":
    main()
