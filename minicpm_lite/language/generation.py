"""Tokens from a decoder, one after another, with a cache.

    stream      the next token of every row, step after step, as they are chosen
    generate    prompts and what the model wrote after them
    pad_left    prompts of different lengths as one batch
    begin       the door of both, and of whoever else chooses tokens step by step: a `Reader`

The prompt is read at once (prefill), then each step reads one token more. A cache that is handed in holds
what was read before, so that a chat which goes on, or a prompt that was scored, is not read again.

Choices, and the traps behind them:

- Prompts of different lengths are padded on the left, so that every row's next token stands in one column.
  A row gets the tokens that it would get alone. Not so where the rotary frequencies follow the length of the
  text ("dynamic", "longrope" around its border): the room of the cache, with the tokens still to come,
  decides for all rows. Nor with packed weights, whose inputs are rounded to 8 bits: there the rounding of a
  call of several rows can become another word (see `minicpm_lite.inference.engine` for what helps).
- Several samples of one prompt read it once: the cache is copied after the prefill, not before.
- A model knows which tokens end a text (``config.eos_token_id``), and stops there unless told otherwise.
- The last token is chosen and not read, so the cache then holds one token less than the text.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..config import require_positive_integer
from ..runtime import calm_threads
from .context import KVCache
from .decoder import Decoder
from .sampling import Sampling, choose, require_sampling
from .scoring import evaluating

__all__ = ["Reader", "Stream", "begin", "generate", "pad_left", "resolve_stop_ids", "stream"]


class Reader:
    """A model, and the cache in which it reads one text on: a call a step.

    Args:
        model: the decoder; it reads in evaluation mode, whatever mode it is in between two steps.
        context: the cache, which nothing else may use from now on.
        stop_ids: tokens that end a row.
    """

    def __init__(self, model: Decoder, context: KVCache, stop_ids: tuple[int, ...]) -> None:
        self.model, self.context, self.stop_ids = model, context, stop_ids
        self._training = any(part.training for part in model.modules())  # a part may, where the model not
        self.settle()

    def settle(self) -> None:
        """The cache was changed by whoever reads, and goes on as it is now."""
        self._left = self.context.length, self.context.changes

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around the model's calls of one step, and nothing else: a caller's code runs between two steps.

        Raises:
            RuntimeError: the cache was used for something else since the step before.
        """
        if (self.context.length, self.context.changes) != self._left:
            raise RuntimeError(
                "The cache has read something else, gone back or moved its rows since the step before, so "
                "this text cannot go on. Stream it again, with the tokens that it has so far."
            )
        in_training = self._training or self.model.training
        with torch.no_grad(), evaluating(self.model) if in_training else nullcontext():
            yield
        self.settle()

    def require_finite(self, logits: Float[Tensor, "*rows vocab"]) -> None:
        """Refuse scores by which no token should be chosen.

        Raises:
            FloatingPointError: some are no finite numbers.
        """
        if not math.isfinite(logits.sum()):  # a sum of all is finite only if each is
            raise FloatingPointError(
                f"Not all scores after token {self.context.length} are finite numbers. Are the weights "
                f"whole? They are {self.model.embed_tokens.weight.dtype}; float16 overflows where bfloat16 "
                "does not."
            )


def begin(
    model: Decoder,
    ids: Int[Tensor, "batch tokens"],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Iterable[int] | None,
    padding: Int[Tensor, " batch"] | None,
    context: KVCache | None,
    samples: int,
) -> Reader:
    """The door of whatever writes: arguments of `stream` that cannot be are refused, a cache is made.

    Raises:
        ValueError: as `stream`.
    """
    require_positive_integer("max_new_tokens", max_new_tokens)
    require_positive_integer("samples", samples)
    require_sampling(sampling)
    stop_ids = resolve_stop_ids(model, stop_ids)
    _refuse_impossible_prompt(model, ids, max_new_tokens, padding)
    if padding is not None and not padding.any():
        padding = None  # rows of one length need no mask
    room = ids.shape[1] + max_new_tokens - 1  # the last token is chosen and never read
    if context is None:
        context = KVCache(room, padding)
    else:
        _refuse_other_text(context, ids, room, padding)
    calm_threads()
    return Reader(model, context, stop_ids)


