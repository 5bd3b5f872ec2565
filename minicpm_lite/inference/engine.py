"""An engine: many requests at once, each of which gets exactly the text that it gets alone.

    engine = Engine(PagedExecutor(model, pages=256))
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
- Each request has a generator of its own, so what it draws does not depend on who is there beside it.
- Scores that are no numbers end their own request, and no other.
- Rounding differs between a call of one row and one of several, as everywhere; a tie to six digits may fall
  the other way.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import require_positive_integer
from ..language.decoder import Decoder
from ..language.generation import resolve_stop_ids
from ..language.sampling import Sampling, choose
from ..language.scoring import evaluating
from ..runtime import calm_threads
from .paged import PagedContext, PagedText, PagePool
from .speculative import Draft, Drafting, Guesses, StreamDrafting, verify

__all__ = ["Answer", "Engine", "PagedExecutor", "Request"]


class PagedExecutor:
    """Runs a decoder of this library, as it is, compiled or with packed weights, on a pool of pages.

    Args:
        model: the decoder.
        pages, page_size: of the pool.
        room: the most tokens of one text; left out, what the model was made for or the pool holds.
    """

    def __init__(self, model: Decoder, pages: int, page_size: int = 16, room: int | None = None) -> None:
        self.model = model
        most = min(model.config.max_position_embeddings, pages * page_size)
        self.pool = PagePool(pages, page_size, most if room is None else room)
        self._context: PagedContext | None = None
        calm_threads()

    def require(self, prompt: Sequence[int], most: int) -> None:
        """Refuse a text that can never be run.

        Raises:
            ValueError: there will never be room for ``most`` tokens, or the model lacks some of the prompt.
        """
        size = self.model.config.vocab_size
        if not prompt or not all(isinstance(each, int) and 0 <= each < size for each in prompt):
            raise ValueError(
                f"The prompt holds {len(prompt)} tokens; expected one at least, and ids from 0 to {size - 1}."
            )
        self.pool.require_room(most)

    def open(self, prompt: Sequence[int], most: int) -> PagedText | None:
        """Room for a text that begins so and has ``most`` tokens at most; None while there is too little."""
        return self.pool.open(prompt, most)

    def close(self, text: PagedText) -> None:
        """The room comes back."""
        self.pool.close(text)

    def prefill(self, text: PagedText, tokens: Sequence[int]) -> Float[Tensor, " vocab"]:
        """Read on in a prompt, and give the scores behind it."""
        return self._read([text], [tokens], last_only=True)[0, -1]

    def decode(self, texts: Sequence[PagedText], tokens: Sequence[int]) -> Float[Tensor, "rows vocab"]:
        """Read the newest token of each text, and give the scores behind it."""
        return self._read(texts, [[each] for each in tokens])[:, -1]

    def verify(
        self, texts: Sequence[PagedText], tokens: Sequence[Sequence[int]]
    ) -> Float[Tensor, "rows places vocab"]:
        """Read the newest token of each text and its guesses, and give the scores behind each of them."""
        return self._read(texts, tokens, parents=range(-1, len(tokens[0]) - 1))

    def accept(self, counts: Sequence[int]) -> None:
        """Of each row that was verified last, so many tokens became text."""
        self._context.take([range(count) for count in counts])

    @property
    def nbytes(self) -> int:
        """Memory that the texts take, in bytes."""
        return self.pool.nbytes

    @torch.no_grad()
    def _read(
        self,
        texts: Sequence[PagedText],
        tokens: Sequence[Sequence[int]],
        parents: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "rows places vocab"]:
        ids = torch.tensor([*map(list, tokens)], device=self.model.embed_tokens.weight.device)
        self._context = PagedContext(self.pool, texts, parents)
        if not self.model.training:
            return self.model(ids, self._context, last_only)
        with evaluating(self.model):
            return self.model(ids, self._context, last_only)


@dataclass(frozen=True)
class Request:
    """What somebody asks for.

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
    text: PagedText
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
        draft: guesses for each request; chains alone. Left out, none.

    Raises:
        ValueError: rows or a piece that are not positive, or a draft that does not fit the model.
    """

    def __init__(
        self, executor: PagedExecutor, rows: int = 8, piece: int = 256, draft: Draft | None = None
    ) -> None:
        require_positive_integer("rows", rows)
        require_positive_integer("piece", piece)
        self.executor, self.rows, self.piece, self.draft = executor, rows, piece, draft
        self._waiting: OrderedDict[str, deque[Answer]] = OrderedDict()  # by user, the next one first
        self._jobs: list[_Job] = []
        if draft is not None:
            drafting = draft.begin(executor.model, executor.pool.room, Sampling(), None)
            if isinstance(drafting, StreamDrafting) and drafting.after:
                raise ValueError("The engine shows no streams to drafts; give one that reads tokens alone.")

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is at work."""
        return not self._jobs and not self._waiting

    def submit(self, request: Request) -> Answer:
        """Take a request into the queue.

        Raises:
            ValueError: a prompt without tokens or with some that the model lacks, a text for which there can
                never be room, or stop ids that are none.
        """
        require_positive_integer("max_new_tokens", request.max_new_tokens)
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
            text = self.executor.open(request.prompt, self._most(request))
            if text is None:
                return
            answer = queue.popleft()
            self._waiting.move_to_end(user)
            if not queue:
                del self._waiting[user]
            model = self.executor.model
            generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(request.seed)
            drafting = None
            if self.draft is not None:
                drafting = self.draft.begin(model, self.executor.pool.room, request.sampling, generator)
            answer.state = "reading"
            self._jobs.append(
                _Job(answer, text, resolve_stop_ids(model, request.stop_ids), generator, drafting)
            )

    def _read_on(self, job: _Job) -> None:
        """Read a piece of a prompt; behind its end the first token is chosen."""
        prompt, start = job.answer.request.prompt, len(job.text)
        piece = prompt[start : start + self.piece]
        scores = self.executor.prefill(job.text, piece)
        if start + len(piece) == len(prompt):
            job.answer.state = "writing"
            self._write(job, scores)

    def _write_on(self, jobs: list[_Job]) -> None:
        """The next tokens of all whose prompts are read."""
        newest = [job.answer.tokens[-1] for job in jobs]
        guesses = self._guess(jobs) if self.draft is not None else []
        longest = max((each.tokens.shape[1] for each in guesses), default=0)
        texts = [job.text for job in jobs]
        if not longest:
            for job, scores in zip(jobs, self.executor.decode(texts, newest), strict=True):
                self._write(job, scores)
            return
        chains = [each.tokens[0].tolist() for each in guesses]
        tokens = [
            [token, *chain, *[0] * (longest - len(chain))]
            for token, chain in zip(newest, chains, strict=True)
        ]
        counts = []
        for job, guess, scores in zip(jobs, guesses, self.executor.verify(texts, tokens), strict=True):
            counts.append(self._accept(job, guess, scores))
        self.executor.accept(counts)

    def _guess(self, jobs: list[_Job]) -> list[Guesses]:
        """A chain for each, none longer than the one with the least room can check."""
        size = self.executor.pool.page_size
        most = min(len(job.text.pages) * size - len(job.text) for job in jobs) - 1
        if most < 1:
            return []
        return [
            job.drafting.propose([job.hear()], min(most, job.left - 1)) if job.left > 1 else Guesses.none(1)
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

    def _accept(self, job: _Job, guesses: Guesses, scores: Float[Tensor, "places vocab"]) -> int:
        """Check the guesses of a request, and say how many tokens of its row became text."""
        if not scores[: guesses.tokens.shape[1] + 1].isfinite().all():
            self._fail(job)
            return 0
        sampling, seen = job.answer.request.sampling, None
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(job.whole, device=scores.device)
        drawn_from = None if guesses.drawn_from is None else guesses.drawn_from[0].to(scores)
        tokens = guesses.tokens[0].to(scores.device)
        path, token = verify(scores, tokens, guesses.parents, drawn_from, sampling, seen, job.generator)
        return self._add(job, [*tokens[path].tolist(), token])

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
