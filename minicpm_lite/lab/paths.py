"""The shapes of a drawing: elements of SVG without their looks, and the path data of lines."""

import math
from collections.abc import Iterable, Sequence

from .places import Place, Point, around


def short(number: float) -> str:
    """A coordinate with the decimals that can be seen."""
    return f"{round(number, 1):g}"


def listed(points: Iterable[Point]) -> str:
    """Points as path data have them.

    >>> listed([(1, 2.04), (3.55, -4)])
    '1 2 3.5 -4'
    """
    return " ".join(f"{short(x)} {short(y)}" for x, y in points)


def rectangle(place: Place, round: float = 0) -> str:
    """A rectangle with round corners."""
    size = f"width='{short(place.width)}' height='{short(place.height)}'"
    return f"rect x='{short(place.x)}' y='{short(place.y)}' {size}" + (f" rx='{round:g}'" if round else "")


def circle(center: Point, radius: float) -> str:
    """A circle."""
    return f"circle cx='{short(center[0])}' cy='{short(center[1])}' r='{short(radius)}'"


def short_of(tip: Point, before: Point, by: float) -> Point:
    """The point that lies so far before the end of a line."""
    share = min(1, by / (math.dist(tip, before) or 1))
    return tip[0] + share * (before[0] - tip[0]), tip[1] + share * (before[1] - tip[1])


def broken_line(corners: Sequence[Point], radius: float = 8) -> str:
    """A line with round corners.

    >>> broken_line([(0, 0), (20, 0), (20, 20)])
    'M0 0L12 0Q20 0 20 8L20 20'
    """
    path = f"M{listed(corners[:1])}"
    for before, corner, after in zip(corners, corners[1:], corners[2:], strict=False):
        bow = [short_of(corner, before, radius), corner, short_of(corner, after, radius)]
        path += f"L{listed(bow[:1])}Q{listed(bow[1:])}"
    return path + f"L{listed(corners[-1:])}"


def bends(tail: Point, tip: Point, across: bool) -> tuple[Point, Point]:
    """The points that pull a line to an S, which begins and ends across (or down)."""
    middle_x, middle_y = (tail[0] + tip[0]) / 2, (tail[1] + tip[1]) / 2
    return ((middle_x, tail[1]), (middle_x, tip[1])) if across else ((tail[0], middle_y), (tip[0], middle_y))


def detour(start: Place, end: Place, bend: float, across: bool) -> list[Point]:
    """The corners of a line around what stands between two places: on the right or below, if bend > 0."""
    both, side = around(start, end), int(bend > 0)
    if across:
        y = both.at(0, side)[1] + bend
        return [start.at(0.5, side), (start.middle[0], y), (end.middle[0], y), end.at(0.5, side)]
    x = both.at(side, 0)[0] + bend
    return [start.at(side, 0.5), (x, start.middle[1]), (x, end.middle[1]), end.at(side, 0.5)]


def brace(low: float, high: float, edge: float, out: float, across: bool) -> str:
    """A curly brace from one coordinate to another, along an edge; it points outwards by twice ``out``."""
    middle, bow = (low + high) / 2, min(abs(out), (high - low) / 4)
    corners = [
        (low, 0), (low, 1), (low + bow, 1), (middle - bow, 1), (middle, 1), (middle, 2),
        (middle, 1), (middle + bow, 1), (high - bow, 1), (high, 1), (high, 0),
    ]  # fmt: skip
    points = [(along, edge + out * depth) for along, depth in corners]
    a, b, c, d, e, f, g, h, i, j, k = (listed([point if across else point[::-1]]) for point in points)
    return f"M{a}Q{b} {c}L{d}Q{e} {f}Q{g} {h}L{i}Q{j} {k}"


def sector(center: Point, radius: float, angle: float) -> str:
    """What a hand that begins at the right sweeps in turning by an angle, of less than a full turn."""
    begin, end = ring(center, radius, 0), ring(center, radius, angle)
    arc = f"A{short(radius)} {short(radius)} 0 {int(abs(angle) > math.pi)} {int(angle < 0)} {listed([end])}"
    return f"M{listed([center])}L{listed([begin])}{arc}z"


def ring(center: Point, radius: float, angle: float) -> Point:
    """The point of a circle at an angle in radians, counted from the right against the clock."""
    return center[0] + radius * math.cos(angle), center[1] - radius * math.sin(angle)
