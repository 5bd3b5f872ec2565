"""The recorded runs of the chapter on long contexts, about 45 minutes beside other work on 2 cores.

Run them with `python notebooks/language/recorded/long_context.py`.

- "text": the model `lite-1m` is trained on Austen in windows of 128 tokens, then read with two, four and
  eight times that by every method, without training and after 40 updates on long windows. From the same
  stable checkpoint goes the recipe of MiniCPM-2B-128k in small: two stages, 44 % long windows.
- "recall": a smaller model learns to repeat a number of four digits that stands somewhere in 64 characters
  of Austen, and is then asked in texts of up to 512 characters.
- "smollm2": SmolLM2-135M-Instruct, trained for 8,192 tokens, is asked within them, plain and scaled.

The rule, fixed before the runs: one loss is lower than another if it is so for every seed and the mean gap
is more than twice its standard error. The chapter asks it of each method against plain reading beyond the
window, before and after tuning; of searched factors against NTK and YaRN; and of short text, after 44 % long
windows against all long. Results go to `long_context.json` beside this file after each job; a run that is
stopped goes on where it was.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import minicpm_lite
from minicpm_lite.config import ModelConfig
from minicpm_lite.data.assets import load_austen
from minicpm_lite.data.corpora import load_corpus
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.long_context import extend_context, search_factors
from minicpm_lite.language.rotary import rotary_frequencies, scaled_frequencies
from minicpm_lite.runtime import seed_everything
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

SEEDS = (0, 1, 2)
FACTORS = (2, 4, 8)
METHODS = ("linear", "ntk", "yarn", "llama3", "longrope")
WINDOW, BATCH_TOKENS, PEAK_LR = 128, 1536, 0.01
STABLE_STEPS, TUNING_STEPS = 600, 40
LONG_SHARE = 0.44  # of the windows' tokens, as in MiniCPM-2B-128k
JUDGED_TOKENS = 32_768  # of held-out text
RECALL_WINDOW, RECALL_STEPS, RECALL_TUNING_STEPS = 64, 1200, 100
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SMOLLM2_LENGTHS = (256, 512, 1024, 1536)


@dataclass(frozen=True)
class Job:
    """One kind of run with one seed; `name` is its key in the results."""

    kind: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}/seed={self.seed}"


def longer(config: ModelConfig, method: str, factor: int, searched: Tensor | None = None) -> ModelConfig:
    """The config for a text ``factor`` times as long; "plain" only reads on."""
    if method == "plain":
        return replace(config, max_position_embeddings=factor * config.max_position_embeddings)
    return extend_context(config, method, float(factor), searched.tolist() if method == "longrope" else None)


def first_candidates(config: ModelConfig, factor: int) -> list[Tensor]:
    """What position interpolation, NTK and YaRN divide each frequency by: where the search begins."""
    plain = rotary_frequencies(config.rotary_dim, config.rope_theta)
    configs = [extend_context(config, method, float(factor)) for method in ("linear", "ntk", "yarn")]
    return [plain / scaled_frequencies(each, each.max_position_embeddings)[0] for each in configs]


def searched_factors(model: Decoder, base: ModelConfig, loss: Callable[[], float], factor: int) -> Tensor:
    def loss_with(factors: Tensor) -> float:
        model.config = longer(base, "longrope", factor, factors)
        return loss()

    return search_factors(loss_with, first_candidates(base, factor), factor, generations=3, children=8)


# Text


@torch.no_grad()
def loss_by_position(model: Decoder, tokens: Tensor, length: int, every: int = 64) -> list[float]:
    """Mean loss of each stretch of ``every`` positions, over windows of ``length``; in nats a token."""
    starts = range(0, len(tokens) - length, length)
    windows = torch.stack([tokens[start : start + length + 1] for start in starts])
    model.eval()
    total = torch.zeros(length)
    for part in windows.split(max(1, 4096 // length)):
        logits = model(part[:, :-1]).transpose(1, 2)
        total += F.cross_entropy(logits, part[:, 1:], reduction="none").sum(0)
    model.train()
    return (total / len(windows)).view(-1, every).mean(1).tolist()


def go_on(run: Trainer, config: ModelConfig, window: int, schedule: WSD, share: float = 1.0) -> Trainer:
    """A copy of a run, with its optimiser state, that goes on with other frequencies and windows.

    A share of the steps, spread evenly, sees windows of the new length, the others windows of the old one.
    Every step sees as many tokens.
    """
    seed, tokens = run.config.seed, load_corpus().train
    model = copy.deepcopy(run.model)
    model.config = config
    long, short = (
        Trainer(model, tokens, schedule, TrainerConfig(max(1, BATCH_TOKENS // length), length, seed=seed))
        for length in (window, WINDOW)
    )
    long.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    short.optimizer = long.optimizer
    for step in range(schedule.total_steps):
        is_long = int((step + 1) * share) > int(step * share)
        now = long if is_long else short
        now.step = step
        now.train(step + 1, progress=False)
    return long


def text(seed: int) -> dict:
    seed_everything(seed)
    corpus = load_corpus()
    judged = corpus.validation[: JUDGED_TOKENS + 1]
    base = replace(minicpm_lite.load_config("lite-1m"), max_position_embeddings=WINDOW)
    config = TrainerConfig(BATCH_TOKENS // WINDOW, WINDOW, seed=seed)
    run = Trainer(Decoder(base), corpus.train, WSD(PEAK_LR, 40, STABLE_STEPS - 40, 0), config)
    run.train(progress=False)
    model = run.model

    def read(config: ModelConfig, length: int) -> list[float]:
        model.config = config
        return loss_by_position(model, judged, length)

    result: dict = {"within": read(base, WINDOW), "untrained": {}, "short_text": {}, "factors": {}}
    for factor in FACTORS:
        length = factor * WINDOW
        held_in = corpus.train[: 8 * 1024 + 1]  # the search must not see what it is judged by
        found = searched_factors(
            model, base, lambda t=held_in, n=length: sum(loss_by_position(model, t, n)), factor
        )
        result["factors"][factor] = found.tolist()
        for method in ("plain", *METHODS):
            result["untrained"][f"{method}/{factor}"] = read(longer(base, method, factor, found), length)
        if factor == 4:
            kept, yarn = found, longer(base, "yarn", 4)
            unsharp = replace(yarn, rope_scaling=replace(yarn.rope_scaling, attention_factor=1.0))
            result["untrained"]["yarn, attention factor 1/4"] = read(unsharp, length)
            for method in METHODS:
                result["short_text"][method] = read(longer(base, method, 4, found), WINDOW)
    model.config = base

    decay = WSD(PEAK_LR, 0, 0, TUNING_STEPS)
    result["tuned"], result["tuned_short_text"] = {}, {}
    for method in ("plain", *METHODS):
        tuned = go_on(run, longer(base, method, 4, kept), 4 * WINDOW, decay)
        result["tuned"][method] = loss_by_position(tuned.model, judged, 4 * WINDOW)
        result["tuned_short_text"][method] = loss_by_position(tuned.model, judged, WINDOW)
    control = go_on(run, base, WINDOW, decay)
    result["tuned_short_text"]["short windows"] = loss_by_position(control.model, judged, WINDOW)

    result["recipe"] = {}
    first, second = extend_context(base, "ntk", 4.0), extend_context(base, "ntk", 8.0)
    stages = (WSD(PEAK_LR, 0, TUNING_STEPS, 0), decay)
    for name, share in (("44 % long", LONG_SHARE), ("all long", 1.0), ("all short", 0.0)):
        stage = go_on(run, first, 4 * WINDOW, stages[0], share)
        stage = go_on(stage, second, 8 * WINDOW, stages[1], share)
        result["recipe"][name] = {
            "long": loss_by_position(stage.model, judged, 8 * WINDOW),
            "short": loss_by_position(stage.model, judged, WINDOW),
        }
    stage = go_on(go_on(run, base, WINDOW, stages[0]), base, WINDOW, stages[1])
    result["recipe"]["not extended"] = {"short": loss_by_position(stage.model, judged, WINDOW)}
    return result


# Recall

MARK, DIGITS = ord("#"), 4


def letters() -> tuple[Tensor, Tensor]:
    """Austen as characters without digits: a part to train on and a held-out part."""
    text = torch.tensor(list(load_austen().encode("ascii", "replace")))
    text = text[(text < ord("0")) | (text > ord("9"))]
    return text[: -len(text) // 20], text[-len(text) // 20 :]


def questions(
    text: Tensor, count: int, length: int, generator: torch.Generator, depth: float | None = None
) -> Tensor:
    """Texts of ``length`` characters that hide "#4217" at a depth and end in "#4217"."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    texts = text[starts + torch.arange(length)]
    number = torch.rand(count, 10, generator=generator).argsort(1)[:, :DIGITS] + ord("0")
    needle = torch.cat([torch.full((count, 1), MARK), number], 1)
    room = length - 2 * needle.shape[1]
    places = torch.randint(room + 1, (count, 1), generator=generator)
    if depth is not None:
        places = torch.full((count, 1), round(depth * room))
    texts.scatter_(1, places + torch.arange(needle.shape[1]), needle)
    texts[:, -needle.shape[1] :] = needle
    return texts


