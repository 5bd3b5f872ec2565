"""The recorded runs of the chapter on sparse attention in which SmolLM2 reads whole texts sparse, before and
after a short training: eleven minutes on one H200; without a GPU, some days.

Run them with `python notebooks/inference/recorded/sparse_trained.py`.

SmolLM2-135M-Instruct (rounded to four bits once, then trained as float32) reads 4,096 tokens of Austen. Every
token attends to a budget of blocks, as `sparse_smollm2.py` has it: 16 tokens each, a third of them local, the
first of the text, and those that it chooses. The last quarter of the novels is for reading, the rest for
training. Two kinds of texts:

- "plain": the novel alone, loss in stretches of 256 tokens.
- "asked": six sentences such as *The magic number of Paris is 4827.* stand somewhere in it, and again at its
  end, in another order. A number there is found if all four of its figures are the likeliest.

Models: the one that was published; and for each of four seeds, which draw texts, two that were trained on
from it with the same texts, one reading them dense, one sparse with 12 blocks (4.7 %). Each text of training
has six such sentences about other things in other words, and its loss is that of all tokens plus that of the
numbers at the end, so that whoever cannot find them is told.

The rules, fixed before the runs; intervals are of 95 %, text by text for the published model, seed by seed
for trained ones.

1. Read sparse without training keeps the quality at a budget if its loss lies within 0.02 nats of dense, by
   the whole interval; and the choice matters if the loss is below that of the window and of random blocks,
   and more is found than by both.
2. Training with sparse attention helps if, read with 12 blocks, the model that was trained so loses less on
   plain texts, and finds more, than the one that read the same texts dense.
3. It can be switched if, read dense, it loses within 0.02 nats of the one that was trained dense, by the
   whole interval, and does not find less.

The power: in `sparse_smollm2.py` losses of 128 tokens differed between ways by 0.02 nats from text to text.
Here 4,095 are scored for each of 24 texts, so 0.005 should be told; of 144 numbers a tenth should be.

The time on the GPU ended after the pairs of seeds 0 and 1 and one half of the third. So an interval over
seeds stands on two, and what it cannot tell stays a direction.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from sparse_smollm2 import (
    BLOCK,
    BUDGETS,
    CITIES,
    LENGTH,
    best_blocks,
    by_block,
    random_means,
    settings,
)
from tokenizers import Tokenizer
from torch import Tensor
from torch.testing import assert_close

from minicpm_lite.data.assets import load_austen
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.inference.block_choice import choose_blocks, window_means, window_scores, window_shares
from minicpm_lite.inference.sparse_attention import SparseContext
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.context import Context, causal_mask, dense_attention
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.wsd import WSD

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVERY = 256  # tokens of a stretch, of which the mean loss is kept
TEXTS, PART = 24, 6  # of each kind; texts of one job
SEEDS = (0, 1, 2, 3)
UPDATES, BATCH, RATE = 60, 2, 1e-4  # of training; texts of an update
THINGS = ("amber", "cobalt", "ivory", "crimson", "emerald", "violet")
WAYS = (
    ("dense", 0),
    *(("sparse", budget) for budget in BUDGETS),
    *((way, budget) for budget in (12, 24, 48) for way in ("window", "random", "best")),
)
TRAINED_WAYS = (("dense", 0), ("sparse", 12), ("sparse", 24), ("sparse", 48), ("window", 12), ("best", 12))
FACTS = {
    "model": "SmolLM2-135M-Instruct, Q4_1", "block": BLOCK, "length": LENGTH, "budgets": BUDGETS,
    "every": EVERY, "texts": TEXTS, "numbers": len(CITIES), "seeds": SEEDS, "updates": UPDATES,
    "batch": BATCH, "rate": RATE,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """The published model on some texts, or a model that is trained and then reads all texts."""

    model: str
    number: int  # the first text, or the seed

    @property
    def name(self) -> str:
        return f"{self.model}/{self.number}"


class Reader(Context):
    """A call is a whole text; of each query the keys in the blocks that it gets are seen, by a mask.

    `SparseContext` does the same for "sparse" without a mask, in steps that keep a GPU waiting.
    """

    def __init__(self, way: str, budget: int) -> None:
        self.way, self.config = way, settings(way, budget)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.way == "dense":
            return dense_attention(query, key, value)
        with torch.no_grad():
            causal = causal_mask(len(query[0, 0]), len(query[0, 0]), query.device)
            blocks = self.chosen(query.float(), key.float(), causal)
            seen = blocks.repeat_interleave(BLOCK, -1)[..., : len(causal)] & causal
            mask = seen.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return dense_attention(query, key, value, mask)

    def chosen(self, query: Tensor, key: Tensor, causal: Tensor) -> Tensor:
        at = torch.arange(len(causal), device=query.device)[None]
        if self.way == "best":
            scores = window_scores(query, key).masked_fill(~causal, -torch.inf)
            return best_blocks(by_block(scores.softmax(-1).sum(2)), at, self.config)
        means = [window_means(key, self.config.kernel_size, self.config.kernel_stride)]
        means = random_means(means) if self.way == "random" else means
        shares = window_shares([window_scores(query, each) for each in means], at, self.config)
        return choose_blocks(shares, at, -(-len(causal) // BLOCK), self.config)


class Novels:
    """Austen as tokens of SmolLM2: a part to train on, and texts to read."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(smollm2_file())
        whole = load_austen()
        border = len(whole) * 3 // 4
        self.train, self.held_out = self.encode(whole[:border]), self.encode(whole[border:])

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text).ids)

    def plain(self, number: int) -> Tensor:
        return self._stretch(2 * number)[:LENGTH]

    def asked(self, number: int) -> tuple[Tensor, Tensor]:
        """A text with six numbers, and the places where their figures stand again at its end."""
        generator = torch.Generator().manual_seed(number)
        return self.with_numbers(self._stretch(2 * number + 1), "magic number", CITIES, generator)

    def _stretch(self, place: int) -> Tensor:
        """One of 48 stretches of the held-out part that do not overlap."""
        assert len(self.held_out) >= 2 * TEXTS * LENGTH
        return self.held_out[place * (len(self.held_out) // (2 * TEXTS)) :]

    def to_learn(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = int(torch.randint(len(self.train) - LENGTH, (1,), generator=generator))
        return self.with_numbers(self.train[start:], "secret code", THINGS, generator)

    def with_numbers(
        self, novel: Tensor, kind: str, names: tuple[str, ...], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        numbers = torch.randint(1000, 10_000, (len(names),), generator=generator).tolist()
        notes = [
            self.encode(f" The {kind} of {name} is {number}.")
            for name, number in zip(names, numbers, strict=True)
        ]
        assert [self.tokenizer.decode(note[-5:-1].tolist()) for note in notes] == [*map(str, numbers)]
        again = [notes[place] for place in torch.randperm(len(notes), generator=generator)]
        notes = [notes[place] for place in torch.randperm(len(notes), generator=generator)]
        room = LENGTH - 2 * sum(map(len, notes))
        cuts = torch.randint(BLOCK, room, (len(notes),), generator=generator).sort().values.tolist()
        parts = [
            part
            for note, first, last in zip(notes, [0, *cuts], cuts, strict=False)
            for part in (novel[first:last], note)
        ]
        ids = torch.cat([*parts, novel[cuts[-1] : room], *again])
        ends = LENGTH - sum(map(len, notes)) + torch.tensor([*map(len, again)]).cumsum(0)
        answers = (ends[:, None] + torch.arange(-5, -1)).flatten()
        return ids, answers


@cache
def novels() -> Novels:
    return Novels()


def published() -> Decoder:
    return load_pretrained(smollm2_file()).to(DEVICE).eval()


@torch.no_grad()
def losses(model: Decoder, ids: Tensor, way: str, budget: int) -> tuple[Tensor, Tensor]:
    """Of each token but the first, in nats, and whether it was the likeliest."""
    ids = ids.to(DEVICE)
    logits = model(ids[None, :-1], Reader(way, budget))[0]
    return F.cross_entropy(logits, ids[1:], reduction="none"), logits.argmax(-1) == ids[1:]


def judged(model: Decoder, ways: tuple[tuple[str, int], ...], texts: range) -> dict:
    """For each way, of each text: losses by stretch; numbers found, and their loss."""
    found = {}
    for way, budget in ways:
        plain = [losses(model, novels().plain(text), way, budget)[0] for text in texts]
        result = {"plain": [[part.mean().item() for part in each.split(EVERY)] for each in plain]}
        result |= {"found": [], "loss": []}
        for text in texts:
            ids, answers = novels().asked(text)
            of_token, right = losses(model, ids, way, budget)
            result["found"].append(int(right[answers - 1].view(-1, 4).all(1).sum()))
            result["loss"].append(of_token[answers - 1].mean().item())
        found[f"{way}/{budget}"] = result
    return found


def trained(way: str, seed: int) -> Decoder:
    """The published model after a short training in which it read dense, or 12 blocks."""
    model, generator = published().train(), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    rate = WSD(RATE, UPDATES // 10, UPDATES // 2, UPDATES - UPDATES // 10 - UPDATES // 2)
    reader = Reader(way, 12)
    for step in range(UPDATES):
        for _ in range(BATCH):
            ids, answers = (each.to(DEVICE) for each in novels().to_learn(generator))
            with torch.autocast(DEVICE.type, torch.bfloat16):
                logits = model(ids[None, :-1], reader)[0]
            of_token = F.cross_entropy(logits.float(), ids[1:], reduction="none")
            ((of_token.mean() + of_token[answers - 1].mean()) / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step + 1)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def check(model: Decoder) -> None:
    """The mask shows what `SparseContext` reads."""
    ids = novels().plain(0)[None, :1024].to(DEVICE)
    with torch.no_grad():
        by_mask, by_blocks = (
            model(ids, reader) for reader in (Reader("sparse", 12), SparseContext(settings("sparse", 12)))
        )
    assert_close(by_mask, by_blocks, rtol=1e-3, atol=1e-3)


def work(job: Job) -> dict:
    seed_everything(job.number)
    if job.model == "published":
        model = published()
        check(model)
        return judged(model, WAYS, range(job.number, job.number + PART))
    return judged(trained(job.model.removeprefix("trained "), job.number), TRAINED_WAYS, range(TEXTS))


if __name__ == "__main__":
    jobs = [Job("published", 0), Job("trained sparse", 0), Job("trained dense", 0)]
    jobs += [Job("published", first) for first in range(PART, TEXTS, PART)]
    jobs += [Job(f"trained {way}", seed) for seed in SEEDS[1:] for way in ("sparse", "dense")]
    run_jobs(__file__, jobs, work, FACTS, workers=1)
