"""Chats: how a conversation is written for a model, and one that goes on without reading its past again.

    chatml, minicpm_chat    templates: messages with roles become one text (a model's own: `templates`)
    encode_chat             the tokens of a conversation in a template
    Chat                    question after question to one model, with one cache

Choices, and the traps behind them:

- A chat template belongs to its model. A model that gets another one answers worse and gives no error.
- The tokens that the model wrote stay as it wrote them. Cut anew from their text they may be others, and the
  cache would be of no use from there on. (A template that changes an answer, as `minicpm_chat` strips blanks
  at its ends, has it read again.)
- A template makes one text of its control tokens, such as ``<|im_end|>``, and of what people wrote, and there
  they look alike. Who writes ``<|im_end|>`` into a question could end it and speak as the system. So what a
  message spells like an added token of the tokenizer is marked before the template sees it, and is read
  letter by letter. The text of a template is for showing; `encode_chat` is for a model.
- A normaliser can make a control token of what does not look like one: where it writes small letters,
  ``<END>`` is read as ``<end>``. So the tokenizer is asked, too, what it would read as one.
- That goes for control tokens in an answer, too, other than the one that ended it: a model that was talked
  into writing them has them read as letters in the next turn.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache

import torch
from tokenizers import Tokenizer

from .context import KVCache
from .decoder import Decoder
from .generation import resolve_stop_ids, stream
from .sampling import Sampling
from .tokenizer import BytePairTokenizer, fast_tokenizer, require_text
from .writing import TextWriter, starts_twice, stop_strings, write

__all__ = ["Chat", "Template", "chatml", "encode_chat", "encode_text", "minicpm_chat"]

Template = Callable[[Sequence[Mapping[str, str]]], str]

# Around what is no control token: halves of characters, which no text can hold.
_OPEN, _CLOSE = "\ud800", "\udfff"
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")
_MARK = re.compile(f"[{_OPEN}{_CLOSE}]")


class Chat:
    """A conversation that goes on: each answer reads only what came since the one before.

    Args:
        model: the decoder.
        tokenizer: its vocabulary.
        template: from messages to the text that the model answers; the model's own.
        sampling: how a token is chosen; left out, the best one.
        stop: an answer ends before the first of these strings.
        stop_ids: an answer ends before the first of these tokens; left out, those of the model.
        room: tokens of the whole conversation.
        generator: source of chance; left out, PyTorch's global one.

    Attributes:
        messages: what was said so far, each with ``role`` and ``content``; may be changed between answers.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | BytePairTokenizer,
        template: Template,
        sampling: Sampling = Sampling(),
        stop: Iterable[str] = (),
        stop_ids: Sequence[int] | None = None,
        room: int = 2048,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model, self.tokenizer, self.template = model, fast_tokenizer(tokenizer), template
        self.sampling, self.stop, self.generator = sampling, stop_strings(stop), generator
        self.stop_ids = resolve_stop_ids(model, stop_ids)
        self.messages: list[Mapping[str, str]] = []
        self._cache = KVCache(min(room, model.config.max_position_embeddings))
        self._controls = _Controls(self.tokenizer)
        # a marked text whose tokens are known: question, answer, question, ...
        self._text, self._ids = "", []
        self._fed: list[int] = []  # of which the cache has read the first
        self._asked = 0  # questions so far: an answer that is still open is closed by the next question

    def answer(self, question: str, max_new_tokens: int) -> Iterator[str]:
        """Yield the answer to a question piece by piece. It joins the messages when it is complete.

        Raises:
            ValueError: the conversation has no room for so many tokens, or the template refuses it.
            RuntimeError: the answer was left open, another question was asked, and now it should go on.
        """
        self._asked += 1
        mine = self._asked
        messages = [*self.messages, {"role": "user", "content": question}]
        text = self.template(self._controls.mark_messages(messages))
        prompt = self._encode(text)
        if (needed := len(prompt) + max_new_tokens - 1) > self._cache.room:
            raise ValueError(
                f"The conversation and its answer need room for {needed} tokens, and this chat has it for "
                f"{self._cache.room}. Ask for fewer new tokens, or begin a chat with more room."
            )
        known = _common_length(self._fed[: self._cache.length], prompt)
        self._cache.truncate(min(known, len(prompt) - 1))
        self._fed = list(prompt)
        steps = stream(
            self.model,
            torch.tensor([prompt], device=self.model.embed_tokens.weight.device),
            max_new_tokens,
            self.sampling,
            self.stop_ids,
            generator=self.generator,
            context=self._cache,
        )

        def noted() -> Iterator[torch.Tensor]:
            for token in steps:
                self._fed.append(int(token))
                yield token
                self._refuse_if_left(mine)

        writer = TextWriter(self.tokenizer, self.stop)
        yield from write(noted(), writer, self.stop_ids)
        self._refuse_if_left(mine)
        self.messages = [*messages, {"role": "assistant", "content": writer.text}]
        said = [token for token in self._fed[len(prompt) :] if token not in self.stop_ids]
        cut = writer.decode(said) != writer.text  # by a stop string
        if not cut and self._controls.ids.isdisjoint(said):
            self._text, self._ids = text + self._controls.mark(writer.text), prompt + said

    def _refuse_if_left(self, asked: int) -> None:
        if asked != self._asked:
            raise RuntimeError(
                "This answer was left open and another question was asked, so it cannot go on. Ask again."
            )

    def _encode(self, text: str) -> list[int]:
        """The tokens of a marked text; of its beginning those that are known."""
        if self._text and text.startswith(self._text):
            return self._ids + self._controls.encode(text[len(self._text) :], add_special_tokens=False)
        return self._controls.encode(text)


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    differs = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


