"""One figure, two lives: an ipywidgets slider in a live kernel, plain HTML in the static book.

Both are made from the same frames, drawn once for each value. The HTML needs no kernel, no network and no
library: an image, a range input and a few lines of script. It works by mouse, touch and keyboard; a screen
reader hears the value together with the description of its frame. Where scripts do not run (a notebook that
Jupyter does not trust yet) the first frame shows, with a line that says what to do.
"""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image

from ..optional import require
from .style import KEEP_KEYS, THEME

ipywidgets = require("ipywidgets", install="minicpm_lite[notebooks]", purpose="use the book's notebooks")
plt = require("matplotlib.pyplot", install="minicpm_lite[notebooks]", purpose="use the book's notebooks")

_SCRIPT = """(() => {
const figure = document.currentScript.parentElement, image = figure.querySelector('img');
const slider = figure.querySelector('input'), output = figure.querySelector('output');
const frames = JSON.parse(figure.querySelector('[type="application/json"]').textContent);
frames[+slider.value].src = image.src;
const show = () => { const frame = frames[+slider.value];
image.src = frame.src; image.alt = frame.alt; output.textContent = frame.text;
slider.setAttribute('aria-valuetext', frame.text + '. ' + frame.alt); };
slider.addEventListener('input', show); show();
figure.querySelector('small').hidden = true;
})()"""


class Explorer:
    """A figure drawn once for each value of a slider. Make it the last expression of a cell.

    Args:
        draw: takes one value and returns a matplotlib figure.
        values: what the slider can be set to: numbers or words, at least two.
        label: what the slider sets, with its unit.
        alt: takes one value and returns one sentence that says what the frame shows.
        start: index of the value shown first.
        colors: colours kept in each frame; line plots need 32, photographs and heat maps more, at most 256.

    Raises:
        ValueError: fewer than two values, or `start` is not the index of one.
        TypeError: `draw` returned no figure, or `alt` no sentence.
    """

    def __init__(
        self,
        draw: Callable[[object], plt.Figure],
        values: Sequence[object],
        label: str,
        alt: Callable[[object], str],
        start: int = 0,
        colors: int = 32,
    ) -> None:
        if len(values) < 2:
            raise ValueError(f"An Explorer moves between at least two values; it was given {len(values)}.")
        if not 0 <= start < len(values):
            raise ValueError(f"start is {start}; expected the index of a value, 0 to {len(values) - 1}.")
        self.label, self.start = label, start
        self.texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        self.alts = [_sentence(alt, value) for value in values]
        self.frames = [_png(draw, value, colors) for value in values]

    def html(self) -> str:
        """The static life."""
        first = self.frames[self.start]
        frames = [  # the first frame stands in the image already, and the script takes it from there
            {"text": text, "alt": alt} | ({} if frame is first else {"src": _data_uri(frame)})
            for text, alt, frame in zip(self.texts, self.alts, self.frames, strict=True)
        ]
        data = json.dumps(frames, ensure_ascii=False).replace("<", r"\u003c")
        text, alt = escape(self.texts[self.start]), escape(self.alts[self.start])
        slider_style = "flex:1 1 12rem;min-width:0;height:2.75rem;margin:0"
        identity = hashlib.sha256(b"".join(self.frames) + data.encode()).hexdigest()[:10]
        return (
            f'{THEME}<figure class="lab-piece" id="explorer-{identity}" '
            'style="margin:1rem auto;max-width:42rem">'
            f'<img src="{_data_uri(first)}" alt="{alt}" style="max-width:100%;height:auto">'
            '<div style="display:flex;align-items:center;gap:1rem">'
            '<label style="display:flex;flex-wrap:wrap;align-items:center;column-gap:1rem;flex:1">'
            f"<span>{escape(self.label)}</span>"
            f'<input type="range" {KEEP_KEYS} min="0" max="{len(self.frames) - 1}" value="{self.start}" '
            f'aria-valuetext="{text}. {alt}" style="{slider_style}"></label>'
            f'<output aria-hidden="true" style="min-width:4rem;font-weight:bold">{text}</output></div>'
            "<small>Run this cell to move the slider.</small>"
            f'<script type="application/json">{data}</script><script>{_SCRIPT}</script></figure>'
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
            source, alt = _data_uri(self.frames[index]), escape(self.alts[index])
            picture.value = f'<img src="{source}" alt="{alt}" style="max-width:100%;height:auto">'

        slider.observe(lambda change: show(change["new"]), "value")
        show(self.start)
        return ipywidgets.VBox([picture, slider])

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, object]:
        shown = f"{self.label}: {self.texts[self.start]} (one of {len(self.texts)}). {self.alts[self.start]}"
        return self.widget()._repr_mimebundle_() | {"text/plain": shown, "text/html": self.html()}


def _sentence(alt: Callable[[object], str], value: object) -> str:
    text = alt(value) if callable(alt) else alt
    if not callable(alt) or not isinstance(text, str) or not text.strip():
        raise TypeError(
            f"alt gave {text!r} for the value {value!r}; expected a function that returns one sentence: "
            "what this frame shows, for readers who do not see it."
        )
    return text


def _png(draw: Callable[[object], plt.Figure], value: object, colors: int) -> bytes:
    figure = draw(value)
    if not isinstance(figure, plt.Figure):
        raise TypeError(
            f"draw returned {type(figure).__name__} for the value {value!r}; expected a matplotlib figure: "
            "end the function with `return figure`."
        )
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=110)
    plt.close(figure)
    image = Image.open(full).convert("RGB").quantize(colors, dither=Image.Dither.NONE)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
