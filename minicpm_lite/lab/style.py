"""One look: the plot style, and the few rules of CSS that the HTML pieces share.

Colour is never the only carrier: the plot cycle changes line style together with colour, and every box has an
icon and a word. All colours of the cycle have a contrast of at least 3 to 1 against white and stay apart for
readers with colour-vision deficiency (after Okabe and Ito 2008, darkened where they were too light).
"""

from ..optional import require

matplotlib = require("matplotlib", install="minicpm_lite[notebooks]", purpose="use the book's notebooks")

COLORS = ("#0072b2", "#c8500a", "#00795a", "#a23b85", "#5c5c5c", "#8a6d00")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))

# The text takes the page's own colour, and tints are half transparent, so one rule serves light and dark. The
# book's theme puts a light mat under HTML outputs in dark mode, for outputs of fixed colours; ours need none.
THEME = (
    "<style>html[data-theme=dark] .bd-content div.cell_output .text_html:has(.lab-piece)"
    "{background-color:transparent!important;color:inherit!important;padding:0!important}</style>"
)

# JupyterLab would take the arrow keys for itself and move between cells.
KEEP_KEYS = 'data-lm-suppress-shortcuts="true"'


def use_book_style() -> None:
    """Set matplotlib's defaults: 6 by 3 inches (fits a phone), a light grid, colours with line styles."""
    matplotlib.rcParams.update(
        {
            "figure.figsize": (6.0, 3.0),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.prop_cycle": matplotlib.cycler(color=COLORS, linestyle=LINE_STYLES),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": "medium",
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "font.size": 10,
            "svg.hashsalt": "minicpm_lite",  # the same picture gives the same file
        }
    )
