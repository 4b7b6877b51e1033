"""Putting an edit back into its source."""

from __future__ import annotations

import numpy as np

GREY = np.uint8(128)


def to_unit(picture: np.ndarray) -> np.ndarray:
    """Return float32 in [0, 1] of a picture that is uint8 or float32 in [-1, 1]."""
    if picture.dtype == np.uint8:
        return picture.astype(np.float32) / np.float32(255.0)
    return picture / np.float32(2.0) + np.float32(0.5)


def composite(source: np.ndarray, edit: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Return the edit inside the hole and the source everywhere else, with a hard seam.

    Args:
        source: ``h w 3``, uint8 or float32 in [-1, 1].
        edit: float32 ``h w 3`` in [0, 1].
        hole: bool ``h w``, True = take the edit.

    Returns:
        float32 ``h w 3`` in [0, 1]; outside the hole :func:`to_bytes` gives back a uint8 source's very bytes.
    """
    return np.where(hole[:, :, None], edit, to_unit(source))


def grey_out(source: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Return a picture (uint8 ``h w 3``) with its hole (bool ``h w``) at mid-grey, to be looked at."""
    return np.where(hole[:, :, None], GREY, source)


def to_bytes(picture: np.ndarray) -> np.ndarray:
    """Round a float picture in [0, 1] to uint8 of the same shape."""
    return np.round(picture * np.float32(255.0)).astype(np.uint8)
