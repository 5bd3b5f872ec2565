"""Texts for the EAGLE-3 head of SmolLM2 to learn from: the model's own answers, and what it made of them.

Run it with `python notebooks/inference/recorded/eagle_texts.py BATCHES`, which writes so many files of 96
answers into a folder of temporary files, 4 KB a token; what is there already is kept.

A draft has to guess what its target writes, so it learns from what its target has written (Li et al. 2025,
EAGLE-3, section 4). SmolLM2-135M-Instruct answers instructions of five kinds, 96 at a time in bfloat16 (of so
many rows it is multiplying that takes time, and no more reading the weights, so packed weights would not
help): half of them greedily, half at temperature 0.8. While it writes, its residual stream is noted after 2,
15 and 27 blocks, in bfloat16, and its 64 most probable next tokens, at each token of question and answer. So
the training of the head (`eagle.py`) never runs the target.

Instructions are made of real text and of templates of our own: first messages of conversations (chitchat),
passages of Austen, web pages and encyclopedia (evals), names of emoji as things to write about. The prompts
by which the head is judged (`speculative_prompts.json`) are others, written by hand, with passages of blocks
of Austen that are held out here; their kind "letters" has no counterpart here.
"""

import json
import random
import sys
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from minicpm_lite.data.assets import load_austen, load_conversations, load_emoji
from minicpm_lite.data.corpora import BLOCK_CHARACTERS, block_is_held_out
from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.data.web_pool import load_web_documents, pieces_of
from minicpm_lite.inference.eagle import levels
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.chat import encode_chat
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import pad_left
from minicpm_lite.language.templates import chat_template
from minicpm_lite.pretrained.checkpoints import load_chat_template, load_pretrained, load_tokenizer
from minicpm_lite.training.checkpoint import load_checkpoint, save_checkpoint

PROMPTS = Path(__file__).with_name("speculative_prompts.json")
FOLDER = Path(tempfile.gettempdir()) / "minicpm_lite_eagle"
ROWS, NEW = 96, 192  # answers at a time, and tokens of an answer at most
TOP, TEMPERATURE = 64, 0.8
LONGEST = 230  # tokens of a question, with the template's
PASSAGE = 480  # characters
KINDS = ("chat", "code", "structured", "summary", "prose")  # of instructions, in turns; each has its share

EXPLAIN = (
    "What is a {}?", "Tell me something interesting about a {}.", "Explain to a child what a {} is.",
    "Why would somebody like a {}?", "What can one do with a {}?", "Is a {} useful? Give reasons.",
    "Describe a {} in three sentences.", "How would you explain a {} to a friend?",
)  # fmt: skip
STORIES = (
    "Write a short story about a {}.", "Write a fairy tale in which a {} plays a part.",
    "Describe a morning on which you find a {}.", "Write a scene between two sisters about a {}.",
    "Tell a story that begins with a {} and ends with a {}.", "Write a page of a diary about a {}.",
    "Write about a dream with a {} and a {}.", "Describe a village that is famous for its {}.",
)  # fmt: skip
LISTS = (
    "Make a table in Markdown with three facts about a {} and a {}.",
    "Write a JSON object that describes a {}.",
    "List five things that have to do with a {}.", "Give ten words that go with {}, as a numbered list.",
    "Write a JSON list of three products with the names {}, {} and {}, each with a price.",
    "Compare a {} with a {} in a list of bullet points.", "Write an HTML page about a {}.",
    "Give step by step instructions for drawing a {}.", "Write a YAML file that describes a {} and a {}.",
)  # fmt: skip
LANGUAGES = ("Python", "Python", "Python", "JavaScript", "C", "Java", "SQL", "Bash")
PROGRAMS = (
    "counts the words of a text", "finds the largest number of a list", "sorts a list of names by length",
    "reads a file line by line", "computes the factorial of a number", "checks whether a number is prime",
    "merges two dictionaries", "removes duplicates from a list", "computes the mean of some numbers",
    "finds the longest word of a sentence", "prints a multiplication table", "adds two matrices",
    "converts Celsius to Fahrenheit", "searches for a word in all files of a folder",
    "writes a list to a CSV file", "computes the distance of two points", "draws a random number",
    "checks whether a text is a palindrome", "counts the vowels of a word",
    "finds common elements of two lists",
    "implements a stack", "implements a queue", "implements binary search", "implements a linked list",
    "validates an e-mail address", "computes the Fibonacci numbers", "rotates a list",
    "splits a list in chunks",
    "parses a date", "measures how long a function takes", "caches the results of a function",
    "draws a bar chart", "downloads a web page", "encrypts a text by shifting its letters",
    "groups records by a field", "computes the greatest common divisor", "flattens a nested list",
    "converts a number to binary", "simulates the throw of two dice", "computes compound interest",
)  # fmt: skip
CODING = (
    "Write a function in {0} that {1}.", "Write a {0} program that {1}.", "Show me {0} code that {1}.",
    "How do I write something in {0} that {1}? Give an example.",
    "Write a {0} class that {1}, with comments.",
    "Write a test in {0} for a function that {1}.", "Explain step by step a {0} program that {1}.",
)  # fmt: skip
SUMMARIES = (
    "Summarize the following text:\n\n{}", "Summarize this in one sentence:\n\n{}",
    "Correct the spelling of the following text and write it again:\n\n{}", "What is this text about?\n\n{}",
    "Rewrite the following text in simpler words:\n\n{}", "Repeat the following text word for word:\n\n{}",
    "List the names and places in this text:\n\n{}",
    "Give this text a title, and quote its best sentence:\n\n{}",
    "Continue the following text:\n\n{}", "Turn this text into a list of bullet points:\n\n{}",
)  # fmt: skip


