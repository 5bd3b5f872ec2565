"""What drafts bring to SmolLM2-135M on four kinds of work: acceptance, and time.

Run `python notebooks/inference/recorded/speculative.py acceptance`, twenty minutes on one core that may be
shared (`acceptance lookup` is that of one draft alone), and on a quiet machine
`python notebooks/inference/recorded/speculative.py time`, thirty minutes on two cores. Both need the weights
of `eagle.py` and `speculative_draft.py`, and the first the texts of `eagle_texts.py`, of which
`eagle_texts.py 0` writes those that are needed here.

Prompts of `speculative_prompts.json`: 24 each of chat, code and structured text, passages of Austen to
shorten or to copy, and free prose; 20 letters, by which the clocks are set, and which are judged for
acceptance alone. Answers are greedy. Drafts:

    lookup      what followed the last three tokens, or fewer, where they stood before; 8 guesses
    decoder     a decoder of two blocks that was taught the same (`speculative_draft.py`); a chain of 4
    chain       the EAGLE-3 head, 8,192 tokens; a chain of 4
    whole       the same head with all 49,152 tokens: what FR-Spec saves
    tree        the same head, EAGLE-2's tree: 4 deep, 4 wide, 12 guesses
    best        the same head, the static tree that the cost model calls fastest on this machine
    adaptive, adaptive lookup       as many guesses as pay, at most 6 or 8

Acceptance is found without the target: its greedy text is known, and its streams were noted, so a draft is
shown what it would see and its guesses are compared with what came. "kept" is the head with other numbers of
tokens. The unit is a prompt; intervals are Student's, at 95 %.

Time: for each prompt all ways write 64 tokens in turns; what is before the second token does not count.
Targets: "F32", whose float32 weights the kernels read once, and "Q8_0". Heads are packed as Q8_0 in both.
What is written must be what plain decoding writes: with F32 up to ties, with Q8_0, which rounds its inputs to
8 bits, up to what a call of several tokens rounds otherwise. Answers that differ are counted.

The rules, fixed before the timed runs.

1. A draft is faster on a kind if the interval over prompts of log(plain seconds / its seconds) is above 0.
2. The cost model is right within 15 % if predicted and measured speed differ by less, in the mean over a
   kind, for each way and kind. It predicts from the clocks (letters) and the measured tokens a call.
3. Adaptive is never slower if no kind's interval lies below log(0.98).
4. "Best" is the best tree if no other shape of the same head has a higher mean speed on all kinds together,
   by the interval of the difference.

A first run under the same rules refuted 2 (19 of 64 pairs of way and kind) and 3 (one of 16). Its clocks had
averaged over whole texts, at whose end calls have fewer guesses, and had drawn lines through numbers of
guesses that were not timed. Now each number is timed by itself, inside a text; and since the best tree and
the adaptive ways are made by the clocks, everything was timed anew.

Power: seconds of one prompt repeat to some 3 % on a quiet machine, and acceptance differs by 20 % from prompt
to prompt, so that 24 prompts tell 1.1 from 1.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from statistics import mean, median

import torch
from eagle import HEAD, KEPT, judge, load_trained, opened, places
from eagle_texts import PROMPTS, Asked
from speculative_draft import decoder_draft
from torch import Tensor

from minicpm_lite.data.packages import smollm2_file
from minicpm_lite.inference.drafts import PromptLookup
from minicpm_lite.inference.eagle import EagleDraft, EagleHead, load_eagle
from minicpm_lite.inference.guess_trees import Chain, DynamicTree, StaticTree
from minicpm_lite.inference.packed import put_packed, quantize_model
from minicpm_lite.inference.quantization import quantize
from minicpm_lite.inference.speculative import Draft, Guesses, Stats, StreamDrafting, speculative_stream
from minicpm_lite.inference.speculative_costs import Adaptive, Costs, best_tree
from minicpm_lite.lab.recorded import load_results, run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.fast_decoding import fast_decoding
from minicpm_lite.language.generation import stream
from minicpm_lite.language.sampling import Sampling
from minicpm_lite.pretrained.checkpoints import load_pretrained

TIMED = ("chat", "code", "summary", "prose")
KINDS = (*TIMED, "letters")
SIZES = (4096, 8192, 16384, 32768, 49152)  # tokens that the head guesses
TARGETS = ("F32", "Q8_0")
NEW, THREADS = 64, 2
CHAIN, TREE, LOOKUP = Chain(4), DynamicTree(depth=4, top_k=4, guesses=12), PromptLookup(8)
WAYS = ("lookup", "decoder", "chain", "whole", "tree", "best", "adaptive", "adaptive lookup")
MOST = 16  # guesses of the best tree, and of the longest call that the clocks know
FACTS = {
    "model": "SmolLM2-135M-Instruct, Q4_1", "kinds": KINDS, "sizes": SIZES, "new": NEW, "threads": THREADS,
    "chain": CHAIN.guesses, "tree": [TREE.depth, TREE.top_k, TREE.guesses], "lookup": LOOKUP.guesses,
    "most": MOST,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Acceptance of a draft, the head with other tokens "kept", or "time"; `name` is its key."""

    what: str
    of: str
    kind: str = ""

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.what, self.of, self.kind) if part)


