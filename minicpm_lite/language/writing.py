"""Text from a decoder, as it is written: pieces of one answer, or the answers to a batch of prompts.

    stream_text       pieces of text, each when it can no longer change
    generate_text     texts for a batch of prompts

Choices, and the traps behind them:

- What a token means depends on where it stands: at the beginning of a text, sentencepiece tokenizers decode
  "▁time" to "time". So an answer is decoded behind the end of its prompt, and its text begins where the
  prompt's ends.
- A token may hold half a character, and a stop string may begin in one token and end in another. Text is
  held back until it can no longer change.
- Special tokens are part of the text, so that ``<|im_end|>`` can be a stop string like any other.
- A prompt is a text, and what it spells like a control token is one. What somebody else wrote belongs into a
  conversation, whose tokens `chat.encode_chat` gives; a prompt may be such tokens, too.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import index
from os.path import commonprefix

import torch
from jaxtyping import Int
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from ..config import ModelConfig
from .decoder import Decoder
from .generation import Stream, pad_left, resolve_stop_ids, stream
from .sampling import Sampling
from .tokenizer import (
    BYTE_TOKEN,
    BytePairTokenizer,
    encode_whole,
    fast_tokenizer,
    misread_tokens,
    require_text,
)

__all__ = [
    "TextWriter",
    "generate_text",
    "starts_twice",
    "stop_strings",
    "stream_text",
    "text_ends",
    "warn_of_ordinary_ends",
    "write",
]

_BYTES_OF_A_CHARACTER = 4
_MOST_IDS = 1 << 32  # that a tokenizer can be asked for
_MOST_DECODED = 16  # tokens, each time, however long the text is


class TextWriter:
    """Puts the text of one row together, token by token, and ends it at a stop string.

    Args:
        tokenizer: whose tokens they are.
        stop: the text ends before the first of these strings.
        prompt: the tokens before, if there are any.

    Attributes:
        text: what can no longer change.
        stopped: a stop string was met; it is not part of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | BytePairTokenizer,
        stop: Iterable[str] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = fast_tokenizer(tokenizer), stop_strings(stop)
        self._misread = misread_tokens(self._tokenizer)
        self._ids = self._end(prompt)  # the newest tokens, those of the prompt among them
        self._known = self._decode()  # of their text, what stood there before or is text now
        self._held = ""  # complete characters that may yet become a stop string

    def push(self, token: int) -> str:
        """Take one more token, and return the text that it makes certain: often a word, at times nothing."""
        if self._tokenizer.id_to_token(token) is None:  # a model may have more ids than its tokenizer
            return ""
        self._ids.append(token)
        if self._is_byte(token):  # what a run of bytes means is known at its end
            return ""
        certain = self._settle(self._new(self._whole_characters()), last=False)
        if len(self._ids) > _MOST_DECODED:
            self._ids = self._end(self._ids)
            self._known = self._whole_characters()
        return certain

    def finish(self) -> str:
        """No more tokens will come: return what was held back; half a character becomes U+FFFD."""
        return self._settle(self._new(self._decode()), last=True)

    def _new(self, text: str) -> str:
        """What a text adds to the known one; a character that the prompt began is new when it is whole."""
        new = text[len(commonprefix([self._known, text])) :]
        if new:
            self._known = text
        return new

    def _whole_characters(self) -> str:
        return self._decode().removesuffix("\ufffd")

    def _decode(self) -> str:
        text = ""
        for name, run in groupby(self._ids, self._misread.get):
            run = list(run)
            text += name * len(run) if name else self._tokenizer.decode(run, skip_special_tokens=False)
        return text

    def _end(self, ids: Sequence[int]) -> list[int]:
        """The last tokens of a text. What follows is decoded behind them as it would be behind all of it."""
        ids = [token for token in ids if self._tokenizer.id_to_token(token) is not None]
        begin = max(len(ids) - _BYTES_OF_A_CHARACTER, 0)
        while begin and self._is_byte(ids[begin]):
            begin -= 1
        return ids[begin:]

    def _is_byte(self, token: int) -> bool:
        return bool(BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token)))

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
    tokenizer: Tokenizer | BytePairTokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Iterable[str] = (),
    stop_ids: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
    stream: Stream = stream,
) -> Iterator[str]:
    """Yield the answer to one prompt piece by piece, each when it can no longer change.

    Args:
        model: the decoder.
        tokenizer: its vocabulary.
        prompt: the text before, in the model's chat template if it is a chat model; or its tokens, such as
            `encode_chat` gives.
        max_new_tokens: tokens at most.
        sampling: how a token is chosen; left out, the best one.
        stop: the text ends before the first of these strings.
        stop_ids: the text ends before the first of these tokens; left out, those of the model.
        generator: source of chance; left out, PyTorch's global one.
        stream: what gives the tokens: `generation.stream`, or another way to the same ones.

    Warns:
        UserWarning: the prompt begins with the start token that the tokenizer puts before it anyway; or the
            text ends at an ordinary token, see `warn_of_ordinary_ends`.

    Raises:
        TypeError: the prompt is neither text nor tokens.
        ValueError: as `stream`; or half a character in the prompt, or something that the vocabulary has no
            token for, or stop strings that are none.
    """
    tokenizer = fast_tokenizer(tokenizer)
    stop_ids = text_ends(model, tokenizer, stop_ids)
    ids = _prompt_ids(tokenizer, prompt)
    rows, _ = pad_left([ids])
    steps = stream(model, rows.to(_device(model)), max_new_tokens, sampling, stop_ids, generator=generator)
    yield from write(steps, TextWriter(tokenizer, stop, ids), stop_ids)


