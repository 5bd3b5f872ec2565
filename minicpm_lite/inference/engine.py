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
- First come, first served within a user, and users in turn: while somebody's next request waits, at most one
  of each other user begins. Turns count requests, not tokens. One that waits for pages is not overtaken by
  smaller ones of anybody, or it might wait for ever.
- Each request has a generator of its own, and its guesses have the room of its own text. So what it draws
  does not depend on who is there beside it, with a draft neither, since other guesses draw otherwise. Where a
  draft is shown what the model made of a text, one that is drawn is read whole, also where pages hold its
  beginning; and a draft that reckons with how many texts share a call is told so for greedy requests alone.
- Scores that are no numbers end their own request, and no other; a draft's, too.
- A step that is broken off, by Ctrl-C or an error, may have done half of its work: a token is chosen and not
  known to the draft, or read and not chosen. So the requests that were at work then end as failed, with what
  they had, and those that wait are served. Whoever goes on with one submits its prompt and its tokens.
- With the kernels of this library for all layers (`fast_decoding` of a float32 model, or a packed one) and
  for pages, a token has the same bits in any company: in a call of one or of many, among guesses or alone. A
  packed model some of whose layers stayed PyTorch's, such as routers of experts, rows that no block divides
  and tables that were not packed, needs `fast_decoding` around it for that. With PyTorch's layers rounding
  depends on the shape of a call, and a tie to six digits may fall the other way. So it is with more than 32
  tokens in a call of float32 layers, and with how a prompt is cut into pieces of more than 32 tokens, which
  known pages change. With pieces of at most 32, or if nothing is shared, a prompt has the same bits whatever
  was read before. Packed weights make much of a last bit, since they round their inputs to 8 bits.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sized
from dataclasses import dataclass, field
from itertools import chain
from reprlib import repr as shown

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import require_positive_integer
from ..language.generation import resolve_stop_ids
from ..language.sampling import Sampling, choose, require_sampling
from ..runtime import require_seed
from .executors import Executor
from .speculative import Draft, Drafting, Guesses, SharingDrafting, StreamDrafting, verify

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

    Raises:
        ValueError: the prompt is no sequence.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] | None = None
    seed: int = 0
    user: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, Iterable):
            raise ValueError(
                f"The prompt is {shown(self.prompt)}; expected token ids, such as a list of them."
            )
        for name in ("prompt", "stop_ids"):
            if isinstance(given := getattr(self, name), Iterable):
                numbers = given.tolist() if hasattr(given, "tolist") else given  # of a tensor or an array
                object.__setattr__(self, name, tuple(numbers))


