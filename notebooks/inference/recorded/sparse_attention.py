"""The recorded runs of the chapter on sparse attention with models of our own, two hours on one core.

Run them with `python notebooks/inference/recorded/sparse_attention.py`.

A text of 1,024 characters of Austen holds sixteen flags, and later asks for each. A flag is one token, which
says that a mark such as # has a figure, say 4; the question is the mark, and the answer the figure. A small
decoder (two blocks, a group of four query heads) learns this and the text, dense, on texts that grow from 64
to 1,024 characters. From there it is trained for 60 more updates in three ways: dense, sparse with 12 blocks
of 16 characters (18.75 % of the text, MiniCPM4's share at 32K), and sparse with 3 (4.7 %, its share at 128K).
Each of the four models then answers questions about flags more than 256 characters back, in held-out text,
with every budget and way to choose.

The rule, fixed before the runs. The unit is a seed: five, with the same texts for all ways. Differences are
in points of right answers, seed by seed, with the 95 % interval.
- Training with it pays if the model trained sparse with 12 blocks has more right answers with 12 blocks than
  the one trained on dense.
- It keeps what dense has if that model with 12 blocks lies within 5 points of the one trained on dense, used
  dense, by the whole interval.
- It is switchable if that model used dense lies within 5 points, and within 0.02 nats a character of text.
- Choosing matters if sparse has more right answers than the last blocks alone, and than random ones.
- A share of 4.7 % hurts if the model has fewer with 3 blocks than dense, by the whole interval.
Since training with it did not pay, the follow-up "longer" was added after the first five seeds: two of the
models, dense and sparse with 12 blocks, trained for 300 updates in the place of 60, three seeds. Its rule:
what was said of 60 updates is taken back if the model trained sparse then has as many right answers as the
one trained on dense, both read sparse.
A guess why it did not pay was that the model is blamed for answers that it could not know. The follow-up
"masked" was added to test it: five seeds, trained sparse with 12 blocks for 60 updates as before, but an
answer has no loss if the block of its flag is not read in the first layer, where this model looks flags up.
Its rule, fixed before the runs: the blame did harm if this model, read sparse, has more right answers than
the one that was trained so with the loss of all, by the whole interval, and to the text if its text loses
less; it did all of the harm if then the answers are not fewer than those of the one trained on dense, read
sparse.
Fewer answers with a loss are in themselves another training. So the follow-up "luck" was added: five seeds,
trained as "masked", but of all answers of an update as many as were not read, drawn by lot, have no loss.
Its rule, fixed before the runs: that the answers could not be known is what did harm if "masked" has more
right answers, read sparse, than "luck", by the whole interval, and less loss of text; if only "luck" too has
more than the one trained with the loss of all, then fewer answers alone explain a part.
With these models the control "random" was redone. At first random numbers had stood for the means of
windows; but a window at a border brings both of its blocks, so they came in pairs. Now each block is drawn
by itself, for each query.
Power: if right answers differ by 3 points from seed to seed, differences from 5 points on can be told.
"""

import copy
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from minicpm_lite.config import ModelConfig, SparseConfig
from minicpm_lite.data.assets import load_austen
from minicpm_lite.inference.block_choice import (
    choose_blocks,
    levels,
    window_means,
    window_scores,
    window_shares,
)
from minicpm_lite.inference.sparse_attention import SparseContext, attend_blocks
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.context import Context
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.checkpoint import save_checkpoint
from minicpm_lite.training.wsd import WSD

SEEDS = (0, 1, 2, 3, 4)
MARKS, FIGURES = "@#$%+<=>^`{|}~/\\", "0123456789"
FIRST_FLAG = 128  # the tokens of flags come behind those of characters
STAGES = ((64, 150, 8, 2048), (256, 150, 16, 4096), (1024, 100, 16, 8192))  # length, updates, flags, tokens
RATE, TEXT_WEIGHT = 0.005, (0.1, 1.0, 1.0)  # of the text's loss beside that of answers, by stage
TUNING, LONGER = 60, 300  # more updates of 4,096 tokens
LENGTH, BLOCK, BUDGETS, TRAINED = 1024, 16, (3, 6, 12, 24, 48), (12, 3)
FAR, JUDGED = 256, 24  # characters back; texts
MODEL = ModelConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
    head_dim=32, vocab_size=FIRST_FLAG + len(MARKS) * len(FIGURES), max_position_embeddings=LENGTH,
    scale_emb=12, scale_depth=1.4, dim_model_base=64, init_std=0.1,
)  # fmt: skip
FACTS = {
    "model": asdict(MODEL), "seeds": SEEDS, "stages": STAGES, "rate": RATE, "tuning": TUNING,
    "longer": LONGER, "length": LENGTH, "block": BLOCK, "budgets": BUDGETS, "far": FAR, "judged": JUDGED,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """All models of one seed; or the models of one of the follow-ups."""

    seed: int
    kind: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}/seed={self.seed}".removeprefix("/")


