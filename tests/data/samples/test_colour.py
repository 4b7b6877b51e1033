"""Colours as seen: profiles against the closed form, transparency against the blend, others untouched."""

from __future__ import annotations

import io
import struct
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from pbe.data.samples.decode import convert_profile, decode_image, on_white, to_srgb
from pbe.data.sources.image_files import UnreadableImageError, encode_again, first_frame, inspect_image

GAMMA = 563 / 256
# Columns are the primaries, adapted to D50: Adobe RGB (1998) as published, and sRGB.
WIDE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def make_profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2, by hand."""
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">2I", start + len(data), len(content))
        data += content
    header = struct.pack(
        ">I4sI4s4s4s12x4s28x", start + len(data), bytes(4), 0x02100000, b"mntr", space, b"XYZ ", b"acsp"
    )
    header += fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def wide_gamut() -> bytes:
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)}
    for name, column in zip((b"r", b"g", b"b"), WIDE.T, strict=True):
        tags |= {name + b"XYZ": b"XYZ " + bytes(4) + fixed(*column), name + b"TRC": curve(GAMMA)}
    return make_profile(b"RGB ", tags)


def in_srgb(image: np.ndarray) -> np.ndarray:
    """The closed form: to linear light, to XYZ, to sRGB's primaries, clipped, and sRGB's curve."""
    linear = (image / 255.0) ** GAMMA @ (np.linalg.inv(SRGB) @ WIDE).T
    linear = linear.clip(0.0, 1.0)
    return 255.0 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    coarse = np.random.default_rng(3).integers(40, 216, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (40, 32), interpolation=cv2.INTER_NEAREST)


def encoded(pixels: np.ndarray, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("png", {}), ("webp", {"lossless": True}), ("jpeg", {"quality": 100, "subsampling": 0})],
)
def test_wide_gamut_becomes_srgb(pixels: np.ndarray, kind: str, options: dict[str, Any]) -> None:
    data = encoded(pixels, kind, icc_profile=wide_gamut(), **options)
    decoded = decode_image(data)
    plain = decode_image(encoded(pixels, kind, **options))
    assert np.abs(in_srgb(plain) - plain).max() > 15  # the profile matters
    assert np.abs(decoded - in_srgb(plain)).max() <= 2


def test_files_encoded_again_keep_their_colours(pixels: np.ndarray) -> None:
    data = encoded(pixels, "png", icc_profile=wide_gamut())
    again, extension = encode_again(data, inspect_image(data), 20, 95)
    assert extension == "png"
    assert b"iCCP" not in again
    small = cv2.resize(decode_image(data), (20, 16), interpolation=cv2.INTER_AREA)
    assert np.abs(decode_image(again).astype(int) - small).max() <= 1
    tiff = encoded(pixels, "tiff", icc_profile=wide_gamut())
    assert np.abs(first_frame(tiff) - in_srgb(pixels)).max() <= 2


def test_ordinary_files_are_handed_back(pixels: np.ndarray) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for options in ({}, {"icc_profile": srgb}, {"icc_profile": b"no profile at all"}):
        for kind in ("png", "webp", "jpeg"):
            data = encoded(pixels, kind, **options)
            assert to_srgb(pixels, data) is pixels
            assert on_white(pixels, data) is pixels
    assert to_srgb(pixels, b"") is pixels
    assert convert_profile(pixels, wide_gamut()[:150]) is pixels


def test_grey_profiles(pixels: np.ndarray) -> None:
    grey = make_profile(
        b"GRAY", {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249), b"kTRC": curve(1.0)}
    )
    level = np.full((4, 4, 3), 128, np.uint8)
    expected = 255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(convert_profile(level, grey) - expected).max() <= 2
    assert convert_profile(pixels, grey) is pixels  # coloured pixels that a grey profile cannot mean


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_transparent_parts_lie_on_white(pixels: np.ndarray, kind: str, orientation: int) -> None:
    alpha = np.linspace(0, 255, pixels.shape[1], dtype=np.uint8)[None].repeat(pixels.shape[0], axis=0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True, "exact": True} if kind == "webp" else {}
    data = encoded(np.dstack([pixels, alpha]), kind, exif=exif, **options)
    share = alpha[..., None] / 255.0
    expected = pixels * share + 255.0 * (1.0 - share)
    shown = expected if orientation == 1 else np.rot90(expected, -1)
    assert np.abs(decode_image(data) - shown).max() <= 1
    stored = decode_image(data, (pixels.shape[1], pixels.shape[0]))
    assert np.abs(stored - expected).max() <= 1
    opaque = encoded(np.dstack([pixels, np.full_like(alpha, 255)]), kind, **options)
    assert np.array_equal(decode_image(opaque), pixels)


def test_palettes_with_a_transparent_colour(pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels).quantize(8)
    buffer = io.BytesIO()
    image.save(buffer, "png", transparency=0)
    shown = decode_image(buffer.getvalue())
    clear = np.asarray(image) == 0
    assert clear.any()
    assert (shown[clear] == 255).all()
    assert np.array_equal(shown[~clear], np.asarray(image.convert("RGB"))[~clear])


@pytest.mark.parametrize("values", [np.float32([[0.1, 0.9]]), np.int32([[0, 70_000]]), np.int32([[-1, 9]])])
def test_numbers_that_are_no_colours(values: np.ndarray) -> None:
    with pytest.raises(UnreadableImageError, match="no colours"):
        first_frame(encoded(values, "tiff"))
