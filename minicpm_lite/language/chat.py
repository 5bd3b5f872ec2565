"""Chats: how a conversation is written for a model, and one that goes on without reading its past again.

    chatml, minicpm_chat    templates: messages with roles become one text
    Chat                    question after question to one model, with one cache

Choices, and the traps behind them:

- A chat template belongs to its model. A model that gets another one answers worse and gives no error.
- The tokens that the model wrote stay as it wrote them. Cut anew from their text they may be others, and the
  cache would be of no use from there on. (A template that changes an answer, as `minicpm_chat` strips blanks
  at its ends, has it read again.)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from tokenizers import Tokenizer

from .context import KVCache
from .decoder import Decoder
from .generation import resolve_stop_ids, stream
from .sampling import Sampling
from .tokenizer import BytePairTokenizer, fast_tokenizer
from .writing import TextWriter, write

__all__ = ["Chat", "chatml", "minicpm_chat"]


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
        template: Callable[[Sequence[Mapping[str, str]]], str],
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        room: int = 2048,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model, self.tokenizer, self.template = model, fast_tokenizer(tokenizer), template
        self.sampling, self.stop, self.generator = sampling, stop, generator
        self.stop_ids = resolve_stop_ids(model, stop_ids)
        self.messages: list[Mapping[str, str]] = []
        self._cache = KVCache(min(room, model.config.max_position_embeddings))
        self._text, self._ids = "", []  # a text whose tokens are known: question, answer, question, ...
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
        text = self.template(messages)
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
        if self.tokenizer.decode(said, skip_special_tokens=False) == writer.text:  # no stop string cut it
            self._text, self._ids = text + writer.text, prompt + said

    def _refuse_if_left(self, asked: int) -> None:
        if asked != self._asked:
            raise RuntimeError(
                "This answer was left open and another question was asked, so it cannot go on. Ask again."
            )

    def _encode(self, text: str) -> list[int]:
        """The tokens of a text; of its beginning those that are known."""
        if self._text and text.startswith(self._text):
            rest = self.tokenizer.encode(text[len(self._text) :], add_special_tokens=False)
            return self._ids + rest.ids
        return self.tokenizer.encode(text).ids


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    differs = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


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
