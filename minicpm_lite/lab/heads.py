"""Where all heads of a decoder look: each small, one large; touch a token, and it shows whom it asks.

    lab.Heads(["the", "cats", "over", "there"], weights, "Attention weights of one block of two heads.")

``weights`` are those of one text, (blocks, heads, tokens, tokens), as `Watched` notes them.

It works by mouse, touch and keyboard (Tab, then the arrow keys), in a page without a kernel or a network. The
weights are stored once, as whole hundredths, and drawn by a few lines of script. A list says whom each token
asks most: for screen readers, on paper, and where scripts do not run.
"""

import json
import math
from collections.abc import Sequence
from html import escape

from .canvas import SMALLEST_TEXT
from .drawing import Drawing
from .paths import rectangle, short
from .places import Place, text_width
from .style import KEEP_KEYS, THEME, css_color
from .svg import FULL_WIDTH, UNFOLD, image

_LEVELS = (0.08, 0.25, 0.5, 0.75)  # a share above one of them is drawn in its tint
_ROW = 20
_LEFT = 58  # of the large triangle; names of rows stand before it
_SMALL = 44

_STYLE = (
    "<style>.lab-heads{margin:1rem auto;max-width:34rem;text-align:left}"
    ".lab-heads .mark{fill:var(--ground);fill-opacity:0;cursor:pointer;outline:none}"
    ".lab-heads .mark[aria-checked=true]{stroke:currentColor;stroke-width:2.4}"
    f".lab-heads .mark:focus-visible{{stroke:{css_color('orange')};stroke-width:3.4}}"
    ".lab-heads [role=status]{min-height:3.2rem;margin:.4rem 0 0}</style>"
)
_SCRIPT = (
    """(() => {
const box = document.currentScript.parentElement, told = box.querySelector('[role=status]');
const svg = ("""
    + UNFOLD
    + """)(box.querySelector('img'));
const {tokens, shares, names, small, chips} =
JSON.parse(box.querySelector('[type="application/json"]').textContent);
const make = (name, look, parent) => {
const mark = document.createElementNS(svg.namespaceURI, name);
for (const key in look) mark.setAttribute(key, look[key]);
return parent.appendChild(mark); };
for (const part of svg.children) part.setAttribute('aria-hidden', true);
svg.setAttribute('role', 'group');
const cells = [...svg.querySelectorAll('.share')], title = svg.querySelector('.title');
const drawn = (name, look) => tokens.map(() => make(name, {'aria-hidden': true, ...look}, svg));
const numbers = drawn('text', {'font-size': 11, 'text-anchor': 'middle'});
const arcs = drawn('path', {fill: 'none', class: 'arc'});
const chosen = [+box.dataset.head, +box.dataset.asks];
const group = (which, label, places, names, wide) => {
const all = make('g', {role: 'radiogroup', 'aria-label': label}, svg);
return places.map(([x, y, width, height], place) => {
const look = {x, y, width, height, rx: 3, class: 'mark', role: 'radio', 'aria-label': names[place]};
const mark = make('rect', look, all);
mark.addEventListener('click', () => { chosen[which] = place; show(); mark.focus({preventScroll: true}); });
mark.addEventListener('keydown', event => {
const by = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: wide, ArrowUp: -wide}[event.key];
if (!by) return;
event.preventDefault(); event.stopPropagation();
if (place + by < 0 || place + by >= places.length) return;
chosen[which] = place + by; show(); marks[which][place + by].focus({preventScroll: true}); });
return mark; }); };
const show = () => {
const [head, asks] = chosen, own = shares[head], start = asks * (asks + 1) / 2;
title.textContent = names[head];
cells.forEach((cell, place) => cell.setAttribute('fill-opacity', (.65 * own[place] / 100).toFixed(3)));
marks.forEach((group, which) => group.forEach((mark, place) => {
mark.setAttribute('aria-checked', place === chosen[which]);
mark.setAttribute('tabindex', place === chosen[which] ? 0 : -1); }));
const middle = chip => chip[0] + chip[2] / 2, below = chips[0][1] + chips[0][3] + 2;
tokens.forEach((_, asked) => {
const share = asked <= asks ? own[start + asked] : 0, shown = asked <= asks, cell = cells[start + asked];
numbers[asked].textContent = shown ? share : '';
if (shown) { const {x, y, width, height} = cell.getBBox();
numbers[asked].setAttribute('x', x + width / 2); numbers[asked].setAttribute('y', y + height / 2 + 4); }
const from = middle(chips[asks]), to = middle(chips[asked]);
const deep = below + 24 + 6 * Math.sqrt(asks - asked + .3);
arcs[asked].setAttribute('d', share < 3 ? '' : from === to ? `M${from - 6} ${below}q6 16 12 0` :
`M${from} ${below}C${from} ${deep} ${to} ${deep} ${to} ${below}`);
arcs[asked].setAttribute('stroke-width', Math.max(.8, share / 14)); });
const asked = tokens.map((token, place) => [own[start + place], token]).slice(0, asks + 1)
.sort((one, other) => other[0] - one[0]).slice(0, 3).filter(each => each[0] > 2);
told.textContent = `${names[head][0].toUpperCase()}${names[head].slice(1)}: “${tokens[asks]}” looks at ` +
asked.map(([share, token]) => `“${token}” (${share} %)`).join(', ') + '.'; };
const marks = [];
marks.push(group(0, 'Head', small, names, +box.dataset.wide));
marks.push(group(1, 'Token that asks', chips, tokens, 1));
show();
})()"""
)


