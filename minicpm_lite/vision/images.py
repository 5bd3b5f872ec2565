"""Images: whatever a file holds becomes one upright picture in RGB, or is refused with a sentence.

What would go wrong in silence is decided here, once:

- **Orientation.** Cameras write the picture as the sensor saw it, and a note (EXIF) how to turn it.
- **Transparency** is laid over white, as a page shows it. Just dropping it shows what colour happens to stand
  under the transparent pixels, mostly black.
- **16 bits** a pixel are scaled to 8. Cutting off what is above 255 would make nearly all of it white.
- **Several frames** (animated GIF, WebP, PNG; pages of a TIFF): the first one.
- **Size.** A small file can hold a picture that fills the memory. What is too large is refused before it is
  unpacked.
"""

import io
import warnings
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..config import require_positive_integer

__all__ = ["pixels_of", "read_image"]

_MOST_PIXELS = 100_000_000  # 300 MB in RGB


def read_image(source: str | PathLike | bytes | Image.Image, most_pixels: int = _MOST_PIXELS) -> Image.Image:
    """An upright picture in RGB, of any kind of picture; the first frame, if there are several.

    Args:
        source: a file, the bytes of one, or an image of Pillow's, which stays as it is.
        most_pixels: a picture with more is refused before it is unpacked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no picture, one that ends too early or is too large, or of numbers whose range is unknown.

    >>> grey = Image.new("L", (3, 2), 128)
    >>> picture = read_image(grey)
    >>> picture.mode, picture.size, picture.getpixel((0, 0))
    ('RGB', (3, 2), (128, 128, 128))
    """
    require_positive_integer("most_pixels", most_pixels)
    name = "The image" if isinstance(source, bytes | Image.Image) else str(source)
    if not isinstance(source, bytes | Image.Image):
        source = Path(source).read_bytes()
    try:
        image = _opened(source) if isinstance(source, bytes) else source
        if image.width * image.height > most_pixels:
            raise Image.DecompressionBombError(f"{image.width:,} by {image.height:,} pixels")
        image = ImageOps.exif_transpose(image)  # a copy, unpacked
    except Image.DecompressionBombError as error:  # Pillow's own, or the one above
        raise ValueError(
            f"{name} is too large: {error}. At most {most_pixels:,} pixels in all are read. Make it smaller, "
            "or give a larger most_pixels if there is memory for it."
        ) from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is no picture of a kind that Pillow knows, or it is empty.") from None
    except Exception as error:  # decoders raise errors of every class on damaged files
        raise ValueError(f"{name} cannot be read to its end as a picture ({error}). Is it whole?") from error
    return _in_rgb(image, name)


def pixels_of(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """The pixels of an image in RGB as SigLIP reads them: from -1 (none of a colour) to 1 (all of it).

    >>> pixels_of(Image.new("RGB", (2, 1), (0, 255, 51))).flatten(1)[:, 0].tolist()
    [-1.0, 1.0, -0.6000000238418579]
    """
    levels = torch.from_numpy(np.array(image, dtype=np.float32))  # (height, width, 3)
    return levels.permute(2, 0, 1) / 127.5 - 1


def _opened(content: bytes) -> Image.Image:
    """The picture of a file, not unpacked yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # most_pixels decides
        return Image.open(io.BytesIO(content))


def _in_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError(f"{name} holds numbers of unknown range. Bring them to 0 to 255 first, in mode L.")
    if image.mode.startswith("I"):  # 16 bits, which Pillow also keeps in 32
        levels = np.asarray(image)
        if levels.size and not 0 <= levels.min() <= levels.max() <= 65535:
            raise ValueError(f"{name} holds numbers beyond 16 bits. Bring them to 0 to 255 first, in mode L.")
        return Image.fromarray((levels // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