def answer_loss(model: Decoder, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of the four digits, in nats a digit, and how many answers are right in every digit."""
    logits, number = model(texts[:, :-1])[:, -DIGITS:], texts[:, -DIGITS:]
    right = (logits.argmax(-1) == number).all(-1).sum()
    return F.cross_entropy(logits.transpose(1, 2), number), right


def train_recall(model: Decoder, text: Tensor, length: int, steps: int, peak_lr: float, seed: int) -> None:
    schedule = WSD(peak_lr, 40, steps - steps // 5 - 40, steps // 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler, generator = schedule.scheduler(optimizer), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss, _ = answer_loss(model, questions(text, 2048 // length, length, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


@torch.no_grad()
def recall_grid(model: Decoder, text: Tensor, length: int, count: int = 64) -> list[dict[str, float]]:
    """For each depth: the part of right answers, and the loss a digit."""
    grid = []
    for depth in DEPTHS:
        texts = questions(text, count, length, torch.Generator().manual_seed(1000), depth)
        parts = [answer_loss(model, part) for part in texts.split(32)]
        right = sum(part[1].item() for part in parts) / count
        grid.append({"right": right, "loss": sum(part[0].item() for part in parts) / len(parts)})
    return grid


def recall(seed: int) -> dict:
    seed_everything(seed)
    train_text, held_out = letters()
    base = ModelConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2, vocab_size=128,
        max_position_embeddings=RECALL_WINDOW, scale_emb=12, scale_depth=1.4, dim_model_base=64, init_std=0.1,
    )  # fmt: skip
    model = Decoder(base)
    train_recall(model, train_text, RECALL_WINDOW, RECALL_STEPS, 0.005, seed)
    result = {
        "config": asdict(base),
        "within": recall_grid(model, held_out, RECALL_WINDOW),
        "untrained": {},
        "tuned": {},
    }
    for factor in FACTORS:
        length = factor * RECALL_WINDOW
        texts = questions(train_text, 64, length, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found = searched_factors(model, base, lambda t=texts: answer_loss(model, t)[0].item(), factor)
            for method in ("plain", *METHODS):
                model.config = longer(base, method, factor, found)
                result["untrained"][f"{method}/{factor}"] = recall_grid(model, held_out, length)
        kept = found if factor == 4 else kept if factor > 4 else None
    for method in ("plain", *METHODS):
        tuned = copy.deepcopy(model)
        tuned.config = longer(base, method, 4, kept)
        train_recall(tuned, train_text, 4 * RECALL_WINDOW, RECALL_TUNING_STEPS, 0.001, seed + 100)
        result["tuned"][method] = recall_grid(tuned, held_out, 4 * RECALL_WINDOW)
    return result


# A real model


@torch.no_grad()
def smollm2(seed: int) -> dict:
    from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer

    path = smollm2_file()
    model, tokenizer = load_pretrained(path).eval(), load_tokenizer(path)
    plain = model.config
    ids = torch.tensor(tokenizer.encode(load_austen()[500_000:520_000]).ids)
    generator = torch.Generator().manual_seed(seed)

    def asked(length: int, depth: float | None, number: str) -> dict[str, float]:
        """Log-probability of the number, a digit, and whether each digit is the likeliest."""
        sentence = f" The magic number is {number}"
        ends = torch.tensor(tokenizer.encode(sentence).ids)
        needle = torch.tensor(tokenizer.encode(sentence + ".").ids)
        room = length - len(ends) - len(needle)
        place = round((depth or 0.0) * room)
        hidden = ids[:0] if depth is None else needle
        whole = torch.cat([ids[:place], hidden, ids[place : length - len(ends) - len(hidden)], ends])[None]
        logits, answer = model(whole[:, :-1])[0, -4:], whole[0, -4:]
        assert tokenizer.decode(answer.tolist()) == number
        return {
            "log_probability": logits.log_softmax(-1).gather(1, answer[:, None]).mean().item(),
            "right": float((logits.argmax(-1) == answer).all()),
        }

    def numbers(count: int) -> Sequence[str]:
        return [str(n) for n in torch.randint(1000, 10_000, (count,), generator=generator).tolist()]

    result: dict = {"context": plain.max_position_embeddings, "needle": {}, "control": {}, "scaled": {}}
    result["rope_theta"], result["head_dim"] = plain.rope_theta, plain.head_dim
    for length in SMOLLM2_LENGTHS:
        for depth in (0.1, 0.5, 0.9):
            result["needle"][f"{length}/{depth}"] = [asked(length, depth, number) for number in numbers(2)]
        result["control"][length] = asked(length, None, numbers(1)[0])
    chosen = numbers(3)
    for method in ("plain", "linear", "ntk", "yarn", "llama3"):
        model.config = plain if method == "plain" else extend_context(plain, method, 4.0)
        result["scaled"][method] = {
            "loss": sum(loss_by_position(model, ids[:2049], 512, 512)),
            "needle": [asked(512, 0.5, number) for number in chosen],
        }
    return result


def work(job: Job) -> dict:
    return {"text": text, "recall": recall, "smollm2": smollm2}[job.kind](job.seed)


if __name__ == "__main__":
    jobs = [Job("recall", 0), Job("text", 0), Job("smollm2", 0)]
    jobs += [Job(kind, seed) for seed in SEEDS[1:] for kind in ("text", "recall")]
    facts = {
        "seeds": SEEDS, "factors": FACTORS, "methods": METHODS, "window": WINDOW,
        "batch_tokens": BATCH_TOKENS, "peak_lr": PEAK_LR, "stable_steps": STABLE_STEPS,
        "tuning_steps": TUNING_STEPS,
        "judged_tokens": JUDGED_TOKENS, "long_share": LONG_SHARE, "depths": DEPTHS,
        "recall_window": RECALL_WINDOW, "recall_steps": RECALL_STEPS,
        "recall_tuning_steps": RECALL_TUNING_STEPS, "smollm2_lengths": SMOLLM2_LENGTHS,
    }  # fmt: skip
    run_jobs(__file__, jobs, work, facts, workers=1)
