"""Serve with compiled decoders: a script, because the shape checks of the tests cannot be compiled.

First models of several shapes, one after the other: together they need more code than one may have made.
Prints a line for each kind of model whose texts are those of an executor that is not compiled; raises where a
graph breaks, a text differs, or code is made again and again.
"""

import random
from dataclasses import replace

import torch
import torch._dynamo

from minicpm_lite.config import LatentAttentionConfig, ModelConfig
from minicpm_lite.inference.drafts import PromptLookup
from minicpm_lite.inference.eagle import EagleDraft, EagleHead
from minicpm_lite.inference.engine import Engine, Request
from minicpm_lite.inference.executors import CompiledExecutor, PagedExecutor
from minicpm_lite.inference.guess_trees import DynamicTree
from minicpm_lite.language.decoder import Decoder

SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=50,
    max_position_embeddings=64, init_std=0.3, eos_token_id=(),
)  # fmt: skip
CONFIGS = {
    "grouped": ModelConfig(**SHAPE, num_key_value_heads=2),
    "latent": ModelConfig(**SHAPE, head_dim=16, latent_attention=LatentAttentionConfig(24, 16, 8, 8, 8)),
}


def requests(count: int) -> list[Request]:
    luck = random.Random(0)
    return [
        Request(tuple(luck.choices(range(50), k=luck.randint(1, 20))), luck.randint(2, 15))
        for _ in range(count)
    ]


def serve(executor: PagedExecutor, draft) -> list[list[int]]:
    engine = Engine(executor, rows=3, piece=6, draft=draft)
    answers = [engine.submit(request) for request in requests(12)]
    engine.run()
    return [answer.tokens for answer in answers]


for width, blocks, heads in ((16, 1, 1), (32, 2, 4), (24, 3, 2), (32, 4, 2), (16, 2, 4)):
    config = replace(CONFIGS["grouped"], hidden_size=width, num_hidden_layers=blocks,
                     num_key_value_heads=heads, head_dim=None)  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(config).eval()
    assert serve(CompiledExecutor(model, 40, 4, backend="eager"), None) == serve(
        PagedExecutor(model, 40, 4), None
    )

for name, config in CONFIGS.items():
    torch.manual_seed(0)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = Decoder(config).eval()
    eagle = EagleDraft(EagleHead(CONFIGS["grouped"], torch.arange(40)), DynamicTree(2, 2, 4))
    drafts = (None, PromptLookup(3), *([eagle] if name == "grouped" else []))
    plain, compiled = PagedExecutor(model, 40, 4), CompiledExecutor(model, 40, 4, backend="eager")
    for draft in (*drafts, *drafts):
        assert serve(compiled, draft) == serve(plain, draft)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # one token or several, one row or several; and where two sizes happen to be the same, as in a first piece
    assert graphs <= 8, f"{graphs} graphs"
    luck = random.Random(5)
    for _ in range(20):  # whatever comes, with a draft and without, no further code is needed
        engine = Engine(compiled, luck.randint(1, 4), luck.choice((1, 6, 40)), luck.choice(drafts))
        for _ in range(luck.choice((1, 2, 3))):
            prompt = luck.choice(
                ([1, 2, 3] * luck.choice((1, 4, 13)), luck.choices(range(50), k=luck.choice((1, 5, 40))))
            )
            engine.submit(Request(tuple(prompt), luck.randint(1, 9)))
        engine.run()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 8, f"{graphs} graphs"
    print(f"{name} is served, {graphs} graphs")
