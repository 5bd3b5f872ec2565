"""Markers: how the pictures of an image stand in the text that a MiniCPM-V model reads.

Each picture (the overview, then the slices) takes as many places as the resampler gives vectors. What stands
at these places is overwritten by the vectors, so any token will do; the releases take ``<unk>``. The markers
around them are tokens of their own and say where a picture begins, and where a row of slices ends:

    2.0, 2.5    <image>..</image><slice><image>..</image><image>..</image>\\n<image>..</image>..</slice>\\n
    since 2.6   <image_id>0</image_id><image>..</image><slice>..</slice><slice>..</slice>\\n<slice>..</slice>

The older generation ends with a line break whether or not there are slices; the newer one never does.

Source: the processors of the releases 2.0 to 4.5.
"""

from ..config import require_positive_integer
from .slicing import SlicePlan

__all__ = ["image_text"]

_GENERATIONS = ("2.0", "2.6")


def image_text(
    plan: SlicePlan,
    queries: int,
    image_id: int | None = None,
    generation: str = "2.6",
    placeholder: str = "<unk>",
) -> str:
    """The text in which the pictures of an image stand.

    Args:
        plan: how the image is cut.
        queries: vectors that the resampler gives for each picture.
        image_id: the image's number in the conversation, counted from 0; None writes no number, as for video
            and for one image. The older generation has none.
        generation: "2.0" (2.0 and Llama3-V 2.5) or "2.6" (2.6 and later).
        placeholder: what stands where a vector will stand.

    Raises:
        ValueError: another generation, a number for the older one, or a number that cannot be.

    >>> plan = SlicePlan((602, 336), (2, 1), (840, 476), (420, 476))
    >>> image_text(plan, 2, image_id=3, placeholder=".")
    '<image_id>3</image_id><image>..</image><slice>..</slice><slice>..</slice>'
    >>> image_text(plan, 2, generation="2.0", placeholder=".")
    '<image>..</image><slice><image>..</image><image>..</image></slice>\\n'
    """
    require_positive_integer("queries", queries)
    if generation not in _GENERATIONS:
        raise ValueError(f"generation is {generation!r}; expected one of {', '.join(_GENERATIONS)}.")
    if image_id is not None:
        if generation == "2.0":
            raise ValueError(f"image_id is {image_id!r}, but generation 2.0 numbers no images; leave it out.")
        if not isinstance(image_id, int) or image_id < 0:
            raise ValueError(f"image_id is {image_id!r}; expected a whole number of at least 0.")
    places = queries * placeholder
    image = f"<image>{places}</image>"
    piece = image if generation == "2.0" else f"<slice>{places}</slice>"
    columns, rows = plan.grid or (0, 0)
    slices = "\n".join(rows * [columns * piece])
    if generation == "2.0":
        return image + (f"<slice>{slices}</slice>" if slices else "") + "\n"
    return ("" if image_id is None else f"<image_id>{image_id}</image_id>") + image + slices
