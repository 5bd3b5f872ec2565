"""Text from a decoder, one token after another, with a cache.

    stream            token ids as they are chosen, for a batch of prompts
    generate          the same, all at once
    stream_text       text as it is written, for one prompt
    generate_text     texts for a batch of prompts

Scores pass through the same steps in the same order as in `transformers`: repetition penalty, temperature,
top-k, top-p, draw. Temperature 0 takes the best token and draws nothing.

Choices, and the traps behind them:

- Prompts of different lengths are padded on the left, so that every row's next token stands in one column.
  Positions count from where a row's text begins, and no row sees its padding: a row gets the tokens that it
  would get alone. Not so where the rotary frequencies follow the length of the text ("dynamic", "longrope"
  around its border): the room of the whole batch, with the tokens still to come, decides for all rows.
- A token may hold half a character, and a stop string may begin in one token and end in another. Text is
  held back until it can no longer change.
- Special tokens are part of the text, so that ``<|im_end|>`` can be a stop string like any other.
- A chat template belongs to its model. A model that gets another one answers worse and gives no error.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from ..config import require_positive_integer, require_positive_number
from .decoder import Decoder, KVCache

__all__ = ["Sampling", "TextWriter", "chatml", "generate", "generate_text", "minicpm_chat",
           "next_token_probabilities", "pad_left", "stream", "stream_text"]  # fmt: skip

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # of sentencepiece vocabularies, for characters they lack


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the scores.

    Attributes:
        temperature: scores are divided by it before the softmax; 0 takes the best token.
        top_k: only the k best tokens may be drawn.
        top_p: only the fewest tokens whose probabilities sum to at least this may be drawn (nucleus).
        repetition_penalty: scores of tokens that already occurred are divided by it if positive and
            multiplied by it if negative; 1 changes nothing. Source: Keskar et al. 2019, CTRL.

    >>> Sampling(temperature=-1.0)
    Traceback (most recent call last):
        ...
    ValueError: temperature is -1.0; expected 0 (always the best token) or a number greater than 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0:
            try:
                require_positive_number("temperature", self.temperature)
            except ValueError:
                raise ValueError(
                    f"temperature is {self.temperature!r}; expected 0 (always the best token) or a number "
                    "greater than 0."
                ) from None
        if self.top_k is not None:
            require_positive_integer("top_k", self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; expected a probability above 0 and up to 1.")
        require_positive_number("repetition_penalty", self.repetition_penalty)


def next_token_probabilities(
    logits: Float[Tensor, "batch vocab"],
    sampling: Sampling,
    seen: Int[Tensor, "batch tokens"] | None = None,
    padding: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """From scores to the probabilities that a token is drawn with.

    Args:
        logits: scores of the next token.
        sampling: temperature, filters and penalty.
        seen: the tokens so far; needed for a repetition penalty.
        padding: how many of the first ``seen`` of each row are no text.

    Raises:
        ValueError: a repetition penalty without the tokens so far.
    """
    logits = _penalised(logits, sampling.repetition_penalty, seen, padding)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth_best = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        best_first, order = probabilities.sort(dim=-1, descending=True, stable=True)
        enough_before = best_first.cumsum(-1) - best_first >= sampling.top_p
        dropped = torch.zeros_like(enough_before).scatter(-1, order, enough_before)
        probabilities = probabilities.masked_fill(dropped, 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def _penalised(logits: Tensor, penalty: float, seen: Tensor | None, padding: Tensor | None) -> Tensor:
    """The scores, lowered for the tokens that a row's text already holds."""
    if penalty == 1:
        return logits
    if seen is None:
        raise ValueError(f"repetition_penalty is {penalty}; give the tokens so far as seen.")
    text = torch.ones_like(seen, dtype=torch.bool)
    if padding is not None:
        text = torch.arange(seen.shape[1], device=seen.device) >= padding[:, None]
    # counted, not set: padding may hold the id of a token that the text holds too
    occurred = torch.zeros_like(logits).scatter_add(-1, seen, text.to(logits.dtype)) > 0
    return torch.where(occurred, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def stream(
    model: Decoder,
    ids: Int[Tensor, "batch tokens"],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_ids: Iterable[int] = (),
    padding: Int[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """Yield the next token of every row, one step after another, until all rows have stopped.

    Args:
        model: the decoder.
        ids: the prompts.
        max_new_tokens: steps at most.
        sampling: how a token is chosen; left out, the best one.
        stop_ids: a row stops with one of these; from then on it yields the first of them.
        padding: how many tokens at the start of each row are no text (see `pad_left`).
        generator: source of chance; left out, PyTorch's global one.

    Raises:
        ValueError: an empty prompt, or more tokens than the model was made for; before the first step.
    """
    require_positive_integer("max_new_tokens", max_new_tokens)
    stop_ids = _whole_numbers(stop_ids)
    _refuse_impossible_prompt(model, ids, max_new_tokens, padding)
    if padding is not None and not padding.any():
        padding = None  # rows of one length need no mask
    room = ids.shape[1] + max_new_tokens - 1  # the last token is chosen and never read
    cache, seen, newest = KVCache(room, padding), ids, ids
    stops = torch.tensor(stop_ids, device=ids.device) if stop_ids else None
    stopped = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        with torch.no_grad():  # not around the whole function: a caller's code runs between its steps
            logits = model(newest, cache, last_only=True)[:, -1]
        if newest is ids and not bool(logits.isfinite().all()):
            raise FloatingPointError(
                f"Not all scores after the prompt are finite numbers ({model.embed_tokens.weight.dtype}). "
                "Are the weights whole? float16 overflows where bfloat16 and float32 do not."
            )
        if sampling.temperature == 0:
            token = _penalised(logits, sampling.repetition_penalty, seen, padding).argmax(-1)
        else:
            probabilities = next_token_probabilities(logits, sampling, seen, padding)
            token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        if stops is not None:
            token = torch.where(stopped, stops[0], token)
            stopped |= torch.isin(token, stops)
        yield token
        if stops is not None and bool(stopped.all()):
            return
        newest = token[:, None]
        if sampling.repetition_penalty != 1:
            seen = torch.cat([seen, newest], dim=1)


def generate(
    model: Decoder,
    ids: Int[Tensor, "batch tokens"],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Iterable[int] = (),
    padding: Int[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch more_tokens"]:
    """Prompts and what the model wrote after them. See `Sampling` and `stream` for the arguments.

    A row that stops earlier than others is filled with the first of ``stop_ids``.

    Raises:
        ValueError: an empty prompt, more tokens than the model was made for, or an impossible setting.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    steps = stream(model, ids, max_new_tokens, sampling, stop_ids, padding, generator)
    return torch.cat([ids, torch.stack(list(steps), dim=1)], dim=1)


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


def _whole_numbers(stop_ids: Iterable[int]) -> tuple[int, ...]:
    """Token ids as a tuple, from a list, a set or another collection of them."""
    if not isinstance(stop_ids, Iterable) or not all(isinstance(each, int) for each in stop_ids):
        raise ValueError(f"stop_ids is {stop_ids!r}; expected a list of token ids, [] for none.")
    return tuple(stop_ids)


def _refuse_impossible_prompt(
    model: Decoder, ids: Tensor, max_new_tokens: int, padding: Tensor | None
) -> None:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or not len(ids):
        raise ValueError(
            f"ids is {ids!r}; expected a tensor of token ids, (batch, tokens). For lists of ids: pad_left."
        )
    if ids.ndim != 2:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}; expected (batch, tokens). For one text: ids[None]."
        )
    if ids.shape[1] == 0:
        raise ValueError("The prompt is empty; give at least one token, such as the start token.")
    limit, prompt = model.config.max_position_embeddings, ids.shape[1]
    if prompt + max_new_tokens > limit:
        cure = f"Set max_new_tokens to {limit - prompt}." if prompt < limit else "Shorten the prompt."
        raise ValueError(
            f"The prompt has {prompt} tokens and max_new_tokens is {max_new_tokens}, together "
            f"{prompt + max_new_tokens}; the model was made for {limit} (max_position_embeddings). {cure}"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= model.config.vocab_size:
        raise ValueError(
            f"The prompt has token ids from {int(ids.min())} to {int(ids.max())}; the model knows 0 to "
            f"{model.config.vocab_size - 1}. Was it cut into tokens with another vocabulary?"
        )
    if padding is not None and not (
        isinstance(padding, Tensor) and padding.dtype in (torch.int64, torch.int32)
    ):
        raise ValueError(f"padding is {padding!r}; expected whole numbers in a tensor, as pad_left gives.")
    if padding is not None and not (
        padding.shape == ids.shape[:1] and 0 <= int(padding.min()) <= int(padding.max()) < prompt
    ):
        raise ValueError(
            f"padding is {padding.tolist()}; expected a number from 0 to {prompt - 1} for each of the "
            f"{len(ids)} rows."
        )


class TextWriter:
    """Puts the text of one row together, token by token, and ends it at a stop string.

    Attributes:
        text: what can no longer change.
        stopped: a stop string was met; it is not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(each, str) and each for each in stop):
            raise ValueError(f"stop is {stop!r}; expected a list of strings, none of them empty.")
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._context, self._known = 0, 0  # the ids from here on are decoded; those up to there are text
        self._held = ""  # complete characters that may yet become a stop string

    def push(self, token: int) -> str:
        """Take one more token, and return the text that it makes certain: often a word, at times nothing."""
        self._ids.append(token)
        new = self._new_text()
        # a token such as <0xE4> is a byte, and what a run of bytes means is known at its end
        if new.endswith("\ufffd") or _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token) or ""):
            return ""
        self._context, self._known = self._known, len(self._ids)
        return self._settle(new, last=False)

    def finish(self) -> str:
        """No more tokens will come: return what was held back; half a character becomes U+FFFD."""
        return self._settle(self._new_text(), last=True)

    def _new_text(self) -> str:
        """What the newest ids add. A few known ones are decoded with them: the place decides on spaces."""
        context = self._ids[self._context : self._known]
        known = self._tokenizer.decode(context, skip_special_tokens=False)
        whole = self._tokenizer.decode(self._ids[self._context :], skip_special_tokens=False)
        return whole[len(known) :]

    def _settle(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        starts = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        if starts:  # the one that is complete first, as if the text had come letter by letter
            _, start = min((start + len(stop), start) for start, stop in starts)
            certain, self._held, self.stopped = self._held[:start], "", True
        else:
            hold = 0 if last else self._possible_stop()
            certain, self._held = self._held[: len(self._held) - hold], self._held[len(self._held) - hold :]
        self.text += certain
        return certain

    def _possible_stop(self) -> int:
        """Length of the longest ending of the held text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def stream_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    stop_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Yield the answer to one prompt piece by piece, each when it can no longer change.

    Args:
        model: the decoder.
        tokenizer: its vocabulary.
        prompt: the text before, in the model's chat template if it is a chat model.
        max_new_tokens: tokens at most.
        sampling: how a token is chosen; left out, the best one.
        stop: the text ends before the first of these strings.
        stop_ids: the text ends before the first of these tokens.
        generator: source of chance; left out, PyTorch's global one.

    Raises:
        ValueError: as `stream`.
    """
    writer = TextWriter(tokenizer, stop)
    ids, _ = pad_left([tokenizer.encode(prompt).ids])
    for token in stream(model, ids.to(_device(model)), max_new_tokens, sampling, stop_ids, None, generator):
        if int(token) in stop_ids:
            break
        if piece := writer.push(int(token)):
            yield piece
        if writer.stopped:
            return
    if piece := writer.finish():
        yield piece


def generate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    stop_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
) -> list[str]:
    """The answers to a batch of prompts, computed together. See `stream_text` for the arguments."""
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; give a list of them, [prompt] for one.")
    writers = [TextWriter(tokenizer, stop) for _ in prompts]
    ids, padding = pad_left([tokenizer.encode(prompt).ids for prompt in prompts])
    device, writing = _device(model), set(range(len(prompts)))
    for tokens in stream(
        model, ids.to(device), max_new_tokens, sampling, stop_ids, padding.to(device), generator
    ):
        for row, token in enumerate(tokens.tolist()):
            if row in writing:
                if token not in stop_ids:
                    writers[row].push(token)
                if token in stop_ids or writers[row].stopped:
                    writing.discard(row)
        if not writing:
            break
    for writer in writers:
        writer.finish()
    return [writer.text for writer in writers]


def _device(model: Decoder) -> torch.device:
    return model.embed_tokens.weight.device


def chatml(
    messages: Sequence[Mapping[str, str]], system: str | None = None, add_generation_prompt: bool = True
) -> str:
    """A conversation in ChatML, the template of MiniCPM3, 4 and 4.1 and of SmolLM2.

    Args:
        messages: each with a ``role`` ("system", "user" or "assistant") and its ``content``.
        system: a system message to begin with when the conversation has none; some models were trained with
            one of their own.
        add_generation_prompt: end with the opening of the assistant's turn, so that the model answers.

    >>> print(chatml([{"role": "user", "content": "Hello!"}]))
    <|im_start|>user
    Hello!<|im_end|>
    <|im_start|>assistant
    <BLANKLINE>

    Raises:
        ValueError: no message, or one without role or content.
    """
    messages = _messages(messages, ("system", "user", "assistant"))
    if system is not None and messages[0][0] != "system":
        messages = [("system", system), *messages]
    turns = [f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def minicpm_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation in the template of the first MiniCPM models: ``<用户>question<AI>answer``.

    >>> minicpm_chat([{"role": "user", "content": "Hello!"}])
    '<用户>Hello!<AI>'

    Raises:
        ValueError: no message, a system message (the template has no place for one), or one without content.
    """
    return "".join(
        f"<用户>{content.strip()}<AI>" if role == "user" else content.strip()
        for role, content in _messages(messages, ("user", "assistant"))
    )


def _messages(messages: Sequence[Mapping[str, str]], roles: tuple[str, ...]) -> list[tuple[str, str]]:
    messages = [] if isinstance(messages, str | Mapping) else list(messages)
    if not messages:
        raise ValueError(
            "messages holds no message; expected a list such as [{'role': 'user', 'content': 'Hello!'}]."
        )
    for index, message in enumerate(messages):
        if (
            not isinstance(message, Mapping)
            or message.get("role") not in roles
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(
                f"Message {index} is {message!r}; expected a role ({', '.join(roles)}) and a text as content."
            )
    return [(message["role"], message["content"]) for message in messages]
