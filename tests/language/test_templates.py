"""A model's own chat template: equal to transformers on templates of every family; a stranger's program is held."""

import sys
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.language.templates import CHATML, MINICPM, chat_template

# As they are published.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN3 = """{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.seen and message.role == "user" %}
        {%- set ns.seen = true %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and '</think>' in message.content %}
        {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
SMOLLM3 = """{% set mark = "x" %}
{% for message in messages %}
    {% if message.role == "assistant" %}
        {% generation %}
{% set mark = "y" %}
<|im_start|>assistant
{{ message.content | tojson }}{{ mark }}<|im_end|>
        {% endgeneration %}
    {% else %}
        {% if loop.index0 > 5 %}{% break %}{% endif %}
<|im_start|>{{ message | tojson(indent=2) }}{{ mark }}<|im_end|>
    {% endif %}
{% endfor %}
"""
TEMPLATES = {
    "mistral": MISTRAL, "smollm 2": SMOLLM2, "minicpm": MINICPM, "minicpm 4": CHATML, "llama 3": LLAMA3,
    "gemma": GEMMA, "qwen 3": QWEN3, "smollm 3": SMOLLM3,
}  # fmt: skip
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": False}
CONTENT = st.lists(
    st.one_of(st.sampled_from(["</think>", "{{ bos_token }}", "{% for %}", "<b>&\"'", "\n", "人"]), st.text(max_size=5)),
    max_size=3,
).map("".join)  # fmt: skip


def theirs(source: str, messages: list[dict], add_generation_prompt: bool) -> str | None:
    """What transformers makes of it; None where the template refuses."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            [messages], chat_template=source, add_generation_prompt=add_generation_prompt, **VARIABLES
        )
    except TemplateError:
        return None
    return texts[0]


def ours(source: str, messages: list[dict], add_generation_prompt: bool) -> str | None:
    try:
        return chat_template(source, VARIABLES | {"add_generation_prompt": add_generation_prompt})(messages)
    except ValueError as error:
        assert str(error).startswith("The chat template refuses these messages: ") and "\n" not in str(error)
        return None


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(
    messages=st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": CONTENT}),
        min_size=1,
        max_size=4,
    ),
    add=st.booleans(),
)
def test_a_template_writes_what_it_writes_in_transformers(name, messages, add):
    assert ours(TEMPLATES[name], messages, add) == theirs(TEMPLATES[name], messages, add)


TALK = [
    {"role": "user", "content": " Who? "},
    {"role": "assistant", "content": "<think>hm</think>\nI."},
    {"role": "user", "content": "You!"},
]


def test_a_conversation_in_three_templates():
    assert chat_template(MISTRAL, VARIABLES)(TALK) == (
        "<s>[INST]  Who?  [/INST]<think>hm</think>\nI.</s>[INST] You! [/INST]"
    )
    assert chat_template(QWEN3, VARIABLES)(TALK).endswith(
        "<|im_start|>assistant\nI.<|im_end|>\n<|im_start|>user\nYou!<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n"
    )
    assert f"Today Date: {datetime.now():%d %b %Y}\n" in chat_template(LLAMA3, VARIABLES)(TALK)


UNSAFE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ strftime_now.__code__.co_code }}",
    "{{ '{0.__class__.__name__}'.format(1) }}",
    "{{ (messages | map(attribute='__class__') | list)[0].x }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
]


@pytest.mark.parametrize("source", UNSAFE)
def test_what_the_sandbox_forbids_is_refused_with_a_sentence(source):
    with pytest.raises(ValueError, match=r"^The chat template refuses these messages: [^\n]+$"):
        chat_template(source)(TALK)
    assert TALK[0]["role"] == "user" and len(TALK) == 3


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "{{ raise_exception('No ' + messages[0].role + ' here') }}",
            "refuses these messages: No user here$",
        ),
        ("{{ 1 / 0 }}", "refuses these messages: ZeroDivisionError: division by zero"),
        ("{{ messages[9].content.strip() }}", "refuses these messages: UndefinedError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses these messages: RecursionError"),
        ("{% for %}", "is no program in Jinja: TemplateSyntaxError"),
        ("{{ x", "is no program in Jinja"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "is no program in Jinja: RecursionError"),
        ("{% include 'secret' %}", "refuses these messages: "),
    ],
)
def test_errors_are_sentences(source, sentence):
    with pytest.raises(ValueError, match=sentence):
        chat_template(source)(TALK)


def test_without_jinja_the_sentence_names_the_command(monkeypatch):
    from minicpm_lite.language import templates

    templates._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"'jinja2' is needed to use .*minicpm_lite\[pretrained\]"):
        chat_template("x")
