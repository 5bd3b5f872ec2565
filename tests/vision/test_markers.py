"""Both generations of markers, as the releases write them."""

import pytest

from minicpm_lite.vision.markers import image_text
from minicpm_lite.vision.slicing import SlicePlan, plan_slices

TWO_ROWS = SlicePlan((448, 448), (2, 2), (896, 896), (448, 448))
WHOLE = SlicePlan((448, 448))


@pytest.mark.parametrize(
    ("plan", "settings", "text"),
    [
        (WHOLE, dict(), "<image>..</image>"),
        (WHOLE, dict(image_id=0), "<image_id>0</image_id><image>..</image>"),
        (WHOLE, dict(generation="2.0"), "<image>..</image>\n"),
        (
            TWO_ROWS,
            dict(image_id=3),
            "<image_id>3</image_id><image>..</image>"
            "<slice>..</slice><slice>..</slice>\n<slice>..</slice><slice>..</slice>",
        ),
        (
            TWO_ROWS,
            dict(generation="2.0"),
            "<image>..</image><slice><image>..</image><image>..</image>\n"
            "<image>..</image><image>..</image></slice>\n",
        ),
    ],
)
def test_texts_of_the_releases(plan, settings, text):
    assert image_text(plan, 2, placeholder=".", **settings) == text


def test_places_are_those_of_all_pictures():
    plan = plan_slices(1344, 1344)
    for generation in ("2.0", "2.6"):
        assert image_text(plan, 64, generation=generation).count("<unk>") == 640


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(queries=0), "queries is 0; expected a whole number of at least 1."),
        (dict(queries=2, generation="3"), "generation is '3'; expected one of 2.0, 2.6."),
        (
            dict(queries=2, generation="2.0", image_id=1),
            "image_id is 1, but generation 2.0 numbers no images; leave it out.",
        ),
        (dict(queries=2, image_id=-1), "image_id is -1; expected a whole number of at least 0."),
    ],
)
def test_what_cannot_be_is_refused(settings, sentence):
    with pytest.raises(ValueError) as caught:
        image_text(WHOLE, **settings)
    assert str(caught.value) == sentence
