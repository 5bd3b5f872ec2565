"""Plots as SVG: small, the same from run to run, in the colours of the page.

matplotlib writes SVG for print: fixed colours, six decimals, a name for every group. `plot_svg` makes of it
what a page wants. Colours follow the theme by three rules:

- A colour of the palette is the page's own shade of it, and the style's ink is the colour of the text.
- Greys and pale tints are mixtures with the ground, as an artist's are with the paper: white becomes the
  ground, black the ink, a pale blue the same share of blue on dark.
- Text in plain black or white stays: it stands on a colour that its author chose, as in a cell of a heat map.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from xml.etree import ElementTree

from IPython import get_ipython

from ..optional import require
from .style import INK, PALETTE, css_color
from .svg import UNDESCRIBED, document, picture

INSTALL = "minicpm_lite[notebooks]"
plt = require("matplotlib.pyplot", install=INSTALL, purpose="use the book's notebooks")
inline_backend = require("matplotlib_inline.backend_inline", INSTALL, purpose="use the book's notebooks")

_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_THEMED = {INK: "currentColor"} | {color: css_color(name) for name, color in PALETTE.items()}
_STAYS_IN_TEXT = {"#000000", "#ffffff"}
_TINT = 0.6  # what is at least so much white is a tint
_COLOR = re.compile(r"#[0-9a-f]{6}\b")
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_REFERENCE = re.compile(r"(?<=url\(#)[\w.-]+|(?<=^href=#).+")
_LINES = re.compile(r"[-\d.e\sMLz]*")
_SIZE = re.compile(r"([\d.]+)px")
_ADVANCES = {"−": 0.84, ".": 0.32}  # in ems, of DejaVu Sans; a digit has 0.64, a bold one 0.06 more
_GAP = 0.08  # half of the narrowest space in a formula
_MONOSPACE = "ui-monospace,Menlo,Consolas,monospace"


def show_plots_as_svg() -> None:
    """In a notebook, let ``plt.show()`` and a figure at a cell's end become SVG; elsewhere do nothing."""
    shell = get_ipython()
    if shell is not None:
        inline_backend.set_matplotlib_formats()  # none, or each plot would be stored twice
        shell.display_formatter.formatters["text/html"].for_type(
            plt.Figure, lambda figure: picture(plot_svg(figure), UNDESCRIBED)
        )


