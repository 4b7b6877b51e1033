"""The run-length code of masks: known values, and round trips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pbe.data.samples.masks import decode_rle, encode_rle


def test_known_code() -> None:
    """Runs of the documentation's example: [0 0 1 1 1 0 1] is 2 3 1 1, and [1 1 1 1 1 1 0] is 0 6 1."""
    first = np.array([[0, 0, 1, 1, 1, 0, 1]], np.uint8).T
    assert encode_rle(first) == {"size": [7, 1], "counts": "231N"}
    assert decode_rle({"size": [7, 1], "counts": [2, 3, 1, 1]}).ravel().tolist() == first.ravel().tolist()
    second = np.array([[1, 1, 1, 1, 1, 1, 0]], np.uint8).T
    assert encode_rle(second)["counts"] == "061"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_round_trip(height: int, width: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    mask = np.repeat(rng.random((height, width)) < share, 3, axis=0).astype(np.uint8)
    assert np.array_equal(decode_rle(encode_rle(mask)), mask)


@pytest.mark.parametrize(
    "code",
    [
        {},
        {"size": [2, 2]},
        {"size": [2, 2], "counts": [3]},
        {"size": [2, 2], "counts": [-1, 5]},
        {"size": [2, 2], "counts": "o"},
        {"size": [2, 2], "counts": "\x00"},
        {"size": 4, "counts": [4]},
    ],
)
def test_damaged_codes(code: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"mask|run"):
        decode_rle(code)
