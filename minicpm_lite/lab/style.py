"""One look: colours, the plot style, and the few rules of CSS that the HTML pieces share.

Colour is never the only carrier: the plot cycle changes line style together with colour, and every box has an
icon and a word. Each colour of the palette has a contrast of at least 3 to 1 against white and against the
dark grounds of the book, JupyterLab and VS Code, so one palette serves both; the book brightens it in the
dark (``custom.css``). The colours differ in lightness as well as in hue, so that they stay apart for readers
with colour-vision deficiency (hues after Okabe and Ito 2008).
"""

from ..optional import require

matplotlib = require("matplotlib", install="minicpm_lite[notebooks]", purpose="use the book's notebooks")

PALETTE = {
    "blue": "#0878d0",
    "orange": "#c2410c",
    "green": "#0ca070",
    "purple": "#ab3da3",
    "grey": "#626a76",
    "gold": "#bb8600",
}
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
INK = "#1f2328"  # text and axes; in a picture it becomes the colour of the text around it

# The text takes the page's own colour, and tints are half transparent, so one rule serves light and dark. The
# book's theme puts a light mat under HTML outputs in dark mode, for outputs of fixed colours; ours need none.
# An explorer's picture and its slider fit on one screen. The signs for playing and pausing are drawn, because
# not every font has them.
# jupyterlab-myst takes the triangle from everything that folds: hints and the answers of a quiz get it back.
THEME = (
    "<style>html[data-theme=dark] .bd-content div.cell_output .text_html:has(.lab-piece)"
    "{background-color:transparent!important;color:inherit!important;padding:0!important}"
    "figure.lab-piece>svg{max-height:calc(100vh - 9rem)}"
    ".lab-play::before{content:'';display:inline-block;width:.8em;height:.8em;background:currentColor;"
    "clip-path:polygon(15% 0,100% 50%,15% 100%)}.lab-play[aria-label=Pause]::before{clip-path:"
    "polygon(10% 0,40% 0,40% 100%,10% 100%,10% 0,60% 0,90% 0,90% 100%,60% 100%,60% 0)}"
    ".jp-Notebook :is(.hint,.lab-piece details)>summary{list-style:revert}</style>"
)

# JupyterLab would take the arrow keys for itself and move between cells.
KEEP_KEYS = 'data-lm-suppress-shortcuts="true"'


def css_color(name: str) -> str:
    """A colour of the palette as CSS: the page's own shade of it, or ours where the page has none.

    >>> css_color("blue")
    'var(--fig-blue,#0878d0)'
    """
    return f"var(--fig-{name},{PALETTE[name]})"


def use_book_style() -> None:
    """Set matplotlib's defaults: 5 by 2.8 inches (360 units wide), a light grid, colours with line styles."""
    matplotlib.rcParams.update(
        {
            "figure.figsize": (5.0, 2.8),
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": matplotlib.cycler(color=PALETTE.values(), linestyle=LINE_STYLES),
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": "medium",
            "grid.color": INK,
            "grid.alpha": 0.16,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "font.size": 11,
            "path.simplify_threshold": 0.3,  # points nearer to a line than this, in pixels, are left out
            "image.interpolation": "none",  # a matrix is stored with a pixel a number
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "minicpm_lite",  # the same picture gives the same file
            **dict.fromkeys(
                (
                    "text.color",
                    "axes.edgecolor",
                    "axes.labelcolor",
                    "xtick.color",
                    "ytick.color",
                    "patch.edgecolor",
                ),
                INK,
            ),
        }
    )
