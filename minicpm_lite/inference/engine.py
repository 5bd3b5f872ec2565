"""An engine: many requests at once, each of which gets exactly the text that it gets alone.

    engine = Engine(PagedExecutor(model, pages=256))       see `minicpm_lite.inference.executors`
    answer = engine.submit(Request(prompt, max_new_tokens=100))
    engine.run()                    or engine.step() again and again, with requests that come between
    answer.tokens

    each step    requests that are called off, and those that are done, give their pages back
                 those that wait begin, one user after the other, while there are rows and pages
                 one prompt is read on by a piece                     (prefill)
                 all whose prompts are read get their next token      (decode; with a draft, several)

A batch of texts that were there from the start ends with its longest, and what comes meanwhile waits. Here a
text leaves when it is done, and the next takes its row in the same step: continuous batching. A prompt is
read in pieces, between which the others write on, so that a long one holds nobody up for more than a piece.

Sources: Yu et al. 2022, "Orca" (continuous batching), OSDI; Agrawal et al. 2023, "Sarathi" (pieces of
prompts), arXiv 2308.16369; Kwon et al. 2023 (pages; see `minicpm_lite.inference.paged`).

Choices, and the traps behind them:

- What a request cannot have is refused at the door, before it takes anything.
- First come, first served within a user, and users in turn. A request that waits for pages is not overtaken
  by smaller ones, or it might wait for ever.
- Each request has a generator of its own, and its guesses have the room of its own text. So what it draws
  does not depend on who is there beside it, with a draft neither. Where a draft is shown what the model made
  of a text, one that is drawn is read whole, also where pages hold its beginning: a draft that had seen less
  would guess otherwise, and other guesses draw otherwise.
- Scores that are no numbers end their own request, and no other.
- Rounding differs between a call of one token and one of several, as everywhere; a tie to six digits may fall
  the other way. Packed weights round their inputs to 8 bits, where the last bit of a number can become a
  whole step, and each layer makes more of that: scores of SmolLM2-135M in Q4_0 differ by some tenths.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sized
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import require_positive_integer
from ..language.generation import resolve_stop_ids
from ..language.sampling import Sampling, choose, require_sampling
from ..runtime import require_seed
from .executors import Executor
from .speculative import Draft, Drafting, Guesses, StreamDrafting, verify

__all__ = ["Answer", "Engine", "Request"]


@dataclass(frozen=True)
class Request:
    """What somebody asks for, as it is when it is made: what was given may change afterwards.

    Attributes:
        prompt: token ids.
        max_new_tokens: to write at most.
        sampling: how tokens are chosen.
        stop_ids: tokens that end the text; None: those of the model.
        seed: of the request's own luck.
        user: who asks; users are served in turn.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] | None = None
    seed: int = 0
    user: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt", "stop_ids"):
            if isinstance(given := getattr(self, name), Iterable):
                object.__setattr__(self, name, tuple(given))


