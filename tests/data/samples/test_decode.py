"""Decoding: every kind of file to uint8 RGB, in the frame of the boxes."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pbe.data.samples.decode import (
    DAMAGED,
    SIZE_MISMATCH,
    UNREADABLE,
    UnusableImageError,
    check_hash,
    decode_image,
)
from tests.data.indexed import blake

RED, WIDTH, HEIGHT = (250, 20, 30), 24, 16


def picture() -> Image.Image:
    """Red above, dark below."""
    pixels = np.full((HEIGHT, WIDTH, 3), 10, np.uint8)
    pixels[: HEIGHT // 2] = RED
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(tag: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = tag
    return encoded(picture(), "JPEG", quality=95, exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(), "JPEG", quality=95),
        encoded(picture(), "JPEG", quality=95, progressive=True),
        encoded(picture(), "PNG"),
        encoded(picture().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        encoded(picture().convert("RGBA"), "PNG"),
        encoded(picture(), "WEBP", lossless=True),
        encoded(picture(), "WEBP", save_all=True, append_images=[picture().rotate(180)], lossless=True),
        cv2.imencode(".png", np.asarray(picture()).astype(np.uint16)[..., ::-1] * 257)[1].tobytes(),
    ],
    ids=["jpeg", "progressive", "png", "palette", "transparent", "webp", "animated", "16 bits"],
)
def test_kinds_of_files(data):
    decoded = decode_image(data, (WIDTH, HEIGHT))
    assert (decoded.shape, decoded.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
    np.testing.assert_allclose(decoded[2, 12].astype(int), RED, atol=6)
    np.testing.assert_allclose(decoded[-2, 12].astype(int), 10, atol=6)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_become_rgb(mode):
    decoded = decode_image(encoded(picture().convert(mode), "JPEG", quality=95))
    assert decoded.shape == (HEIGHT, WIDTH, 3)
    expected = np.asarray(picture().convert(mode).convert("RGB"))[2, 12]
    np.testing.assert_allclose(decoded[2, 12].astype(int), expected, atol=12)


def test_boxes_in_the_displayed_frame():
    decoded = decode_image(turned(6), (HEIGHT, WIDTH))
    assert decoded.shape == (WIDTH, HEIGHT, 3)
    np.testing.assert_allclose(decoded[12, -2].astype(int), RED, atol=12)  # what was above is on the right


def test_boxes_in_the_stored_frame():
    decoded = decode_image(turned(6), (WIDTH, HEIGHT))
    assert decoded.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(decoded[2, 12].astype(int), RED, atol=12)


@pytest.mark.parametrize(("tag", "frame"), [(6, (24, 24)), (1, (HEIGHT, WIDTH)), (3, (HEIGHT, WIDTH))])
def test_neither_frame_fits(tag, frame):
    with pytest.raises(UnusableImageError, match=SIZE_MISMATCH):
        decode_image(turned(tag), frame)


@pytest.mark.parametrize("data", [b"", b"text", turned(1)[:300], encoded(picture(), "PNG")[:60]])
def test_what_is_cut_short_or_no_image(data):
    with pytest.raises(UnusableImageError, match=UNREADABLE):
        decode_image(data)


def test_hashes():
    check_hash(b"bytes", blake(b"bytes"))
    with pytest.raises(UnusableImageError, match=DAMAGED):
        check_hash(b"bytes!", blake(b"bytes"))
