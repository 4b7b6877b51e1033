"""COCO's run-length code of masks: runs of 0 and 1 in turn, down the columns, starting with 0.

The compressed text is LEB128-like: every run (from the fourth on, its difference to the run two before) is
cut into groups of five bits, the lowest first; bit 5 says that more follow, and 48 is added to make it a
printable character. Both forms are read; the compressed one is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

CONTINUES, SIGN, GROUP_BITS, BASE = 0x20, 0x10, 5, 48
MAX_SHIFT = 60  # bits of a run; no mask has more pixels
MAX_PIXELS = 2**31


def _text_to_runs(text: str) -> list[int]:
    """Return the runs of a compressed text.

    Raises:
        ValueError: it ends in the middle of a run.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - BASE
        if not 0 <= group < 64:
            raise ValueError(f"run-length text holds {character!r}")
        if shift > MAX_SHIFT:
            raise ValueError("a run-length text holds a run longer than any mask")
        value |= (group & 0x1F) << shift
        shift += GROUP_BITS
        if group & CONTINUES:
            continue
        if group & SIGN:
            value |= -1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("run-length text is cut short")
    return runs


def _runs_to_text(runs: Sequence[int]) -> str:
    characters = []
    for position, run in enumerate(runs):
        value = run - runs[position - 2] if position > 2 else run
        more = True
        while more:
            group = value & 0x1F
            value >>= GROUP_BITS
            more = value != (-1 if group & SIGN else 0)
            characters.append(chr((group | (CONTINUES if more else 0)) + BASE))
    return "".join(characters)


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Return ``{"size": [h, w], "counts": text}`` of a mask, ``h w``; what is not zero counts as one."""
    flat = (mask != 0).T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = np.concatenate([[0], changes, [flat.size]])
    runs = np.diff(ends).tolist()
    if flat.size and flat[0]:
        runs = [0, *runs]
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": _runs_to_text(runs)}


def decode_rle(mask: dict[str, Any]) -> np.ndarray:
    """Return the mask, uint8 ``h w`` of 0 and 1, of a run-length code, compressed (text) or not (list).

    Raises:
        ValueError: it is no such code, or its runs do not add up to its size.
    """
    try:
        height, width = (int(side) for side in mask["size"])
        counts = mask["counts"]
        runs = _text_to_runs(counts) if isinstance(counts, str) else [int(run) for run in counts]
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"no run-length mask: {error}") from error
    if (
        height < 0
        or width < 0
        or height * width > MAX_PIXELS
        or any(run < 0 for run in runs)
        or sum(runs) != height * width
    ):
        raise ValueError(f"the runs of a mask do not add up to its size, {width} x {height}")
    values = np.arange(len(runs), dtype=np.uint8) & 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)
