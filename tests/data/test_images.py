"""Images to pixels, against transformers' CLIP processor and LLaVA's padding; every mode and format that Pillow opens."""

from __future__ import annotations

import functools
import io
import re
import resource

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessorPil

import reverie_jax
from reverie_jax.data import images
from reverie_jax.data.images import (
    PAD_COLOR,
    BrokenImage,
    decode,
    describe_conversion,
    downscale,
    encode_png,
    gray_depth,
    preprocess,
    random_resized_crop,
    to_rgb,
)
from tests.data.fakes import saved

SIZE = 24


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise, for which errors of resizing are visible."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(1, height // 3), max(1, width // 3), 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def clip(image: Image.Image, size: int) -> np.ndarray:
    """CLIP's preprocessing up to normalization, in [0, 255]."""
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


# Geometry.


def check_geometry(size: int, shape: tuple[int, int], pad: bool, seed: int) -> None:
    image = noise(*shape, seed)
    ours = preprocess(image, size, "pad" if pad else "square")
    theirs = clip(padded(image) if pad else image, size)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(np.float64) - theirs).max() <= 1


@settings(max_examples=60)
@given(st.integers(8, 40), st.tuples(st.integers(1, 60), st.integers(1, 60)), st.booleans(), st.integers(0, 99))
@example(SIZE, (SIZE, SIZE), True, 0)
@example(SIZE, (17, 90), False, 0)
# 24 / 11 * 55 is 119.99999999999999 in floating point, but 24 * 55 / 11 is 120.
@example(SIZE, (11, 55), False, 0)
@example(SIZE, (55, 11), False, 0)
@example(SIZE, (94, 47), False, 0)
def test_any_shape_is_clips(size, shape, pad, seed):
    check_geometry(size, shape, pad, seed)


sides = st.integers(1, 700)


@pytest.mark.parametrize("size", [224, 336])
@settings(max_examples=8, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(shape=st.tuples(sides, sides).filter(lambda s: max(s) <= 8 * min(s)), pad=st.booleans(), seed=st.integers(0, 99))
@example(shape=(500, 375), pad=False, seed=0)
@example(shape=(375, 500), pad=True, seed=0)
@example(shape=(337, 335), pad=False, seed=0)
@example(shape=(1, 8), pad=False, seed=0)
@example(shape=(77, 599), pad=False, seed=0)
@example(shape=(2000, 3), pad=True, seed=0)
def test_any_shape_is_clips_at_published_sizes(size, shape, pad, seed):
    check_geometry(size, shape, pad, seed)


@settings(max_examples=60)
@given(st.integers(20, 700), st.integers(20, 700), st.integers(8, 340))
@example(640, 480, 336)
@example(500, 375, 336)
@example(640, 427, 336)
@example(333, 500, 336)
def test_computing_only_the_crop_changes_no_byte(width, height, size):
    image = noise(width, height)
    short = min(width, height)
    whole = image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    cropped = np.asarray(whole.crop((left, top, left + size, top + size)))
    np.testing.assert_array_equal(preprocess(image, size, "square"), cropped)


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 900)),
    st.booleans(),
    st.booleans(),
    st.integers(4, 40),
    st.integers(400, 9000),
)
@example((1, 900), False, False, 24, 400)
def test_a_part_at_a_time_gives_the_same_pixels(shape, turned, pad, size, large):
    image = noise(*(shape[::-1] if turned else shape))
    whole = padded(image) if pad else image
    width, height = (size * side // min(whole.size) for side in whole.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = whole.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_LARGE", large)
        found = preprocess(image, size, "pad" if pad else "square")
    difference = np.abs(found.astype(int) - np.asarray(resized).astype(int))
    assert difference.max() <= (0 if pad and max(shape) <= 4 * image.width else 1)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (1080, 30_000)], ids=str)
def test_memory_is_bounded_by_the_image_and_the_result(shape):
    image = Image.new("RGB", shape, (9, 99, 199))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for pad in (True, False):
        assert (preprocess(image, 336, "pad" if pad else "square")[168, 168] == (9, 99, 199)).all() or pad
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


@settings(max_examples=20)
@given(st.integers(1, 90), st.integers(1, 90))
@example(10, 21)
@example(24, 24)
def test_padding_moves_no_pixel(width, height):
    image = noise(width, height)
    np.testing.assert_array_equal(preprocess(image, max(width, height)), np.asarray(padded(image)))
    assert PAD_COLOR == (122, 116, 104)


