"""Plots as SVG in the colours of the page, the palette, and what shows them."""

import itertools
import re
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from numpy.linalg import norm

from minicpm_lite.lab import style, svg
from minicpm_lite.lab.plots import plot_svg
from minicpm_lite.lab.press.execute import execute
from minicpm_lite.lab.press.notebook import Notebook

CUSTOM_CSS = Path(__file__).parents[2] / "book" / "_static" / "custom.css"
GROUNDS = {"white": "#ffffff", "book": "#121212", "JupyterLab": "#111111", "VS Code": "#1e1e1e"}
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SEEN_WITH = {
    "full colour vision": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


@pytest.fixture(autouse=True)
def book_style():
    with plt.rc_context():
        style.use_book_style()
        yield
    plt.close("all")


def linear(color):
    parts = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    low, high = sorted(0.05 + linear(color) @ [0.2126, 0.7152, 0.0722] for color in (one, other))
    return high / low


def cielab(rgb):
    xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]] @ np.clip(rgb, 0, 1)
    x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def dark_palette():
    return dict(re.findall(r"--fig-(\w+): (#[0-9a-f]{6})", CUSTOM_CSS.read_text()))


@pytest.mark.parametrize("ground", GROUNDS)
def test_the_palette_is_readable_on_every_ground(ground):
    for name, color in style.PALETTE.items():
        assert contrast(color, GROUNDS[ground]) >= 3, f"{name} on the ground of {ground}"


def test_the_books_dark_palette_has_every_colour_and_is_brighter():
    assert dark_palette().keys() == style.PALETTE.keys()
    assert all(contrast(color, GROUNDS["book"]) >= 6 for color in dark_palette().values())


@pytest.mark.parametrize("eyes", SEEN_WITH)
@pytest.mark.parametrize("palette", ["light", "dark"])
def test_colours_stay_apart_for_all_eyes(eyes, palette):
    colors = (style.PALETTE if palette == "light" else dark_palette()).values()
    for one, other in itertools.combinations(colors, 2):
        apart = norm(cielab(SEEN_WITH[eyes] @ linear(one)) - cielab(SEEN_WITH[eyes] @ linear(other)))
        assert apart > 11, f"{one} and {other} look alike with {eyes}"


def test_curves_differ_by_more_than_colour():
    assert len(set(style.LINE_STYLES)) == len(set(style.PALETTE.values())) == len(style.PALETTE)


def curves(points=1000):
    figure, axes = plt.subplots()
    noise = np.random.default_rng(0).normal(0, 0.02, (2, points))
    for row, name in zip(noise, ["own", "theirs"], strict=True):
        axes.plot(np.linspace(3, 1, points) + row, label=name)
    axes.set(xlabel="Step", ylabel="Loss (nats) & <more>")
    axes.legend()
    return figure


def test_a_plot_is_small_has_text_as_text_and_comes_out_the_same():
    picture = plot_svg(curves())
    assert picture == plot_svg(curves())
    assert len(picture) < 25_000
    root = ElementTree.fromstring(picture)
    assert {"Step", "Loss (nats) & <more>", "own", "theirs"} <= {
        text.text for text in root.iterfind(".//{*}text")
    }
    assert not root.findall(".//{*}metadata") and "DejaVu" not in picture and "dc:date" not in picture


def test_colours_are_the_pages():
    figure, axes = plt.subplots()
    axes.plot([0, 1])
    axes.axhline(0.5, color="k")
    axes.axvspan(0, 1, color="#cfe6f5")
    axes.bar([0, 1], [1, 1], color="#fde725", edgecolor="white", hatch="//")
    axes.text(0, 0, "on dark", color="white")
    axes.text(0, 1, "on bright", color="black")
    axes.text(1, 1, "on paper")
    picture = plot_svg(figure)
    assert style.css_color("blue") in picture
    assert "stroke:currentColor;stroke-width:1.5" in picture, "black is the ink"
    assert "color-mix(in srgb,#007aca 19%,var(--ground))" in picture, "a pale tint is a share of its hue"
    assert "fill:#fde725" in picture and "stroke:var(--ground)" in picture, "colours stay, also below hatches"
    looks = {text.text: text.get("style") for text in ElementTree.fromstring(picture).iterfind(".//{*}text")}
    assert "fill:#ffffff" in looks["on dark"] and "fill:#000" in looks["on bright"]
    assert "fill" not in looks["on paper"], "it is the ink, as the whole document"