@cache
def things() -> list[str]:
    """What can be written about."""
    return [emoji.english.split(":")[-1].strip() for emoji in load_emoji()]


@cache
def messages() -> list[str]:
    """How conversations begin, and what else is said in them."""
    turns = [" ".join(" ".join(turn).split()) for talk in load_conversations() for turn in talk[:3]]
    return [turn for turn in dict.fromkeys(turns) if 20 <= len(turn) <= 160]


@cache
def passages() -> list[str]:
    """Of the novels, without the blocks that are held out, and of pages of the web."""
    novels, found = load_austen(), []
    for block in range(len(novels) // BLOCK_CHARACTERS):
        if not block_is_held_out(block):
            found += pieces_of(novels[block * BLOCK_CHARACTERS :][:BLOCK_CHARACTERS], PASSAGE)
    pages = [d.text for d in load_web_documents() if d.source in ("c4", "openwebtext", "oscar", "wikipedia")]
    pages = [piece for page in pages for piece in pieces_of(page[:20_000], PASSAGE)]
    return found[:: max(len(found) // len(pages), 1)] + pages  # about as many of each


def instruction(kind: str, rng: random.Random) -> str:
    """One of a kind."""
    some = [rng.choice(things()) for _ in range(3)]
    match kind:
        case "chat" if rng.random() < 0.6:
            return rng.choice(messages())
        case "chat":
            return rng.choice(EXPLAIN).format(*some)
        case "code":
            return rng.choice(CODING).format(rng.choice(LANGUAGES), rng.choice(PROGRAMS))
        case "structured":
            return rng.choice(LISTS).format(*some)
        case "summary":
            return rng.choice(SUMMARIES).format(rng.choice(passages()))
    return rng.choice(STORIES).format(*some)


class Asked:
    """SmolLM2 in bfloat16, and how it is asked."""

    def __init__(self) -> None:
        path = smollm2_file()
        self.tokenizer = load_tokenizer(path)
        self.template = chat_template(load_chat_template(path))

    @cached_property
    def model(self) -> Decoder:
        return load_pretrained(smollm2_file(), torch.bfloat16).eval()

    def encode(self, question: str) -> list[int]:
        return encode_chat(self.tokenizer, self.template, [{"role": "user", "content": question}])

    def prompts(self, number: int) -> list[list[int]]:
        """The questions of a batch, all of one kind, so that answers are about equally long."""
        rng, found = random.Random(number), []
        while len(found) < ROWS:
            ids = self.encode(instruction(KINDS[number % len(KINDS)], rng))
            found += [ids] if len(ids) <= LONGEST else []
        return found


@torch.no_grad()
def write_answers(
    model: Decoder, prompts: list[list[int]], drawn: list[bool], seed: int = 0
) -> dict[str, Tensor]:
    """Questions with the model's answers, one behind the other, and what it made of each token that it read.

    Args:
        model: the target.
        prompts: the questions.
        drawn: whether an answer is drawn at the temperature; else each of its tokens is the best.
        seed: of what is drawn.
    """
    after, ends = levels(model.config.num_hidden_layers), model.config.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    tokens, padding = pad_left(prompts)
    cache = KVCache(tokens.shape[1] + NEW, padding)
    kept = [[] for _ in prompts]
    active, done = [*range(len(prompts))], [False] * len(prompts)
    for step in range(NEW):
        cache.read(tokens)
        *streams, last = model.states(model.embed(tokens), cache, after)
        streams = torch.cat(streams, dim=-1)
        starts = [0 if step else int(padding[row]) for row in active]
        if step:
            logits = model.logits(last)
        else:  # of a long question all scores at once would be large
            logits = [model.logits(last[row : row + 1, start:])[0] for row, start in enumerate(starts)]
        best, said = zip(*map(most_probable, logits), strict=True)
        for place, (row, start) in enumerate(zip(active, starts, strict=True)):
            if not done[row]:
                kept[row].append((tokens[place, start:], streams[place, start:], best[place], said[place]))
        newest, said = torch.stack([each[-1] for each in best]), torch.stack([each[-1] for each in said])
        rank = torch.multinomial((said.float() / TEMPERATURE).softmax(-1), 1, generator=generator)
        rank *= torch.tensor([[drawn[row]] for row in active])
        tokens = newest.gather(1, rank).long()
        for row, token in zip(active, tokens.flatten().tolist(), strict=True):
            done[row] |= token in ends
        going = [place for place, row in enumerate(active) if not done[row]]
        if not going:
            break
        if len(going) <= 0.75 * len(active):  # to move the rows of the cache takes as long as a few steps
            cache.select(going)
            active, tokens = [active[place] for place in going], tokens[going]
    rows = [[torch.cat(each) for each in zip(*parts, strict=True)] for parts in kept]
    ids, streams, best, said = (torch.cat(each) for each in zip(*rows, strict=True))
    return {
        "ids": ids.int(), "streams": streams, "best": best, "said": said,
        "lengths": torch.tensor([len(row[0]) for row in rows]),
        "asked": torch.tensor([len(prompt) for prompt in prompts]),
    }  # fmt: skip


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens and their log-probabilities."""
    best = logits.topk(TOP, dim=-1)
    return best.indices.int(), (best.values - logits.logsumexp(-1, keepdim=True)).half()


def file_of(number: int | str) -> Path:
    """Of a batch, or of the prompts of a kind by which the head is judged."""
    return FOLDER / f"texts-{number:0>4}.safetensors"


@dataclass(frozen=True)
class Job:
    """A batch, or the prompts of a kind by which the head is judged; `name` is its key in the results."""

    of: int | str

    @property
    def name(self) -> str:
        return f"texts/{self.of}"


def work(job: Job) -> dict:
    """Write a file, unless it is there, and say how much there is."""
    judged, file = json.loads(PROMPTS.read_text()), file_of(job.of)
    FOLDER.mkdir(exist_ok=True)
    if not file.exists():
        asked = Asked()
        if job.of in judged:
            prompts = [asked.encode(question) for question in judged[job.of]]
            texts = write_answers(asked.model, prompts, [False] * len(prompts))
        else:
            drawn = [row % 2 == 1 for row in range(ROWS)]
            texts = write_answers(asked.model, asked.prompts(job.of), drawn, job.of)
        save_checkpoint(file, texts, {})
    texts, _ = load_checkpoint(file)
    kind = job.of if job.of in judged else KINDS[job.of % len(KINDS)]
    return {"kind": kind, "texts": len(texts["lengths"]), "tokens": len(texts["ids"]),
            "asked": int(texts["asked"].sum())}  # fmt: skip


if __name__ == "__main__":
    facts = {"rows": ROWS, "new": NEW, "top": TOP, "temperature": TEMPERATURE, "passage": PASSAGE}
    numbers = [*json.loads(PROMPTS.read_text()), *range(int(sys.argv[1]))]
    run_jobs(__file__, [Job(number) for number in numbers], work, facts, workers=1)
