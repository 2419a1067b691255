"""Pictures to pixels, against transformers' CLIP processor and LLaVA's padding."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil

from reverie_jax.data.images import PAD_COLOUR, BrokenImage, decode, encode_png, preprocess

SIZE = 24


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise: random pixels, blown up a little, so that a resize has something to get wrong."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(1, height // 3), max(1, width // 3), 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def clip(image: Image.Image, size: int) -> np.ndarray:
    """The published preprocessing up to normalisation, in [0, 255]."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_normalize=False, do_rescale=False
    )
    pixels = processor(image, return_tensors="np")["pixel_values"][0]
    return np.asarray(pixels, np.float64).transpose(1, 2, 0)


def padded(image: Image.Image) -> Image.Image:
    """LLaVA's expand2square, written out pixel by pixel."""
    side = max(image.size)
    out = np.empty((side, side, 3), np.uint8)
    out[:] = (122, 116, 104)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    out[top : top + image.height, left : left + image.width] = np.asarray(image)
    return Image.fromarray(out)


def agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(np.float64) - theirs).max() <= 1


SHAPES = {"square": (40, 40), "wide": (61, 33), "tall": (17, 90), "upscaled": (11, 7), "exact": (SIZE, SIZE)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_padded_picture_is_clips(shape):
    image = noise(*shape)
    agree(preprocess(image, SIZE), clip(padded(image), SIZE))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cropped_picture_is_clips(shape):
    image = noise(*shape)
    agree(preprocess(image, SIZE, pad=False), clip(image, SIZE))


def test_published_size_is_clips():
    image = noise(500, 375)
    agree(preprocess(image, 336), clip(padded(image), 336))


# (11, 55): 24 / 11 * 55 is 119.99999999999999 in floating point, but 24 * 55 / 11 is 120.
@pytest.mark.parametrize("shape", [(11, 55), (55, 11), (94, 47), (22, 110)])
def test_cropped_picture_is_clips_where_the_ratio_does_not_divide(shape):
    image = noise(*shape)
    agree(preprocess(image, SIZE, pad=False), clip(image, SIZE))


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(8, 40), st.booleans(), st.integers(0, 99))
def test_any_shape_is_clips(width, height, size, pad, seed):
    image = noise(width, height, seed)
    agree(preprocess(image, size, pad=pad), clip(padded(image) if pad else image, size))


@pytest.mark.parametrize(("size", "first", "last"), [((10, 21), 5, 14), ((11, 20), 4, 14)])
def test_padding_stands_where_llava_puts_it(size, first, last):
    image = Image.new("RGB", size, (255, 255, 255))
    pixels = preprocess(image, max(size))
    content = np.flatnonzero((pixels == 255).all((0, 2)))
    assert content.tolist() == list(range(first, last + 1))
    turned = preprocess(image.transpose(Image.Transpose.ROTATE_90), max(size))
    assert np.flatnonzero((turned == 255).all((1, 2))).tolist() == list(range(first, last + 1))


def test_padding_has_clips_mean_colour():
    pixels = preprocess(Image.new("RGB", (10, 30)), 30)
    assert PAD_COLOUR == (122, 116, 104)
    assert (pixels[:, :10] == (122, 116, 104)).all()
    assert (pixels[:, -10:] == (122, 116, 104)).all()


def test_square_picture_of_the_right_size_is_left_alone():
    image = noise(SIZE, SIZE)
    assert np.array_equal(preprocess(image, SIZE), np.asarray(image))


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


GREY = Image.linear_gradient("L").resize((16, 16))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_png_mode_becomes_rgb(mode):
    image = GREY.convert(mode)
    encoded = saved(image)
    assert Image.open(io.BytesIO(encoded)).mode == mode
    pixels = decode(encoded, "a.png")
    assert pixels.mode == "RGB"
    assert np.array_equal(np.asarray(pixels), np.asarray(image.convert("RGB")))
    assert np.asarray(pixels).std() > 10


def test_sixteen_bits_keep_their_shades():
    # Pillow's own conversion cuts at 255: all but the darkest 256th of the shades would be white.
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    encoded = saved(Image.fromarray(levels))
    assert Image.open(io.BytesIO(encoded)).mode == "I;16"
    pixels = decode(encoded, "a.png")
    assert pixels.mode == "RGB"
    found = np.asarray(pixels)[..., 0].astype(int)
    assert np.abs(found - np.arange(256).reshape(16, 16)).max() <= 1


def test_jpeg_and_transparent_palette_are_read():
    assert decode(saved(GREY.convert("CMYK"), "JPEG"), "a.jpg").mode == "RGB"
    palette = GREY.convert("P")
    assert decode(saved(palette, transparency=3), "a.png").mode == "RGB"


def test_png_keeps_every_pixel():
    pixels = np.asarray(noise(13, 7))
    assert np.array_equal(np.asarray(decode(encode_png(pixels), "a.png")), pixels)


PNG = saved(noise(20, 20))
BROKEN = {
    "empty": b"",
    "text": b"this is no picture",
    "signature": PNG[:8],
    "cut": PNG[: len(PNG) // 2],
    "flipped": PNG[:60] + bytes([PNG[60] ^ 0xFF]) + PNG[61:],
    "jpeg": saved(noise(20, 20), "JPEG")[:200],
}


@pytest.mark.parametrize("encoded", BROKEN.values(), ids=BROKEN)
def test_broken_bytes_name_the_file(encoded):
    with pytest.raises(BrokenImage, match=r"^photos/a\.png: not a readable picture") as caught:
        decode(encoded, "photos/a.png")
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)  # no memory addresses: the line is the same every time


@settings(max_examples=60)
@given(st.integers(0, len(PNG) - 1), st.integers(1, 255))
def test_any_damaged_byte_is_read_or_named(place, change):
    damaged = PNG[:place] + bytes([PNG[place] ^ change]) + PNG[place + 1 :]
    try:
        assert decode(damaged, "a.png").mode == "RGB"
    except BrokenImage as error:
        assert str(error).startswith("a.png: ")  # noqa: PT017


def test_a_picture_that_is_far_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BrokenImage, match=r"a\.png"):
        decode(PNG, "a.png")


@pytest.mark.parametrize(("width", "height"), [(640, 480), (500, 375), (400, 300), (640, 427), (480, 640), (333, 500)])
def test_computing_only_the_crop_changes_no_byte(width, height):
    image = noise(width, height)
    short = min(width, height)
    whole = image.resize((336 * width // short, 336 * height // short), Image.Resampling.BICUBIC)
    left, top = (whole.width - 336) // 2, (whole.height - 336) // 2
    cropped = np.asarray(whole.crop((left, top, left + 336, top + 336)))
    np.testing.assert_array_equal(preprocess(image, 336, pad=False), cropped)


@settings(max_examples=200, deadline=None)
@given(st.integers(20, 300), st.integers(20, 300), st.integers(8, 340))
def test_any_crop_is_of_the_whole(width, height, size):
    image = noise(width, height)
    short = min(width, height)
    whole = image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    cropped = np.asarray(whole.crop((left, top, left + size, top + size)))
    np.testing.assert_array_equal(preprocess(image, size, pad=False), cropped)
