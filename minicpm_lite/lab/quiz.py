"""A short quiz for a live kernel and for the static book: radio buttons, and the answer to unfold."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import count, product
from string import ascii_lowercase

from .display import inline_html
from .style import KEEP_KEYS, THEME

_SCRIPT = """(() => {
const quiz = document.currentScript.parentElement;
quiz.querySelectorAll('fieldset').forEach(question => question.addEventListener('change', event => {
const right = event.target.value === question.dataset.right;
question.querySelector('[role=status]').textContent =
right ? '✓ Right. ' + question.dataset.why : '✗ Not this one. Try another, or open the answer.'; }));
quiz.querySelector('small').hidden = true;
})()"""


class Quiz:
    """Questions with one right option each. Make it the last expression of a cell.

    Args:
        questions: ``(question, options, index of the right option, why)`` each; what stands between
            backticks shows as code.

    Raises:
        ValueError: fewer than two options, two that are the same, or the index is not that of an option.

    >>> Quiz([("What does `2 * 3` give?", ["5", "6"], 1, "Two threes.")])
    Quiz: 1 question
    1. What does `2 * 3` give?
       a) 5
       b) 6
    """

    def __init__(self, questions: Iterable[tuple[str, Iterable[str], int, str]]) -> None:
        self.questions = [(question, list(options), *rest) for question, options, *rest in questions]
        for question, options, right, _ in self.questions:
            if len(set(options)) < max(2, len(options)):
                raise ValueError(f"The question {question!r} needs two or more options, all different.")
            if right not in range(len(options)):
                raise ValueError(
                    f"The right option of {question!r} is {right}; expected 0 to {len(options) - 1}."
                )

    def __repr__(self) -> str:
        lines = [f"Quiz: {len(self.questions)} question{'s' if len(self.questions) != 1 else ''}"]
        for number, (question, options, _, _) in enumerate(self.questions, start=1):
            lines.append(f"{number}. {question}")
            lines += [f"   {letter}) {option}" for letter, option in zip(_letters(), options, strict=False)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        identity = hashlib.sha256(json.dumps(self.questions).encode()).hexdigest()[:10]
        questions = "".join(
            _question(f"quiz-{identity}-{number}", number, *question)
            for number, question in enumerate(self.questions, start=1)
        )
        return (
            f'{THEME}<div class="lab-piece" style="margin:1rem 0">'
            f"{questions}<small>Run this cell to answer here, or open the answers.</small>"
            f"<script>{_SCRIPT}</script></div>"
        )


def _letters() -> Iterator[str]:
    """The letters of options: a to z, then aa, ab and so on."""
    return ("".join(letters) for length in count(1) for letters in product(ascii_lowercase, repeat=length))


def _question(name: str, number: int, question: str, options: Sequence[str], right: int, why: str) -> str:
    radios = "".join(
        '<label style="display:flex;gap:.6rem;align-items:baseline;padding:.3rem 0">'
        f'<input type="radio" {KEEP_KEYS} name="{name}" value="{index}">'
        f"<span>{inline_html(option)}</span></label>"
        for index, option in enumerate(options)
    )
    legend_style = "float:left;width:100%;margin:0;padding:0;border:0;font-size:inherit;font-weight:bold"
    box_style = (
        "border:1px solid rgba(128,128,128,.5);border-radius:.25rem;padding:.5rem 1rem;margin:0 0 1rem"
    )
    return (
        f'<fieldset data-right="{right}" data-why="{escape(why.replace("`", ""))}" style="{box_style}">'
        f'<legend style="{legend_style}">{number}. {inline_html(question)}</legend>'
        f'<div style="clear:both">{radios}</div><p role="status" style="margin:.3rem 0;font-weight:bold"></p>'
        f"<details><summary {KEEP_KEYS}>Answer</summary>"
        f"<p>{inline_html(options[right].removesuffix('.'))}. {inline_html(why)}</p></details></fieldset>"
    )
