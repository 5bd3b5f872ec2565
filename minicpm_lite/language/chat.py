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
  they look alike. Who writes ``<|im_end|>`` into a question could end it and speak as the system. So the
  template is shown what a message spells like one in other letters, one for one; what is a control token in
  its text then is its own, and the rest is put back and read as text. The text of a template is for showing;
  `encode_chat` is for a model.
- What a template makes of a text is the template's. One that takes letters out of texts, changes them or puts
  texts together (``replace``, ``lower``, ``join``) can make a control token of what no message spells, and it
  controls, just as the ``<|image|>`` does that a template writes for an ``<image>``. Nothing here can tell
  the two apart. So look at what a template does to texts before strangers write them.
- A normaliser can make a control token of what does not look like one: where it writes small letters,
  ``<END>`` is read as ``<end>``. So the tokenizer is asked what it would read as one.
- Control tokens in an answer, other than the one that ended it, are read as text in the next turn, too: a
  model may have been talked into writing them.
- Templates of models that think look for ``</think>`` in earlier answers, to cut the thinking out. Where the
  text would come out otherwise with it hidden, they are shown the answers as they are; what they leave of an
  answer's control tokens controls then, for the model wrote them. (A template that looks, and writes the same
  text all the same, cannot be told from one that does not look.)
- What is bound to a template, as the ``documents`` in the variables of `chat_template`, is part of it.
- A chat goes on while its model is trained, and its tokenizer is told to cut batches of something else. So
  both are looked at again before each answer.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers

from .context import KVCache, appearance
from .decoder import Decoder
from .generation import Stream, stream
from .sampling import Sampling
from .tokenizer import (
    BytePairTokenizer,
    control_tokens,
    encode_whole,
    fast_tokenizer,
    reading_all_as_text,
    require_text,
)
from .writing import TextWriter, starts_twice, stop_strings, text_ends, write

__all__ = ["Chat", "Template", "chatml", "encode_chat", "encode_text", "minicpm_chat"]

Template = Callable[[Sequence[Mapping[str, object]]], str]

_RARE_LETTERS = [chr(code) for code in range(0x20000, 0x2A6D7)]  # CJK Extension B: no case, no other form


