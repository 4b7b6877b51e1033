"""Square crops, padding by reflection, and the original's squashing."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pbe.data.crops import Crop, cut, plan_original_crop, plan_square_crop, resize, valid_mask
from pbe.data.masks import Box, extend_box
from pbe.data.randomness import generator


def draw_case(index: int) -> tuple[Box, Box, int, int, np.random.Generator]:
    rng = generator("crop", index)
    width, height = (int(side) for side in rng.integers(20, 200, 2))
    box_width, box_height = rng.uniform(0.1, 0.95, 2) * (width, height)
    x, y = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    box = Box(x, y, x + box_width, y + box_height).rounded_out(width, height)
    return box, extend_box(box, width, height, 0.4, rng), width, height, rng


def contains(outer: Box, inner: Box) -> bool:
    return outer.x1 <= inner.x1 and outer.y1 <= inner.y1 and outer.x2 >= inner.x2 and outer.y2 >= inner.y2


def as_box(crop: Crop) -> Box:
    return Box(crop.x, crop.y, crop.x + crop.width, crop.y + crop.height)


def test_crops_are_square_and_keep_the_extended_box():
    seen = set()
    for index in range(2000):
        box, extended, width, height, rng = draw_case(index)
        plan = plan_square_crop(box, extended, width, height, 0.6, rng)
        crop = plan.crop
        assert crop.width == crop.height >= 1
        assert contains(as_box(crop), plan.extended)
        assert contains(plan.extended, box)
        assert contains(extended, plan.extended)
        inside = (
            crop.x >= 0 and crop.y >= 0 and crop.x + crop.width <= width and crop.y + crop.height <= height
        )
        padded = max(box.width, box.height) > min(width, height)
        assert ("padded" in plan.events) == padded
        assert inside or padded
        assert ("shrunk" in plan.events) == (
            not padded and max(extended.width, extended.height) > min(width, height)
        )
        seen.update(plan.events)
    assert seen == {"padded", "shrunk"}


def test_a_long_extended_box_is_shrunk_towards_the_box():
    plan = plan_square_crop(Box(40, 10, 100, 50), Box(10, 5, 150, 60), 200, 80, 0.0, generator(0))
    assert plan.events == ("shrunk",)
    # 140 px have to become 80: both ends give up three quarters of their distance to the box.
    assert plan.extended == Box(40 - 8, 5, 100 + 12, 60)


def test_shrinking_is_symmetric_and_bounded():
    box = Box(45, 45, 55, 55)
    plans = [plan_square_crop(box, box, 100, 100, 0.6, generator("s", index)) for index in range(400)]
    insets = {plan.crop.x for plan in plans}
    assert insets == set(range(28))  # 0 to int(0.6 * 45)
    assert all(
        plan.crop == Crop(plan.crop.x, plan.crop.x, 100 - 2 * plan.crop.x, 100 - 2 * plan.crop.x)
        for plan in plans
    )


@pytest.mark.parametrize("transpose", [False, True])
def test_positions_are_spread(transpose):
    box = Box(30, 90, 50, 110) if transpose else Box(90, 30, 110, 50)
    width, height = (80, 200) if transpose else (200, 80)
    plans = [plan_square_crop(box, box, width, height, 0.0, generator("p", index)) for index in range(2000)]
    starts = np.bincount([plan.crop.y if transpose else plan.crop.x for plan in plans], minlength=200)
    assert np.flatnonzero(starts).tolist() == list(range(30, 91))
    assert starts[30:91].max() < 4 * 2000 / 61


def test_original_squashes_where_fewer_than_two_positions_exist():
    wide = plan_original_crop(Box(10, 5, 150, 60), 200, 80, 0.6, generator(0))
    assert wide.crop == Crop(0, 0, 200, 80)
    assert wide.events == ("squashed",)
    single = plan_original_crop(Box(50, 5, 130, 60), 200, 80, 0.6, generator(0))
    assert single.events == ("squashed",)
    square = plan_original_crop(Box(20, 20, 40, 40), 80, 80, 0.6, generator(0))
    assert square.crop == Crop(0, 0, 80, 80)
    assert square.events == ()


@pytest.mark.parametrize("transpose", [False, True])
def test_original_crops_elsewhere(transpose):
    for index in range(200):
        extended = Box(20, 100, 50, 140) if transpose else Box(100, 20, 140, 50)
        width, height = (80, 200) if transpose else (200, 80)
        plan = plan_original_crop(extended, width, height, 0.6, generator("o", index))
        assert plan.crop.width == plan.crop.height
        assert contains(as_box(plan.crop), extended)
        assert plan.events == ()


def test_cut_reflects_and_the_valid_mask_marks_it():
    picture = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    crop = Crop(0, -2, 8, 8)
    out = cut(picture, crop, 8)
    np.testing.assert_array_equal(out[2:6], picture)
    np.testing.assert_array_equal(out[1], picture[1])
    np.testing.assert_array_equal(out[0], picture[2])
    np.testing.assert_array_equal(out[6:], picture[[2, 1]])
    valid = valid_mask(crop, 8, 4, 8)
    assert valid[2:6].all()
    assert np.count_nonzero(valid) == 32


def test_reflection_goes_beyond_the_picture_s_own_length():
    picture = np.random.default_rng(0).integers(0, 255, (2, 90, 3), dtype=np.uint8)
    out = cut(picture, Crop(0, -44, 90, 90), 90)
    assert out.shape == (90, 90, 3)
    assert set(np.unique(out)) <= set(np.unique(picture))


def test_valid_pixels_lie_wholly_inside():
    # 10 px of 30 are inside; at 16 px that is 5.33 to 10.67.
    valid = valid_mask(Crop(0, -10, 30, 30), 30, 10, 16)
    assert np.flatnonzero(valid[:, 0]).tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("start", "row"), [(-148, 7), (-150, 8), (0, 0), (-298, 15)])
def test_a_picture_thinner_than_a_pixel_keeps_the_one_at_its_middle(transpose, start, row):
    """Two pixels of 300 are a tenth of one at 16 px."""
    if transpose:
        valid = valid_mask(Crop(start, 0, 300, 300), 2, 300, 16).T
    else:
        valid = valid_mask(Crop(0, start, 300, 300), 300, 2, 16)
    assert np.flatnonzero(valid.any(axis=1)).tolist() == [row]
    assert valid[row].all()


def test_shrinking_averages():
    """A checkerboard of single pixels becomes grey, not a moiré."""
    board = (np.indices((96, 96)).sum(0) % 2 * 255).astype(np.uint8)
    out = cut(np.dstack([board] * 3), Crop(0, 0, 96, 96), 24)
    assert abs(out.astype(int) - 127).max() <= 1


@pytest.mark.parametrize(("side", "averaged"), [(149, False), (150, False), (151, True), (80, False)])
def test_averaging_may_start_at_a_larger_factor(side, averaged):
    picture = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    filters = {True: cv2.INTER_AREA, False: cv2.INTER_LINEAR}
    expected = cv2.resize(picture, (100, 100), interpolation=filters[averaged])
    np.testing.assert_array_equal(resize(picture, 100, 100, 1.5), expected)
    np.testing.assert_array_equal(cut(picture, Crop(0, 0, side, side), 100, 1.5), expected)
