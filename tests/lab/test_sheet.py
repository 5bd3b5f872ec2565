"""Sheets: what they hold as text, and what they refuse. A browser tries them in tests/book."""

import doctest
import re

import pytest

from minicpm_lite import lab
from minicpm_lite.lab import sheet as module


def area(**look):
    d = lab.Drawing("Two numbers and their product.")
    sheet = lab.Sheet(d, **look)
    sheet.part(d.box(4, 4, 60, 24, "2"), "width", "2", "Given <here>.", stop=True)
    sheet.part(d.box(70, 4, 60, 24, "3"), "height", "3")
    sheet.part(d.box(40, 50, 60, 24, "6"), "area", "6 = 2 × 3^{1}", made_of=("width", "height"), stop=True)
    return sheet


def test_the_example():
    assert doctest.testmod(module).failed == 0


def test_a_sheet_holds_all_sums_as_text():
    sheet = area(start="area")
    assert repr(sheet).splitlines() == [
        "Sheet: Two numbers and their product.", "width: 2", "height: 3", "area: 6 = 2 × 3^{1}",
    ]  # fmt: skip
    page = sheet._repr_html_()
    items = re.findall(r"<li (.*?)>(.*?)</li>", page)
    assert [attributes for attributes, _ in items] == [
        'data-at="4 4 60 24" data-of="" data-stop', 'data-at="70 4 60 24" data-of=""',
        'data-at="40 50 60 24" data-of="0 1" data-stop',
    ]  # fmt: skip
    assert items[0][1] == '<p class="name">width</p><p class="sum">2</p><p>Given &lt;here&gt;.</p>'
    assert "6 = 2\u00a0×\u00a03<sup>1</sup>" in items[2][1]
    assert 'data-start="2"' in page and 'alt="Two numbers and their product."' in page
    assert page == area(start="area")._repr_html_() and "http" not in page.replace("http://www.w3.org", "")


def test_there_are_buttons_only_where_there_are_stops():
    assert area()._repr_html_().count("<button") == 3 and 'data-start=""' in area()._repr_html_()
    d = lab.Drawing("One number.")
    sheet = lab.Sheet(d)
    place = d.box(4, 4, 60, 24, "2")
    assert sheet.part(place, "width", "2") is place
    assert "<button" not in sheet._repr_html_()


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (("area", "7"), "The name is 'area'; expected one that no other part has"),
        ((" ", "7"), "The name is ' '"),
        (("volume", ""), "'volume' has no sum"),
        (("volume", "6", "", ("depth",)), "'volume' is made of 'depth'; expected the names of earlier parts"),
    ],
)
def test_a_part_is_refused(part, says):
    sheet = area()
    name, sum, *rest = part
    with pytest.raises(ValueError, match=re.escape(says)):
        sheet.part(lab.Drawing("x").box(4, 4, 9, 9), name, sum, *rest[:1], made_of=(rest + [""] * 2)[1])


def test_a_sheet_is_refused():
    with pytest.raises(ValueError, match="start is 'depth'; expected the name of a part"):
        area(start="depth")._repr_html_()
    with pytest.raises(ValueError, match="seconds is 0; expected a number greater than 0"):
        area(seconds=0)
    with pytest.raises(ValueError, match="no part; expected at least one number that answers"):
        lab.Sheet(lab.Drawing("Nothing."))._repr_html_()