def crop_of_torchvision(width: int, height: int, scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params of torchvision, written anew: (top, left, height, width)."""
    logs = np.log([3.0 / 4.0, 4.0 / 3.0])
    for _ in range(10):
        target = height * width * rng.uniform(scale, 1.0)
        aspect = np.exp(rng.uniform(*logs))
        across, down = int(np.rint(np.sqrt(target * aspect))), int(np.rint(np.sqrt(target / aspect)))
        if 0 < across <= width and 0 < down <= height:
            return int(rng.integers(0, height - down + 1)), int(rng.integers(0, width - across + 1)), down, across
    across, down = width, height
    if width / height < 3.0 / 4.0:
        down = int(np.rint(width / (3.0 / 4.0)))
    elif width / height > 4.0 / 3.0:
        across = int(np.rint(height * (4.0 / 3.0)))
    return (height - down) // 2, (width - across) // 2, down, across


@settings(max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([0.08, 0.5, 0.99, 1.0]), st.integers(0, 99))
@example(90, 20, 1.0, 0)
@example(20, 90, 1.0, 0)
@example(80, 60, 1.0, 0)
@example(1, 1, 0.5, 0)
def test_random_crops_are_torchvisions(width, height, scale, seed):
    image = noise(width, height)
    top, left, down, across = crop_of_torchvision(width, height, scale, np.random.default_rng(seed))
    part = Image.fromarray(np.asarray(image)[top : top + down, left : left + across])
    found = random_resized_crop(image, SIZE, scale, np.random.default_rng(seed))
    np.testing.assert_array_equal(found, np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))


def test_larger_images_are_scaled_down():
    image = saved(noise(80, 40))
    assert downscale(image, "a.png", 80) == image
    with Image.open(io.BytesIO(downscale(image, "a.png", 20))) as small:
        assert (small.format, small.size) == ("JPEG", (20, 10))


# Modes.

STRAIGHT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
"""Modes of 8 bits that Pillow converts to RGB directly."""
PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
MODES = (*STRAIGHT, *PREMULTIPLIED, "LAB", *DEEP)


def colorful(width: int = 12, height: int = 9) -> Image.Image:
    """Every pixel has another color, none of them gray."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 20, y * 25, 255 - x * y], -1).astype(np.uint8))


def alpha(width: int = 12, height: int = 9) -> Image.Image:
    return Image.fromarray(np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8))


@functools.cache
def image_of(mode: str) -> Image.Image:
    image = colorful()
    if mode in DEEP:
        gray = np.linspace(0, 65535, 108).reshape(9, 12)
        if mode in ("I", "F"):
            return Image.fromarray(gray.astype(np.int32 if mode == "I" else np.float32))
        return Image.frombytes(mode, image.size, gray.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
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
    image = image_of(mode)
    assert image.mode == mode
    before = image.tobytes()
    found = to_rgb(image)
    pixels = np.asarray(found)
    assert (found.mode, found.size, pixels.dtype) == ("RGB", image.size, np.uint8)
    assert image.tobytes() == before
    if mode in STRAIGHT or mode in PREMULTIPLIED:
        straight = image.convert(PREMULTIPLIED[mode]) if mode in PREMULTIPLIED else image
        assert np.array_equal(pixels, np.asarray(straight.convert("RGB")))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) >= (2 if mode == "1" else 30)
    elif mode == "LAB":
        light = pixels.astype(int).sum(-1).ravel()
        assert light[0] < 30
        assert light[-1] > 3 * 245
        assert (np.diff(light) >= 0).all()
    elif mode != "F":  # 16 bits keep their upper byte
        expected = np.linspace(0, 65535, 108).astype(int) / 257
        assert np.abs(pixels.astype(int).reshape(-1, 3) - expected[:, None]).max() <= 1
    for size in ((1, 1), (3, 1), (1, 5)):
        for value in (0, 1):
            bands = len(Image.new(mode, size).getbands())
            small = to_rgb(Image.new(mode, size, value if bands == 1 else None))
            assert (small.mode, small.size) == ("RGB", size)
    assert np.array_equal(np.asarray(decode(reverie_jax.ask(image, "What is this?").image, "a")), pixels)


def test_transparency_is_dropped_not_blended():
    image = colorful()
    image.putalpha(0)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(colorful()))
    palette = colorful().quantize(16)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert np.array_equal(np.asarray(to_rgb(palette)), np.asarray(colorful().quantize(16).convert("RGB")))


DEPTHS = {"I;16": (8, 10, 12, 14, 16), "I": (8, 12, 16, 24), "F": (1, 8, 12, 16)}


@pytest.mark.parametrize(("mode", "depth"), [(mode, depth) for mode, depths in DEPTHS.items() for depth in depths])
def test_gray_of_any_depth_fills_eight_bits(mode, depth):
    """Cameras and scanners write 8 or 12 bits into files of 16: taken as 16 bits, such pictures are black."""
    values = np.linspace(0, 1 if depth == 1 else 2**depth - 1, 108).reshape(9, 12)
    image = Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    if mode == "I;16":  # as it comes from a file
        image = Image.open(io.BytesIO(saved(image)))
    assert gray_depth(image) == depth
    if mode != "I;16" or depth > 8:
        assert f" {8 if depth == 1 else depth} bits" in describe_conversion(image)[1]
    expected = np.linspace(0, 255, 108).reshape(9, 12)
    assert np.abs(np.asarray(to_rgb(image))[..., 0].astype(float) - expected).max() <= 1


