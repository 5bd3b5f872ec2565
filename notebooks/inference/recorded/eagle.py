"""An EAGLE-3 head for SmolLM2-135M-Instruct, from the writing of its texts to the end of its training.

Run `python notebooks/inference/recorded/eagle_texts.py` first, which writes the questions, on any machine,
and `python notebooks/inference/recorded/eagle.py 80 250` on one GPU: for so many seconds the target answers
questions, and for so many the stable stage lasts; trials and the decay of the rate come on top, a minute and
a half. The head is written to `eagle.safetensors` (10 MB), with the ranking of all tokens by their frequency.

What is as published (Li et al. 2025, arXiv 2503.01840, and its code): the target's own answers as text, three
levels of its stream, the training-time test of 7 steps, the weights 0.8^k, the target's law learned and no
stream reproduced, AdamW with betas 0.9 and 0.95, gradients cut to 0.5. What is not:

- The output layer is the target's own and is not trained (FR-Spec has it so with EAGLE-2). All tokens are
  guessed in training, so the head can be given any number of the most frequent ones afterwards, and half the
  checkpoint is saved.
- Each number of a stream is divided by its usual size while the head is trained, and in the end the weights
  that read it are. A few are forty times as large as most, and Adam moves all weights alike: so the head
  would be mostly they.
- The block may begin as the target's block behind the late level, which reads the streams alone at first and
  adds to a quarter of the late level what it makes of them. "random" is the published beginning.
- Questions and answers count alike, half of the answers are greedy and half drawn at temperature 0.8.
- Weights are moved in float32 and computed with in bfloat16, and the target computes in bfloat16.

The rules, fixed before the run. Beginning and rate are those of the trial with the most tokens a call. The
stable stage ends when its seconds do, and then the rate decays, in a fourth as many updates.

The head is judged on answers that the target wrote greedily to prompts of five kinds which it was not trained
with. From the beginning of an answer on it guesses seven tokens; those before the first that is not the
answer's are accepted, the target writes one more, and from there it guesses again. So the tokens of an answer
over the calls it took are exactly what a chain of seven, or fewer, has there. The unit is a prompt. An
interval of 95 % over 24 prompts (20 of "letters") should tell differences of about 0.15. "The head transfers
to a kind that it never saw" if the interval of letters overlaps that of prose.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from eagle_texts import KINDS, NEW, PROMPTS, ROWS, load_rows, save_rows, written
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence

from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.inference.drafts import rank_by_frequency
from minicpm_lite.inference.eagle import (
    STEPS,
    EagleHead,
    eagle,
    levels,
    load_eagle,
    save_eagle,
    share_output,
    unrolled,
)
from minicpm_lite.lab.recorded import load_results, run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate, pad_left
from minicpm_lite.language.scoring import context_only, evaluating
from minicpm_lite.pretrained.checkpoints import load_pretrained
from minicpm_lite.training.objective import Objective
from minicpm_lite.training.precision import rounded
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

HEAD = Path(__file__).with_suffix(".safetensors")
KEPT = 8192  # most frequent tokens that are guessed where nothing else is said
TEMPERATURE = 0.8  # of half the answers
TOKENS = 6144  # of a batch
WARMUP, EVERY, TRIAL = 50, 250, 100  # updates; between two measurements; of a trial
BEGINNINGS = (("target", 1e-3), ("target", 2e-3), ("random", 1e-3), ("random", 2e-3))  # with a rate
SMALLER = 0.25  # the late level at first, beside what the block adds
JUDGED, RANKS = 8, 10  # prompts of a kind while it is trained; of first guesses that are looked at
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Job:
    """The target's texts, the trials, or the run; `name` is its key in the results."""

    name: str
    seconds: float = 0.0


@cache
def target() -> Decoder:
    return load_pretrained(smollm2_file(), torch.bfloat16).eval().to(DEVICE)


# ------------------------------------------------------------------------------------------- texts


