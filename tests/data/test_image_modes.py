"""Every kind of picture that Pillow opens becomes 8-bit RGB as original LLaVA's `convert("RGB")` has it, turned nowhere;
published sizes against transformers' CLIP processor. (`test_images` holds the basic geometry and broken files.)
"""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import reverie_jax
from reverie_jax.data.images import decode, preprocess, to_rgb
from tests.data.test_images import agree, clip, noise, padded, saved

STRAIGHT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
"""Modes of 8 bits that Pillow takes to RGB by itself."""
PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
MODES = (*STRAIGHT, *PREMULTIPLIED, "LAB", *DEEP)


def coloured(width: int = 12, height: int = 9) -> Image.Image:
    """Every pixel another colour, none of them grey."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 20, y * 25, 255 - x * y], -1).astype(np.uint8))


def alpha(width: int = 12, height: int = 9) -> Image.Image:
    return Image.fromarray(np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8))


@functools.cache
def picture(mode: str) -> Image.Image:
    image = coloured()
    if mode in DEEP:
        grey = np.linspace(0, 65535, 108).reshape(9, 12)
        if mode in ("I", "F"):
            return Image.fromarray(grey.astype(np.int32 if mode == "I" else np.float32))
        return Image.frombytes(mode, image.size, grey.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    if mode in ("LA", "RGBA", "La", "RGBa"):
        image = image.convert(PREMULTIPLIED.get(mode, mode))
        image.putalpha(alpha())
        return image.convert(mode)
    if mode in ("P", "PA"):
        return image.quantize(64) if mode == "P" else image.quantize(64).convert("PA")
    if mode == "LAB":
        return Image.merge("LAB", [alpha(), *[Image.new("L", image.size, 128)] * 2])
    return image.convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_of_eight_bits(mode):
    image = picture(mode)
    assert image.mode == mode
    before = image.tobytes()
    found = to_rgb(image)
    assert (found.mode, found.size) == ("RGB", image.size)
    assert np.asarray(found).dtype == np.uint8
    assert image.tobytes() == before
    for pad in (True, False):
        assert preprocess(found, 8, pad=pad).shape == (8, 8, 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 5)])
def test_the_smallest_pictures_too(mode, size):
    for value in (0, 1):
        found = to_rgb(Image.new(mode, size, value if len(Image.new(mode, size).getbands()) == 1 else None))
        assert (found.mode, found.size) == ("RGB", size)


@pytest.mark.parametrize("mode", STRAIGHT)
def test_eight_bits_are_pillows_own(mode):
    image = picture(mode)
    found = np.asarray(to_rgb(image))
    assert np.array_equal(found, np.asarray(image.convert("RGB")))
    assert len(np.unique(found.reshape(-1, 3), axis=0)) >= (2 if mode == "1" else 30)


@pytest.mark.parametrize("mode", PREMULTIPLIED)
def test_premultiplied_colours_are_divided_again(mode):
    image = picture(mode)
    straight = image.convert(PREMULTIPLIED[mode])
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(straight.convert("RGB")))


def test_transparency_is_dropped_not_blended():
    image = coloured()
    image.putalpha(0)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(coloured()))
    palette = coloured().quantize(16)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert np.array_equal(np.asarray(to_rgb(palette)), np.asarray(coloured().quantize(16).convert("RGB")))


def test_lab_is_lighter_where_its_lightness_is():
    light = np.asarray(to_rgb(picture("LAB"))).astype(int).sum(-1).ravel()
    assert light[0] < 30
    assert light[-1] > 3 * 245
    assert (np.diff(light) >= 0).all()


@pytest.mark.parametrize("mode", [mode for mode in DEEP if mode != "F"])
def test_sixteen_bits_keep_their_shades(mode):
    expected = np.linspace(0, 65535, 108).astype(int) / 257
    found = np.asarray(to_rgb(picture(mode))).astype(int).reshape(-1, 3)
    assert np.abs(found - expected[:, None]).max() <= 1


WILD = {
    "negative": [-5.0, -1e9, 0.0, 3.0],
    "huge": [1e9, 2e9, 70000.0, 0.0],
    "not a number": [np.nan, 1.0, 2.0, 3.0],
    "infinite": [np.inf, -np.inf, 0.0, 255.0],
}


@pytest.mark.parametrize("values", WILD.values(), ids=WILD)
def test_values_that_no_picture_should_have_are_no_error(values):
    grey = np.asarray(values).reshape(2, 2)
    found = to_rgb(Image.fromarray(grey.astype(np.float32)))
    assert (found.mode, found.size) == ("RGB", (2, 2))
    whole = np.nan_to_num(grey, posinf=0, neginf=0).clip(-(2**31), 2**31 - 1).astype(np.int32)
    found = to_rgb(Image.fromarray(whole))
    assert (found.mode, found.size) == ("RGB", (2, 2))
    level = np.asarray(found)[..., 0].ravel()
    assert (np.diff(level[np.argsort(whole.ravel(), kind="stable")].astype(int)) >= 0).all()


# --- files ---------------------------------------------------------------------------------------------------------

FILES = {
    "png 1": ("1", "PNG"),
    "png palette": ("P", "PNG"),
    "png grey with alpha": ("LA", "PNG"),
    "gif": ("P", "GIF"),
    "webp with alpha": ("RGBA", "WEBP"),
    "jpeg grey": ("L", "JPEG"),
    "jpeg cmyk": ("CMYK", "JPEG"),
    "tiff lab": ("LAB", "TIFF"),
    "tiff ycbcr": ("YCbCr", "TIFF"),
    "tiff cmyk": ("CMYK", "TIFF"),
    "tiff 16 big": ("I;16B", "TIFF"),
    "tiff float": ("F", "TIFF"),
    "tiff palette with alpha": ("PA", "TIFF"),
    "bmp": ("RGB", "BMP"),
    "pgm": ("L", "PPM"),
    "pgm of 16 bits": ("I", "PPM"),
}


@pytest.mark.parametrize(("mode", "form"), FILES.values(), ids=FILES)
def test_a_file_reads_as_its_picture(mode, form):
    encoded = saved(picture(mode), form)
    with Image.open(io.BytesIO(encoded)) as opened:
        expected = np.asarray(to_rgb(opened))
    found = decode(encoded, "a")
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), expected)
    assert expected.std() > 10


@pytest.mark.parametrize(
    "options", [{}, {"transparency": 0}, {"transparency": bytes([0, 128, 255])}], ids=["opaque", "one clear", "blended"]
)
def test_palette_files_have_their_colours(options):
    # Pasted as indices, as some of the original's scripts do, red would come out black.
    image = Image.new("P", (20, 8))
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    ImageDraw.Draw(image).rectangle((10, 0, 14, 7), fill=1)
    ImageDraw.Draw(image).rectangle((15, 0, 19, 7), fill=2)
    row = preprocess(decode(saved(image, **options), "a.png"), 20)[10]
    assert (row[:10] == (255, 0, 0)).all()
    assert (row[10:15] == (0, 255, 0)).all()
    assert (row[15:] == (10, 20, 30)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])  # Pillow itself turns a TIFF as it loads it
def test_a_cameras_orientation_is_not_applied(orientation, form):
    image = noise(30, 17)
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = saved(image, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    with Image.open(io.BytesIO(encoded)) as opened:
        assert opened.getexif()[0x0112] == orientation
    found = np.asarray(decode(encoded, "a"))
    plain = np.asarray(decode(saved(image, form, **({"lossless": True} if form == "WEBP" else {})), "a"))
    assert found.shape == (17, 30, 3)
    assert np.array_equal(found, plain)


def test_only_the_first_frame_is_looked_at():
    frames = [Image.new("RGB", (5, 4), colour) for colour in ((200, 10, 10), (10, 200, 10))]
    encoded = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(encoded, "a.gif")).reshape(-1, 3).tolist() == [[200, 10, 10]] * 20


@pytest.mark.parametrize("mode", MODES)
def test_a_question_about_an_opened_picture_shows_that_picture(mode):
    record = reverie_jax.ask(picture(mode), "What is this?")
    assert np.array_equal(np.asarray(decode(record.image, "a")), np.asarray(to_rgb(picture(mode))))


# --- published sizes -----------------------------------------------------------------------------------------------

sides = st.integers(1, 700)


@pytest.mark.parametrize("size", [224, 336])
@settings(max_examples=30, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(shape=st.tuples(sides, sides).filter(lambda s: max(s) <= 8 * min(s)), pad=st.booleans(), seed=st.integers(0, 99))
@example(shape=(500, 375), pad=False, seed=0)
@example(shape=(375, 500), pad=True, seed=0)
@example(shape=(337, 335), pad=False, seed=0)
@example(shape=(225, 223), pad=True, seed=0)
@example(shape=(1, 8), pad=False, seed=0)
@example(shape=(77, 599), pad=False, seed=0)
def test_any_shape_is_clips_at_published_sizes(size, shape, pad, seed):
    image = noise(*shape, seed)
    agree(preprocess(image, size, pad=pad), clip(padded(image) if pad else image, size))


@pytest.mark.parametrize("size", [224, 336])
@pytest.mark.parametrize("shape", [(1, 700), (2000, 3), (640, 1)])
def test_slivers_are_clips_when_padded(size, shape):
    image = noise(*shape)
    agree(preprocess(image, size), clip(padded(image), size))


@settings(max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90))
def test_padding_moves_no_pixel(width, height):
    image = noise(width, height)
    assert np.array_equal(preprocess(image, max(width, height)), np.asarray(padded(image)))
