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


def sheet(rows=3):
    """Rows of numbers; each is the sum of the two above it."""
    drawing = lab.Drawing("A triangle of sums.")
    sheet = lab.Sheet(drawing, seconds=1)
    for row in range(rows):
        for column in range(rows - row):
            above = [f"row {row - 1}, {column + way}" for way in (0, 1)] if row else []
            place = drawing.box(20 + 54 * column + 27 * row, 10 + 40 * row, 48, 24, str(2**row))
            sheet.part(
                place, f"row {row}, {column}", f"{2**row} = sum {row}{column}", made_of=above, stop=not column
            )
    return sheet


def heads():
    """Two blocks of two heads on four tokens; each head looks one token further back than the one before."""
    back = [[[float(asked == max(asks - far, 0)) for asked in range(4)] for asks in range(4)]
            for far in range(4)]  # fmt: skip
    return lab.Heads(["the", "cats", "over", "there"], [back[:2], back[2:]], "Four heads.")


def looks(page):
    """Which numbers are lit, by how."""
    marks = page.locator("svg .part").evaluate_all(
        "marks => marks.map(mark => [mark.dataset.look, mark.getAttribute('aria-label')])"
    )
    lit = {}
    for look, name in marks:
        lit.setdefault(look, []).append(name)
    return {look: names for look, names in lit.items() if look}


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


def test_a_number_of_a_sheet_answers_the_pointer(page):
    page.set_content(PAGE.format(sheet()._repr_html_()))
    said = page.get_by_role("status")
    assert said.inner_text().startswith("Point at a number") and looks(page) == {}
    number = page.get_by_role("option", name="row 1, 0")
    number.hover()
    assert said.inner_text().split("\n")[0] == "row 1, 0" and "2 = sum 10" in said.inner_text()
    assert looks(page) == {"now": ["row 1, 0"], "of": ["row 0, 0", "row 0, 1"], "into": ["row 2, 0"]}
    assert number.get_attribute("aria-selected") == "true"
    number.click()  # now it stays
    page.get_by_role("option", name="row 0, 2").hover()
    assert "2 = sum 10" in said.inner_text()
    page.get_by_role("option", name="row 0, 2").click()
    assert "1 = sum 02" in said.inner_text()
    page.locator("svg").click(position={"x": 3, "y": 3})
    assert looks(page) == {} and said.inner_text().startswith("Point at a number")