def plot_svg(figure: plt.Figure, prefix: str | None = None) -> str:
    """A matplotlib figure as an SVG document.

    Args:
        figure: drawn in the book's style.
        prefix: what names in the document begin with; they must differ from those in others on the page, so
            by default it follows from the content.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", facecolor="none", edgecolor="none", metadata=_NO_METADATA)
    root = ElementTree.fromstring(file.getvalue())
    prefix = prefix or "p" + hashlib.sha256(file.getvalue().encode()).hexdigest()[:8]
    names = {name: f"{prefix}-{number}" for number, name in enumerate(sorted(set(_referred_to(root))))}
    _, _, width, height = map(float, root.get("viewBox").split())
    return document(width, height, "".join(_written(child, names) for child in root))


def _referred_to(root: ElementTree.Element) -> Iterator[str]:
    for element in root.iter():
        for key, value in element.attrib.items():
            yield from _REFERENCE.findall(f"{_local(key)}={value}")


def _written(element: ElementTree.Element, names: dict[str, str], has_ink: bool = False) -> str:
    """An element without what a page does not need: names nobody refers to, empty groups, far decimals."""
    tag = _local(element.tag)
    children = list(element)
    if tag == "text":
        children = _digits_together(children)
    is_text = tag in ("text", "tspan") or any(_local(child.tag) == "text" for child in children)
    attributes = {_local(key): value for key, value in element.attrib.items()}
    looks = [f"{key}:{attributes.pop(key)}" for key in ("fill", "stroke") if key in attributes]
    style = _style(";".join([*looks, attributes.pop("style", "")]), is_text)
    has_ink |= "fill" in style
    if tag == "style" or (tag == "path" and style == {"fill": "none"}):
        return ""  # rules of a style would hold for the whole page; `document` has them as attributes
    if tag == "text" and not has_ink:
        style["fill"] = "#000"  # matplotlib leaves out what is black
    if style.get("fill") == "currentColor":  # as `document` has it
        del style["fill"]
    attributes = {
        key: _renamed(key, _rounded(key, value), names)
        for key, value in attributes.items()
        if (key != "id" or value in names) and not value.startswith("rotate(-0 ")
    }
    if style:
        css = ";".join(f"{key}:{value}" for key, value in style.items())
        attributes["style"] = _renamed("style", css, names)
    inside = escape((element.text or "").strip()) if is_text else ""
    inside += "".join(_written(child, names, has_ink) for child in children)
    if tag in ("g", "defs") and not inside or tag == "g" and not attributes:
        return inside
    opening = tag + "".join(f" {key}='{value}'" for key, value in attributes.items())
    return f"<{opening}>{inside}</{tag}>" if inside else f"<{opening}/>"


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _digits_together(spans: list[ElementTree.Element]) -> list[ElementTree.Element]:
    """The characters of a formula, where those of a number are one piece: their places fit only one font."""
    pieces = spans[:1]
    for before, span in pairwise(spans):
        is_number = (before.text + span.text).strip("−.0123456789") == ""
        if is_number and _line_of(before) == _line_of(span) and _touch(before, span):
            pieces[-1].text += span.text
        else:
            pieces.append(span)
    return pieces


def _touch(before: ElementTree.Element, span: ElementTree.Element) -> bool:
    """Whether no space stands between a character of a number and the next on its line."""
    apart = float(span.get("x")) - float(before.get("x"))
    return apart < (_ADVANCES.get(before.text, 0.64) + _GAP) * float(_SIZE.search(span.get("style"))[1])


def _line_of(span: ElementTree.Element) -> tuple[str | None, str | None]:
    return span.get("y"), span.get("style")


def _style(css: str, is_text: bool) -> dict[str, str]:
    style = {
        key.strip(): value.strip()
        for key, _, value in (part.partition(":") for part in css.split(";"))
        if value
    }
    family = style.pop("font-family", "")  # the page's own font instead
    if "Mono" in family.split(",")[0]:
        style["font-family"] = _MONOSPACE
    for key in ("fill", "stroke"):
        if key in style and not (is_text and style[key] in _STAYS_IN_TEXT):
            style[key] = _COLOR.sub(lambda color: themed(color[0]), style[key])
    return style


def themed(color: str) -> str:
    """What a colour of a plot is on a page.

    >>> themed("#0878d0"), themed("#1f2328"), themed("#000000"), themed("#ffffff")
    ('var(--fig-blue,#0878d0)', 'currentColor', 'currentColor', 'var(--ground)')
    >>> themed("#cccccc"), themed("#cfe6f5")
    ('color-mix(in srgb,currentColor 20%,var(--ground))', 'color-mix(in srgb,#007aca 19%,var(--ground))')
    >>> themed("#fde725")
    '#fde725'
    """
    if color in _THEMED:
        return _THEMED[color]
    parts = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    share = 1 - min(parts) / 255
    is_grey = max(parts) - min(parts) <= 8
    if is_grey and share in (0, 1):
        return "currentColor" if share else "var(--ground)"
    if not is_grey and 1 - share < _TINT:
        return color
    full = "".join(f"{round(255 - (255 - part) / share):02x}" for part in parts)
    return f"color-mix(in srgb,{'currentColor' if is_grey else '#' + full} {share:.0%},var(--ground))"


def _rounded(key: str, value: str) -> str:
    """The value of an attribute with the decimals that can be seen."""
    if key == "href" and not value.startswith("#"):  # an image
        return value
    if key == "d" and _LINES.fullmatch(value):
        return "".join(_steps(corners) for corners in re.findall(r"M([^M]*)", value))
    decimals = 3 if key == "transform" else 1
    value = _NUMBER.sub(lambda number: _short(float(number[0]), decimals), value)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", " ".join(value.split())) if key == "d" else value


def _steps(corners: str) -> str:
    """A broken line that begins ``x y L x y``, in steps from corner to corner, which are short.

    >>> _steps(" 10.04 20 L 11.06 19.5 L 12 20 z")
    'M10 20l1.1-.5 .9 .5z'
    """
    tenths = [round(10 * float(number)) for number in re.findall(r"[-\d.e]+", corners)]
    steps = [here - before for before, here in zip(tenths, tenths[2:], strict=False)]
    line = "".join(f" {_short(step / 10)}" for step in steps).replace(" -", "-").removeprefix(" ")
    return (
        f"M{_short(tenths[0] / 10)} {_short(tenths[1] / 10)}{'l' * bool(steps)}{line}{'z' * ('z' in corners)}"
    )


def _short(number: float, decimals: int = 1) -> str:
    text = f"{number:.{decimals}f}".rstrip("0").rstrip(".")
    return re.sub(r"^(-?)0\.", r"\1.", text) if text != "-0" else "0"


def _renamed(key: str, value: str, names: dict[str, str]) -> str:
    """The value of an attribute with the document's own names, ready to be quoted."""
    if key == "id":
        return names[value]
    renamed = _REFERENCE.sub(lambda name: names[name[0]], f"{key}={value}")
    return escape(renamed.removeprefix(f"{key}="))
