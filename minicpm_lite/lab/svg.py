"""What every picture of the book shares: an SVG that takes the page's colours, and the HTML that shows it.

An output holds the SVG as the source of an ``<img>``, and a line of script that puts the SVG itself in the
image's place. Neither alone would do. JupyterLab strips drawings and scripts from outputs of notebooks that
it does not trust yet (whatever was just downloaded), but shows images; there, and wherever scripts do not
run, the picture brings its own paper, light or dark. Where scripts run (a live kernel, the book, VS Code,
Colab) the SVG stands in the page, so its ink is the text's colour, its palette the theme's, it turns with the
theme's switch, and its text can be selected and searched. An output of type ``image/svg+xml`` would be an
image in all of them, and nothing at all before it is trusted.
"""

from html import escape

from .style import INK, THEME

FULL_WIDTH = 360  # units: what a phone shows without making it smaller
ENLARGED = 1.45  # on a screen with room
UNDESCRIBED = "A plot that is not described yet."  # until the press writes the description here

# The page's ground, by the names that the book, JupyterLab, VS Code and Colab have for it.
GROUND = (
    "var(--fig-ground,var(--pst-color-background,var(--jp-layout-color0,var(--vscode-editor-background,"
    "var(--colab-primary-surface-color,#fff)))))"
)
# Only an SVG that is a document of its own is `:root`; inside a page these rules do nothing.
_PAPER = (
    f"<style>svg:root{{background:#fff;color:{INK}}}@media(prefers-color-scheme:dark)"
    "{svg:root{background:#14181e;color:#e6e9ee;--fig-ground:#14181e}}</style>"
)
_ADDRESS = "data:image/svg+xml,"
# A function of a script: puts the drawing in the place of its image, and returns it.
UNFOLD = (
    "image=>{const box=document.createElement('div');"
    f"box.innerHTML=decodeURIComponent(image.getAttribute('src').slice({len(_ADDRESS)}));"
    "const svg=box.firstElementChild;svg.setAttribute('aria-label',image.alt);"
    "image.replaceWith(svg);return svg}"
)


def document(width: float, height: float, body: str, scrolls: bool = False) -> str:
    """An SVG document, in whose elements ``currentColor`` is the ink and ``var(--ground)`` the paper.

    Args:
        width: in units, a CSS pixel each on a phone, and ``ENLARGED`` where there is room.
        height: in units.
        body: the elements. Attributes stand in single quotes, which keeps the output small.
        scrolls: keep the size and scroll sideways where there is no room, rather than shrink.
    """
    shown = width if scrolls else width * ENLARGED
    fluid = "" if scrolls else "max-width:100%;height:auto;"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' viewBox='0 0 {width:g} {height:g}' "
        f"width='{shown:.0f}' height='{height * shown / width:.0f}' "
        "fill='currentColor' stroke-linejoin='round' "
        "font-family='system-ui,-apple-system,Segoe UI,Roboto,Helvetica,Arial,sans-serif' "
        f"style='display:block;margin:0 auto;{fluid}--ground:{GROUND}'>{_PAPER}{body}</svg>"
    )


def picture(svg: str, alt: str, scrolls: bool = False) -> str:
    """The HTML of an output that shows one SVG."""
    box = ' tabindex="0" style="overflow-x:auto' if scrolls else ' style="'
    return (
        f'{THEME}<div class="lab-piece lab-picture"{box};margin:1rem 0">{image(svg, alt, scrolls)}'
        f"<script>({UNFOLD})(document.currentScript.parentElement.querySelector('img'))</script></div>"
    )


def image(svg: str, alt: str, scrolls: bool = False) -> str:
    """The SVG as an image, which a script may unfold."""
    source = svg.replace("%", "%25").replace("#", "%23").replace("&", "&amp;").replace('"', "&quot;")
    width = "none" if scrolls else "100%"
    style = f"display:block;margin:0 auto;max-width:{width};height:auto"
    return f'<img alt="{escape(alt)}" src="{_ADDRESS}{source}" style="{style}">'


def inline(svg: str, alt: str) -> str:
    """The SVG as it stands in a page, with its description."""
    return svg.replace("<svg ", f'<svg aria-label="{escape(alt)}" ', 1)


def describe(html: str, alt: str) -> str:
    """The HTML of a plot with its description in the place that was left for it."""
    return html.replace(f'alt="{UNDESCRIBED}"', f'alt="{escape(alt)}"', 1)