class Heads:
    """Attention weights of all heads on one text, to be looked at. Make it the last expression of a cell.

    Args:
        tokens: the text, 3 to 12 short pieces.
        weights: (blocks, heads, tokens, tokens) of a causal model: row t holds the shares that token t gives.
        alt: a sentence that says what it shows, for readers who do not see it.
        start: block, head and token that are shown first, counted from 0; the last token, if left out.

    Raises:
        ValueError: the shapes do not fit, rows are no shares of tokens up to their own, a piece is too long
            for its place, or there is no such start.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        weights: Sequence,
        alt: str,
        start: tuple[int, int, int] | None = None,
    ) -> None:
        table = weights.tolist() if hasattr(weights, "tolist") else weights
        self.tokens, self.alt, count = list(tokens), alt, len(tokens)
        if not 3 <= count <= 12:
            raise ValueError(f"The text has {count} pieces; expected 3 to 12, for phones.")
        self.blocks, self.heads = len(table), len(table[0])
        self.shares, self.names = [], []
        for block, own in enumerate(table):
            for head, rows in enumerate(own):
                self.names.append(f"block {block + 1}, head {head + 1}")
                self.shares.append(_hundredths(rows, count, self.names[-1]))
        block, head, asks = start or (0, 0, count - 1)
        if not (0 <= block < self.blocks and 0 <= head < self.heads and 0 <= asks < count):
            raise ValueError(f"start is {start}; expected block, head and token, each counted from 0.")
        self.start, self.asks = block * self.heads + head, asks

    def __repr__(self) -> str:
        return "\n".join([f"Heads: {self.alt}", *(f"{name}: {line}" for name, line in self._lines())])

    def _lines(self) -> list[tuple[str, str]]:
        """For each head, whom each token asks most."""
        lines = []
        for name, own in zip(self.names, self.shares, strict=True):
            asked = []
            for asks, token in enumerate(self.tokens):
                row = own[asks * (asks + 1) // 2 :][: asks + 1]
                asked.append(f"{token} → {self.tokens[row.index(max(row))]} {max(row)} %")
            lines.append((name, ", ".join(asked)))
        return lines

    def _drawing(self) -> tuple[Drawing, list[Place], list[Place]]:
        """All heads small, the first one large, tokens below; and the places that can be touched."""
        d, count = Drawing(self.alt), len(self.tokens)
        step, cell = (FULL_WIDTH - _LEFT) / self.heads, (FULL_WIDTH - _LEFT - 4) / count
        for token in self.tokens:
            if (needed := text_width(token, SMALLEST_TEXT)) > min(cell, _LEFT - 8):
                raise ValueError(f"{token!r} is about {needed:.0f} units wide; its place has {cell:.0f}.")
        small = []
        for head in range(self.heads):
            d.text(_LEFT + step * (head + 0.5), 8, f"head {head + 1}", size=SMALLEST_TEXT, muted=True)
        for number, own in enumerate(self.shares):
            block, head = divmod(number, self.heads)
            place = Place(_LEFT + step * (head + 0.5) - _SMALL / 2, 18 + (_SMALL + 8) * block, _SMALL, _SMALL)
            small.append(place)
            d._covered(place, "A head")
            d._parts += _small(own, count, place)
        for block in range(self.blocks):
            middle = 18 + (_SMALL + 8) * block + _SMALL / 2
            d.text(_LEFT - 4, middle, f"block {block + 1}", size=SMALLEST_TEXT, anchor="end", muted=True)
        top = d.height + 18
        d._parts.append(
            f"<text class='title' x='{_LEFT}' y='{short(top - 2)}' font-size='13' font-weight='600'>"
            f"{self.names[self.start]}</text>"
        )
        d.text(FULL_WIDTH - 4, top - 6, "weights in %", size=SMALLEST_TEXT, anchor="end", muted=True)
        for asks, token in enumerate(self.tokens):
            y = top + 4 + _ROW * asks
            d.text(_LEFT - 6, y + _ROW / 2, token, size=SMALLEST_TEXT, anchor="end")
            for asked in range(asks + 1):
                place = d._covered(Place(_LEFT + cell * asked, y, cell, _ROW), "A share")
                share = self.shares[self.start][asks * (asks + 1) // 2 + asked]
                d._parts.append(
                    f"<{rectangle(place)} class='share' fill='{css_color('purple')}' "
                    f"fill-opacity='{0.65 * share / 100:.3f}' stroke='currentColor' stroke-opacity='.3' "
                    "stroke-width='.7'/>"
                )
        bottom = top + 4 + _ROW * count + 6
        chips = []
        for number, token in enumerate(self.tokens):
            chips.append(Place(_LEFT + cell * number + 1, bottom, cell - 2, 30))
            d.box(*_corners(chips[-1]), token, size=SMALLEST_TEXT, round=3)
        deepest = bottom + 30 + 2 + 0.75 * (24 + 6 * math.sqrt(count))
        d._covered(Place(0, bottom, 1, deepest - bottom), "The arcs")
        return d, small, chips

    def _repr_html_(self) -> str:
        d, small, chips = self._drawing()
        data = {
            "tokens": self.tokens, "shares": self.shares, "names": self.names,
            "small": [_corners(place) for place in small], "chips": [_corners(place) for place in chips],
        }  # fmt: skip
        stored = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", r"\u003c")
        items = "".join(f"<li>{escape(name)}: {escape(line)}</li>" for name, line in self._lines())
        arcs = f"<style>.lab-heads .arc{{stroke:{css_color('purple')};stroke-opacity:.75}}</style>"
        return (
            f'{THEME}{_STYLE}{arcs}<div class="lab-piece lab-picture lab-heads" {KEEP_KEYS} '
            f'data-head="{self.start}" data-asks="{self.asks}" data-wide="{self.heads}">'
            f"{image(d.svg(), self.alt)}"
            '<p role="status">Run this cell to choose a head and a token; the list below has all heads.</p>'
            f"<details><summary {KEEP_KEYS}>Whom each token asks most, as text</summary><ol>{items}</ol>"
            f'</details><script type="application/json">{stored}</script><script>{_SCRIPT}</script></div>'
        )


def _hundredths(rows: Sequence[Sequence[float]], count: int, name: str) -> list[int]:
    """The rows up to the diagonal, as whole hundredths."""
    if len(rows) != count or any(len(row) != count for row in rows):
        raise ValueError(f"{name} has no weights of {count} by {count}, as many as the text has pieces.")
    for asks, row in enumerate(rows):
        whole = abs(sum(row[: asks + 1]) - 1) <= 1e-3  # which no sum of nan is
        if not whole or any(row[asks + 1 :]) or min(row) < 0:
            raise ValueError(f"Row {asks} of {name} is no share of 1 among the tokens up to its own.")
    return [round(100 * share) for asks, row in enumerate(rows) for share in row[: asks + 1]]


def _small(own: Sequence[int], count: int, place: Place) -> list[str]:
    """One head in one tint a level, each a single path."""
    cell = place.width / count
    frame = f"<{rectangle(place)} fill='none' stroke='currentColor' stroke-opacity='.35' stroke-width='.8'/>"
    paths = {}
    for asks in range(count):
        for asked in range(asks + 1):
            share = own[asks * (asks + 1) // 2 + asked] / 100
            level = sum(share > least for least in _LEVELS)
            if level:
                at = f"M{short(place.x + cell * asked)} {short(place.y + cell * asks)}"
                paths[level] = paths.get(level, "") + f"{at}h{short(cell)}v{short(cell)}h-{short(cell)}z"
    tint = css_color("purple")
    return [frame, *(f"<path d='{path}' fill='{tint}' fill-opacity='{level / len(_LEVELS):g}'/>"
                     for level, path in sorted(paths.items()))]  # fmt: skip


def _corners(place: Place) -> tuple[float, float, float, float]:
    return tuple(round(side, 1) for side in (place.x, place.y, place.width, place.height))
