"""Masks: what they cover and where they end."""

from __future__ import annotations

import numpy as np
import pytest

from pbe.data.randomness import generator
from pbe.data.samples.crops import Box
from pbe.data.samples.masks import (
    bezier_mask,
    curve_points,
    extend_box,
    rectangle_mask,
)

SIZE = 64


def draw_box(rng: np.random.Generator, size: int = SIZE, least: float = 4.0) -> Box:
    width, height = rng.uniform(least, 0.9 * size, 2)
    x, y = rng.uniform(0, size - width), rng.uniform(0, size - height)
    return Box(x, y, x + width, y + height)


def test_extended_box_contains_the_box_and_stays_inside():
    for index in range(500):
        rng = generator("extend", index)
        box = draw_box(rng)
        extended = extend_box(box, SIZE, SIZE, 0.4, rng)
        assert 0.6 * box.x1 - 1e-9 <= extended.x1 <= box.x1
        assert 0.6 * box.y1 - 1e-9 <= extended.y1 <= box.y1
        assert box.x2 <= extended.x2 <= box.x2 + 0.4 * (SIZE - box.x2) + 1e-9
        assert box.y2 <= extended.y2 <= box.y2 + 0.4 * (SIZE - box.y2) + 1e-9


def test_extension_is_uniform_up_to_the_fraction():
    box = Box(30, 30, 40, 40)
    moved = [30 - extend_box(box, SIZE, SIZE, 0.4, generator("u", index)).x1 for index in range(2600)]
    counts = np.bincount(np.array(moved, int))
    assert len(counts) == 13  # 0 to int(0.4 * 30) pixels
    assert counts == pytest.approx(200, abs=4 * np.sqrt(200))


def test_rectangle_is_exactly_the_box():
    mask = rectangle_mask(Box(3, 5, 9, 20), 32, 24)
    expected = np.zeros((24, 32), np.uint8)
    expected[5:20, 3:9] = 255
    np.testing.assert_array_equal(mask, expected)


def test_rectangle_of_fractions_holds_every_touched_pixel():
    mask = rectangle_mask(Box(2.5, 0.1, 4.0000000001, 1.0), 8, 8)
    assert mask[0, 2:4].all()
    assert np.count_nonzero(mask) == 2


def test_curves_bulge_half_way_to_the_extended_box():
    points = curve_points(Box(20, 20, 40, 40), Box(10, 4, 56, 50)).reshape(4, 18, 2)
    middle = points[:, 9]  # t = 0.5
    np.testing.assert_allclose(middle, [[30, 12], [48, 30], [30, 45], [15, 30]])
    # Clockwise from the top left: the first curve runs to the right, along the top.
    assert (np.diff(points[0, :, 0]) > 0).all()
    assert (points[0, :, 1] < 20).all()


def test_arbitrary_masks_stay_within_bounds_and_cover_the_box():
    jitter = (2.0, 3.0)
    for index in range(500):
        rng = generator("bezier", index)
        box = draw_box(rng)
        extended = extend_box(box, SIZE, SIZE, 0.4, rng)
        mask = bezier_mask(box, extended, SIZE, SIZE, jitter, rng)
        limit = Box(extended.x1 - 2, extended.y1 - 3, extended.x2 + 2, extended.y2 + 3)
        assert not mask[rectangle_mask(limit, SIZE, SIZE) == 0].any()
        inside = mask[rectangle_mask(box, SIZE, SIZE) > 0] > 0
        assert inside.mean() >= 0.9
        assert set(np.unique(mask)) <= {0, 255}


@pytest.mark.parametrize("side", [0.5, 1.0, 2.0, 3.0])
def test_tiny_boxes_are_covered_under_huge_jitter(side):
    for index in range(50):
        rng = generator("tiny", index)
        x, y = rng.uniform(0, SIZE - side, 2)
        box = Box(x, y, x + side, y + side)
        mask = bezier_mask(box, box, SIZE, SIZE, (10.0, 10.0), rng)
        assert (mask[rectangle_mask(box, SIZE, SIZE) > 0] > 0).mean() >= 0.9


def test_arbitrary_masks_vary():
    box, extended = Box(20, 20, 40, 40), Box(12, 12, 50, 50)
    masks = [bezier_mask(box, extended, SIZE, SIZE, (1.0, 1.0), generator("v", i)) for i in range(2)]
    assert (masks[0] != masks[1]).any()
