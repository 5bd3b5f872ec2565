"""What drawings are made of: text, boxes, lines, arrows and braces, with checks that keep them readable."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape

from .paths import bends, brace, broken_line, circle, detour, listed, rectangle, ring, short, short_of
from .places import Place, Point, around, facing, place_of, runs, text_width
from .style import PALETTE, css_color
from .svg import FULL_WIDTH, document, picture

SMALLEST_TEXT = 11
WIDEST = 720
_LINE = 1.25  # the height of a line, in sizes of its text


class Canvas:
    """The size of a drawing and its parts so far; what `Drawing` builds on."""

    def __init__(self, alt: str, width: float = FULL_WIDTH) -> None:
        if not isinstance(alt, str) or not alt.strip():
            raise ValueError(
                f"alt is {alt!r}; expected a sentence: what the drawing shows, for readers who do not see it."
            )
        if not 0 < width <= WIDEST:
            raise ValueError(
                f"The drawing is {width:g} units wide; expected at most {WIDEST}, better {FULL_WIDTH}."
            )
        self.alt, self.width = alt.strip(), width
        self._parts: list[str] = []
        self._bottom = 0.0

    @property
    def height(self) -> float:
        """How far down its parts reach, and a margin, in units."""
        return round(self._bottom) + 4

    def svg(self, height: float | None = None) -> str:
        """The drawing as an SVG document, as high as its parts reach, or so many units."""
        return document(self.width, height or self.height, "".join(self._parts), self._scrolls)

    def __repr__(self) -> str:
        return f"Drawing: {self.alt}"

    def _repr_html_(self) -> str:
        return picture(self.svg(), self.alt, self._scrolls)

    @property
    def _scrolls(self) -> bool:
        return self.width > FULL_WIDTH

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        anchor: str = "middle",
        bold: bool = False,
        muted: bool = False,
        clear: bool = False,
    ) -> Place:
        """Text at a point: around it, from it on (``anchor="start"``), or up to it (``anchor="end"``).

        With ``clear``, lines that pass behind the text are interrupted.
        """
        if size < SMALLEST_TEXT:
            raise ValueError(
                f"The text {text!r} has size {size:g}; expected at least {SMALLEST_TEXT}, for phones."
            )
        lines = text.split("\n")
        width, height = max(text_width(line, size, bold) for line in lines), _LINE * size * len(lines)
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
        place = self._covered(Place(left, y - height / 2, width, height), f"The text {text!r}")
        look = " font-weight='600'" * bold + " opacity='.75'" * muted
        look += " stroke='var(--ground)' stroke-width='5' paint-order='stroke'" * clear
        for number, line in enumerate(lines):
            baseline = place.y + _LINE * size * (number + 0.5) + 0.35 * size
            where = f"x='{short(x)}' y='{short(baseline)}' font-size='{size:g}' text-anchor='{anchor}'"
            self._parts.append(f"<text {where}{look}>{_spans(line, size)}</text>")
        return place

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        *,
        note: str = "",
        tone: str | None = None,
        size: float = 12,
        bold: bool = False,
        dashed: bool = False,
        fill: float = 0.16,
        round: float = 6,
        pile: int = 1,
        solid: bool = False,
    ) -> Place:
        """A box with a text, and a quieter note below it, such as a shape.

        Args:
            x: of its left side.
            y: of its upper side.
            width: in units.
            height: in units.
            text: in its middle.
            note: in the line below the text.
            tone: a colour of the palette; without one it has an outline of ink.
            size: of the text.
            bold: for the text.
            dashed: its outline.
            fill: how strong its tint is, 0 to 1.
            round: the radius of its corners.
            pile: how many there are, of which the others look out behind it, to the right and above.
            solid: it hides what it lies on, as something that passes in front.
        """
        place = self._covered(Place(x, y, width, height), f"The box {text!r}")
        for line in (*text.split("\n"), note):
            if (needed := text_width(line, size, bold and line != note)) > width:
                raise ValueError(f"{line!r} is about {needed:.0f} units wide; its box has {width:g}.")
        for behind in reversed(range(pile)):
            card = self._covered(Place(x + 4 * behind, y - 4 * behind, width, height), "The pile")
            if pile > 1 or solid:  # it hides what it lies on
                self._parts.append(f"<{rectangle(card, round)} fill='var(--ground)'/>")
            self._draw(rectangle(card, round), tone, dashed=dashed, fill=fill if tone else 0)
        middle_x, middle_y = place.middle
        lines = text.count("\n") + 1 if text else 0
        if text:
            self.text(middle_x, middle_y - bool(note) * _LINE * size / 2, text, size=size, bold=bold)
        if note:
            self.text(middle_x, middle_y + lines * _LINE * size / 2, note, size=SMALLEST_TEXT, muted=True)
        return place

    def row(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        texts: Sequence[str],
        *,
        gap: float = 4,
        tone: str | None = None,
    ) -> list[Place]:
        """Boxes side by side, each of this width and height."""
        return [
            self.box(x + number * (width + gap), y, width, height, text, tone=tone, round=4)
            for number, text in enumerate(texts)
        ]

    def group(self, *places: Place, text: str = "", tone: str | None = None, pad: float = 9) -> Place:
        """A dashed frame around some places, with a text in its upper left corner."""
        inside, room = around(*places).grown(pad), 16 if text else 0
        frame = Place(inside.x, inside.y - room, inside.width, inside.height + room)
        self._draw(rectangle(self._covered(frame, f"The group {text!r}"), 10), tone, width=1.2, dashed=True)
        if text:
            self.text(frame.x + 8, frame.y + 12, text, size=SMALLEST_TEXT, anchor="start", muted=True)
        return frame

    def sign(self, x: float, y: float, text: str, *, radius: float = 10, tone: str | None = None) -> Place:
        """A circle around a point with a sign in it, such as + or ×."""
        place = self._covered(Place(x - radius, y - radius, 2 * radius, 2 * radius), f"The sign {text!r}")
        self._draw(circle((x, y), radius), tone, fill=0.16 if tone else 0)
        self.text(x, y, text, size=14)
        return place

    def line(
        self,
        points: Iterable[Point],
        *,
        tone: str | None = None,
        width: float = 1.6,
        dashed: bool = False,
        fill: float = 0,
    ) -> None:
        """A line through points; with ``fill``, 0 to 1, what it encloses is tinted."""
        points = list(points)
        self._covered(around(*map(place_of, points)), "The line")
        self._draw(f"path d='M{listed(points)}'", tone, width=width, dashed=dashed, fill=fill)

    def arrow(
        self,
        start: Place | Point,
        end: Place | Point,
        text: str = "",
        *,
        bend: float = 0,
        tone: str | None = None,
        width: float = 1.6,
        dashed: bool = False,
        straight: bool = False,
    ) -> None:
        """An arrow from one place, or point, to another: straight, or a gentle S where they are not in line.

        Args:
            start: where it begins.
            end: where it points to.
            text: beside its middle.
            bend: how far it goes out of its way around what stands between: on the right, or below if it runs
                across; on the left, or above, if negative.
            tone: a colour of the palette.
            width: of the line.
            dashed: its line.
            straight: slanting, without the S.
        """
        start, end = place_of(start), place_of(end)
        tail, tip, across = facing(start, end)
        corners = detour(start, end, bend, across) if bend else [tail, tip]
        self._covered(around(*map(place_of, corners)), "The arrow")
        before, tip = corners[-2:]
        if not bend and not straight:
            away, before = bends(tail, tip, across)
        head = max(7, 3.2 * width)
        stop = short_of(tip, before, head - 1)
        if bend or straight:
            path = broken_line([*corners[:-1], stop])
        else:
            path = f"M{listed([tail])}C{listed([away, before, stop])}"
        self._draw(f"path d='{path}'", tone, width=width, dashed=dashed)
        back = math.atan2(tip[1] - before[1], before[0] - tip[0])
        sides = ring(tip, head, back - 0.42), ring(tip, head, back + 0.42)
        self._draw(f"path d='M{listed([tip, *sides])}z'", tone, width=0, fill=1)
        if text:
            middle = around(*map(place_of, corners[-3:-1] if bend else corners)).middle
            self.text(*middle, text, size=SMALLEST_TEXT, clear=True)

    def bracket(self, place: Place, text: str = "", *, side: str = "bottom", gap: float = 4) -> None:
        """A brace along one side of a place, ``top``, ``bottom``, ``left`` or ``right``, with a text."""
        across, out = side in ("top", "bottom"), -1 if side in ("top", "left") else 1
        edges = {"top": place.y, "bottom": place.bottom, "left": place.x, "right": place.right}
        edge = edges[side] + out * gap
        low, high = (place.x, place.right) if across else (place.y, place.bottom)
        self._draw(f"path d='{brace(low, high, edge, 5 * out, across)}'", None, width=1.2)
        if text and across:
            half = _LINE * SMALLEST_TEXT * (text.count("\n") + 1) / 2
            self.text((low + high) / 2, edge + out * (12 + half), text, size=SMALLEST_TEXT)
        elif text:
            anchor = "start" if out > 0 else "end"
            self.text(edge + out * 15, (low + high) / 2, text, size=SMALLEST_TEXT, anchor=anchor)

    @contextmanager
    def faded(self, fade: bool = True) -> Iterator[None]:
        """What is drawn inside is pale, as what is still to come; with ``fade`` False it is as usual."""
        self._parts.append("<g opacity='.28'>" if fade else "<g>")
        yield
        self._parts.append("</g>")

    def _covered(self, place: Place, what: str) -> Place:
        """Note how far down the drawing reaches, and refuse what sticks out of it elsewhere."""
        if min(place.x, place.y) < -1 or place.right > self.width + 1:
            raise ValueError(
                f"{what} covers {place.x:.0f} to {place.right:.0f} across and begins {place.y:.0f} down; "
                f"the drawing has 0 to {self.width:g} across and begins at 0."
            )
        self._bottom = max(self._bottom, place.bottom)
        return place

    def _draw(
        self,
        element: str,
        tone: str | None,
        *,
        width: float = 1.4,
        dashed: bool = False,
        fill: float = 0,
        opacity: float = 1,
    ) -> None:
        if tone is not None and tone not in PALETTE:
            raise ValueError(f"tone is {tone!r}; expected one of {', '.join(PALETTE)}.")
        color = css_color(tone) if tone else "currentColor"
        look = f" fill='{color}' fill-opacity='{fill:.2g}'" if fill else " fill='none'"
        look += f" stroke='{color}' stroke-width='{width:g}'" if width else ""
        look += " stroke-dasharray='5 4'" * dashed + (f" opacity='{opacity:g}'" if opacity < 1 else "")
        self._parts.append(f"<{element}{look}/>")


def _spans(line: str, size: float) -> str:
    """A line of text with what stands below and above it."""
    spans, height = [], 0.0
    for text, where in runs(line):
        level = {"": 0.0, "_": 0.25, "^": -0.38}[where] * size
        small = f" font-size='{short(0.78 * size)}'" if where else ""
        shift = f" dy='{short(level - height)}'" if level != height else ""
        spans.append(f"<tspan{shift}{small}>{escape(text)}</tspan>" if shift or small else escape(text))
        height = level
    return "".join(spans)