def work(job: Job) -> dict:
    with torch.no_grad():
        match job.what:
            case "acceptance":
                return acceptance(job.of)
            case "kept":
                return judge(load_trained(int(job.of)), 24)
        torch.set_num_threads(THREADS)
        return clocks(job.of) if job.kind == "letters" else timed(job.of, job.kind)


@cache
def target(type: str) -> Decoder:
    plain = load_pretrained(smollm2_file()).eval()
    return fast_decoding(plain) if type == "F32" else quantize_model(plain, type)


@cache
def head(type: str, kept: int = KEPT) -> EagleHead:
    """Packed: guesses may be rounded, what is written is not."""
    found = load_eagle(HEAD, target(type), kept)
    for name, weight in [*found.named_parameters()]:
        if weight.ndim == 2:
            put_packed(found, name, quantize(weight, "Q8_0"))
    return found


def chances() -> list[float]:
    """That the target's best token is the head's best, its second best, ...: of all kinds, on prompts."""
    runs = load_results(HEAD)["runs"]
    longest = max((name for name in runs if name.startswith("head/")), key=lambda name: int(name[5:]))
    judged = runs[longest]["judged"]
    return [mean(each) for each in zip(*(judged[kind]["ranks"] for kind in TIMED), strict=True)]


def costs_of(type: str, way: str) -> Costs:
    clock = load_results(__file__)["runs"][f"time/{type}/letters"]
    return Costs(tuple(clock["calls"]), clock["draft"][way])


def best_shape(type: str) -> StaticTree | None:
    return best_tree(costs_of(type, "chain"), chances(), MOST)


def draft(type: str, way: str) -> tuple[Draft, int, int]:
    """A way to guess, its guesses at most, and the steps of the draft that they take."""
    match way:
        case "lookup":
            return LOOKUP, LOOKUP.guesses, 1
        case "chain" | "whole":
            size = KEPT if way == "chain" else SIZES[-1]
            return EagleDraft(head(type, size), CHAIN), CHAIN.guesses, CHAIN.guesses
        case "decoder":
            return decoder_draft(CHAIN), CHAIN.guesses, CHAIN.guesses
        case "tree":
            return EagleDraft(head(type), TREE), TREE.guesses, TREE.depth
        case "best":
            shape = best_tree(costs_of(type, "chain"), chances(), MOST) or StaticTree((-1,), (0,))
            return EagleDraft(head(type), shape), len(shape.parents), depth(shape)
        case "adaptive":
            return Adaptive(EagleDraft(head(type), Chain(6)), costs_of(type, "chain"), most=6), 6, 6
        case "adaptive lookup":
            return Adaptive(LOOKUP, costs_of(type, "lookup"), most=LOOKUP.guesses), LOOKUP.guesses, 1
    raise ValueError(f"There is no way {way!r}.")


def depth(shape: StaticTree) -> int:
    depths = []
    for parent in shape.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths)


# ------------------------------------------------------------------------------------------- acceptance


def acceptance(way: str) -> dict:
    """For each kind the tokens that a call writes, prompt by prompt, and how many guesses it had."""
    way_to_guess, _, _ = draft("F32", way)
    found = {}
    for kind in KINDS:
        followed = [follow(way_to_guess, *text) for text in texts(kind)]
        found[kind] = {
            "lengths": [mean(written) for written, _ in followed],
            "calls": [len(written) for written, _ in followed],
            "guesses": [mean(guessed) for _, guessed in followed],
        }
        print(way, kind, mean(found[kind]["lengths"]), flush=True)
    return found


def texts(kind: str) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Of each prompt: tokens of question and answer, the target's streams at them, tokens of the question."""
    file = opened(kind)
    ids, streams, asked = (file.get_tensor(name) for name in ("ids", "streams", "asked"))
    for (start, length), question in zip(zip(*places(file), strict=True), asked.tolist(), strict=True):
        yield ids[start : start + length].long(), streams[start : start + length].float(), question


def follow(draft: Draft, ids: Tensor, streams: Tensor, asked: int) -> tuple[list[int], list[int]]:
    """What calls would write if the target writes this text, and how many guesses they would check."""
    drafting = draft.begin(target("F32"), len(ids) + NEW, Sampling(), None)
    text, at = ids.tolist(), asked  # the newest token
    heard = read = 0  # tokens that the draft was told, and whose streams it was shown
    written, guessed = [], []
    while at < len(text) - 1:
        if isinstance(drafting, StreamDrafting):
            drafting.see([streams[read:at]])
        guesses = drafting.propose([text[heard : at + 1]], NEW)
        heard, read = at + 1, at
        accepted = branch(guesses, text[at + 1 : -1])
        written.append(accepted + 1)
        guessed.append(guesses.tokens.shape[1])
        at += accepted + 1
    return written, guessed


