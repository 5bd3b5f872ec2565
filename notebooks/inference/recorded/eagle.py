"""An EAGLE-3 head for SmolLM2-135M-Instruct: two and a half hours on one core that others shared.

Run `python notebooks/inference/recorded/eagle_texts.py 40` first, which writes the texts, then `python
notebooks/inference/recorded/eagle.py trials`, and `python notebooks/inference/recorded/eagle.py 3000`, where
the number says how many updates the stable stage has. A run goes on from the newest checkpoint of the stable
stage up to that number, and decays in a folder of its own, so that a longer one goes on from there, too. The
head is written to `eagle.safetensors` (10 MB), with the ranking of all tokens by their frequency, whose first
8,192 it guesses.

What is as published (Li et al. 2025, arXiv 2503.01840, and its code): three levels of the target's stream,
the training-time test of 7 steps, the weights 0.8^k, the target's law learned and no stream reproduced, AdamW
with betas 0.9 and 0.95, gradients cut to 0.5. What is not, since a CPU has few updates:

- The output layer is the target's own, cut to the frequent tokens (FR-Spec does so with EAGLE-2), and not
  trained. So the head can be given any number of tokens afterwards, and half the checkpoint is saved. So that
  it learns of rare ones, too, each batch adds those outside the 8,192 that are among the two best anywhere.
- Each number of a stream is divided by its usual size, and in the end the weights that read it are. A few are
  forty times as large as most, and Adam moves all weights alike: so the head would be mostly they.
- The block begins as the target's block behind the late level, reads the streams alone at first, and adds to
  a quarter of the late level what it makes of them. "random" is the published beginning.
- The stable stage unrolls 3 steps, the decay 7: a first guess must be learned before a seventh.
- The law is that of the 64 most probable tokens. All of a text counts but the beginning that the template
  writes, also the question.
- Weights are moved in float32 and computed with in bfloat16.

Beginning and rate were chosen by trials of 40 updates; `trials` runs four of them again for the record, after
the choice was made.

The rules, fixed before the run. The stable stage ends when a hundred updates bring less than 0.03 tokens of
acceptance length, or when the time does; then the rate decays, in a fourth as many updates.

Noted after the run: with eight prompts a kind, the curve moves by 0.03 in either direction from one hundred
updates to the next, so the rule was met after 500 already, while the mean of the kinds went on from 1.39
there to 1.79 after 3,000. What ended the stage was the number that was given, 3,000.

The head is judged on answers that the target wrote greedily to prompts of five kinds which it was not trained
with. From the beginning of an answer on it guesses seven tokens; those before the first that is not the
target's best are accepted, the target writes one more, and from there it guesses again. So the tokens of an
answer over the calls it took are exactly what a chain of seven, or fewer, has there. The unit is a prompt. An
interval of 95 % over 24 prompts (20 of "letters") should tell differences of about 0.15. "The head transfers
to a kind that it never saw" if the interval of letters overlaps that of prose.
"""

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from eagle_texts import FOLDER, KINDS, PROMPTS, TOP, file_of
from safetensors import safe_open
from torch import Tensor, nn

from minicpm_lite.data.assets import load_austen, load_conversations
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.data.web_pool import load_web_documents
from minicpm_lite.inference.drafts import rank_by_frequency
from minicpm_lite.inference.eagle import (
    DECAY,
    STEPS,
    EagleHead,
    load_eagle,
    save_eagle,
    share_output,
    unrolled,
)
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer
from minicpm_lite.training.objective import Objective
from minicpm_lite.training.precision import rounded
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.sharded_checkpoint import checkpoints
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

HEAD = Path(__file__).with_suffix(".safetensors")
KEPT, ADDED = 8192, 2  # tokens that are guessed; best ones of each place that a batch adds
ROWS = 4  # texts of a batch
FIRST, EACH, FILES = 3, 40, 40  # files at the beginning; updates until one more is read; all files
HEADER = 24  # tokens with which each text begins
WARMUP, EVERY = 20, 100  # updates; between two measurements
TRIAL, FEWER = 40, 3  # updates; steps that are unrolled in the stable stage
RATE, SMALLER = 2e-3, 0.25  # what trials chose; the late level at first, beside what the block adds
JUDGED, RANKS = 8, 10  # prompts of a kind while it is trained; of first guesses that are looked at