def test_what_others_read_in_another_way_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(images, "_warned", set())
    clear, deep = (saved(Image.new(mode, (2, 2), color)) for mode, color in (("RGBA", (9, 9, 9, 9)), ("I;16", 900)))
    for _ in range(2):
        for encoded, name in ((PNG, "rgb.png"), (saved(image_of("RGBA")), "a.png"), (clear, "b.png"), (deep, "c.png")):
            decode(encoded, name)
    assert [record.getMessage()[:6] for record in caplog.records] == ["a.png:", "c.png:"]


WILD = {
    "negative": [-5.0, -1e9, 0.0, 3.0],
    "huge": [1e9, 2e9, 70000.0, 0.0],
    "not a number": [np.nan, 1.0, 2.0, 3.0],
    "infinite": [np.inf, -np.inf, 0.0, 255.0],
}


@pytest.mark.parametrize("values", WILD.values(), ids=WILD)
def test_values_out_of_range_are_not_errors(values):
    gray = np.asarray(values).reshape(2, 2)
    found = to_rgb(Image.fromarray(gray.astype(np.float32)))
    assert (found.mode, found.size) == ("RGB", (2, 2))
    whole = np.nan_to_num(gray, posinf=0, neginf=0).clip(-(2**31), 2**31 - 1).astype(np.int32)
    found = to_rgb(Image.fromarray(whole))
    assert (found.mode, found.size) == ("RGB", (2, 2))
    level = np.asarray(found)[..., 0].ravel()
    assert (np.diff(level[np.argsort(whole.ravel(), kind="stable")].astype(int)) >= 0).all()


# Files.

FILES = {
    "png 1": ("1", "PNG"),
    "png of 16 bits": ("I;16", "PNG"),
    "png gray with alpha": ("LA", "PNG"),
    "gif": ("P", "GIF"),
    "webp with alpha": ("RGBA", "WEBP"),
    "jpeg cmyk": ("CMYK", "JPEG"),
    "tiff lab": ("LAB", "TIFF"),
    "tiff 16 big": ("I;16B", "TIFF"),
    "tiff float": ("F", "TIFF"),
    "tiff palette with alpha": ("PA", "TIFF"),
    "pgm of 16 bits": ("I", "PPM"),
}


@pytest.mark.parametrize(("mode", "form"), FILES.values(), ids=FILES)
def test_every_format_is_decoded(mode, form):
    encoded = saved(image_of(mode), form)
    with Image.open(io.BytesIO(encoded)) as opened:
        expected = np.asarray(to_rgb(opened))
    found = decode(encoded, "a")
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), expected)
    assert expected.std() > 10


@pytest.mark.parametrize(
    "options", [{}, {"transparency": 0}, {"transparency": bytes([0, 128, 255])}], ids=["opaque", "one clear", "blended"]
)
def test_palette_files_have_their_colors(options):
    # Pasted as indices, as some of the original scripts do, red would come out black.
    image = Image.new("P", (20, 8))
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    ImageDraw.Draw(image).rectangle((10, 0, 14, 7), fill=1)
    ImageDraw.Draw(image).rectangle((15, 0, 19, 7), fill=2)
    row = preprocess(decode(saved(image, **options), "a.png"), 20)[10]
    assert (row[:10] == (255, 0, 0)).all()
    assert (row[10:15] == (0, 255, 0)).all()
    assert (row[15:] == (10, 20, 30)).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])  # Pillow itself turns a TIFF as it loads it
def test_the_exif_orientation_is_not_applied(form):
    image, options = noise(30, 17), {"lossless": True} if form == "WEBP" else {}
    plain = np.asarray(decode(saved(image, form, **options), "a"))
    assert plain.shape == (17, 30, 3)
    for orientation in (3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        encoded = saved(image, form, exif=exif, **options)
        with Image.open(io.BytesIO(encoded)) as opened:
            assert opened.getexif()[0x0112] == orientation
        assert np.array_equal(np.asarray(decode(encoded, "a")), plain)


def test_only_the_first_frame_is_decoded():
    frames = [Image.new("RGB", (5, 4), color) for color in ((200, 10, 10), (10, 200, 10))]
    encoded = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(encoded, "a.gif")).reshape(-1, 3).tolist() == [[200, 10, 10]] * 20


def test_png_keeps_every_pixel():
    pixels = np.asarray(noise(13, 7))
    assert np.array_equal(np.asarray(decode(encode_png(pixels), "a.png")), pixels)


# Broken files.

PNG = saved(noise(20, 20))


@settings(max_examples=40)
@given(st.integers(0, len(PNG) - 1), st.integers(1, 255))
def test_a_damaged_byte_is_decoded_or_named(index, change):
    damaged = PNG[:index] + bytes([PNG[index] ^ change]) + PNG[index + 1 :]
    try:
        assert decode(damaged, "a.png").mode == "RGB"
    except BrokenImage as error:
        assert re.fullmatch(r"a\.png: (?!.*0x).*", str(error))  # noqa: PT017  # one line, without a memory address


def test_images_beyond_pillows_limit_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BrokenImage, match=r"a\.png"):
        decode(PNG, "a.png")