@dataclass(eq=False)
class Answer:
    """What becomes of a request.

    Attributes:
        request: what was asked.
        tokens: what was written so far. They are whose answer it is: the engine adds to them, and reads none.
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
    written: list[int] = field(default_factory=list)  # as the answer's, which whoever has it may change
    heard: int = 0  # tokens of prompt and answer that the draft knows

    @property
    def whole(self) -> list[int]:
        return [*self.answer.request.prompt, *self.written]

    @property
    def left(self) -> int:
        return self.answer.request.max_new_tokens - len(self.written)

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
        share: read a beginning that several prompts have in common once. Without it each prompt is read
            whole and in the same pieces, so that not one bit depends on what was read before.

    Raises:
        ValueError: rows or a piece that are not positive, or a draft that does not fit the model.
    """

    def __init__(
        self,
        executor: Executor,
        rows: int = 8,
        piece: int = 256,
        draft: Draft | None = None,
        share: bool = True,
    ) -> None:
        require_positive_integer("rows", rows)
        require_positive_integer("piece", piece)
        self.executor, self.rows, self.piece, self.draft, self.share = executor, rows, piece, draft, share
        self._waiting: OrderedDict[str, deque[Answer]] = OrderedDict()  # by user, the next one first
        self._jobs: list[_Job] = []
        self._in_step = False
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

    def close(self) -> None:
        """Call off all that waits or is at work, so that its pages come back; what was written stays."""
        for answer in [*(job.answer for job in self._jobs), *chain.from_iterable(self._waiting.values())]:
            self.cancel(answer)
        self._let_go()

    def run(self) -> None:
        """Step until nothing is left to do.

        Raises:
            RuntimeError: what waits cannot begin, since texts that are not of this engine have the pages.
        """
        while not self.idle:
            nobody = not self._jobs
            if not self.step() and nobody and not self._jobs and self._waiting:
                raise RuntimeError(
                    "What waits cannot begin: nothing of this engine is at work, and yet its executor has "
                    "too few unused pages. Texts of another engine have them. Let that one run on or close "
                    "it (Engine.close), or give this one an executor of its own."
                )

    def step(self) -> list[Answer]:
        """Do a little for everybody, and say for whom there is something new.

        If the step before was broken off, what was at work in it ends as failed.
        """
        if self._in_step:
            for job in self._jobs:
                if not job.answer.over:
                    self._fail(
                        job, "A step was broken off, by an interruption or an error, while it was at work."
                    )
        self._in_step = True
        before = {id(job): len(job.written) for job in self._jobs}
        self._let_go()
        self._begin()
        at_work = [*self._jobs]
        reading = [job for job in self._jobs if job.answer.state == "reading"]
        writing = [job for job in self._jobs if job.answer.state == "writing"]
        if reading:
            self._read_on(reading[0])
        if writing:
            self._write_on(writing)
        self._let_go()
        self._in_step = False
        return [job.answer for job in at_work if job.answer.over or len(job.written) > before.get(id(job), 0)]

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
            share = self.share and (not self._after or request.sampling.temperature == 0)
            text = self.executor.open(request.prompt, self._most(request), share)
            if text is None:
                return
            answer, model = queue[0], self.executor.model
            generator = torch.Generator(self.executor.device).manual_seed(request.seed)
            drafting = None
            if self.draft is not None:
                drafting = self.draft.begin(model, self.executor.room, request.sampling, generator)
            stop_ids = resolve_stop_ids(model, request.stop_ids)
            self._jobs.append(_Job(answer, text, stop_ids, generator, drafting))
            answer.state = "reading"
            queue.popleft()  # it is at work already, so that it is never in neither
            self._waiting.move_to_end(user)
            if not queue:
                del self._waiting[user]

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
        proposed = [self._guess(job, len(jobs)) for job in jobs]
        going = [row for row in zip(jobs, proposed, strict=True) if not row[0].answer.over]
        if not going:
            return
        jobs, guesses = zip(*going, strict=True)
        newest, texts = [job.written[-1] for job in jobs], [job.text for job in jobs]
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

    def _guess(self, job: _Job, texts: int) -> Guesses:
        """A tree; none for a last token, behind which there is no room, and where the draft has failed."""
        if job.drafting is not None and job.left > 1:
            greedy = job.answer.request.sampling.temperature == 0
            if greedy and isinstance(job.drafting, SharingDrafting):
                job.drafting.reckon_with(texts)
            try:
                return job.drafting.propose([job.hear()], job.left - 1)
            except FloatingPointError as error:
                self._fail(job, str(error))
        return Guesses.none(1)

    def _write(self, job: _Job, scores: Float[Tensor, " vocab"]) -> None:
        """Choose the next token of a request."""
        if not scores.isfinite().all():
            self._fail(job, self._no_numbers(job))
            return
        sampling, seen = job.answer.request.sampling, None
        if sampling.repetition_penalty != 1:
            seen = torch.tensor([job.whole], device=scores.device)
        token = choose(scores[None], sampling, seen, None, job.generator)
        self._add(job, [int(token)])

    def _accept(self, job: _Job, guesses: Guesses, scores: Float[Tensor, "places vocab"]) -> list[int]:
        """Check the guesses of a request, and say which tokens of its row became text."""
        if not scores[: len(guesses.parents) + 1].isfinite().all():
            self._fail(job, self._no_numbers(job))
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
    def _no_numbers(job: _Job) -> str:
        return f"Not all scores after token {len(job.whole)} are finite numbers."

    @staticmethod
    def _fail(job: _Job, why: str) -> None:
        job.answer.state, job.answer.why = "failed", why

    @staticmethod
    def _add(job: _Job, tokens: list[int]) -> int:
        """Take tokens up to the end of the answer, and say how many there were."""
        answer = job.answer
        ends = (place for place, token in enumerate(tokens, start=1) if token in job.stop_ids)
        end = min(next(ends, len(tokens)), job.left)
        job.written += tokens[:end]
        answer.tokens += tokens[:end]
        answer.last = time.perf_counter()
        answer.first = answer.first or answer.last
        if job.left == 0 or job.written[-1] in job.stop_ids:
            answer.state = "done"
        return end