@dataclass(frozen=True)
class Job:
    """A trial of how to begin and of a rate, or a run; `name` is its key in the results."""

    begins: str
    rate: float
    stable: int = 0  # updates; of a trial none

    @property
    def name(self) -> str:
        return f"head/{self.stable}" if self.stable else f"trial/{self.begins}/{self.rate}"


@cache
def target() -> Decoder:
    return load_pretrained(smollm2_file()).eval()


@cache
def ranking() -> Tensor:
    """All ids by their frequency in what SmolLM2 wrote first, in web pages, code, conversations and novels.

    The last two are cut, so that a novelist's words are not taken for frequent ones.
    """
    written = torch.cat([opened(number).get_tensor("ids") for number in range(FIRST)]).long()
    encode, room = load_tokenizer(smollm2_file()).encode_batch, 500_000  # letters
    talk = "\n".join(line for turns in load_conversations() for turn in turns for line in turn)
    web = [each.text for each in load_web_documents() if not each.source.startswith("random")]
    read = [torch.tensor(each.ids) for each in encode([*web, talk[:room], load_austen()[:room]])]
    ends = target().config.eos_token_id
    return rank_by_frequency(torch.cat([written, *read]), target().config.vocab_size, ends)


@cache
def sizes() -> Tensor:
    """How large each number of the streams usually is, behind the beginning that the template writes."""
    file = opened(0)
    behind = [
        file.get_slice("streams")[start + HEADER : start + length]
        for start, length in zip(*places(file), strict=True)
    ]
    return torch.cat(behind).float().square().mean(0).sqrt()


def begun(begins: str) -> EagleHead:
    """A head at the beginning of its training."""
    torch.manual_seed(0)
    model = target()
    head = EagleHead(model.config, ranking()[:KEPT])
    share_output(head, model)
    if begins == "random":
        return head
    late = len(head.fuse.weight[0]) // 3 * 2
    block = model.layers[model.config.num_hidden_layers - 3]
    with torch.no_grad():
        head.fuse.weight.zero_()
        head.fuse.weight[:, late:].copy_(SMALLER * sizes()[late:].diag())
        for part in ("q_proj", "k_proj", "v_proj"):
            of_streams = getattr(block.self_attn, part).weight
            of_tokens, of_hidden = getattr(head.self_attn, part).weight.chunk(2, dim=1)
            of_tokens *= 0.1
            of_hidden.copy_(of_streams)
        head.self_attn.o_proj.load_state_dict(block.self_attn.o_proj.state_dict())
        head.mlp.load_state_dict(block.mlp.state_dict())
        head.hidden_norm.load_state_dict(block.input_layernorm.state_dict())
        head.post_attention_layernorm.load_state_dict(block.post_attention_layernorm.state_dict())
        head.norm.load_state_dict(model.norm.state_dict())
    return head


