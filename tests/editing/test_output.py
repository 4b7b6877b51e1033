"""The watermark: it can be read back, is not seen, and says what is missing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from pbe.editing.output import METHOD, TEXT, add_watermark
from pbe.errors import UserError


def photograph(height: int = 288, width: int = 320) -> np.ndarray:
    """Something like one: shapes of several sizes with soft edges."""
    rng = np.random.default_rng(0)
    layers = [Image.fromarray(rng.integers(40, 216, (n, n, 3), dtype=np.uint8)) for n in (3, 9, 40)]
    resized = [np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC)) for layer in layers]
    return np.mean(resized, axis=0).astype(np.uint8)


def test_text_is_read_back_and_not_seen() -> None:
    decoder = pytest.importorskip("imwatermark").WatermarkDecoder("bytes", 8 * len(TEXT))
    picture = photograph()
    before = picture.copy()
    marked = add_watermark(picture)
    assert np.array_equal(picture, before)
    assert marked.shape == picture.shape
    assert marked.dtype == np.uint8
    assert decoder.decode(np.ascontiguousarray(marked[:, :, ::-1]), METHOD) == TEXT.encode()
    assert decoder.decode(np.ascontiguousarray(picture[:, :, ::-1]), METHOD) != TEXT.encode()
    error = np.square(marked.astype(float) - picture).mean()
    assert 0.0 < error < 12.0  # more than 37 dB


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    with pytest.raises(UserError, match=r"--no-deps invisible-watermark"):
        add_watermark(photograph())


@pytest.mark.parametrize(
    ("picture", "error"),
    [
        (np.zeros((255, 257, 3), np.uint8), "257x255 is too small"),
        (np.zeros((300, 300), np.uint8), "uint8"),
        (np.zeros((300, 300, 4), np.uint8), "uint8"),
        (np.zeros((300, 300, 3), np.float32), "float32"),
    ],
)
def test_images_that_cannot_hold_one(picture: np.ndarray, error: str) -> None:
    with pytest.raises(UserError, match=error):
        add_watermark(picture)


@pytest.mark.parametrize("text", ["", "grün"])
def test_text_that_cannot_be_hidden(text: str) -> None:
    with pytest.raises(UserError, match="ASCII"):
        add_watermark(photograph(), text)
