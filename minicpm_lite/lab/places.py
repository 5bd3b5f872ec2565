"""Where the parts of a drawing stand, and how wide their text is: plain geometry in units, y downwards."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]

# Advances in ems, of DejaVu Sans, which is the widest of the fonts that a page may choose.
_ADVANCES = dict.fromkeys("ijl.,:;'|!·", 0.3) | dict.fromkeys("frtI()[] ", 0.39)
_ADVANCES |= dict.fromkeys("mwMWQ@%+−=×<>→←≈—", 0.9) | dict.fromkeys("0123456789", 0.64)
_MARKUP = re.compile(r"([_^])\{([^}]*)\}")


@dataclass(frozen=True)
class Place:
    """A rectangle: what a part of a drawing covers."""

    x: float
    y: float
    width: float = 0.0
    height: float = 0.0

    @property
    def right(self) -> float:
        """Where its right side stands."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Where its lower side stands."""
        return self.y + self.height

    @property
    def middle(self) -> Point:
        """The point in its middle."""
        return self.at(0.5, 0.5)

    def at(self, across: float, down: float) -> Point:
        """A point of it: ``at(0, 0)`` is the upper left corner, ``at(1, 0.5)`` the middle of the right."""
        return self.x + across * self.width, self.y + down * self.height

    def grown(self, by: float) -> "Place":
        """The rectangle that is larger by so much on each side."""
        return Place(self.x - by, self.y - by, self.width + 2 * by, self.height + 2 * by)


@dataclass(frozen=True)
class Grid(Place):
    """A matrix: a rectangle of equal cells."""

    rows: int = 1
    columns: int = 1

    def cell(self, row: int, column: int) -> Place:
        """The place of one cell, counted from 0.

        Raises:
            ValueError: the matrix has no such cell.
        """
        if row not in range(self.rows) or column not in range(self.columns):
            raise ValueError(
                f"The cell is ({row}, {column}); expected a row from 0 to {self.rows - 1} "
                f"and a column from 0 to {self.columns - 1}."
            )
        width, height = self.width / self.columns, self.height / self.rows
        return Place(self.x + column * width, self.y + row * height, width, height)

    def row(self, number: int) -> Place:
        """The place of one row, counted from 0."""
        return around(self.cell(number, 0), self.cell(number, self.columns - 1))

    def column(self, number: int) -> Place:
        """The place of one column, counted from 0."""
        return around(self.cell(0, number), self.cell(self.rows - 1, number))


@dataclass(frozen=True)
class Axes(Place):
    """A rectangle with a scale: ``point(x, y)`` is where a pair of values stands."""

    xs: Point = (0.0, 1.0)
    ys: Point = (0.0, 1.0)

    def point(self, x: float, y: float) -> Point:
        """The point of a pair of values."""
        (left, right), (low, high) = self.xs, self.ys
        return self.at((x - left) / (right - left), (high - y) / (high - low))


def around(*places: Place) -> Place:
    """The smallest rectangle that holds all of them."""
    x, y = min(place.x for place in places), min(place.y for place in places)
    right, bottom = max(place.right for place in places), max(place.bottom for place in places)
    return Place(x, y, right - x, bottom - y)


def place_of(thing: Place | Point) -> Place:
    """A place, or a point as a place without size."""
    return thing if isinstance(thing, Place) else Place(*thing)


def facing(start: Place, end: Place) -> tuple[Point, Point, bool]:
    """Where an arrow leaves one place and meets the other, and whether it runs across rather than down.

    It runs straight where the middle of one place lies within the other.
    """
    across = max(end.x - start.right, start.x - end.right) >= max(end.y - start.bottom, start.y - end.bottom)
    if across:
        rightwards = end.x >= start.right
        row = _shared(start.y, start.bottom, end.y, end.bottom)
        tail, tip = (start.right, end.x) if rightwards else (start.x, end.right)
        return (tail, row[0]), (tip, row[1]), True
    downwards = end.y >= start.bottom
    column = _shared(start.x, start.right, end.x, end.right)
    tail, tip = (start.bottom, end.y) if downwards else (start.y, end.bottom)
    return (column[0], tail), (column[1], tip), False


def _shared(low: float, high: float, other_low: float, other_high: float) -> Point:
    middle, other = (low + high) / 2, (other_low + other_high) / 2
    if low <= other <= high and other_high - other_low <= high - low:
        return other, other
    return (middle, middle) if other_low <= middle <= other_high else (middle, other)


def text_width(text: str, size: float, bold: bool = False) -> float:
    """About how wide a line of text is, in any usual sans serif; rather more than less.

    >>> round(text_width("query", 12)), round(text_width("词元", 12)), round(text_width("W_{q}", 12))
    (34, 24, 17)
    """
    small = sum(len(match[2]) for match in _MARKUP.finditer(text))
    plain = [character for character in _MARKUP.sub(r"\2", text) if not unicodedata.combining(character)]
    return size * (1.12 if bold else 1) * (sum(map(_advance, plain)) - 0.12 * small)


def _advance(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF":
        return 1.0
    return _ADVANCES.get(character, 0.7 if character.isupper() else 0.61)


def runs(text: str) -> list[tuple[str, str]]:
    """The pieces of a line and how each stands: "" on the line, "_" below it, "^" above.

    >>> runs("W_{q} x")
    [('W', ''), ('q', '_'), (' x', '')]
    """
    pieces: list[tuple[str, str]] = []
    end = 0
    for match in _MARKUP.finditer(text):
        pieces += [(text[end : match.start()], ""), (match[2], match[1])]
        end = match.end()
    return [piece for piece in (*pieces, (text[end:], "")) if piece[0]]


def leaves(tree: str | Sequence) -> list[str]:
    """The leaves of nested pairs, in order.

    >>> leaves((("l", "o"), "w"))
    ['l', 'o', 'w']
    """
    return [tree] if isinstance(tree, str) else [leaf for branch in tree[:2] for leaf in leaves(branch)]