class Chat:
    """A conversation that goes on: each answer reads only what came since the one before.

    Where the model has another config or other weights than at the answer before, all is read again; where
    the tokenizer cuts what was said in another way, it is cut anew. A change of the model that neither shows,
    as of a hook, asks for a new chat, which may be given the messages of this one.

    Args:
        model: the decoder.
        tokenizer: its vocabulary.
        template: from messages to the text that the model answers; the model's own.
        sampling: how a token is chosen; left out, the best one.
        stop: an answer ends before the first of these strings.
        stop_ids: an answer ends before the first of these tokens; left out, those of the model.
        room: tokens of the whole conversation.
        generator: source of chance; left out, PyTorch's global one.
        stream: what gives the tokens: `generation.stream`, or another way to the same ones.

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
        stream: Stream = stream,
    ) -> None:
        self.stream = stream
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.sampling, self.stop, self.generator = sampling, stop_strings(stop), generator
        self.stop_ids = text_ends(model, fast_tokenizer(tokenizer), stop_ids)
        self.messages: list[Mapping[str, object]] = []
        self._cache = KVCache(min(room, model.config.max_position_embeddings))
        self._text, self._ids = "", []  # tokens that are known: question, answer, question, ...
        self._cut: list[int] = []  # the same text as the tokenizer cut it then
        self._fed: list[int] = []  # of which the cache has read the first
        self._read_by: tuple | None = None  # the model, as it read them
        self._asked = 0  # questions so far: an answer that is still open is closed by the next question

    def answer(self, question: str, max_new_tokens: int) -> Iterator[str]:
        """Yield the answer to a question piece by piece. It joins the messages when it is complete.

        Raises:
            ValueError: the conversation has no room for so many tokens, the template refuses it, or the
                vocabulary has no token for something in it.
            RuntimeError: the answer was left open, another question was asked, and now it should go on.
        """
        self._asked += 1
        mine = self._asked
        messages = [*self.messages, {"role": "user", "content": question}]
        controls = _Controls(fast_tokenizer(self.tokenizer))
        text, reader = controls.read(self.template, messages)
        prompt = self._encode(text, reader)
        if (needed := len(prompt) + max_new_tokens - 1) > self._cache.room:
            more = self._cache.room < self.model.config.max_position_embeddings
            raise ValueError(
                f"The conversation and its answer need room for {needed} tokens, and this chat has it for "
                f"{self._cache.room}{'' if more else ', which is all that the model was made for'}. Ask for "
                f"fewer new tokens, or begin a chat {'with more room' if more else 'anew'}."
            )
        if (reads_now := appearance(self.model)) != self._read_by:
            self._cache.truncate(0)  # what another model made of the past
            self._read_by = reads_now
        known = _common_length(self._fed[: self._cache.length], prompt)
        self._cache.truncate(min(known, len(prompt) - 1))
        self._fed = list(prompt)
        steps = self.stream(
            self.model,
            torch.tensor([prompt], device=next(self.model.parameters()).device),
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

        writer = TextWriter(self.tokenizer, self.stop, prompt)
        yield from write(noted(), writer, self.stop_ids)
        self._refuse_if_left(mine)
        self.messages = [*messages, {"role": "assistant", "content": writer.text}]
        said = [token for token in self._fed[len(prompt) :] if token not in self.stop_ids]
        if not writer.stopped and controls.ids.isdisjoint(said):
            self._text, self._ids = text + writer.text, prompt + said
            self._cut, _ = _encode(reader, self._text)

    def _refuse_if_left(self, asked: int) -> None:
        if asked != self._asked:
            raise RuntimeError(
                "This answer was left open and another question was asked, so it cannot go on. Ask again."
            )

    def _encode(self, text: str, reader: Tokenizer) -> list[int]:
        """The tokens of a conversation; those of its beginning as they are known.

        All are cut anew where no token ends with the beginning, or the tokenizer cuts it in another way now.
        """
        ids, offsets = _encode(reader, text)
        known = len(self._text)
        rest = next((place for place, (start, _) in enumerate(offsets) if start >= known), len(ids))
        if (
            known
            and text.startswith(self._text)
            and offsets[rest - 1][1] == known
            and ids[:rest] == self._cut
        ):
            return self._ids + ids[rest:]
        return ids


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    differs = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


def encode_chat(
    tokenizer: Tokenizer | BytePairTokenizer,
    template: Template,
    messages: Iterable[Mapping[str, object]],
    add_special_tokens: bool = True,
) -> list[int]:
    """The tokens of a conversation: a control token stands where the template puts it, and nowhere else.

    What a message spells like one is read as text. Where no message does, the tokens are those of the
    template's text, as in transformers, with what it made of a message's letters. See
    `tokenizer.control_tokens` for what is one.

    Args:
        tokenizer: the model's.
        template: the model's.
        messages: as the template takes them.
        add_special_tokens: begin with the start token where the tokenizer has one, and once if the template
            writes it, too.

    Raises:
        TypeError, ValueError: as the template; or a message that is no table, or holds half a character, what
            the vocabulary has no token for, what is neither text nor number, or lists that are nested too
            deeply.
    """
    text, reader = _Controls(fast_tokenizer(tokenizer)).read(template, list(messages))
    return _encode(reader, text, add_special_tokens)[0]


def encode_text(tokenizer: Tokenizer | BytePairTokenizer, text: str) -> list[int]:
    """The tokens of what somebody wrote, by itself: what it spells like a control token is text.

    Raises:
        TypeError: the text is not a str.
        ValueError: it holds half a character, or something that the vocabulary has no token for.
    """
    require_text(text)
    controls = _Controls(fast_tokenizer(tokenizer))
    reader = controls.twin if controls.spelt(text) else controls.tokenizer
    return encode_whole(reader, text, add_special_tokens=False).ids


def _encode(
    reader: Tokenizer, text: str, add_special_tokens: bool = True
) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a text, with one start token, and where in the text each begins and ends."""
    encoding = encode_whole(reader, text, add_special_tokens)
    begin = starts_twice(encoding)
    return encoding.ids[begin:], encoding.offsets[begin:]