def write_texts(seconds: float) -> dict:
    """Have the target answer, a batch of questions after the other, half of them greedily."""
    questions, _ = load_rows("questions")
    rows, kinds, ends = [], [], target().config.eos_token_id
    start = time.perf_counter()
    for number in range(len(questions) // ROWS):
        if time.perf_counter() - start > seconds:
            break
        asked = [row.tolist() for row in questions[number * ROWS :][:ROWS]]
        ids, padding = pad_left(asked)
        answers = generate(
            target(),
            ids.to(DEVICE),
            NEW,
            temperature=TEMPERATURE if number % 2 else 0.0,
            padding=padding.to(DEVICE),
            generator=torch.Generator(DEVICE).manual_seed(number),
        )
        answers = answers[:, ids.shape[1] :].tolist()
        rows += [question + answer for question, answer in zip(asked, written(answers, ends), strict=True)]
        kinds += [KINDS[number % len(KINDS)]] * ROWS
    took = time.perf_counter() - start
    save_rows("texts", rows)
    tokens = {
        kind: sum(len(row) for row, its in zip(rows, kinds, strict=True) if its == kind) for kind in KINDS
    }
    return {"texts": len(rows), "tokens": tokens, "seconds": took}


class Texts:
    """Neighbours by length as a batch, a function of the step; behind a text stands what is not predicted."""

    def __init__(self) -> None:
        rows, _ = load_rows("texts")
        self.rows = sorted((row for row in rows if len(row) > STEPS + 2), key=len)

    def __getitem__(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        last = int(torch.randint(len(self.rows), (1,), generator=generator)) + 1
        most = TOKENS // len(self.rows[last - 1])
        return padded(self.rows[max(last - most, 0) : last])

    def identity(self) -> dict:
        return {"texts": len(self.rows), "tokens of a batch": TOKENS}


def padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=int(context_only(torch.tensor(0))))


@cache
def ranking() -> Tensor:
    """All ids by their frequency in what the target wrote, in web pages, code, conversations and novels."""
    rows = [row for name in ("texts", "read") for row in load_rows(name)[0]]
    config = target().config
    return rank_by_frequency(torch.cat(rows), config.vocab_size, config.eos_token_id)


# ------------------------------------------------------------------------------------------- the head


def streams_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The target's streams at all tokens, and its embeddings of them."""
    embedded = target().embed(ids)
    *streams, _ = target().states(embedded, after=levels(target().config.num_hidden_layers))
    return torch.cat(streams, dim=-1), embedded


@cache
@torch.no_grad()
def sizes() -> Tensor:
    """How large each number of the streams usually is."""
    ids = Texts()[0].clamp(min=0).to(DEVICE)
    streams, _ = streams_of(ids)
    return streams[:, 1:].float().square().mean((0, 1)).sqrt()  # the first token's are a thing of their own


class Divided(nn.Module):
    """Weights that read what was divided by its usual size, as weights that read what was not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sizes", sizes())

    def forward(self, weight: Tensor) -> Tensor:
        return (weight / self.sizes).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * self.sizes


def begun(begins: str) -> EagleHead:
    """A head at the beginning of its training; it guesses all tokens."""
    torch.manual_seed(0)
    model = target()
    head = EagleHead(model.config, ranking()).to(DEVICE)
    share_output(head, model)
    with torch.no_grad():
        head.fuse.weight /= sizes()
        if begins == "target":
            late = len(head.fuse.weight[0]) // 3 * 2
            block = model.layers[model.config.num_hidden_layers - 3]
            head.fuse.weight.zero_()
            head.fuse.weight[:, late:].fill_diagonal_(SMALLER)
            for part in ("q_proj", "k_proj", "v_proj"):
                of_tokens, of_hidden = getattr(head.self_attn, part).weight.chunk(2, dim=1)
                of_tokens *= 0.1
                of_hidden.copy_(getattr(block.self_attn, part).weight)
            head.self_attn.o_proj.load_state_dict(block.self_attn.o_proj.state_dict())
            head.mlp.load_state_dict(block.mlp.state_dict())
            head.hidden_norm.load_state_dict(block.input_layernorm.state_dict())
            head.post_attention_layernorm.load_state_dict(block.post_attention_layernorm.state_dict())
            head.norm.load_state_dict(model.norm.state_dict())
    parametrize.register_parametrization(head.fuse, "weight", Divided())
    return head


@torch.no_grad()
def trained(head: EagleHead) -> EagleHead:
    """The same head, whose weights read streams as they are."""
    found = EagleHead(head.config, ranking()).to(DEVICE)
    share_output(found, target())
    for name, weight in found.named_parameters():
        weight.copy_(attrgetter(name)(head))
    return found


def load_trained(kept: int) -> EagleHead:
    """The head that was written, to be judged with other numbers of tokens."""
    return load_eagle(HEAD, target(), kept).to(DEVICE)


# ------------------------------------------------------------------------------------------- how it is judged

Unroll = Callable[[nn.Module, Tensor], Iterator[Tensor]]


def chain(head: EagleHead, ids: Tensor) -> Iterator[Tensor]:
    """Of each step the normed state at each place; that of step k at t is about the token t + 2 + k."""
    streams, embedded = streams_of(ids)
    return (head.norm(states) for states in unrolled(head, streams, embedded))


@torch.no_grad()
def judge(model: nn.Module, prompts: int, unroll: Unroll = chain) -> dict[str, dict]:
    """For each kind, of each prompt, the tokens that a call writes with chains of 1 to 7 guesses.

    Besides: how often the answer's token is the first one of a first guess, the second, ...
    """
    found = {}
    with rounded(model), evaluating(model):
        table = target().tables[-1].detach()[model.vocabulary]
        for kind in json.loads(PROMPTS.read_text()):
            (rows, beside), lengths, ranks = load_rows(kind), [], []
            for row, asked in zip(rows[:prompts], beside["asked"].tolist(), strict=False):
                ids, right = row[None].to(DEVICE), []
                for step, states in enumerate(unroll(model, ids)):
                    wanted = ids[0, 2 + step :]  # what the last state is about the text does not tell
                    scores = F.linear(states[0, : len(wanted)], table)
                    right.append(F.pad(model.vocabulary[scores.argmax(-1)] == wanted, (0, step)))
                    if step == 0:
                        guesses = model.vocabulary[scores[asked - 1 :].topk(RANKS).indices]
                        ranks.append(guesses == wanted[asked - 1 :, None])
                right = torch.stack(right, dim=-1).int().cumprod(-1)[asked - 1 :]  # (places, steps)
                lengths.append([length(right, most) for most in range(1, STEPS + 1)])
            found[kind] = {"lengths": lengths, "ranks": torch.cat(ranks).float().mean(0).tolist()}
    return found


def length(right: Tensor, most: int) -> float:
    """Tokens a call of chains of so many guesses, over a whole answer.

    Args:
        right: (places, steps): 1 where a guess and all before it, behind a place, are the answer's.
        most: guesses of a chain.
    """
    accepted = right[:, :most].sum(-1).tolist()
    at = calls = 0
    while at < len(accepted):
        at, calls = at + accepted[at] + 1, calls + 1
    return at / max(calls, 1)


def of_all(judged: dict[str, dict]) -> float:
    """Tokens a call with chains of seven, all kinds alike."""
    return mean(mean(each[-1] for each in of["lengths"]) for of in judged.values())


# ------------------------------------------------------------------------------------------- training


def trainer_of(model: nn.Module, rate: float, objective: Objective) -> Trainer:
    """One whose rate does not decay before it is told to."""
    config = TrainerConfig(1, 256, precision="bfloat16", max_grad_norm=0.5)  # batches have their own size
    return Trainer(model, Texts(), WSD(rate, WARMUP, 10**6, 1), config, objective)


def train(trainer: Trainer, seconds: float, judged: Callable[[], dict]) -> dict:
    """The stable stage for so long, then the decay; what was measured on the way."""
    rate, curve, start = trainer.schedule.peak_lr, {}, time.perf_counter()
    while time.perf_counter() - start < seconds:
        trainer.train(trainer.step + EVERY, progress=False)
        curve[trainer.step] = judged()
        print(trainer.step, trainer.losses[-1], of_all(curve[trainer.step]), flush=True)
    stable = trainer.step
    trainer.schedule = WSD(rate, WARMUP, stable - WARMUP, stable // 4)
    while trainer.step < trainer.schedule.total_steps:
        trainer.train(min(trainer.step + EVERY, trainer.schedule.total_steps), progress=False)
        curve[trainer.step] = judged()
        print(trainer.step, trainer.losses[-1], of_all(curve[trainer.step]), flush=True)
    tenths = [trainer.losses[first : first + 10] for first in range(0, trainer.step, 10)]
    return {"rate": rate, "stable": stable, "updates": trainer.step, "curve": curve,
            "losses": [mean(each) for each in tenths]}  # fmt: skip


def work(job: Job) -> dict:
    torch.backends.cuda.matmul.allow_tf32 = True
    if job.name == "texts":
        return write_texts(job.seconds)
    if job.name == "trials":
        found = {}
        for begins, rate in BEGINNINGS:
            trainer = trainer_of(begun(begins), rate, eagle(target()))
            trainer.train(TRIAL, progress=False)
            found[f"{begins}/{rate}"] = {"losses": trainer.losses, "judged": judge(trainer.model, JUDGED)}
            print(begins, rate, trainer.losses[-1], of_all(found[f"{begins}/{rate}"]["judged"]), flush=True)
        return found
    trials = load_results(__file__)["runs"]["trials"]
    begins, rate = max(BEGINNINGS, key=lambda it: of_all(trials[f"{it[0]}/{it[1]}"]["judged"]))
    head = begun(begins)
    found = train(trainer_of(head, rate, eagle(target())), job.seconds, lambda: judge(head, JUDGED))
    save_eagle(HEAD, trained(head), ranking())
    return found | {"begins": begins, "judged": judge(head, 24)}


if __name__ == "__main__":
    facts = {
        "model": "SmolLM2-135M-Instruct, Q4_1", "steps": STEPS, "kinds": KINDS, "rows": ROWS, "new": NEW,
        "temperature": TEMPERATURE, "tokens": TOKENS, "warmup": WARMUP, "trial": TRIAL, "smaller": SMALLER,
    }  # fmt: skip
    texts, stable = (float(seconds) for seconds in sys.argv[1:])
    for job in (Job("texts", texts), Job("trials"), Job("head", stable)):  # each reads what the last one left
        run_jobs(__file__, [job], work, facts, workers=1)
