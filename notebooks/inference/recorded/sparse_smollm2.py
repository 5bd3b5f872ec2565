"""The recorded runs of the chapter on sparse attention that look into SmolLM2, 15 minutes on one core.

Run them with `python notebooks/inference/recorded/sparse_smollm2.py`.

SmolLM2-135M-Instruct, whose weights were rounded to four bits once, was trained with dense attention for
8,192 tokens. Here it reads Austen in blocks of 16 tokens (windows of 8, stride 4), of which a query attends
to a budget: its own and those before it (a third of the budget), the first of the text, and those that it
chooses. A share of 18.75 % of 4,096 tokens is what MiniCPM4 has at 32K, 4.7 % what it has at 128K.

The text is read dense. Then its last 128 tokens are scored and six needles are asked for, with every way to
choose, from the same cache. Ways: by the means ("sparse"); the last blocks alone ("window"); by means that
are random numbers ("random"); and the blocks that dense attention gives most ("best"), which is the most that
any choice of so many blocks could hold.

Jobs of the kind "shares" ask instead, of the same 128 tokens, which share of the dense attention is on the
blocks of each way, and how many of the blocks that are not forced the coarse means would have found. There
"random" is a draw of each block by itself. Random numbers in the place of means are no such draw: a window at
a border brings both of its blocks, and all queries of a layer meet the same numbers. So what they hold is
noted, too, as "random means".

The rule, fixed before the runs. A text is a unit, five texts. One way loses less than another if the 95 %
interval of the difference, text by text, leaves out 0. "Sparse keeps quality untrained" at a share if its
loss lies within 0.02 nats of dense, by the whole interval. Choosing matters if sparse loses less than window
and than random at the same budget. Power: losses of one text differ between ways by some 0.02 nats from text
to text; 0.025 can be told with five.

The power was misjudged: losses of 128 tokens differed between sparse and window by 0.1 nats from text to
text. So the chapter takes its verdicts on losses and needles from `sparse_trained.py`, which scores 4,095
tokens of 24 texts, and from here what the "shares" say; of them nothing is decided by a rule.
"""

from dataclasses import dataclass, replace
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from minicpm_lite.config import SparseConfig
from minicpm_lite.data.assets import load_austen
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.inference.block_choice import choose_blocks, window_means, window_scores, window_shares
from minicpm_lite.inference.sparse_attention import SparseCache, attend_blocks, attend_text
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.context import dense_attention
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer
from minicpm_lite.runtime import seed_everything

BLOCK, LENGTH = 16, 4096
BUDGETS = (12, 24, 48, 96, 192)  # blocks: 4.7, 9.4, 18.75, 37.5 and 75 % of 4,096 tokens
SCORED = 128  # tokens at the end of a text
CITIES = ("London", "Paris", "Vienna", "Dublin", "Madrid", "Lisbon")
WAYS = (
    *(("sparse", budget) for budget in BUDGETS),
    *((way, budget) for budget in (12, 24, 48) for way in ("window", "random", "best")),
)
ASKED = (("dense", 0), *((way, budget) for budget in (12, 24, 48) for way in ("sparse", "window")),
         ("random", 12), ("random", 48), ("best", 12))  # fmt: skip
