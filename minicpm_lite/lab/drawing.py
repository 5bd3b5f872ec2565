"""Drawings of mechanisms: boxes with shapes, arrows, matrices, dials, curves, timelines and trees, as SVG.

    d = lab.Drawing("Token ids go through a table of embeddings.")
    ids = d.box(4, 15, 80, 30, "ids", note="8")
    table = d.box(130, 10, 100, 40, "embedding", tone="blue")
    d.arrow(ids, table)
    d

Coordinates are units, from the upper left corner. 360 units are as wide as a phone, where a unit is a pixel;
on a wider screen a unit is larger. A drawing is as high as its parts reach. Every part returns the place that
it covers, to which the next is put: ``ids.right + 20``, ``table.at(0.5, 1)``, ``d.arrow(ids, table)``. In a
text, ``_{q}`` stands below the line and ``^{2}`` above it, and a line break begins a new line.

What nobody could read is refused: text below 11 units, text that is wider than its box, and parts that stick
out of the drawing. Tones are the colours of the plots; what they say must be told by words or shapes, too.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from .canvas import SMALLEST_TEXT, Canvas
from .paths import bends, circle, listed, rectangle, ring, sector, short
from .places import Axes, Grid, Place, Point, around, leaves, text_width

Ticks = Mapping[float, str] | Sequence[float]  # values that are named, or their names by value


class Drawing(Canvas):
    """A canvas for one mechanism. Make it the last expression of a cell.

    Args:
        alt: a sentence or two that say what it shows, for readers who do not see it.
        width: in units. Above 360, up to 720, it scrolls sideways on a phone.

    Raises:
        ValueError: it says nothing, or is too wide.
    """

    def matrix(
        self,
        x: float,
        y: float,
        values: Sequence[Sequence[object]],
        *,
        cell: float = 26,
        height: float | None = None,
        rows: Sequence[str] = (),
        columns: Sequence[str] = (),
        tone: str | None = "blue",
        below_zero: str = "orange",
        heat: bool = True,
        digits: int = 2,
        marked: Collection[tuple[int, int]] = (),
        numbers: bool = True,
    ) -> Grid:
        """Numbers in cells, tinted by their size.

        Args:
            x: of the cells' left side; the names of rows stand left of it.
            y: of the cells' upper side; the names of columns stand above it.
            values: rows, an array or a tensor of two dimensions. None, False and minus infinity are cells
                that are masked: struck out. True is one that is not; a text is shown as it is.
            cell: the width of a cell.
            height: of a cell; by default its width.
            rows: a name for each row.
            columns: a name for each column.
            tone: the tint of numbers above zero, and of texts.
            below_zero: the tint of numbers below.
            heat: tint a number by its share of the largest; otherwise all alike.
            digits: decimals of numbers that are not whole.
            marked: rows and columns of cells with a strong outline.
            numbers: show them; otherwise only the tints.
        """
        table = [[_plain(value) for value in _plain(row)] for row in _plain(values)]
        if len({len(row) for row in table}) != 1:
            raise ValueError(f"The rows have {[len(row) for row in table]} cells; expected as many in each.")
        height = height or cell
        grid = Grid(x, y, cell * len(table[0]), height * len(table), len(table), len(table[0]))
        self._covered(grid, "The matrix")
        numeric = [abs(value) for row in table for value in row if _is_number(value)]
        largest = max(numeric, default=0) if heat else 0
        for row, line in enumerate(table):
            for column, value in enumerate(line):
                place = grid.cell(row, column)
                if value is None or value is False or value == -math.inf:
                    self._masked(place)
                    continue
                strength = 0.05 + 0.45 * abs(value) / largest if largest and _is_number(value) else 0.16
                hue = below_zero if _is_number(value) and value < 0 else tone
                self._draw(rectangle(place), hue, width=0, fill=strength if hue else 0)
                self._draw(rectangle(place), None, width=0.8, opacity=0.5)
                if numbers and value is not True:
                    self._number(place, _shown(value, digits))
        for row, column in marked:
            self._draw(rectangle(grid.cell(row, column), 2), None, width=2.2)
        for number, name in enumerate(rows):
            self.text(x - 6, grid.row(number).middle[1], name, size=SMALLEST_TEXT, anchor="end")
        for number, name in enumerate(columns):
            self.text(grid.column(number).middle[0], y - 9, name, size=SMALLEST_TEXT)
        return grid

    def dial(
        self, x: float, y: float, radius: float, angle: float, text: str = "", *, tone: str = "blue"
    ) -> Place:
        """A circle around a point, whose hand has turned by an angle in radians against the clock.

        It begins at the right. What it has swept since its last full turn is tinted. The text stands below.
        """
        place = self._covered(Place(x - radius, y - radius, 2 * radius, 2 * radius), "The dial")
        tip, swept = ring((x, y), radius, angle), math.fmod(angle, math.tau)
        self._draw(circle((x, y), radius), None, width=1, opacity=0.45)
        self._draw(f"path d='M{listed([(x, y), (x + radius, y)])}'", None, width=1, opacity=0.45)
        self._draw(f"path d='{sector((x, y), 0.6 * radius, swept)}'", tone, width=0, fill=0.3)
        self._draw(f"path d='M{listed([(x, y), tip])}'", tone, width=2.2)
        self._draw(circle(tip, 3), tone, width=0, fill=1)
        return around(place, self.text(x, y + radius + 9, text, size=SMALLEST_TEXT)) if text else place

    def axes(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        xs: Point,
        ys: Point,
        x_ticks: Ticks = (),
        y_ticks: Ticks = (),
        x_label: str = "",
        y_label: str = "",
    ) -> Axes:
        """Two axes, for ``d.line([axes.point(v, f(v)) for v in ...])``. They cross at zero, if it is there.

        Args:
            x: of the left side of the area.
            y: of its upper side.
            width: in units.
            height: in units.
            xs: the least and the largest value across.
            ys: the least and the largest value upwards.
            x_ticks: values that are named, or their names by value.
            y_ticks: the same upwards.
            x_label: above the right end of the axis.
            y_label: above the upper end of the other.
        """
        axes = Axes(x, y, width, height, xs, ys)
        self._covered(axes, "The axes")
        cross_x, cross_y = min(max(0, xs[0]), xs[1]), min(max(0, ys[0]), ys[1])
        for ends in ([(xs[0], cross_y), (xs[1], cross_y)], [(cross_x, ys[0]), (cross_x, ys[1])]):
            self._draw(f"path d='M{listed(axes.point(*end) for end in ends)}'", None, width=1, opacity=0.6)
        for value, name in _ticks(x_ticks):
            across, down = axes.point(value, cross_y)
            self._draw(f"path d='M{short(across)} {short(down - 2.5)}v5'", None, width=1, opacity=0.6)
            self.text(across, down + 11, name, size=SMALLEST_TEXT)
        for value, name in _ticks(y_ticks):
            across, down = axes.point(cross_x, value)
            self._draw(f"path d='M{short(across - 2.5)} {short(down)}h5'", None, width=1, opacity=0.6)
            self.text(across - 6, down, name, size=SMALLEST_TEXT, anchor="end")
        if x_label:
            self.text(
                axes.right,
                axes.point(0, cross_y)[1] - 9,
                x_label,
                size=SMALLEST_TEXT,
                anchor="end",
                muted=True,
            )
        if y_label:
            self.text(axes.point(cross_x, 0)[0], y - 9, y_label, size=SMALLEST_TEXT, muted=True)
        return axes

    def timeline(
        self,
        x: float,
        y: float,
        width: float,
        lanes: Mapping[str, Iterable[tuple[float, float, str, str]]],
        *,
        end: float,
        ticks: Ticks = (),
        label: str = "",
        height: float = 22,
        gap: float = 6,
    ) -> Axes:
        """Lanes in which spans of time are boxes. Returns the axes of time, for what else is to stand there.

        Args:
            x: where time 0 stands; the names of the lanes stand left of it.
            y: of the upper side of the first lane.
            width: of the time from 0 to ``end``.
            lanes: by name, the spans ``(start, end, text, tone)`` in each.
            end: the last moment.
            ticks: moments that are named, or their names by moment.
            label: of the axis of time, below its right end.
            height: of a lane.
            gap: between lanes.
        """
        axes = self.axes(
            x, y - gap, width, len(lanes) * (height + gap) + gap, xs=(0, end), ys=(0, 1), x_ticks=ticks
        )
        for number, (name, spans) in enumerate(lanes.items()):
            top = y + number * (height + gap)
            self.text(x - 6, top + height / 2, name, size=SMALLEST_TEXT, anchor="end")
            for start, stop, text, tone in spans:
                left, right = axes.point(start, 0)[0], axes.point(stop, 0)[0]
                self.box(
                    left, top, right - left, height, text, tone=tone, size=SMALLEST_TEXT, round=3, fill=0.24
                )
        if label:
            self.text(axes.right, axes.bottom + 25, label, size=SMALLEST_TEXT, anchor="end", muted=True)
        return axes

    def tree(
        self,
        x: float,
        y: float,
        width: float,
        tree: str | Sequence,
        *,
        level: float = 44,
        height: float = 24,
        tone: str = "blue",
    ) -> Place:
        """What is joined in pairs, as a tokenizer merges the pieces of a word. Returns the place of the root.

        Args:
            x: of the left side.
            y: of the upper side of the root.
            width: that the leaves share.
            tree: a leaf, which is a text, or a pair of trees; a third member is a note, such as when
                they were joined.
            level: from one row down to the next.
            height: of a box.
            tone: of what was joined.
        """
        share, deepest = width / len(leaves(tree)), _depth(tree)

        def branch(tree: str | Sequence, left: float) -> Place:
            text, top = "".join(leaves(tree)), y + level * (deepest - _depth(tree))
            if isinstance(tree, str):
                return self.box(left + 0.12 * share, top, 0.76 * share, height, text)
            first, second, *note = tree
            children = branch(first, left), branch(second, left + share * len(leaves(first)))
            middle, wide = around(*children).middle[0], text_width(text, 12) + 16
            place = self.box(middle - wide / 2, top, wide, height, text, tone=tone)
            for child in children:
                tail, tip = child.at(0.5, 0), place.at(0.5, 1)
                path = f"M{listed([tail])}C{listed([*bends(tail, tip, across=False), tip])}"
                self._draw(f"path d='{path}'", None)
            if note:
                self.text(
                    place.right + 6, place.middle[1], note[0], size=SMALLEST_TEXT, anchor="start", muted=True
                )
            return place

        return branch(tree, x)

    def _masked(self, place: Place) -> None:
        self._draw(rectangle(place), None, width=0.8, fill=0.06, opacity=0.5)
        stroke = listed([place.at(0, 1), place.at(1, 0)])
        self._draw(f"path d='M{stroke}'", None, width=0.8, opacity=0.35)

    def _number(self, place: Place, text: str) -> None:
        if (needed := text_width(text, SMALLEST_TEXT)) > place.width:
            raise ValueError(f"{text!r} is about {needed:.0f} units wide; its cell has {place.width:g}.")
        self.text(*place.middle, text, size=SMALLEST_TEXT)


def _plain(values: object) -> object:
    """What an array, a tensor or one of their numbers holds, in lists and numbers of Python."""
    return values.tolist() if hasattr(values, "tolist") else values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: object, digits: int) -> str:
    if not _is_number(value):
        return str(value)
    return (str(value) if isinstance(value, int) else f"{value:.{digits}f}").replace("-", "−")


def _ticks(ticks: Ticks) -> list[tuple[float, str]]:
    if isinstance(ticks, Mapping):
        return list(ticks.items())
    return [(value, f"{value:,g}".replace("-", "−")) for value in ticks]


def _depth(tree: str | Sequence) -> int:
    return 0 if isinstance(tree, str) else 1 + max(map(_depth, tree[:2]))