@dataclass(eq=False)
class Answer:
    """What becomes of a request.

    Attributes:
        request: what was asked.
        tokens: what was written so far.
        state: "waiting", "reading" (its prompt), "writing", "done", "cancelled" or "failed".
        why: it failed.
        submitted: when it came, in seconds of ``time.perf_counter``, as those below.
        first: when its first token was chosen.
        last: when its latest was.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    state: str = "waiting"
    why: str = ""
    submitted: float = 0.0
    first: float = 0.0
    last: float = 0.0

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self.state in ("done", "cancelled", "failed")


@dataclass(eq=False)
class _Job:
    """A request at work."""

    answer: Answer
    text: Sized
    stop_ids: tuple[int, ...]
    generator: torch.Generator
    drafting: Drafting | None
    heard: int = 0  # tokens of prompt and answer that the draft knows

    @property
    def whole(self) -> list[int]:
        return [*self.answer.request.prompt, *self.answer.tokens]

    @property
    def left(self) -> int:
        return self.answer.request.max_new_tokens - len(self.answer.tokens)

    def hear(self) -> list[int]:
        new = self.whole[self.heard :]
        self.heard += len(new)
        return new


class Engine:
    """Serves requests, step by step.

    Args:
        executor: runs the model.
        rows: requests at work at once, at most.
        piece: tokens of a prompt that are read in one step, at most.
        draft: guesses for each request; left out, none.

    Raises:
        ValueError: rows or a piece that are not positive, or a draft that does not fit the model.
    """

    def __init__(
        self, executor: Executor, rows: int = 8, piece: int = 256, draft: Draft | None = None
    ) -> None:
        require_positive_integer("rows", rows)
        require_positive_integer("piece", piece)
        self.executor, self.rows, self.piece, self.draft = executor, rows, piece, draft
        self._waiting: OrderedDict[str, deque[Answer]] = OrderedDict()  # by user, the next one first
        self._jobs: list[_Job] = []
        drafting = None if draft is None else draft.begin(executor.model, executor.room, Sampling(), None)
        self._after = drafting.after if isinstance(drafting, StreamDrafting) else ()

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is at work."""
        return not self._jobs and not self._waiting

    def submit(self, request: Request) -> Answer:
        """Take a request into the queue.

        Raises:
            ValueError: a prompt without tokens or with some that the model lacks, a text for which there can
                never be room, stop ids, sampling or a seed that are none, or a user without a name.
        """
        require_positive_integer("max_new_tokens", request.max_new_tokens)
        require_sampling(request.sampling)
        require_seed(request.seed)
        if not isinstance(request.user, str):
            raise ValueError(f"user is {request.user!r}; expected a name, by which users are served in turn.")
        resolve_stop_ids(self.executor.model, request.stop_ids)
        self.executor.require(request.prompt, self._most(request))
        answer = Answer(request, submitted=time.perf_counter())
        self._waiting.setdefault(request.user, deque()).append(answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        """Write no more of it; what was written stays. Nothing happens to what is over."""
        if not answer.over:
            answer.state = "cancelled"

    def run(self) -> None:
        """Step until nothing is left to do."""
        while not self.idle:
            self.step()

    def step(self) -> list[Answer]:
        """Do a little for everybody, and say for whom there is something new."""
        before = {id(job.answer): len(job.answer.tokens) for job in self._jobs}
        self._let_go()
        self._begin()
        at_work = [job.answer for job in self._jobs]
        reading = [job for job in self._jobs if job.answer.state == "reading"]
        writing = [job for job in self._jobs if job.answer.state == "writing"]
        if reading:
            self._read_on(reading[0])
        if writing:
            self._write_on(writing)
        self._let_go()
        return [answer for answer in at_work if answer.over or len(answer.tokens) > before.get(id(answer), 0)]

    @staticmethod
    def _most(request: Request) -> int:
        return len(request.prompt) + request.max_new_tokens - 1  # the last token is chosen and never read

    def _let_go(self) -> None:
        """What is over gives its pages back, and leaves the queue."""
        for job in self._jobs:
            if job.answer.over:
                self.executor.close(job.text)
        self._jobs = [job for job in self._jobs if not job.answer.over]
        for user, queue in [*self._waiting.items()]:
            kept = deque(answer for answer in queue if not answer.over)
            if kept:
                self._waiting[user] = kept
            else:
                del self._waiting[user]

    def _begin(self) -> None:
        """Those that wait begin, users in turn, as long as there are rows and pages."""
        while self._waiting and len(self._jobs) < self.rows:
            user = next(iter(self._waiting))
            queue = self._waiting[user]
            request = queue[0].request
            share = not self._after or request.sampling.temperature == 0
            text = self.executor.open(request.prompt, self._most(request), share)
            if text is None:
                return
            answer = queue.popleft()
            self._waiting.move_to_end(user)
            if not queue:
                del self._waiting[user]
            model = self.executor.model
            generator = torch.Generator(self.executor.device).manual_seed(request.seed)
            drafting = None
            if self.draft is not None:
                drafting = self.draft.begin(model, self.executor.room, request.sampling, generator)
            answer.state = "reading"
            self._jobs.append(
                _Job(answer, text, resolve_stop_ids(model, request.stop_ids), generator, drafting)
            )

    def _read_on(self, job: _Job) -> None:
        """Read a piece of a prompt; behind its end the first token is chosen."""
        prompt, start = job.answer.request.prompt, len(job.text)
        piece = prompt[start : start + self.piece]
        scores, streams = self.executor.prefill(job.text, piece, self._after)
        if self._after:
            job.drafting.see([streams])
        if start + len(piece) == len(prompt):
            job.answer.state = "writing"
            self._write(job, scores)

    def _write_on(self, jobs: list[_Job]) -> None:
        """The next tokens of all whose prompts are read."""
        newest = [job.answer.tokens[-1] for job in jobs]
        guesses, texts = self._guess(jobs) if self.draft is not None else [], [job.text for job in jobs]
        if any(each.parents for each in guesses):
            tokens = [[token, *each.tokens[0].tolist()] for token, each in zip(newest, guesses, strict=True)]
            parents = [[-1, *(parent + 1 for parent in each.parents)] for each in guesses]
            scores, streams = self.executor.verify(texts, tokens, parents, self._after)
            paths = [self._accept(*row) for row in zip(jobs, guesses, scores, strict=True)]
            self.executor.accept(paths)
        else:
            scores, streams = self.executor.decode(texts, newest, self._after)
            for job, each in zip(jobs, scores, strict=True):
                self._write(job, each)
            paths = [[0]] * len(jobs)
        if self._after:
            for job, path, stream in zip(jobs, paths, streams, strict=True):
                job.drafting.see([stream[path]])

    def _guess(self, jobs: list[_Job]) -> list[Guesses]:
        """A tree for each; none for a last token, behind which there is no room."""
        return [
            job.drafting.propose([job.hear()], job.left - 1) if job.left > 1 else Guesses.none(1)
            for job in jobs
        ]

    def _write(self, job: _Job, scores: Float[Tensor, " vocab"]) -> None:
        """Choose the next token of a request."""
        if not scores.isfinite().all():
            self._fail(job)
            return
        sampling, seen = job.answer.request.sampling, None
        if sampling.repetition_penalty != 1:
            seen = torch.tensor([job.whole], device=scores.device)
        token = choose(scores[None], sampling, seen, None, job.generator)
        self._add(job, [int(token)])

    def _accept(self, job: _Job, guesses: Guesses, scores: Float[Tensor, "places vocab"]) -> list[int]:
        """Check the guesses of a request, and say which tokens of its row became text."""
        if not scores[: len(guesses.parents) + 1].isfinite().all():
            self._fail(job)
            return []
        sampling, seen = job.answer.request.sampling, None
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(job.whole, device=scores.device)
        drawn_from = None if guesses.drawn_from is None else guesses.drawn_from[0].to(scores)
        tokens = guesses.tokens[0].to(scores.device)
        path, token = verify(scores, tokens, guesses.parents, drawn_from, sampling, seen, job.generator)
        written = self._add(job, [*tokens[path].tolist(), token])
        return [0, *(guess + 1 for guess in path)][:written]  # its newest token is not read

    @staticmethod
    def _fail(job: _Job) -> None:
        job.answer.state = "failed"
        job.answer.why = f"Not all scores after token {len(job.whole)} are finite numbers."

    @staticmethod
    def _add(job: _Job, tokens: list[int]) -> int:
        """Take tokens up to the end of the answer, and say how many there were."""
        answer = job.answer
        ends = (place for place, token in enumerate(tokens, start=1) if token in job.stop_ids)
        end = min(next(ends, len(tokens)), job.left)
        answer.tokens += tokens[:end]
        answer.last = time.perf_counter()
        answer.first = answer.first or answer.last
        if job.left == 0 or answer.tokens[-1] in job.stop_ids:
            answer.state = "done"
        return end
