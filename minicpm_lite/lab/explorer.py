"""One figure, two lives: an ipywidgets slider in a live kernel, plain HTML in the static book.

Both are made from the same frames, drawn once for each value. The HTML needs no kernel, no network and no
library: a drawing, a range input and a few lines of script. It works by mouse, touch and keyboard; a screen
reader hears the value together with the description of its frame. A film, whose values are steps in time, has
a button that plays it, and may rest at some of them. Where scripts do not run (a notebook that
Jupyter does not trust yet) the first frame shows, with a line that says what to do.

Frames are SVGs and differ in little: each is stored as a list of its elements, and each element once.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from html import escape

from ..config import require_positive_number
from ..optional import require
from .drawing import Drawing
from .plots import plot_svg
from .style import KEEP_KEYS, THEME
from .svg import UNFOLD, image, inline

ipywidgets = require("ipywidgets", install="minicpm_lite[notebooks]", purpose="use the book's notebooks")
plt = require("matplotlib.pyplot", install="minicpm_lite[notebooks]", purpose="use the book's notebooks")

_SCRIPT = (
    """(() => {
const figure = document.currentScript.parentElement;
const slider = figure.querySelector('input'), output = figure.querySelector('output');
const button = figure.querySelector('button');
const {parts, frames} = JSON.parse(figure.querySelector('[type="application/json"]').textContent);
let svg = ("""
    + UNFOLD
    + """)(figure.querySelector('img'));
const box = document.createElement('div');
const show = () => { const frame = frames[+slider.value];
box.innerHTML = frame.parts.map(part => parts[part]).join('');
svg.replaceWith(box.firstElementChild); svg = figure.querySelector('svg');
svg.setAttribute('aria-label', frame.alt); output.textContent = frame.text;
slider.setAttribute('aria-valuetext', frame.text + '. ' + frame.alt); };
let timer = 0;
const stop = () => { clearTimeout(timer); timer = 0;
button?.setAttribute('aria-label', 'Play'); };
const wait = () => { timer = setTimeout(next, 1000 * JSON.parse(button.dataset.seconds)[slider.value]); };
const next = () => { if (+slider.value === +slider.max || !figure.isConnected) return stop();
slider.value = +slider.value + 1; show(); wait(); };
if (button) { button.hidden = false; button.addEventListener('click', () => {
if (timer) return stop();
if (+slider.value === +slider.max) { slider.value = 0; show(); }
wait();
button.setAttribute('aria-label', 'Pause'); }); }
slider.addEventListener('input', () => { stop(); show(); }); show();
figure.querySelector('small').hidden = true;
})()"""
)


class Explorer:
    """A figure drawn once for each value of a slider. Make it the last expression of a cell.

    Args:
        draw: takes one value and returns a matplotlib figure or a drawing.
        values: what the slider can be set to: numbers or words, at least two.
        label: what the slider sets, with its unit.
        alt: takes one value and returns one sentence that says what the frame shows.
        start: index of the value shown first.
        seconds: for a film, how long a button shows each value, or a function that says it for a value, so
            that the film rests where there is more to read; without, there is no button.

    Raises:
        ValueError: fewer than two values, `start` is not the index of one, or ``seconds`` is not above 0.
        TypeError: `draw` returned neither, or `alt` no sentence.
    """

    def __init__(
        self,
        draw: Callable[[object], plt.Figure | Drawing],
        values: Sequence[object],
        label: str,
        alt: Callable[[object], str],
        start: int = 0,
        seconds: float | Callable[[object], float] | None = None,
    ) -> None:
        if len(values) < 2:
            raise ValueError(f"An Explorer moves between at least two values; it was given {len(values)}.")
        if not 0 <= start < len(values):
            raise ValueError(f"start is {start}; expected the index of a value, 0 to {len(values) - 1}.")
        self.label, self.start = label, start
        self.seconds = [] if seconds is None else [_seconds(seconds, value) for value in values]
        self.texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        self.alts = [_sentence(alt, value) for value in values]
        content = json.dumps([label, self.texts, self.alts])
        self.identity = "explorer-" + hashlib.sha256(content.encode()).hexdigest()[:10]
        drawn = [_drawn(draw, value, self.identity) for value in values]
        highest = max((each.height for each in drawn if isinstance(each, Drawing)), default=0)
        # one height for all, or the slider below would move
        self.frames = [each.svg(highest) if isinstance(each, Drawing) else each for each in drawn]

    def html(self) -> str:
        """The static life."""
        elements = [re.split(r"(?=<)", frame) for frame in self.frames]
        places = {part: place for place, part in enumerate(dict.fromkeys(sum(elements, [])))}
        frames = [
            {"text": text, "alt": alt, "parts": [places[part] for part in parts]}
            for text, alt, parts in zip(self.texts, self.alts, elements, strict=True)
        ]
        data = json.dumps(
            {"parts": list(places), "frames": frames}, ensure_ascii=False, separators=(",", ":")
        )
        data = data.replace("<", r"\u003c")
        text, alt = escape(self.texts[self.start]), escape(self.alts[self.start])
        slider_style = "flex:1 1 12rem;min-width:0;height:2.75rem;margin:0"
        return (
            f'{THEME}<figure class="lab-piece" id="{self.identity}" style="margin:1rem auto;max-width:42rem">'
            f"{image(self.frames[self.start], self.alts[self.start])}"
            f'<div style="display:flex;align-items:center;gap:1rem">{self._button()}'
            '<label style="display:flex;flex-wrap:wrap;align-items:center;column-gap:1rem;flex:1">'
            f"<span>{escape(self.label)}</span>"
            f'<input type="range" {KEEP_KEYS} min="0" max="{len(self.frames) - 1}" value="{self.start}" '
            f'aria-valuetext="{text}. {alt}" style="{slider_style}"></label>'
            f'<output aria-hidden="true" style="min-width:4rem;font-weight:bold">{text}</output></div>'
            "<small>Run this cell to move the slider.</small>"
            f'<script type="application/json">{data}</script><script>{_SCRIPT}</script></figure>'
        )

    def _button(self) -> str:
        if not self.seconds:
            return ""
        seconds = json.dumps(self.seconds, separators=(",", ":"))
        look = "width:2.75rem;height:2.75rem;font-size:1.1rem;cursor:pointer"
        return (
            f'<button type="button" hidden {KEEP_KEYS} class="lab-play" aria-label="Play" '
            f'data-seconds="{seconds}" style="{look}"></button>'
        )

    def widget(self) -> ipywidgets.Widget:
        """The life in a kernel."""
        slider = ipywidgets.SelectionSlider(
            options=[(text, index) for index, text in enumerate(self.texts)],
            value=self.start,
            description=self.label,
            style={"description_width": "initial"},
            layout={"width": "100%", "max_width": "42rem"},
        )
        picture = ipywidgets.HTML()  # not ipywidgets.Image, which cannot carry a text for screen readers

        def show(index: int) -> None:
            picture.value = inline(self.frames[index], self.alts[index])

        slider.observe(lambda change: show(change["new"]), "value")
        show(self.start)
        if not self.seconds:
            return ipywidgets.VBox([picture, slider])
        film = ipywidgets.Play(max=len(self.frames) - 1, value=self.start)

        def pace(index: int) -> None:
            film.interval = int(1000 * self.seconds[index])

        film.observe(lambda change: pace(change["new"]), "value")
        pace(self.start)
        ipywidgets.jslink((film, "value"), (slider, "index"))
        return ipywidgets.VBox([picture, ipywidgets.HBox([film, slider])])

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, object]:
        shown = f"{self.label}: {self.texts[self.start]} (one of {len(self.texts)}). {self.alts[self.start]}"
        return self.widget()._repr_mimebundle_() | {"text/plain": shown, "text/html": self.html()}


def _seconds(seconds: float | Callable[[object], float], value: object) -> float:
    shown = seconds(value) if callable(seconds) else seconds
    require_positive_number("seconds", shown)
    return shown


def _sentence(alt: Callable[[object], str], value: object) -> str:
    text = alt(value) if callable(alt) else alt
    if not callable(alt) or not isinstance(text, str) or not text.strip():
        raise TypeError(
            f"alt gave {text!r} for the value {value!r}; expected a function that returns one sentence: "
            "what this frame shows, for readers who do not see it."
        )
    return text


def _drawn(draw: Callable[[object], plt.Figure | Drawing], value: object, prefix: str) -> str | Drawing:
    """A plot as SVG, or a drawing."""
    figure = draw(value)
    if isinstance(figure, Drawing):
        return figure
    if not isinstance(figure, plt.Figure):
        raise TypeError(
            f"draw returned {type(figure).__name__} for the value {value!r}; expected a matplotlib figure or "
            "a drawing: end the function with `return figure`."
        )
    svg = plot_svg(figure, prefix)
    plt.close(figure)
    return svg
