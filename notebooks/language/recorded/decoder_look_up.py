"""The recorded runs of the chapter on learning, with more and fewer heads: how often is the look-up found?

Run them with `python notebooks/language/recorded/decoder_look_up.py`: three minutes on 2 cores.

Models of the pencil's size (one block, four numbers a token) begin at random and see the two sentences of
the chapter four hundred times. Five kinds, which differ in the number of query and key-value heads alone; 30
seeds of each. One has found the look-up if its last loss is below 0.2: the best that is possible is
ln(2) / 4 = 0.173, and half *is* and half *are* cost twice that. Results go to `decoder_look_up.json` beside
this file.
"""

import math
from dataclasses import asdict, dataclass

import torch

from minicpm_lite.config import ModelConfig
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.scoring import next_token_loss
from minicpm_lite.runtime import seed_everything

WORDS = ["the", "cat", "cats", "over", "there", "is", "are"]
TEXTS = ("the cats over there are", "the cat over there is")
HEADS = ((1, 1), (2, 1), (2, 2), (16, 1), (16, 16))  # query heads, key-value heads
SEEDS = range(30)
STEPS = 400
RATE = 0.03
FACTS = {"texts": TEXTS, "seeds": list(SEEDS), "steps": STEPS, "rate": RATE, "best": math.log(2) / 4}


@dataclass(frozen=True)
class Job:
    """All seeds of one kind of model."""

    heads: int
    kv_heads: int

    @property
    def name(self) -> str:
        return f"{self.heads}/{self.kv_heads}"


def learn(heads: int, kv_heads: int, seed: int) -> float:
    """The last loss of one model, in nats a token."""
    seed_everything(seed)
    model = Decoder(
        ModelConfig(
            hidden_size=4,
            intermediate_size=2,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=4,
            vocab_size=len(WORDS),
            scale_emb=12,
            scale_depth=1.4,
            dim_model_base=4,
            init_std=0.1,
        )
    )
    lesson = torch.tensor([[WORDS.index(word) for word in text.split()] for text in TEXTS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        loss = next_token_loss(model, lesson)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def train(job: Job) -> dict:
    return asdict(job) | {"losses": [learn(job.heads, job.kv_heads, seed) for seed in SEEDS]}


if __name__ == "__main__":
    run_jobs(__file__, [Job(*each) for each in reversed(HEADS)], train, FACTS)
