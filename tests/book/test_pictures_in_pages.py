"""Pictures in a real browser: they take the page's place, colours and keys, and are readable on a phone."""

import matplotlib.pyplot as plt
import pytest
from page_checks import SIZES

from minicpm_lite import lab
from minicpm_lite.lab import style

pytestmark = pytest.mark.pages

PAGE = """<!DOCTYPE html><html lang="en" data-theme="dark"><head><meta name="viewport" content="width=device-width">
<style>body {{ margin: 16px; color: rgb(200, 210, 220); background: #121212; --fig-blue: rgb(1, 2, 3) }}</style>
<title>t</title></head><body><main>{}</main></body></html>"""


def drawn():
    drawing = lab.Drawing("Ids become vectors.")
    drawing.arrow(
        drawing.box(4, 4, 90, 30, "50% & #1"), drawing.box(200, 4, 100, 30, "<vectors>", tone="blue")
    )
    return drawing


def explorer(**more):
    def draw(count):
        figure, axes = plt.subplots()
        axes.plot(range(count))
        return figure

    with plt.rc_context():
        style.use_book_style()
        return lab.Explorer(draw, [2, 3, 4], "Points", lambda count: f"A line of {count} points.", **more)


def test_a_drawing_stands_in_the_page_in_its_colours(page):
    page.set_content(PAGE.format(drawn()._repr_html_()))
    assert page.locator("img").count() == 0
    svg = page.get_by_role("img", name="Ids become vectors.")
    assert svg.locator("text").all_text_contents() == ["50% & #1", "<vectors>"]
    color = "element => getComputedStyle(element).fill"
    assert svg.locator("text").first.evaluate(color) == "rgb(200, 210, 220)", (
        "the ink is the colour of the text"
    )
    assert svg.locator("rect").nth(1).evaluate(color) == "rgb(1, 2, 3)", "the palette is the page's"


def test_without_scripts_a_drawing_is_an_image_on_its_own_paper(page):
    # JupyterLab shows no more of an output that it does not trust.
    without = drawn()._repr_html_().replace("<script>", "<script type='text/none'>")
    page.set_content(PAGE.format(without))
    assert page.locator("svg").count() == 0
    image = page.get_by_role("img", name="Ids become vectors.")
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 522


@pytest.mark.parametrize("size", SIZES)
def test_text_is_readable_and_nothing_scrolls(page, size):
    page.set_viewport_size(dict(zip(("width", "height"), SIZES[size], strict=True)))
    wide = lab.Drawing("Wide.", width=600)
    wide.box(500, 4, 90, 30, "far away")
    page.set_content(PAGE.format(drawn()._repr_html_() + wide._repr_html_() + explorer().html()))
    heights = page.locator("svg text").evaluate_all(
        "texts => texts.map(text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)"
    )
    assert len(heights) > 5 and min(heights) > 10.9
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_an_explorer_moves_by_key_and_by_mouse(page):
    page.set_content(PAGE.format(explorer().html()))
    slider, shown = page.get_by_role("slider"), page.locator("output")
    assert (
        page.get_by_role("img", name="A line of 2 points.").count() == 1 and page.locator("img").count() == 0
    )
    slider.press("ArrowRight")
    assert page.get_by_role("img", name="A line of 3 points.").count() == 1 and shown.text_content() == "3"
    assert slider.get_attribute("aria-valuetext") == "3. A line of 3 points."
    box = slider.bounding_box()
    slider.click(position={"x": box["width"] - 2, "y": box["height"] / 2})
    assert page.get_by_role("img", name="A line of 4 points.").count() == 1 and shown.text_content() == "4"
    assert page.locator("figure svg").count() == 1 and not page.locator("small").is_visible()


def test_a_film_is_played_paused_and_begins_again(page):
    page.clock.install()
    page.set_content(PAGE.format(explorer(seconds=1).html()))
    shown = page.locator("output")
    page.get_by_role("button", name="Play").click()
    page.clock.run_for(1100)
    assert shown.text_content() == "3"
    page.get_by_role("button", name="Pause").click()
    page.clock.run_for(5000)
    assert shown.text_content() == "3"
    page.get_by_role("button", name="Play").click()
    page.clock.run_for(2100)
    assert shown.text_content() == "4" and page.get_by_role("button", name="Play").count() == 1
    page.get_by_role("button", name="Play").click()
    assert shown.text_content() == "2"
    page.clock.run_for(1100)
    page.get_by_role("slider").press("ArrowLeft")  # whoever moves it takes over
    page.clock.run_for(5000)
    assert shown.text_content() == "2"