def write(steps: Iterator[Int[Tensor, " 1"]], writer: TextWriter, stop_ids: Sequence[int]) -> Iterator[str]:
    """Yield the pieces of text that the tokens of one row make certain, up to a stop string or token."""
    for token in steps:
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
    tokenizer: Tokenizer | BytePairTokenizer,
    prompts: Iterable[str | Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Iterable[str] = (),
    stop_ids: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
    stream: Stream = stream,
) -> list[str]:
    """The answers to a batch of prompts, computed together. See `stream_text` for the arguments."""
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; give a list of them, [prompt] for one.")
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts is {prompts!r}; expected a list of texts.")
    tokenizer, stop = fast_tokenizer(tokenizer), stop_strings(stop)
    stop_ids = text_ends(model, tokenizer, stop_ids)
    rows = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    ids, padding = pad_left(rows)
    writers = [TextWriter(tokenizer, stop, row) for row in rows]
    device, writing = _device(model), set(range(len(ids)))
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


def text_ends(model: Decoder, tokenizer: Tokenizer, stop_ids: Iterable[int] | None) -> tuple[int, ...]:
    """The tokens before which a text ends: as `resolve_stop_ids`, with a warning of the model's own."""
    if stop_ids is None:
        warn_of_ordinary_ends(tokenizer, model.config)
    return resolve_stop_ids(model, stop_ids)


def warn_of_ordinary_ends(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Say so, where texts of a model end at a token of ordinary texts.

    The shape of a released model names its ends by ids, which in another vocabulary are something else.

    Warns:
        UserWarning: there is such an end.
    """
    added = tokenizer.get_added_tokens_decoder()
    names = {i: tokenizer.id_to_token(i) for i in config.eos_token_id if i not in added}
    ordinary = [f"{name!r} (id {i})" for i, name in names.items() if name is not None]
    if ordinary:
        warnings.warn(
            f"The model ends texts at {' and '.join(ordinary)}, of which ordinary texts are made. A shape "
            "that was taken from a released model has ends of its tokenizer; for another one, make it with "
            "replace(config, eos_token_id=...).",
            stacklevel=3,
        )


def stop_strings(stop: Iterable[str]) -> tuple[str, ...]:
    """The strings before which a text ends.

    Raises:
        ValueError: one string in place of several, or something in them that is no string or empty.
    """
    found = (None,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    if not all(isinstance(each, str) and each for each in found):
        raise ValueError(f"stop is {stop!r}; expected a list of strings, none of them empty.")
    return found


def starts_twice(encoding: Encoding) -> int:
    """With how many start tokens a text begins that the tokenizer puts before it once more; mostly 0."""
    mask, ids = encoding.special_tokens_mask, encoding.ids
    starts = next((place for place, added in enumerate(mask) if not added), 0)
    return starts if ids[:starts] == ids[starts : 2 * starts] and not any(mask[starts : 2 * starts]) else 0


def _prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, Iterable) and not isinstance(prompt, str | bytes):
        try:
            ids = [index(token) for token in prompt]
        except TypeError:
            ids = [-1]
        if not all(0 <= token < _MOST_IDS for token in ids):
            raise ValueError(f"A prompt is {prompt!r}; expected a text, or its tokens as a list of ids.")
        return ids
    require_text(prompt)
    encoding = encode_whole(tokenizer, prompt)
    if starts := starts_twice(encoding):
        warnings.warn(
            f"The prompt begins with {''.join(encoding.tokens[:starts])}, and the tokenizer puts another "
            "before it. Models see one in training; leave it out of the prompt.",
            stacklevel=3,
        )
    return encoding.ids


def _device(model: Decoder) -> torch.device:
    return next(model.parameters()).device  # asked of the table, one that is packed would be unpacked