def settings(budget: int, way: str = "sparse") -> SparseConfig:
    """So many blocks: of three a third is local, but with "window" all but the first."""
    local = budget - 1 if way == "window" else max(1, (budget - 1) // 3)
    return SparseConfig(
        kernel_size=8, kernel_stride=4, block_size=BLOCK, window_size=BLOCK * local, topk=budget - local,
        dense_len=0,
    )  # fmt: skip


class RandomBlocks(SparseContext):
    """The blocks that are not forced are drawn by themselves, for each query and layer."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        at = torch.arange(query.shape[2])[None]
        luck = torch.rand(len(query), key.shape[1], query.shape[2], -(-key.shape[2] // BLOCK))
        own_window = replace(self.config, kernel_size=BLOCK, kernel_stride=BLOCK)  # a block is its window
        chosen = choose_blocks(luck, at, luck.shape[-1], own_window)
        return attend_blocks(query, key, value, chosen, at, torch.zeros(1, dtype=torch.long), BLOCK)


class Noting(SparseContext):
    """Notes which blocks the first layer reads: (texts, queries, blocks).

    Args:
        by_lot: answers are blamed by lot, as many as were read.
    """

    blocks: Tensor

    def __init__(self, config: SparseConfig, by_lot: bool = False) -> None:
        super().__init__(config)
        self.by_lot = by_lot
        self.shares: list[float] = []  # of the answers of each update that have a loss

    @torch.no_grad()
    def note(self, query: Tensor, key: Tensor) -> None:
        at = torch.arange(query.shape[2])[None]
        means = [window_means(key, *level) for level in levels(self.config)]
        shares = window_shares([window_scores(query, each) for each in means], at, self.config)
        self.blocks = choose_blocks(shares, at, -(-key.shape[2] // BLOCK), self.config)[:, 0]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if layer == 0:
            self.note(query, key)
        return super().attend(layer, query, key, value)

    def counts(self, at: Tensor) -> Tensor:
        """Which answers have a loss: those whose flag's block is read, or by lot as many: (texts, flags)."""
        rows = torch.arange(len(at))[:, None]
        read = self.blocks[rows, at[..., 1], at[..., 0] // BLOCK]
        self.shares.append(read.float().mean().item())
        return read.flatten()[torch.randperm(read.numel())].view_as(read) if self.by_lot else read


def context(way: str, budget: int) -> Context | None:
    if way == "dense":
        return None
    return (RandomBlocks if way == "random" else SparseContext)(settings(budget, way))


@cache
def letters() -> tuple[Tensor, Tensor]:
    """Austen as characters without marks and figures: a part to train on and a held-out part."""
    text = torch.tensor(list(load_austen().encode("ascii", "replace")))
    text = text[~torch.isin(text, torch.tensor(list((MARKS + FIGURES).encode())))]
    return text[: -len(text) // 20], text[-len(text) // 20 :]


def texts(
    source: Tensor, count: int, length: int, flags: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Texts with flags and questions, and where they stand: (count, flags, 2), the flag and the mark."""
    starts = torch.randint(len(source) - length, (count, 1), generator=generator)
    text = source[starts + torch.arange(length)]
    width = 2 if length <= 64 else 3
    places = torch.rand(count, length // width - 1, generator=generator).argsort(1)[:, : 2 * flags]
    at = width * places.view(count, flags, 2).sort(-1).values
    at += torch.randint(width, (count, 1, 1), generator=generator)
    mark = torch.rand(count, len(MARKS), generator=generator).argsort(1)[:, :flags]
    figure = torch.randint(len(FIGURES), (count, flags), generator=generator)
    text.scatter_(1, at[..., 0], FIRST_FLAG + len(FIGURES) * mark + figure)
    text.scatter_(1, at[..., 1], torch.tensor(list(MARKS.encode()))[mark])
    text.scatter_(1, at[..., 1] + 1, figure + ord("0"))
    return text, at


def losses(
    model: Decoder, text: Tensor, at: Tensor, context: Context | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the text and of the answers, in nats a token, and which answers are right."""
    logits = model(text[:, :-1], context).mT
    of_token = F.cross_entropy(logits, text[:, 1:], reduction="none")
    answers, flags = at[..., 1], (at[..., 0] - 1).clamp(min=0)  # flags cannot be foreseen
    plain = torch.ones_like(of_token).scatter(1, answers, 0).scatter(1, flags, 0)
    right = (logits.argmax(1) == text[:, 1:]).gather(1, answers)
    of_answers = of_token.gather(1, answers)
    if isinstance(context, Noting):
        of_answers = of_answers * context.counts(at)
    return (of_token * plain).sum() / plain.sum(), of_answers.mean(), right


def update(
    model: Decoder, optimizer: torch.optim.Optimizer, text: Tensor, at: Tensor, weight: float, rate: float,
    context: Context | None = None,
) -> None:  # fmt: skip
    of_text, of_answers, _ = losses(model, text, at, context)
    optimizer.zero_grad()
    (weight * of_text + of_answers).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def adam(model: Decoder) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)


def learn(seed: int) -> tuple[Decoder, torch.optim.Optimizer]:
    """A model that was trained dense, on texts that grow."""
    seed_everything(seed)
    source, generator = letters()[0], torch.Generator().manual_seed(seed)
    model = Decoder(MODEL)
    optimizer, step = adam(model), 0
    for (length, updates, flags, tokens), weight in zip(STAGES, TEXT_WEIGHT, strict=True):
        for _ in range(updates):
            step += 1
            text, at = texts(source, tokens // length, length, flags, generator)
            update(model, optimizer, text, at, weight, RATE * min(1.0, step / 40))
    return model, optimizer


def go_on(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    context: Context | None,
    seed: int,
    updates: int = TUNING,
) -> Decoder:
    """A copy that was trained for some more updates, with the optimiser's state and a decaying rate."""
    model = copy.deepcopy(model)
    own = adam(model)
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    source, generator = letters()[0], torch.Generator().manual_seed(1000 + seed)
    rate = WSD(RATE, 0, 0, updates)
    for step in range(updates):
        text, at = texts(source, 4, LENGTH, len(MARKS), generator)
        update(model, own, text, at, 1.0, rate(step + 1), context)
    return model


@torch.no_grad()
def judge(model: Decoder, way: str, budget: int, count: int = JUDGED, seed: int = 0) -> dict[str, float]:
    """The share of right answers about flags far back and near, and the loss of the text."""
    generator = torch.Generator().manual_seed(2000 + seed)
    text, at = texts(letters()[1], count, LENGTH, len(MARKS), generator)
    of_text, _, right = losses(model, text, at, context(way, budget))
    far = at[..., 1] - at[..., 0] > FAR
    return {
        "far": right[far].float().mean().item(),
        "near": right[~far].float().mean().item(),
        "text": of_text.item(),
        "questions": int(far.sum()),
    }


def go_on_longer(seed: int) -> dict:
    begun, optimizer = learn(seed)
    found = {}
    for name, way in (("dense", None), ("sparse 12", SparseContext(settings(12)))):
        model = go_on(begun, optimizer, way, seed, LONGER)
        found |= {f"{name}/dense": judge(model, "dense", 0), f"{name}/sparse/12": judge(model, "sparse", 12)}
    return found


def go_on_masked(seed: int) -> dict:
    begun, optimizer = learn(seed)
    model = go_on(begun, optimizer, Noting(settings(12)), seed)
    return {
        "begun/sparse/12": judge(begun, "sparse", 12),
        "masked/dense": judge(model, "dense", 0),
        "masked/sparse/12": judge(model, "sparse", 12),
    }


def go_on_by_luck(seed: int) -> dict:
    """Trained with the loss of answers by lot; and the model trained on dense, read at random."""
    begun, optimizer = learn(seed)
    lot = Noting(settings(12), by_lot=True)
    model = go_on(begun, optimizer, lot, seed)
    dense = go_on(begun, optimizer, None, seed)
    return {
        "begun/sparse/12": judge(begun, "sparse", 12),
        "luck/dense": judge(model, "dense", 0),
        "luck/sparse/12": judge(model, "sparse", 12),
        "counted": mean(lot.shares),
        "dense/sparse/12": judge(dense, "sparse", 12),
        **{f"dense/random/{budget}": judge(dense, "random", budget) for budget in BUDGETS[:3]},
    }


def work(job: Job) -> dict:
    if job.kind:
        kinds = {"longer": go_on_longer, "masked": go_on_masked, "luck": go_on_by_luck}
        return kinds[job.kind](job.seed)
    begun, optimizer = learn(job.seed)
    models = {"begun": begun, "dense": go_on(begun, optimizer, None, job.seed)}
    models |= {
        f"sparse {budget}": go_on(begun, optimizer, SparseContext(settings(budget)), job.seed)
        for budget in TRAINED
    }
    found = {}
    for name, model in models.items():
        found[f"{name}/dense"] = judge(model, "dense", 0)
        for budget in BUDGETS:
            found[f"{name}/sparse/{budget}"] = judge(model, "sparse", budget)
            if name in ("dense", "sparse 12") and budget <= 12:
                found[f"{name}/window/{budget}"] = judge(model, "window", budget)
    if job.seed == 0:
        kept = {
            f"{name}/{key}": weight
            for name in ("dense", "sparse 12")
            for key, weight in models[name].state_dict().items()
        }
        save_checkpoint(Path(__file__).with_suffix(".safetensors"), kept, {"model": asdict(MODEL), "seed": 0})
    return found


if __name__ == "__main__":
    jobs = [Job(seed) for seed in SEEDS] + [Job(seed, "longer") for seed in SEEDS[:3]]
    jobs += [Job(seed, kind) for kind in ("masked", "luck") for seed in SEEDS]
    run_jobs(__file__, jobs, work, FACTS, workers=1)
