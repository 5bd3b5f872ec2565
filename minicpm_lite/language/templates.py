"""A model's own chat template, as it is published: a small program in Jinja that writes a conversation.

    chat_template(source)    from what `tokenizer_config.json` or `chat_template.jinja` holds to a template
    CHATML, MINICPM          sources of two: of MiniCPM3, 4 and 4.1, and of the first MiniCPM models

Choices, and the traps behind them:

- The program comes from a stranger, so it runs in Jinja's sandbox, which bars the way to Python itself.
- It sees what `transformers` shows it: the same whitespace rules, the loop controls, ``raise_exception``,
  ``strftime_now``, ``{% generation %}``, and a ``tojson`` that leaves letters as they are.
- It is a program and may fail in any way; then one sentence says so.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import NoReturn

from ..optional import require
from .chat import Template

__all__ = ["CHATML", "MINICPM", "chat_template"]

# As MiniCPM4 and MiniCPM-2B publish them; in Python they are `chat.chatml` and `chat.minicpm_chat`.
CHATML = (
    r"{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    r" + '<|im_end|>' + '\n'}}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MINICPM = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{'<用户>' + message['content'].strip() + '<AI>'}}{% else %}{{message['content'].strip()}}{% endif %}"
    "{% endfor %}"
)


def chat_template(source: str, variables: Mapping[str, object] | None = None) -> Template:
    """A template for `Chat` and `encode_chat` from its source in Jinja.

    Args:
        source: the program.
        variables: what it may ask for beside the messages: ``bos_token``, ``eos_token``, ``enable_thinking``
            and the like; also ``add_generation_prompt``, which is true unless it is given. They are part of
            the template: what they spell like a control token is one.

    Raises:
        ImportError: jinja2 is missing; the message names the command that installs it.
        ValueError: the source is no program in Jinja; from the template itself: it refuses the messages,
            fails, or does what the sandbox forbids.

    >>> source = "{{ bos_token }}{% for message in messages %}[{{ message.content }}]{% endfor %}"
    >>> chat_template(source, {"bos_token": "<s>"})([{"role": "user", "content": "Hello!"}])
    '<s>[Hello!]'
    """
    environment = _environment()
    given = {"tools": None, "documents": None, "add_generation_prompt": True} | dict(variables or {})
    try:
        program = environment.from_string(source)
    except Exception as error:  # of Jinja, or of Python where a program nests too deep
        raise ValueError(f"The chat template is no program in Jinja: {_reason(error)}") from None

    def template(messages: Sequence[Mapping[str, object]]) -> str:
        try:
            return program.render(given, messages=messages)
        except Exception as error:  # a stranger's program may raise anything
            raise ValueError(f"The chat template refuses these messages: {_reason(error)}") from None

    return template


@cache
def _environment():
    """Where templates run: a sandbox with what `transformers` gives them."""
    _, sandbox, extensions, nodes = (
        require(name, install="minicpm_lite[pretrained]", purpose="use a model's own chat template")
        for name in ("jinja2", "jinja2.sandbox", "jinja2.ext", "jinja2.nodes")
    )

    class Generation(extensions.Extension):
        """``{% generation %}`` marks what the model wrote, for training; here it is text like any other."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extensions.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _reason(error: Exception) -> str:
    """One line."""
    words = " ".join(str(error).split())
    return words if type(error) is ValueError else f"{type(error).__name__}: {words}"