def test_nothing_leaks_from_one_picture_to_another():
    one, other = plot_svg(curves()), plot_svg(curves(900))
    names = [set(re.findall(r"id='([^']+)'", picture)) for picture in (one, other)]
    assert names[0] and not names[0] & names[1]
    for picture, own in zip((one, other), names, strict=True):
        assert set(re.findall(r"(?:url\(|href=')#([\w-]+)", picture)) == own, (
            "all names are used, and resolve"
        )
        rules = re.sub(r"@media\([^)]*\)", "", re.search(r"<style>(.*?)</style>", picture)[1])
        assert all(rule.lstrip("{").startswith("svg:root{") for rule in re.findall(r"[^}]+\{", rules))


def test_a_matrix_keeps_its_pixels():
    figure, axes = plt.subplots()
    axes.imshow(np.eye(4))
    picture = plot_svg(figure)
    assert (
        "data:image/png;base64," in picture
        and "image-rendering:pixelated" in picture
        and len(picture) < 8_000
    )


def test_numbers_of_a_formula_are_one_piece():
    figure, axes = plt.subplots()
    axes.set_title("$10^{-3}x$")
    spans = [span.text for span in ElementTree.fromstring(plot_svg(figure)).iterfind(".//{*}tspan")]
    assert spans == ["10", "−3", "x"]


@pytest.mark.parametrize(
    ("formula", "pieces"),
    [
        ("x_1 + x_2", "x 1 + x 2"),
        ("x_{10} + y^{-3.5}", "x 10 + y −3.5"),
        (r"10^4\ 10^5", "10 4 10 5"),
        ("1 - x - y", "1 − x − y"),
        ("N^{0.5} D^{0.3}", "N 0.5 D 0.3"),
        (r"-12.5\times 10^{-34}", "−12.5 × 10 −34"),
        (r"12\,500 - 1", "12 500 − 1"),
        (r"\mathbf{-0.51\,2}", "−0.51 2"),
        (r"\mathit{10}\,\mathtt{20}", "10 20"),
    ],
)
@pytest.mark.parametrize("size", [6, 11, 30])
def test_numbers_of_a_formula_stand_where_they_belong(formula, pieces, size):
    figure, axes = plt.subplots()
    axes.set_title(f"${formula}$", fontsize=size)
    spans = ElementTree.fromstring(plot_svg(figure)).findall(".//{*}tspan")
    spans = [span for span in spans if span.text is not None]
    assert " ".join(span.text for span in sorted(spans, key=lambda span: float(span.get("x")))) == pieces


def test_what_shows_a_picture_gives_it_back():
    drawn = svg.document(360, 20, "<text>50% of \"a\" &amp; 'b' #1</text>")
    page = svg.picture(drawn, 'Half of "a" & <b>.')
    source = re.search(r'src="data:image/svg\+xml,([^"]*)"', page)[1]
    assert unescape(source).replace("%23", "#").replace("%25", "%") == drawn
    assert 'alt="Half of &quot;a&quot; &amp; &lt;b&gt;."' in page and "tabindex" not in page
    assert "http://www.w3.org" in page and page.count("http") == 1, "it asks the network for nothing"
    assert svg.inline(drawn, "A <b>.").startswith('<svg aria-label="A &lt;b&gt;." xmlns')


PLOT = """import matplotlib.pyplot as plt
plt.plot([1, 2])
plt.show()
plt.plot([2, 1]);"""


@pytest.mark.slow  # a kernel starts
def test_plt_show_gives_one_svg_that_carries_the_alt_text_of_its_cell(tmp_path):
    described = new_code_cell(PLOT, metadata={"mystnb": {"image": {"alt": 'A line & "more".'}}})
    start = new_code_cell('from minicpm_lite import lab\n\nlab.start(library="0.2", seed=0)')
    nb = new_notebook(cells=[start, described, new_code_cell(PLOT)])
    execute(Notebook(tmp_path / "topic.ipynb", nb))
    for cell in nb.cells[1:]:
        assert [set(output.data) for output in cell.outputs] == [{"text/html", "text/plain"}] * 2
        assert all(output.metadata == {} for output in cell.outputs), (
            "JupyterLab puts no ground of its own below"
        )
    pages = [output.data["text/html"] for output in nb.cells[1].outputs]
    assert all(
        '<img alt="A line &amp; &quot;more&quot;." src="data:image/svg+xml,<svg' in page for page in pages
    )
    undescribed = [output.data["text/html"] for output in nb.cells[2].outputs]
    assert all(f'alt="{svg.UNDESCRIBED}"' in page for page in undescribed)
    assert [svg.describe(page, 'A line & "more".') for page in undescribed] == pages, (
        "the same from run to run"
    )