class _Controls:
    """Tells the control tokens that a template writes from what messages spell like them.

    Attributes:
        tokenizer: whose control tokens they are.
        ids: of all of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        controls = {token.content: i for i, token in control_tokens(tokenizer).items()}
        self.tokenizer, self.ids = tokenizer, frozenset(controls.values())
        self._beginnings = _beginnings(tuple(controls))
        # in a sequence, since a Replace alone cannot be unpickled
        steps = normalizers.Sequence([tokenizer.normalizer] if tokenizer.normalizer is not None else [])
        self._finder = _finder(tuple(tokenizer.get_added_tokens_decoder().values()), pickle.dumps(steps))
        added = self._finder.get_added_tokens_decoder()
        self._control = {
            i: controls[token.content] for i, token in added.items() if token.content in controls
        }

    @cached_property
    def twin(self) -> Tokenizer:
        """The tokenizer to which all that is spelt is text."""
        return reading_all_as_text(self.tokenizer)

    def read(self, template: Template, messages: Sequence[Mapping[str, object]]) -> tuple[str, Tokenizer]:
        """A conversation as one text, and the tokenizer that finds the template's control tokens in it."""
        texts = _texts(messages)
        plain = template(messages)
        spelt = {letter for text in texts for start, end in self.spelt(text) for letter in text[start:end]}
        if not spelt:
            return plain, self.tokenizer
        taken = "".join((plain, *texts))
        unused = (each for each in _RARE_LETTERS if each not in taken and _in_ascii(each) not in taken)
        hide = dict(zip(sorted(spelt), unused, strict=False))
        shown = self._show(template, messages, hide)
        if _put_back(shown, hide) != plain:  # the template looks at what is hidden, or changes its letters
            if self._control_ids(shown) == self._control_ids(plain):
                shown = plain  # where nothing of it is left
            else:
                shown = self._show(template, messages, hide, trusted=("assistant",))
        return _put_back(self._renamed(shown), hide), self.twin

    def spelt(self, text: str, is_name: bool = False) -> list[tuple[int, int]]:
        """Where a text spells a control token, and where it begins one at its end.

        Templates ask for keys and roles by name, letter by letter, so the end of a name begins nothing.
        """
        places = [(start, end) for start, end, _ in self._found(text)]
        if is_name and text.isidentifier():
            return places
        end, normalizer = len(text.rstrip()), self.tokenizer.normalizer
        for start in range(max(end - max(map(len, self._beginnings), default=0), 0), end):
            last = text[start:end]
            if last in self._beginnings or (
                normalizer is not None and normalizer.normalize_str(last) in self._beginnings
            ):
                return [*places, (start, end)]
        return places

    def _found(self, text: str) -> Iterator[tuple[int, int, int]]:
        """The control tokens in a text: begin and end, without blanks that are read with them, and id."""
        found = self._finder.encode(text)
        for (start, end), i in zip(found.offsets, found.ids, strict=True):
            if i in self._control:
                token = text[start:end]
                start, end = start + len(token) - len(token.lstrip()), start + len(token.rstrip())
                yield start, end, self._control[i]

    def _control_ids(self, text: str) -> list[int]:
        return [i for _, _, i in self._found(text)]

    def _show(
        self,
        template: Template,
        messages: Sequence[Mapping[str, object]],
        hide: Mapping[str, str],
        trusted: tuple[str, ...] = (),
    ) -> str:
        """What a template makes of messages in which what they spell is hidden, but for trusted roles."""
        table = str.maketrans(hide)

        def hidden(text: str, is_name: bool) -> str:
            pieces, done = [], 0
            for start, end in self.spelt(text, is_name):
                pieces += text[done:start], text[max(start, done) : end].translate(table)
                done = end
            return "".join((*pieces, text[done:]))

        return template(
            [each if each.get("role") in trusted else _in_texts(hidden, each) for each in messages]
        )

    def _renamed(self, text: str) -> str:
        """A text in which control tokens have the names by which the twin knows them."""
        names, pieces, done = self.twin.get_added_tokens_decoder(), [], 0
        for start, end, i in self._found(text):
            pieces += text[done:start], names[i].content.strip()
            done = end
        return "".join((*pieces, text[done:]))


# corpora are encoded text by text with one tokenizer, so what is made from it is kept
@lru_cache(maxsize=2)
def _finder(added: tuple[AddedToken, ...], normalizer: bytes) -> Tokenizer:
    """Takes added tokens out of a text as their tokenizer does, and leaves what is between them whole."""
    finder = Tokenizer(models.WordLevel({" ": 0}, unk_token=" "))
    finder.normalizer = pickle.loads(normalizer)
    finder.add_tokens(list(added))
    return finder


@lru_cache(maxsize=2)
def _beginnings(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(name[:length] for name in names for length in range(1, len(name)))


def _in_ascii(letter: str) -> str:
    return json.dumps(letter)[1:-1]


def _put_back(text: str, hide: Mapping[str, str]) -> str:
    """What was hidden in a text, as it was written."""
    for letter, stand_in in hide.items():  # `tojson` may have been asked for ASCII
        text = text.replace(_in_ascii(stand_in), _in_ascii(letter))
    return text.translate(str.maketrans({stand_in: letter for letter, stand_in in hide.items()}))


def _texts(messages: Sequence[Mapping[str, object]]) -> list[str]:
    """All texts in messages, wherever they stand.

    Raises:
        ValueError: no message, something in one that is neither text nor number nor a list or table of them,
            nesting that is too deep, or half a character.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"Message {number} is of type {type(message).__name__}; expected a table such as "
                "{'role': 'user', 'content': 'Hello!'}."
            )
    texts: list[str] = []

    def note(text: str, is_name: bool) -> str:
        require_text(text)
        texts.append(text)
        return text

    try:
        for message in messages:
            _in_texts(note, message)
    except RecursionError:
        raise ValueError("The messages hold lists or tables that are nested too deeply.") from None
    return texts


def _in_texts(change: Callable[[str, bool], str], value: object, is_name: bool = False) -> object:
    """A copy of what a message holds, with every text in it changed; keys and roles are names."""
    match value:
        case str():
            return change(value, is_name)
        case Mapping():
            return {
                _in_texts(change, key, True): _in_texts(change, each, key == "role")
                for key, each in value.items()
            }
        case list():
            return [_in_texts(change, each, is_name) for each in value]
        case tuple():
            return tuple(_in_texts(change, each, is_name) for each in value)
        case None | bool() | int() | float():
            return value
    raise ValueError(
        f"A message holds something of type {type(value).__name__}; expected texts, numbers, and lists and "
        "tables of them."
    )


def chatml(
    messages: Sequence[Mapping[str, object]], system: str | None = None, add_generation_prompt: bool = True
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


def minicpm_chat(messages: Sequence[Mapping[str, object]]) -> str:
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


def _messages(messages: Sequence[Mapping[str, object]], roles: tuple[str, ...]) -> list[tuple[str, str]]:
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
