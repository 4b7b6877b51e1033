"""An invisible watermark that says a picture was edited; it needs the package invisible-watermark.

That package (MIT) asks for opencv-python, which takes the place of the headless OpenCV used here and needs
system libraries that servers lack. So it is no dependency, and is installed without its own.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np

from pbe.editing.problems import EditTypeError, EditValueError
from pbe.errors import UserError

TEXT = "PaintByExample"
METHOD = "dwtDctSvd"  # the package's default, dwtDct, reads back wrongly from half of the pictures tried
SMALLEST = 256 * 256
INSTALL = "pip install PyWavelets && pip install --no-deps invisible-watermark"


def add_watermark(image: np.ndarray, text: str = TEXT) -> np.ndarray:
    """Hide a text in the frequencies of a picture's colour; the eye does not see it, a decoder reads it.

    It is read by ``imwatermark.WatermarkDecoder("bytes", 8 * len(text)).decode(bgr, "dwtDctSvd")``. The mark
    does not survive a resize, and may read back with errors from flat or very noisy pictures.

    Args:
        image: uint8 ``h w 3``, RGB, of at least 256x256 pixels in area.
        text: what to hide; 8 bits a character, ASCII.

    Returns:
        A new array, uint8 ``h w 3``.

    Raises:
        EditTypeError: not uint8 ``h w 3``.
        EditValueError: a picture too small, or a text that is empty or not ASCII.
        UserError: the package is not installed.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise EditTypeError(f"watermark: {image.dtype} {image.shape}; it must be uint8 (h, w, 3)")
    if image.shape[0] * image.shape[1] < SMALLEST:
        size = f"{image.shape[1]}x{image.shape[0]}"
        raise EditValueError(f"watermark: {size} is too small; it needs an area of 256x256 pixels")
    if not text or not text.isascii():
        raise EditValueError(f"watermark: '{text}' cannot be hidden; it must be ASCII and not empty")
    try:
        encoder = import_module("imwatermark").WatermarkEncoder()
    except ImportError as error:
        raise UserError(f"a watermark needs the package invisible-watermark ({error}): {INSTALL}") from error
    encoder.set_watermark("bytes", text.encode("ascii"))
    marked = encoder.encode(np.ascontiguousarray(image[:, :, ::-1]), METHOD)  # the package takes BGR
    return np.ascontiguousarray(marked[:, :, ::-1])