def branch(guesses: Guesses, text: list[int]) -> int:
    """How many guesses, one behind the other, are this text."""
    tokens, place = guesses.tokens[0].tolist(), -1
    for accepted, token in enumerate(text):
        following = [
            guess
            for guess, parent in enumerate(guesses.parents)
            if parent == place and tokens[guess] == token
        ]
        if not following:
            return accepted
        place = following[0]
    return len(text)


# ------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Still:
    """Guesses that are never right, for clocks."""

    guesses: int

    def begin(self, *_: object) -> "Still":
        return self

    def propose(self, new: list[list[int]], most: int) -> Guesses:
        guesses = min(self.guesses, most)
        return Guesses(torch.zeros(1, guesses, dtype=torch.long), (*range(-1, guesses - 1),))

    def select(self, rows: list[int]) -> None:
        """One row never stops before the end."""


def write(
    type: str, prompt: list[int], way_to_guess: Draft | None, new: int
) -> tuple[list[int], float, Stats]:
    """An answer, and the seconds from its second token on."""
    stats = Stats()
    ids, model = torch.tensor([prompt]), target(type)
    steps = (
        stream(model, ids, new)
        if way_to_guess is None
        else speculative_stream(model, ids, new, draft=way_to_guess, stats=stats)
    )
    answer = [int(next(steps))]
    start = time.perf_counter()
    answer += [int(token) for token in steps]
    return answer, time.perf_counter() - start, stats


@cache
def prompts(kind: str) -> list[list[int]]:
    asked = Asked()
    return [asked.encode(question) for question in json.loads(PROMPTS.read_text())[kind]]


def clocks(type: str) -> dict:
    """Seconds of calls that check so many guesses, and of a step of each draft, on letters."""
    asked = prompts("letters")
    answer, _, _ = write(type, asked[0], None, 24)
    plain = median(write(type, asked[0], None, 24)[1] / (len(answer) - 1) for _ in range(5))
    calls = [plain]
    for guesses in range(1, MOST + 1):
        found = [clocked(type, asked[0], Still(guesses), 13) for _ in range(5)]
        assert all(stats.proposed == guesses * stats.calls for stats in found)
        calls.append(median(stats.target_seconds / stats.calls for stats in found))
    drafts = {way: draft(type, way)[::2] for way in ("lookup", "decoder", "chain", "whole", "tree")}
    drafts |= {str(size): (EagleDraft(head(type, size), CHAIN), CHAIN.guesses) for size in SIZES}
    steps = {}
    for way, (way_to_guess, in_a_call) in drafts.items():
        found = [clocked(type, each, way_to_guess, 32) for each in asked[:6]]
        steps[way] = median(stats.draft_seconds / stats.calls for stats in found) / in_a_call
    return {"calls": calls, "draft": steps}


def clocked(type: str, prompt: list[int], way_to_guess: Draft, new: int) -> Stats:
    """What so many tokens take inside a longer text: at its end calls have fewer guesses than were asked."""
    stats, ids = Stats(), torch.tensor([prompt])
    steps = speculative_stream(target(type), ids, new + MOST + 4, draft=way_to_guess, stats=stats)
    for _ in range(new):
        next(steps)
    steps.close()
    return stats


def timed(type: str, kind: str) -> dict:
    """All ways in turns, prompt by prompt: seconds, and what the guesses came to."""
    ways = {way: draft(type, way) for way in WAYS}
    write(type, prompts(kind)[0], None, 8)
    found = {"plain": []} | {way: [] for way in ways}
    for number, prompt in enumerate(prompts(kind)):
        wanted, seconds, _ = write(type, prompt, None, NEW)
        found["plain"].append(seconds)
        first = number % len(WAYS)
        for way in WAYS[first:] + WAYS[:first]:
            answer, seconds, stats = write(type, prompt, ways[way][0], NEW)
            found[way].append(
                {
                    "seconds": seconds,
                    "draft": stats.draft_seconds,
                    "target": stats.target_seconds,
                    "length": stats.acceptance_length,
                    "guesses": stats.proposed / max(stats.calls, 1),
                    "same": answer == wanted,
                }
            )
    return found | {"most": {way: most for way, (_, most, _) in ways.items()},
                    "steps": {way: steps for way, (_, _, steps) in ways.items()}}  # fmt: skip


if __name__ == "__main__":
    judging = [Job("acceptance", way) for way in ("lookup", "decoder", "chain", "tree")]
    judging += [Job("kept", str(size)) for size in SIZES]
    clocked = [Job("time", type, "letters") for type in TARGETS]
    timing = [Job("time", type, kind) for type in TARGETS for kind in TIMED]
    match sys.argv[1:]:
        case ["acceptance", *wanted]:
            jobs = [job for job in judging if not wanted or job.of in wanted]
            run_jobs(__file__, jobs, work, FACTS, workers=1)
        case ["time"]:
            run_jobs(__file__, clocked, work, FACTS, workers=1)  # the others ask them
            run_jobs(__file__, timing, work, FACTS, workers=1)
