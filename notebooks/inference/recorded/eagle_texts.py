"""Questions for SmolLM2-135M-Instruct, whose answers the EAGLE-3 head learns from; six minutes on a CPU.

Run it with `python notebooks/inference/recorded/eagle_texts.py`; what it writes goes into a folder of
temporary files, for `eagle.py`.

A draft has to guess what its target writes, so it learns from what its target has written (Li et al. 2025,
EAGLE-3, section 4). Here are the instructions, of five kinds, made of real text and of templates of our own:
first messages of conversations (chitchat), passages of Austen, web pages and encyclopedia (evals), names of
emoji as things to write about. `eagle.py` has the model answer them.

The prompts by which the head is judged (`speculative_prompts.json`) are others, written by hand, with
passages of blocks of Austen that are held out here; their kind "letters" has no counterpart here. They are
answered greedily here, in float32.
"""

import json
import random
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
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.chat import encode_chat
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.fast_decoding import fast_decoding
from minicpm_lite.language.generation import generate, pad_left
from minicpm_lite.language.templates import chat_template
from minicpm_lite.pretrained.checkpoints import load_chat_template, load_pretrained, load_tokenizer
from minicpm_lite.training.checkpoint import load_checkpoint, save_checkpoint

PROMPTS = Path(__file__).with_name("speculative_prompts.json")
FOLDER = Path(tempfile.gettempdir()) / "minicpm_lite_eagle"
BATCHES, ROWS = 40, 2048  # of questions; a batch is of one kind
NEW = 192  # tokens of an answer at most
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
    """SmolLM2, and how it is asked."""

    def __init__(self) -> None:
        path = smollm2_file()
        self.tokenizer = load_tokenizer(path)
        self.template = chat_template(load_chat_template(path))

    @cached_property
    def model(self) -> Decoder:
        return fast_decoding(load_pretrained(smollm2_file()).eval())

    def encode(self, question: str) -> list[int]:
        return encode_chat(self.tokenizer, self.template, [{"role": "user", "content": question}])

    def questions(self, number: int) -> list[list[int]]:
        """Those of a batch, all of one kind, so that answers are about equally long."""
        rng, found = random.Random(number), []
        while len(found) < ROWS:
            ids = self.encode(instruction(KINDS[number % len(KINDS)], rng))
            found += [ids] if len(ids) <= LONGEST else []
        return found

    def read(self) -> list[int]:
        """Tokens of web pages and code, conversations and novels, from which frequencies are counted.

        The last two are cut, so that a novelist's words are not taken for frequent ones.
        """
        room = 500_000  # letters
        talk = "\n".join(line for turns in load_conversations() for turn in turns for line in turn)
        web = [each.text for each in load_web_documents() if not each.source.startswith("random")]
        found = self.tokenizer.encode_batch([*web, talk[:room], load_austen()[:room]])
        return [id for each in found for id in each.ids]


def written(rows: list[list[int]], ends: tuple[int, ...]) -> list[list[int]]:
    """Answers without what fills a row behind its end."""
    found = []
    for row in rows:
        end = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
        found.append(row[: end + 1])
    return found


def file_of(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def save_rows(name: str, rows: list[list[int]], **more: Tensor) -> None:
    """Rows of tokens one behind the other, and whatever is to stand beside them."""
    FOLDER.mkdir(exist_ok=True)
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.uint16)
    lengths = torch.tensor([len(row) for row in rows])
    save_checkpoint(file_of(name), {"ids": ids, "lengths": lengths} | more, {})


def load_rows(name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The rows, and what stands beside them."""
    tensors, _ = load_checkpoint(file_of(name))
    rows = tensors.pop("ids").long().split(tensors.pop("lengths").tolist())
    return list(rows), tensors


@dataclass(frozen=True)
class Job:
    """The questions, or the prompts of a kind by which the head is judged; `name` is its key."""

    of: str

    @property
    def name(self) -> str:
        return f"texts/{self.of}"


def work(job: Job) -> dict:
    """Write a file and say how much there is."""
    asked, judged = Asked(), json.loads(PROMPTS.read_text())
    if job.of in judged:
        questions = [asked.encode(question) for question in judged[job.of]]
        ids, padding = pad_left(questions)
        answers = generate(asked.model, ids, NEW, padding=padding)[:, ids.shape[1] :].tolist()
        answers = written(answers, asked.model.config.eos_token_id)
        rows = [question + answer for question, answer in zip(questions, answers, strict=True)]
        save_rows(job.of, rows, asked=torch.tensor([len(question) for question in questions]))
    elif job.of == "read":
        rows = [asked.read()]
        save_rows(job.of, rows)
    else:
        rows = [question for number in range(BATCHES) for question in asked.questions(number)]
        save_rows(job.of, rows)
    different = len({tuple(row) for row in rows})
    return {"texts": len(rows), "different": different, "tokens": sum(map(len, rows))}


if __name__ == "__main__":
    facts = {"batches": BATCHES, "rows": ROWS, "new": NEW, "longest": LONGEST, "passage": PASSAGE,
             "kinds": KINDS}  # fmt: skip
    jobs = [Job(name) for name in ("questions", "read", *json.loads(PROMPTS.read_text()))]
    run_jobs(__file__, jobs, work, facts, workers=1)