class Texts:
    """Texts in batches, each a function of the step: neighbours by length of one file.

    The files are written while this reads: a step may draw from the first few, and from one more each 40
    steps. It waits for one that is not there yet.

    Args:
        files: how many there are at most.
    """

    def __init__(self, files: int = FILES) -> None:
        self.files = files

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        number = int(torch.randint(min(FIRST + step // EACH, self.files), (1,), generator=generator))
        rows = self.rows(number)
        start = int(torch.randint(len(rows) - ROWS + 1, (1,), generator=generator))
        return padded(rows[start : start + ROWS])

    def rows(self, number: int) -> list[tuple]:
        """The texts of a file, the shortest first."""
        file = opened(number)
        rows = [(file, start, length) for start, length in zip(*places(file), strict=True)]
        return sorted((row for row in rows if row[2] > HEADER + STEPS + 1), key=lambda row: row[2])

    def identity(self) -> dict:
        return {"files": self.files, "first": FIRST, "each": EACH}


def opened(number: int):
    """A file of texts, as soon as it is there."""
    while not file_of(number).exists():
        time.sleep(1)
    return safe_open(file_of(number), "pt")


def places(file) -> tuple[list[int], list[int]]:
    """Where the texts of a file begin, and their lengths."""
    lengths = file.get_tensor("lengths")
    return (lengths.cumsum(0) - lengths).tolist(), lengths.tolist()


def padded(rows: list[tuple]) -> dict[str, Tensor]:
    """Texts side by side, zeros behind them. `counted` are tokens whose next one is to be guessed."""
    longest = max(length for _, _, length in rows)

    def together(name: str) -> Tensor:
        parts = [file.get_slice(name)[start : start + length] for file, start, length in rows]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    lengths = torch.tensor([length for _, _, length in rows])
    at = torch.arange(longest)
    counted = (at >= HEADER) & (at < lengths[:, None])
    return {name: together(name) for name in ("ids", "streams", "best", "said")} | {"counted": counted}


Unroll = Callable[[nn.Module, dict[str, Tensor]], Iterator[Tensor]]


def chain(head: EagleHead, batch: dict[str, Tensor], steps: int = STEPS) -> Iterator[Tensor]:
    """Of each step the normed state at each place; that of step k at t is about the token t + 2 + k."""
    embedded = F.embedding(batch["ids"], target().embed_tokens.weight).to(head.norm.weight)
    streams = (batch["streams"] / sizes()).to(embedded)
    return (head.norm(states) for states in unrolled(head, streams, embedded, steps))


def loss(model: nn.Module, batch: dict[str, Tensor], unroll: Unroll = chain) -> tuple[Tensor, Tensor]:
    """The sum over the steps of 0.8^k times the cross entropy of the target's law and the model's."""
    counted, kept = batch["counted"], model.vocabulary
    best = batch["best"].long()
    known = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    known[kept] = True
    added = best[..., :ADDED][counted].unique()
    kept = torch.cat([kept, added[~known[added]]])
    place = torch.full((model.config.vocab_size,), -1)
    place[kept] = torch.arange(len(kept))
    where = place[best]
    law = torch.where(where >= 0, batch["said"].float().exp(), 0)
    law = law / law.sum(-1, keepdim=True).clamp(min=1e-9)
    table, total = target().tables[-1].detach()[kept].to(model.norm.weight), 0.0
    for step, states in enumerate(unroll(model, batch)):
        told = counted[:, 1 + step :]
        scores = F.linear(states[told], table).float()
        said = scores.gather(-1, where[:, 1 + step :][told].clamp(min=0))
        surprise = scores.logsumexp(-1) - (law[:, 1 + step :][told] * said).sum(-1)
        total = total + DECAY**step * surprise.sum()
    mean = total / counted.sum().clamp(min=1)
    return mean, mean.detach()


def objective(steps: int) -> Objective:
    told = partial(loss, unroll=partial(chain, steps=steps))
    return Objective(f"EAGLE-3 from noted streams, {steps} steps", told, units)


def units(batch: dict[str, Tensor]) -> int:
    return int(batch["counted"].sum())


def load_trained(kept: int) -> EagleHead:
    """The head that was written, to be judged with other numbers of tokens."""
    head = load_eagle(HEAD, target(), kept)
    head.fuse.weight *= sizes()
    return head


@cache
def judged(kind: str, prompts: int) -> list[dict[str, Tensor]]:
    """Greedy answers to prompts of a kind, a few side by side; answers alone are counted."""
    file = safe_open(file_of(kind), "pt")
    rows = [(file, start, length) for start, length in zip(*places(file), strict=True)][:prompts]
    asked, found = file.get_tensor("asked")[:prompts], []
    for first in range(0, len(rows), 8):
        batch = padded(rows[first : first + 8])
        batch["counted"] &= torch.arange(batch["ids"].shape[1]) >= asked[first : first + 8, None] - 1
        found.append(batch)
    return found


@torch.no_grad()
def judge(model: nn.Module, prompts: int, unroll: Unroll = chain) -> dict[str, dict]:
    """For each kind, of each prompt, the tokens that a call writes with chains of 1 to 7 guesses.

    Besides: how often the target's best token is the first one of a first guess, the second, ...
    """
    found = {}
    with rounded(model):
        table = target().tables[-1].detach()[model.vocabulary].to(model.norm.weight)
        for kind in json.loads(PROMPTS.read_text()):
            lengths, ranks = [], []
            for batch in judged(kind, prompts):
                best, counted, right = batch["best"][..., 0], batch["counted"], []
                for step, states in enumerate(unroll(model, batch)):
                    scores, wanted = F.linear(states, table), best[:, 1 + step :]
                    right.append(F.pad(model.vocabulary[scores.argmax(-1)] == wanted, (0, step)))
                    if step == 0:
                        told = counted[:, 1:]
                        guesses = model.vocabulary[scores[told].topk(RANKS).indices]
                        ranks.append(guesses == wanted[told][:, None])
                right = torch.stack(right, dim=-1).cumprod(-1)  # (rows, places, steps)
                for row, told in zip(right, counted, strict=True):
                    first, end = int(told.int().argmax()), int(told.nonzero().max())
                    lengths.append([length(row[first:end], most) for most in range(1, STEPS + 1)])
            found[kind] = {"lengths": lengths, "ranks": torch.cat(ranks).float().mean(0).tolist()}
    return found


def length(right: Tensor, most: int) -> float:
    """Tokens a call of chains of so many guesses, over a whole answer.

    Args:
        right: (places, steps): 1 where a guess and all before it, behind a place, are the target's.
        most: guesses of a chain.
    """
    accepted = right[:, :most].sum(-1).tolist()
    at = calls = 0
    while at < len(accepted):
        at, calls = at + accepted[at] + 1, calls + 1
    return at / calls


def seen(stable: int) -> int:
    """Files that are written when the stable stage ends."""
    return min(FIRST - 1 + stable // EACH, FILES)


def train(job: Job) -> dict:
    """A trial, or a run: its stable stage in one folder, the decay from there in another."""
    head, config = begun(job.begins), TrainerConfig(ROWS, 256, precision="bfloat16", max_grad_norm=0.5)
    schedule = WSD(job.rate, WARMUP, (job.stable or TRIAL) - WARMUP, job.stable // 4)
    trainer = Trainer(head, Texts(), schedule, config, objective(FEWER))
    if not job.stable:
        trainer.train(progress=False)
        return {"losses": trainer.losses, "judged": judge(head, JUDGED)}
    stages = (
        ("stable", job.stable, FEWER, FILES),
        (f"decay-{job.stable}", schedule.total_steps, STEPS, seen(job.stable)),
    )
    curve = {}
    for stage, end, steps, files in stages:
        folder, file = FOLDER / stage, FOLDER / f"{stage}.json"
        trainer.objective, trainer.batches = objective(steps), Texts(files)
        found = {step: path for step, path in checkpoints(folder).items() if trainer.step < step <= end}
        if found:
            trainer.load(found[max(found)])
        points = json.loads(file.read_text()) if file.exists() else {}
        while trainer.step < end:
            until = min((trainer.step // EVERY + 1) * EVERY, end)
            trainer.train(until, folder, checkpoint_every=EVERY // 4, keep=40, progress=False)
            points[str(until)] = judge(head, JUDGED)
            file.write_text(json.dumps(points))
            told = {kind: mean(each[-1] for each in of["lengths"]) for kind, of in points[str(until)].items()}
            print(until, trainer.losses[-1], told, flush=True)
        curve |= {step: point for step, point in points.items() if int(step) <= end}
    written = copy.deepcopy(head)
    with torch.no_grad():
        written.fuse.weight /= sizes()
    save_eagle(HEAD, written, ranking())
    took = sum(
        json.loads(line)["seconds"]
        for stage, *_ in stages
        for line in (FOLDER / stage / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["step"] <= trainer.step
    )
    return {"curve": curve, "losses": trainer.losses, "judged": judge(head, 24), "updates took": took}


def facts() -> dict:
    return {
        "model": "SmolLM2-135M-Instruct, Q4_1", "steps": STEPS, "decay": DECAY, "kept": KEPT, "added": ADDED,
        "rows": ROWS, "warmup": WARMUP, "trial": TRIAL, "fewer": FEWER, "smaller": SMALLER, "kinds": KINDS,
        "top": TOP, **Texts().identity(),
    }  # fmt: skip


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["trials"]:
            jobs = [Job("target", 2e-3), Job("random", 1e-3), Job("random", 2e-3), Job("target", 1e-3)]
        case [stable]:
            jobs = [Job("target", RATE, int(stable))]
    run_jobs(__file__, jobs, train, facts(), workers=1)