FACTS = {
    "model": "SmolLM2-135M-Instruct, Q4_1", "block": BLOCK, "length": LENGTH, "budgets": BUDGETS,
    "scored": SCORED, "needles": len(CITIES),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One text, and what is asked of it; `name` is its key in the results."""

    text: int
    length: int = LENGTH
    kind: str = "answer"

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.length}/{self.text}"


def settings(way: str, budget: int, coarse: bool = False) -> SparseConfig:
    """So many blocks; the whole text for "dense"."""
    sizes = {"kernel_size": 8, "kernel_stride": 4, "block_size": BLOCK}
    if way == "dense":
        return SparseConfig(**sizes, window_size=BLOCK, topk=1, dense_len=10**6)
    local = budget - 1 if way == "window" else budget // 3
    topk = budget - local
    return SparseConfig(
        **sizes, window_size=BLOCK * local, topk=topk, dense_len=0, coarse_topk=2 * topk if coarse else None
    )


def random_means(means: list[Tensor]) -> list[Tensor]:
    return [torch.randn_like(each) for each in means]


def dense_shares(query: Tensor, key: Tensor) -> Tensor:
    """What dense attention gives each key, summed over a group: (batch, kv_heads, queries, keys)."""
    scores, queries, keys = window_scores(query, key), query.shape[2], key.shape[2]
    later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return scores.masked_fill(later, -torch.inf).softmax(-1).sum(2)


def by_block(shares: Tensor) -> Tensor:
    return F.pad(shares, (0, -shares.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)


def best_blocks(of_block: Tensor, at: Tensor, config: SparseConfig) -> Tensor:
    """The blocks that have most of something, after those that every query gets."""
    config = SparseConfig(
        kernel_size=BLOCK, kernel_stride=BLOCK, block_size=BLOCK, window_size=config.window_size,
        topk=config.topk, dense_len=0,
    )  # fmt: skip
    return choose_blocks(of_block, at, of_block.shape[-1], config)  # a block as its own window


def chosen_by(way: str, query: Tensor, key: Tensor, means: list[Tensor], at: Tensor, config: SparseConfig):
    """The blocks of one way to choose."""
    if way == "best":
        return best_blocks(by_block(dense_shares(query, key)), at, config)
    means = random_means(means) if way == "random" else means
    shares = window_shares([window_scores(query, each) for each in means], at, config)
    return choose_blocks(shares, at, -(-key.shape[2] // BLOCK), config)


class Reader(SparseCache):
    """A cache whose way to choose can be exchanged between two calls."""

    way = "dense"
    noted: list[dict] | None = None  # what `note` finds, a dictionary for each layer

    def use(self, way: str, budget: int) -> None:
        self.way, self.config = way, settings(way, budget)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        means = [level.means for level in self._means[layer]]
        at = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[None]
        if self.noted is not None:
            self.noted.append(note(query, key, means, at))
        if self.way == "best":
            chosen = chosen_by("best", query, key, means, at, self.config)
            return attend_blocks(query, key, value, chosen, at, self._starts, BLOCK)
        if self.way == "random":
            means = random_means(means)
        if self.way == "dense":
            return dense_attention(query, key, value)
        return attend_text(query, key, value, means, self._starts, self.config)


def note(query: Tensor, key: Tensor, means: list[Tensor], at: Tensor) -> dict[str, float]:
    """Shares of dense attention on the blocks of each way; free blocks that two levels choose as one does."""
    fine, coarse = means[0], window_means(key, 32, 16)
    of_block = by_block(dense_shares(query, key))
    found = {}
    for budget in BUDGETS[:3]:
        config = settings("sparse", budget)
        forced = best_blocks(of_block, at, replace(config, topk=config.init_blocks))
        chosen = {
            way: chosen_by(way, query, key, [fine], at, settings(way, budget))
            for way in ("sparse", "window", "best")
        }
        chosen |= {
            "forced": forced,
            "random": best_blocks(torch.rand_like(of_block), at, config),
            "random means": chosen_by("random", query, key, [fine], at, config),
        }
        for way, blocks in chosen.items():
            found[f"{way}/{budget}"] = ((of_block * blocks).sum(-1) / of_block.sum(-1)).mean().item()
        two = chosen_by("sparse", query, key, [fine, coarse], at, settings("sparse", budget, coarse=True))
        free = chosen["sparse"] & ~forced
        found[f"recall/{budget}"] = ((free & two).sum() / free.sum()).item()
    return found


class Asker:
    """SmolLM2, the novels as its tokens, and needles in them."""

    def __init__(self) -> None:
        path = smollm2_file()
        self.model: Decoder = load_pretrained(path).eval()
        self.tokenizer = load_tokenizer(path)

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text).ids)

    def text(self, number: int, length: int) -> tuple[Tensor, list[tuple[str, str]]]:
        """A stretch of a novel in which each city has a number, and the pairs of city and number."""
        start = 300_000 + 600_000 * number
        ids = self.encode(load_austen()[start : start + 6 * length])
        generator = torch.Generator().manual_seed(number)
        numbers = torch.randint(1000, 10_000, (len(CITIES),), generator=generator).tolist()
        order = torch.randperm(len(CITIES), generator=generator).tolist()
        room, parts, taken = (length - SCORED) // len(CITIES), [], 0
        notes = [(CITIES[city], str(number)) for city, number in zip(order, numbers, strict=True)]
        for place, (city, number) in enumerate(notes):
            needle = self.encode(f" The magic number of {city} is {number}.")
            before = 16 + int(torch.randint(room - len(needle) - 32, (1,), generator=generator))
            parts += [ids[taken : taken + before], needle]
            behind = room - before - len(needle) if place < len(notes) - 1 else 0
            parts.append(ids[taken + before : taken + before + behind])
            taken += before + behind
        short = length - SCORED - sum(map(len, parts))
        parts.append(ids[taken : taken + short + SCORED])
        whole = torch.cat(parts)
        assert len(whole) == length
        return whole, notes


@torch.no_grad()
def shares(job: Job) -> dict[str, float]:
    """What `note` finds, mean of all layers."""
    seed_everything(job.text)
    asker = Asker()
    whole, _ = asker.text(job.text, job.length)
    cache = Reader(job.length, settings("dense", 0))
    asker.model(whole[None, :-SCORED], cache, last_only=True)
    cache.noted = []
    asker.model(whole[None, -SCORED:], cache, last_only=True)
    return {name: mean(layer[name] for layer in cache.noted) for name in cache.noted[0]}


@torch.no_grad()
def answer(job: Job) -> dict:
    seed_everything(job.text)
    asker = Asker()
    whole, notes = asker.text(job.text, job.length)
    begun = job.length - SCORED
    cache = Reader(job.length + 32, settings("dense", 0))
    asker.model(whole[None, :begun], cache, last_only=True)

    def again(way: str, budget: int, ids: Tensor) -> Tensor:
        """The scores of each token of `ids` behind the text, which is as before afterwards."""
        cache.use(way, budget)
        logits = asker.model(ids[None], cache)[0].log_softmax(-1)
        cache.truncate(begun)
        return logits

    def loss(way: str, budget: int) -> float:
        logits = again(way, budget, whole[begun:])
        return -logits[:-1].gather(1, whole[begun + 1 :, None]).mean().item()

    def ask(way: str, budget: int, city: str, number: str) -> dict[str, float]:
        question = asker.encode(f" The magic number of {city} is")
        ids = asker.encode(f" The magic number of {city} is {number}")
        logits = again(way, budget, ids[:-1])[len(question) :][-4:]
        assert asker.tokenizer.decode(ids[-4:].tolist()) == number
        said = logits.gather(1, ids[-4:, None]).mean().item()
        return {"log_probability": said, "right": float((logits.argmax(-1) == ids[-4:]).all())}

    result: dict = {"loss": {"dense/0": loss("dense", 0)}}
    for way, budget in WAYS:
        result["loss"][f"{way}/{budget}"] = loss(way, budget)
    result["needles"] = {
        f"{way}/{budget}": [ask(way, budget, city, number) for city, number in notes] for way, budget in ASKED
    }
    return result


def work(job: Job) -> dict:
    return {"answer": answer, "shares": shares}[job.kind](job)


if __name__ == "__main__":
    jobs = [Job(text) for text in range(5)] + [Job(0, 8192)]
    jobs += [Job(text, kind="shares") for text in range(5)]
    run_jobs(__file__, jobs, work, FACTS, workers=1)