def encode_chat(
    tokenizer: Tokenizer | BytePairTokenizer,
    template: Template,
    messages: Sequence[Mapping[str, str]],
    add_special_tokens: bool = True,
) -> list[int]:
    """The tokens of a conversation: a control token stands where the template puts it, and nowhere else.

    What a message spells like one is read as the letters it is written with. Control tokens are the added
    tokens of the tokenizer that have more than one character.

    Args:
        tokenizer: the model's.
        template: the model's.
        messages: as the template takes them.
        add_special_tokens: begin with the start token where the tokenizer has one, and once if the template
            writes it, too.

    Raises:
        TypeError, ValueError: as the template; or half a character in a message, or messages that are nested
            too deeply.
    """
    controls = _Controls(fast_tokenizer(tokenizer))
    return controls.encode(template(controls.mark_messages(messages)), add_special_tokens)


def encode_text(tokenizer: Tokenizer | BytePairTokenizer, text: str) -> list[int]:
    """The tokens of what somebody wrote, by itself: what it spells like a control token is letters."""
    controls = _Controls(fast_tokenizer(tokenizer))
    return controls.encode(controls.mark(text), add_special_tokens=False)


@cache  # corpora are encoded text by text with one tokenizer
def _spellings(names: tuple[str, ...]) -> tuple[re.Pattern, frozenset[str]]:
    """What finds these names in a text, longer ones first; and all beginnings of them."""
    longest_first = sorted(names, key=len, reverse=True)
    found = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    return found, frozenset(name[:length] for name in names for length in range(1, len(name)))


class _Controls:
    """Keeps the control tokens of a template apart from what messages spell like them.

    Attributes:
        ids: of all control tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        names = {i: t.content for i, t in added.items() if len(t.content) > 1 and not t.content.isspace()}
        self._tokenizer, self.ids = tokenizer, frozenset(names)
        self._normalised = tokenizer.normalizer is not None and any(added[i].normalized for i in names)
        self._spelt, self._begun = _spellings(tuple(names.values()))

    def mark_messages(self, messages: Sequence[Mapping]) -> list:
        """Messages in which each text is marked; what is no message is left for the template to refuse."""
        try:
            return [self._mark_all(each) if isinstance(each, Mapping) else each for each in messages]
        except RecursionError:
            raise ValueError("The messages hold lists or tables that are nested too deeply.") from None

    def _mark_all(self, value: object) -> object:
        match value:
            case str():
                return self.mark(value)
            case Mapping():
                return {key: self._mark_all(each) for key, each in value.items()}
            case list():
                return [self._mark_all(each) for each in value]
        return value

    def mark(self, text: str) -> str:
        """The text with a mark around what spells a control token, or begins one at its end."""
        require_text(text)
        places = [spelt.span() for spelt in self._spelt.finditer(text)]
        if self._normalised:
            read = self._tokenizer.encode(text, add_special_tokens=False)
            places += [place for place, i in zip(read.offsets, read.ids, strict=True) if i in self.ids]
        end = len(text.rstrip())
        longest = max(map(len, self._begun), default=0)
        begun = (start for start in range(max(end - longest, 0), end) if text[start:end] in self._begun)
        places += [(start, end) for start in begun][:1]
        marked, done = "", 0
        for start, stop in sorted(places):
            if stop > done:
                start = max(start, done)
                marked += f"{text[done:start]}{_OPEN}{text[start:stop]}{_CLOSE}"
                done = stop
        return marked + text[done:]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a marked text; what is marked is read letter by letter."""
        texts, spelt = _MARKED.split(text)[::2], _MARKED.findall(text)
        pieces = [texts[0]]
        for letters, following in zip(spelt, texts[1:], strict=True):
            pieces += [*letters, following]
        # a mark that a template left without the other marks nothing
        first, *rest = (_MARK.sub("", piece) for piece in pieces)
        begin = self._tokenizer.encode(first, add_special_tokens=add_special_tokens)
        ids = begin.ids[1:] if starts_twice(begin) else begin.ids
        for piece in rest:
            ids += self._tokenizer.encode(piece, add_special_tokens=False).ids
        return ids


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
