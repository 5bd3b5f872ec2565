"""Titles of exercises: "Exercise 9.1 Where does the decay begin?", and behind it how hard it is.

sphinx-exercise puts a title in brackets, and an author writes the difficulty in the title, before it
("Easy: ...") or behind it ("... (easy)"), where every program that shows notebooks shows it.
"""

import re

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx_exercise.nodes import is_exercise_node, solution_node

LEVELS = "warm-up|easy|medium|hard|research"
BEFORE = re.compile(rf"({LEVELS}): ", re.IGNORECASE)
BEHIND = re.compile(rf" \(({LEVELS})\)$", re.IGNORECASE)


def split_level(title: str) -> tuple[str, str]:
    """The words of a title, and how hard the exercise is; empty where the title does not say.

    >>> split_level("Where does it begin? (easy)"), split_level("Easy: turn a vector"), split_level("Bands")
    (('Where does it begin?', 'easy'), ('Turn a vector', 'easy'), ('Bands', ''))
    """
    if found := BEFORE.match(title):
        words = title[found.end() :]
        return words[:1].upper() + words[1:], found[1].lower()
    if found := BEHIND.search(title):
        return title[: found.start()], found[1].lower()
    return title, ""


class Titles(SphinxPostTransform):
    """Take titles out of the brackets that sphinx-exercise put them in (its transforms are 20 to 22)."""

    default_priority = 23

    def run(self):
        for exercise in self.document.findall(is_exercise_node):
            level = self.unbracket(exercise[0])
            if level:
                exercise[0] += nodes.inline("", level, classes=["level"])
        for solution in self.document.findall(solution_node):
            for link in solution[0].findall(nodes.reference):
                self.unbracket(link, before=": ")

    def unbracket(self, title: nodes.Element, before: str = "") -> str:
        """Mend one title in its place, and return how hard the exercise is."""
        opening = next((child for child in title if child.astext() == " ("), None)
        if opening is None:
            return ""
        title.replace(opening, nodes.Text(before))
        title.pop()
        words, level = split_level(title[-1].astext())
        if isinstance(title[-1], nodes.Text):
            title[-1] = nodes.Text(words)
        return level


def setup(app):
    app.add_post_transform(Titles)