def test_a_number_of_a_sheet_answers_the_keys(page):
    page.set_content(PAGE.format("<button>before</button>" + sheet()._repr_html_()))
    said = page.get_by_role("status")
    page.get_by_text("before").focus()
    for key, expected in (
        ("Tab", "row 0, 0"), ("ArrowRight", "row 0, 1"), ("ArrowDown", "row 1, 0"), ("ArrowDown", "row 2, 0"),
        ("ArrowUp", "row 1, 0"), ("ArrowLeft", "row 0, 2"), ("Enter", "row 0, 2"), ("Escape", "Point at"),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert said.inner_text().startswith(expected), key
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.textContent") == "before", "the sheet is one stop for Tab"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == looks(page)["now"][0]


def test_the_buttons_of_a_sheet_lead_through_it(page):
    page.clock.install()
    page.set_content(PAGE.format(sheet()._repr_html_()))
    said = page.get_by_role("status")
    page.get_by_role("button", name="Play").click()
    assert said.inner_text().startswith("row 0, 0")
    page.clock.run_for(1100)
    assert said.inner_text().startswith("row 1, 0")
    page.get_by_role("button", name="Pause").click()
    page.clock.run_for(5000)
    assert said.inner_text().startswith("row 1, 0")
    for name, expected in (
        ("Back", "row 0, 0"),
        ("Back", "row 0, 0"),
        ("On", "row 1, 0"),
        ("Play", "row 2, 0"),
    ):
        page.get_by_role("button", name=name, exact=True).click()
        assert said.inner_text().startswith(expected), name
    page.clock.run_for(1100)
    page.get_by_role("button", name="Play").click()  # at the end: from the beginning
    assert said.inner_text().startswith("row 0, 0")


def test_a_thumb_need_not_be_exact_and_the_sum_stays_in_view(browser):
    context = browser.new_context(viewport={"width": 390, "height": 320}, has_touch=True)
    page = context.new_page()
    # a box that scrolls, as a theme puts around outputs, would hold the sum back
    shown = "<style>.output {{ overflow-x: auto }}</style><div class='output'>{}</div>"
    page.set_content(
        PAGE.format(shown.format(sheet(6)._repr_html_()) + "<p style='height: 2000px'>after</p>")
    )
    place = page.get_by_role("option", name="row 1, 1").bounding_box()
    page.touchscreen.tap(place["x"] + 20, place["y"] + place["height"] + 4)
    assert looks(page)["now"] == ["row 1, 1"]
    height = "element => element.getBoundingClientRect().bottom"
    assert page.locator("svg").evaluate(height) > page.locator("aside").evaluate("e => e.offsetTop")
    said = page.get_by_role("status")
    assert "2 = sum 11" in said.inner_text() and page.locator("aside").evaluate(height) <= 321
    for _ in range(5):
        page.get_by_role("button", name="On").tap()
    page.wait_for_function("document.querySelector('[data-look=now]').getBoundingClientRect().bottom < 320")
    now, said = (page.locator(each).evaluate("e => e.getBoundingClientRect().toJSON()")
                 for each in ("[data-look=now]", "aside"))  # fmt: skip
    assert now["top"] >= 0 and said["bottom"] <= 321 and page.evaluate("scrollX") == 0
    context.close()


def test_a_sheet_on_paper_and_without_scripts_is_whole(page):
    page.set_content(PAGE.format(sheet()._repr_html_()))
    page.get_by_role("option", name="row 1, 0").click()
    page.emulate_media(media="print")
    pale = "mark => getComputedStyle(mark).fillOpacity"
    assert set(page.locator("svg .part").evaluate_all(f"marks => marks.map({pale})")) == {"0"}
    assert not page.locator("aside").is_visible()
    page.emulate_media(media="screen")
    page.set_content(PAGE.format(sheet()._repr_html_().replace("<script>", "<script type='text/none'>")))
    assert page.get_by_role("img", name="A triangle of sums.").count() == 1
    assert "below" in page.get_by_role("status").inner_text() and not page.get_by_role("button").count()
    page.get_by_text("All numbers as text").click()
    assert page.locator("li").nth(3).inner_text().split() == ["row", "1,", "0", "2", "=", "sum", "10"]


def test_heads_answer_pointer_and_keys(page):
    page.set_content(PAGE.format(heads()._repr_html_()))
    said = page.get_by_role("status")
    assert said.inner_text() == "Block 1, head 1: “there” looks at “there” (100 %)."
    page.get_by_role("radio", name="block 1, head 2").click()
    assert said.inner_text() == "Block 1, head 2: “there” looks at “over” (100 %)."
    page.keyboard.press("ArrowDown")
    assert said.inner_text() == "Block 2, head 2: “there” looks at “the” (100 %)."
    page.get_by_role("radio", name="over").click()
    page.keyboard.press("ArrowLeft")
    assert said.inner_text() == "Block 2, head 2: “cats” looks at “the” (100 %)."
    chosen = page.locator("[aria-checked=true]").evaluate_all(
        "all => all.map(e => e.getAttribute('aria-label'))"
    )
    assert chosen == ["block 2, head 2", "cats"]
    assert page.locator("[tabindex='0']").count() == 2, "a stop for Tab in each group"


def test_heads_without_scripts_are_a_picture_and_a_list(page):
    page.set_content(PAGE.format(heads()._repr_html_().replace("<script>", "<script type='text/none'>")))
    assert page.get_by_role("img", name="Four heads.").count() == 1
    page.get_by_text("as text").click()
    assert page.locator("li").nth(1).inner_text().endswith("there → over 100 %")
