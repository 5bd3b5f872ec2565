"""Slicing: an image of any size and shape becomes pieces that the encoder knows (MiniCPM-V 2.0 and later).

An encoder that learned from pictures of 448 by 448 pixels sees little in a page of text that is squeezed to
that size. So a large image is cut, and the whole is given once more, small, as an overview:

    grid       columns m and rows n with m n near (pixels of the image) / 448^2, at most ``max_slices``, whose
               shape m/n is nearest to the image's: the smallest |ln(width / height) - ln(m / n)|
    refined    the image, resized so that each of the m n slices has about 448^2 pixels
    overview   the image, resized to about 448^2 pixels; small images are enlarged to it and not cut

Slices keep the image's shape as well as whole patches of 14 pixels allow, so they are seldom square.

Source: MiniCPM-V (arXiv 2408.01800, section 3.2) and the code of the releases 2.0 to 4.5, which agree. All
that follows from code alone is kept here, since each slice moves if it is not:

- Numbers are rounded as Python rounds them, halves to the even one, and cut off by ``int``.
- When a size is fitted, the height comes first and the width from the height that was cut off.
- Numbers of slices are tried in the order k - 1, k, k + 1, and of each the grids with few columns first. A
  later grid wins only if it is better, so ties are decided by order, and by the last bit of ln(m / n): seven
  slices' worth of a square image are three columns and two rows, and not two and three.

Traps in copies of the rule: others round down, cut from 448 pixels a side on (instead of 448^2 in all), or
enlarge small images to a square.
"""

import math
from dataclasses import dataclass

from PIL import Image

from ..config import require_positive_integer

__all__ = ["SlicePlan", "plan_slices", "slice_image"]

_LARGEST, _MOST_SLICES = 2**31, 1024  # far beyond any picture, and small enough to be counted
_Size = tuple[int, int]  # width and height, in pixels


@dataclass(frozen=True)
class SlicePlan:
    """How an image is cut. Sizes are width and height in pixels, whole patches each way.

    Attributes:
        overview: the size of the whole image, made small (or enlarged, if it is small).
        grid: columns and rows of slices, or None if the image is not cut.
        refined: the size to which the image is resized before it is cut, or None.
        slice: the size of each slice, or None.
    """

    overview: _Size
    grid: _Size | None = None
    refined: _Size | None = None
    slice: _Size | None = None

    @property
    def sizes(self) -> list[_Size]:
        """The size of each picture that the encoder sees: the overview, then the slices row by row.

        >>> plan_slices(640, 480).sizes
        [(518, 392), (364, 546), (364, 546)]
        """
        columns, rows = self.grid or (0, 0)
        return [self.overview] + columns * rows * [self.slice]

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """Left, top, right and bottom of each slice in the refined image, row by row.

        >>> plan_slices(640, 480).boxes()
        [(0, 0, 364, 546), (364, 0, 728, 546)]
        """
        if self.grid is None:
            return []
        (columns, rows), (width, height) = self.grid, self.slice
        return [
            (column * width, row * height, (column + 1) * width, (row + 1) * height)
            for row in range(rows)
            for column in range(columns)
        ]


def plan_slices(width: int, height: int, max_slices: int = 9, side: int = 448, patch: int = 14) -> SlicePlan:
    """How an image of a size is cut.

    Args:
        width: pixels.
        height: pixels.
        max_slices: slices at most, the overview not counted; 1 cuts nothing.
        side: each slice gets about ``side**2`` pixels.
        patch: pixels of the side of a patch, of which all sizes are multiples.

    Raises:
        ValueError: a number that is not a whole one of at least 1, or patches larger than ``side``.

    >>> plan_slices(1920, 1080)
    SlicePlan(overview=(602, 336), grid=(4, 2), refined=(1680, 952), slice=(420, 476))
    >>> plan_slices(300, 200)  # too small to be cut; enlarged
    SlicePlan(overview=(546, 364), grid=None, refined=None, slice=None)
    """
    numbers = {"width": width, "height": height, "max_slices": max_slices, "side": side, "patch": patch}
    for name, value in numbers.items():
        require_positive_integer(name, value)
        if value > (largest := _MOST_SLICES if name == "max_slices" else _LARGEST):
            raise ValueError(f"{name} is {value:,}; at most {largest:,} is possible here.")
    if patch > side:
        raise ValueError(f"patch is {patch} and side {side}; a slice holds at least one patch.")
    overview = _fit(width, height, side, patch)
    grid = _best_grid(width, height, max_slices, side)
    if grid is None:
        return SlicePlan(overview)
    columns, rows = grid
    cell = _snap(width, columns) / columns, _snap(height, rows) / rows
    piece = _fit(*cell, side, patch)
    return SlicePlan(overview, grid, (columns * piece[0], rows * piece[1]), piece)


def slice_image(
    image: Image.Image, max_slices: int = 9, side: int = 448, patch: int = 14
) -> list[Image.Image]:
    """The pictures that the encoder sees of an image: the overview, then the slices row by row.

    Overview and refined image are both made from the image itself, by bicubic interpolation.

    Args:
        image: in RGB; `minicpm_lite.vision.images.read_image` makes that of any other.
        max_slices, side, patch: as for `plan_slices`.

    Raises:
        TypeError: the image is not one of Pillow's, in RGB.

    >>> [piece.size for piece in slice_image(Image.new("RGB", (640, 480)))]
    [(518, 392), (364, 546), (364, 546)]
    """
    if getattr(image, "mode", None) != "RGB":
        given = f"an image in {image.mode}" if isinstance(image, Image.Image) else type(image).__name__
        raise TypeError(f"Got {given}; expected an image in RGB: vision.images.read_image(...) makes one.")
    plan = plan_slices(*image.size, max_slices, side, patch)
    pieces = [image.resize(plan.overview, Image.Resampling.BICUBIC)]
    if plan.grid is not None:
        refined = image.resize(plan.refined, Image.Resampling.BICUBIC)
        pieces += [refined.crop(box) for box in plan.boxes()]
    return pieces


def _best_grid(width: int, height: int, max_slices: int, side: int) -> _Size | None:
    """Columns and rows of the slices; None if one picture is enough."""
    enough = min(math.ceil(width * height / side**2), max_slices)
    if enough <= 1:
        return None
    numbers = [number for number in (enough - 1, enough, enough + 1) if 1 < number <= max_slices]
    grids = [
        (columns, number // columns)
        for number in numbers
        for columns in range(1, number + 1)
        if number % columns == 0
    ]
    shape = math.log(width / height)
    # the logarithm of the quotient: a difference of two logarithms has other last bits, and breaks other ties
    return min(grids, key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))  # of equals the first


def _fit(width: float, height: float, side: int, patch: int) -> _Size:
    """About ``side**2`` pixels in the same shape, in whole patches."""
    shape = width / height
    height = int(side / math.sqrt(shape))
    return _snap(int(height * shape), patch), _snap(height, patch)


def _snap(length: int, step: int) -> int:
    """The multiple of a step that is nearest to a length, at least one step."""
    return max(round(length / step) * step, step)