def stream(
    model: Decoder,
    ids: Int[Tensor, "batch tokens"],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_ids: Iterable[int] | None = None,
    padding: Int[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
    context: KVCache | None = None,
    samples: int = 1,
) -> Iterator[Int[Tensor, " rows"]]:
    """Yield the next token of every row, one step after another, until all rows have stopped.

    Args:
        model: the decoder.
        ids: the prompts.
        max_new_tokens: steps at most.
        sampling: how a token is chosen; left out, the best one.
        stop_ids: a row stops with one of these; from then on it yields the first of them. Left out: the
            model's own, ``config.eos_token_id``; ``()`` for none.
        padding: how many tokens at the start of each row are no text (see `pad_left`).
        generator: source of chance; left out, PyTorch's global one.
        context: a cache that has read the beginning of ``ids`` and has room for the rest and what comes; left
            out, one is made.
        samples: rows that go on from each prompt, in the order of the prompts; they share its prefill.

    Raises:
        ValueError: an empty prompt, more tokens than the model was made for, a stop id that the model lacks,
            or a cache that another model has filled, or whose padding leaves a row no text; before the first
            step.
        FloatingPointError: scores that are no finite numbers.
        RuntimeError: the cache was used for something else between two steps.
    """
    reader = begin(model, ids, max_new_tokens, sampling, stop_ids, padding, context, samples)
    context, stop_ids = reader.context, reader.stop_ids
    seen, newest = ids.long(), ids[:, context.length :]
    stops = torch.tensor(stop_ids, device=ids.device) if stop_ids else None
    stopped = torch.zeros(len(ids) * samples, dtype=torch.bool, device=ids.device)
    for step in range(max_new_tokens):
        with reader.reading():
            logits = model(newest, context, last_only=True).squeeze(1)
        reader.require_finite(logits)
        if step == 0 and samples > 1:
            rows = torch.arange(len(ids), device=ids.device).repeat_interleave(samples)
            context.select(rows.tolist())
            reader.settle()
            logits, seen = logits[rows], seen[rows]
        token = choose(logits, sampling, seen, context.padding, generator)
        if stops is not None:
            token = torch.where(stopped, stops[0], token)
            stopped |= torch.isin(token, stops)
        newest = token.unsqueeze(1).clone()  # whoever gets the token may change it
        yield token
        if stops is not None and bool(stopped.all()):
            return
        if sampling.repetition_penalty != 1:
            seen = torch.cat([seen, newest], dim=1)


@runtime_checkable
class Stream(Protocol):
    """A way to the tokens of a text: `stream`, or one that takes and yields the same."""

    def __call__(
        self,
        model: Decoder,
        ids: Int[Tensor, "batch tokens"],
        max_new_tokens: int,
        sampling: Sampling = ...,
        stop_ids: Iterable[int] | None = ...,
        padding: Int[Tensor, " batch"] | None = ...,
        generator: torch.Generator | None = ...,
        context: KVCache | None = ...,
        samples: int = ...,
    ) -> Iterator[Int[Tensor, " rows"]]:
        """The next token of every row, one step after another; see `stream`."""
        ...


def generate(
    model: Decoder,
    ids: Int[Tensor, "batch tokens"],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Iterable[int] | None = None,
    padding: Int[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
    context: KVCache | None = None,
    samples: int = 1,
    stream: Stream = stream,
) -> Int[Tensor, "rows more_tokens"]:
    """Prompts and what the model wrote after them. See `Sampling` and `stream` for the arguments.

    ``stream`` gives the tokens: the function of this name, or another way to the same ones.

    A row that stops earlier than others is filled with the first of ``stop_ids``.

    Raises:
        ValueError: an empty prompt, more tokens than the model was made for, or an impossible setting.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    steps = stream(model, ids, max_new_tokens, sampling, stop_ids, padding, generator, context, samples)
    written = torch.stack(list(steps), dim=1)  # (batch * samples, new_tokens)
    return torch.cat([ids.repeat_interleave(samples, dim=0), written], dim=1)


def pad_left(
    prompts: Sequence[Sequence[int]], pad_id: int = 0
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, " batch"]]:
    """Prompts of different lengths as one tensor, and how many tokens of each row are padding.

    Which id of the vocabulary pads makes no difference, since nothing sees it.

    >>> ids, padding = pad_left([[5, 6, 7], [8]])
    >>> ids.tolist(), padding.tolist()
    ([[5, 6, 7], [0, 0, 8]], [0, 2])

    Raises:
        ValueError: no prompt, or an empty one.
    """
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"Prompt {index} is empty; give at least one token, such as the start token.")
    if not len(prompts):
        raise ValueError("There is no prompt; give at least one.")
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[pad_id] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    return torch.tensor(rows), torch.tensor(padding)


def resolve_stop_ids(model: Decoder, stop_ids: Iterable[int] | None) -> tuple[int, ...]:
    """The token ids that end a text: those given, or where none were given the model's own.

    Raises:
        ValueError: something that is no id of the model.
    """
    if stop_ids is None:
        return model.config.eos_token_id
    found = tuple(stop_ids) if isinstance(stop_ids, Iterable) else (None,)
    vocab_size = model.config.vocab_size
    if not all(type(each) is int and 0 <= each < vocab_size for each in found):
        raise ValueError(
            f"stop_ids is {stop_ids!r}; expected a list of token ids, which this model has from 0 to "
            f"{vocab_size - 1}, [] for none."
        )
    return found


def _refuse_impossible_prompt(
    model: Decoder, ids: Tensor, max_new_tokens: int, padding: Tensor | None
) -> None:
    kinds = (torch.int64, torch.int32)
    if not isinstance(ids, Tensor) or ids.dtype not in kinds or ids.ndim != 2 or not ids.numel():
        raise ValueError(
            f"ids is {ids!r}; expected a tensor of token ids, (batch, tokens), with one token at least, such "
            "as the start token, in 64 or 32 bits. For one text: ids[None]; for lists of ids: pad_left."
        )
    limit, prompt = model.config.max_position_embeddings, ids.shape[1]
    if prompt + max_new_tokens - 1 > limit:  # the last token is not read
        most = limit - prompt + 1
        cure = f"Set max_new_tokens to {most}." if most > 0 else "Shorten the prompt."
        raise ValueError(
            f"The prompt has {prompt} tokens and max_new_tokens is {max_new_tokens}; the model was made to "
            f"read {limit} (max_position_embeddings). {cure}"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= model.config.vocab_size:
        raise ValueError(
            f"The prompt has token ids from {int(ids.min())} to {int(ids.max())}; the model knows 0 to "
            f"{model.config.vocab_size - 1}. Was it cut into tokens with another vocabulary?"
        )
    if padding is not None and not (
        isinstance(padding, Tensor)
        and padding.dtype in kinds
        and padding.shape == ids.shape[:1]
        and 0 <= int(padding.min()) <= int(padding.max()) < prompt
    ):
        raise ValueError(
            f"padding is {padding!r}; expected whole numbers in a tensor, as pad_left gives: from 0 to "
            f"{prompt - 1}, one for each of the {len(ids)} rows."
        )


def _refuse_other_text(context: KVCache, ids: Tensor, room: int, padding: Tensor | None) -> None:
    if padding is not None:
        raise ValueError("padding is given, and a context; a cache has the padding that it was made with.")
    if context.length >= ids.shape[1]:
        raise ValueError(
            f"The cache has read {context.length} tokens, and ids holds {ids.shape[1]}; give the whole text, "
            "of which the cache has read the beginning, or go back with its truncate."
        )
    if context.padding is not None and int(context.padding.max()) >= ids.shape[1]:
        raise ValueError(
            f"The cache was made with the padding {context.padding.tolist()}, and ids holds {ids.shape[1]} "
            "tokens; each row needs one that is text. Make it with the padding of these rows."
        )
    if not context.has_read(ids):
        raise ValueError(
            "The cache has read another text than ids begins with; go back with its truncate to what they "
            "have in common, or use another cache."
        )
    if room > context.room:
        raise ValueError(
            f"The cache has room for {context.room} tokens; this text and its answer need {room}. Make a "
            "larger one, or ask for fewer new tokens."
        )
