"""Any image is read upright and in RGB, or refused with a sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minicpm_lite.vision.images import pixels_of, read_image


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


def as_file(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (size, kind)
        for size in [(1, 1), (3, 5000), (20_000, 3), (7, 11)]
        for kind in ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]
        if kind != "WEBP" or max(size) <= 16_383  # which holds no more
    ],
)
def test_kinds_and_sizes(size, kind):
    picture = read_image(as_file(noise(*size), kind))
    assert (picture.mode, picture.size) == ("RGB", size)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_without_transparency_are_what_pillow_makes_of_them(mode):
    image = noise(5, 4).convert("LAB") if mode == "LAB" else noise(5, 4, mode)
    before = image.tobytes()
    picture = read_image(image)
    assert picture.tobytes() == image.convert("RGB").tobytes()
    assert image.tobytes() == before and image.mode == mode


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_is_laid_over_white(mode):
    colour = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 255, 128)):
        colour.putpixel((x, 0), (40, 40, 40, alpha))
    image = {"RGBa": lambda: colour.convert("RGBa"), "La": lambda: colour.convert("LA").convert("La")}.get(
        mode, lambda: colour.convert(mode)
    )()
    picture = read_image(image)
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((1, 0)) == (40, 40, 40)
    assert all(abs(level - 147) <= 2 for level in picture.getpixel((2, 0)))


def test_a_transparent_entry_of_a_palette_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((1, 0), 1)
    picture = read_image(as_file(image, "PNG", transparency=0))
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 0, 0)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(kind):
    levels = np.array([[0, 256, 257, 32_768, 65_535]], dtype=np.uint16)
    picture = read_image(as_file(Image.fromarray(levels), kind))
    assert [picture.getpixel((x, 0))[0] for x in range(5)] == [0, 0, 1, 127, 255]


def test_numbers_of_unknown_range_are_refused():
    with pytest.raises(ValueError, match="The image holds numbers of unknown range. Bring them to 0 to 255"):
        read_image(Image.fromarray(np.ones((2, 2), dtype=np.float32)))
    with pytest.raises(ValueError, match="The image holds numbers beyond 16 bits. Bring them to 0 to 255"):
        read_image(Image.fromarray(np.array([[70_000]], dtype=np.int32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_a_camera_turned_is_upright(orientation):
    """The corner that is marked, and the size, are where somebody who looks at the picture sees them."""
    image = Image.new("RGB", (40, 24), "white")
    image.paste("black", (0, 0, 16, 8))  # near the corner in which the stored rows begin
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read_image(as_file(image, "JPEG", exif=exif.tobytes(), quality=95))
    assert picture.size == ((40, 24) if orientation <= 4 else (24, 40))
    right, down = picture.width - 3, picture.height - 3
    # EXIF: where row 0 and column 0 of the stored picture lie
    corner = {1: (3, 3), 2: (right, 3), 3: (right, down), 4: (3, down)}
    corner |= {5: (3, 3), 6: (right, 3), 7: (right, down), 8: (3, down)}
    dark = [at for at in ((3, 3), (right, 3), (right, down), (3, down)) if picture.getpixel(at)[0] < 128]
    assert dark == [corner[orientation]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    settings = {"save_all": True, "append_images": frames[1:]}
    settings |= {"lossless": True} if kind == "WEBP" else {}
    picture = read_image(as_file(frames[0], kind, **settings))
    assert picture.getpixel((1, 1)) == (255, 0, 0)


def test_files_and_paths(tmp_path):
    image = noise(6, 5)
    file = tmp_path / "a picture.png"
    image.save(file)
    for source in (file, str(file), file.read_bytes()):
        assert read_image(source).tobytes() == image.tobytes()


def test_what_is_no_picture_is_refused(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a picture")
    with pytest.raises(
        ValueError, match=r"notes.txt is no picture of a kind that Pillow knows, or it is empty"
    ):
        read_image(text)
    with pytest.raises(ValueError, match="The image is no picture"):
        read_image(b"")
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        read_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_picture_that_ends_too_early_is_refused(kind):
    whole = as_file(noise(64, 64), kind)
    with pytest.raises(ValueError, match="Is it whole\\?|is no picture"):
        read_image(whole[: len(whole) // 2])


def png_of(width: int, height: int) -> bytes:
    """The head of a PNG that says how large it is, and next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(11_000, 10_000), (50_000, 50_000), (2**31 - 1, 1)])
def test_what_would_fill_the_memory_is_refused_before_it_is_unpacked(width, height):
    with pytest.raises(ValueError, match="The image is too large: .* At most 100,000,000 pixels"):
        read_image(png_of(width, height))


def test_a_limit_of_ones_own():
    with pytest.raises(ValueError) as caught:
        read_image(noise(20, 10), most_pixels=199)
    assert str(caught.value) == (
        "The image is too large: 20 by 10 pixels. At most 199 pixels in all are read. Make it smaller, or "
        "give a larger most_pixels if there is memory for it."
    )
    assert read_image(noise(20, 10), most_pixels=200).size == (20, 10)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_files_are_read_or_refused(data):
    """No error but a ValueError with a sentence, whatever byte is damaged."""
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]))
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"exif": exif.tobytes()} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    content = bytearray(as_file(noise(9, 7), kind, **more))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        picture = read_image(bytes(content), most_pixels=10_000_000)
    except ValueError as refused:
        assert str(refused).startswith("The image ")
    else:
        assert picture.mode == "RGB"


def test_pixels_lie_between_minus_one_and_one():
    image = noise(6, 4)
    pixels = pixels_of(image)
    assert pixels.shape == (3, 4, 6) and pixels.dtype == torch.float32
    for x, y in ((0, 0), (5, 3), (2, 1)):
        expected = [level / 255 * 2 - 1 for level in image.getpixel((x, y))]
        torch.testing.assert_close(pixels[:, y, x], torch.tensor(expected), atol=1e-6, rtol=0)
