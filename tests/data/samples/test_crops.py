"""Square crops, padding by reflection, and the original's squashing."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pbe.data.randomness import generator
from pbe.data.samples.crops import (
    GREY,
    Box,
    Crop,
    cut,
    mirror_mask,
    plan_original_crop,
    plan_square_crop,
    resize,
    resize_area,
    valid_mask,
)
from pbe.data.samples.masks import extend_box, rectangle_mask


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


def test_an_end_that_rounding_left_below_a_whole_pixel_has_its_crop():
    extended = Box(15.901465451314419, 7.334210173442054, 112, 96)  # fitted, it begins at 15.999999999999996
    plan = plan_square_crop(Box(21, 10, 112, 96), extended, 112, 96, 0.6, generator(0))
    assert (plan.crop.x, plan.crop.width) == (16, 96)


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


def test_reflection_goes_beyond_the_image_s_own_length():
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
def test_an_image_thinner_than_a_pixel_keeps_the_one_at_its_middle(transpose, start, row):
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


def area_weights(old: int, new: int) -> np.ndarray:
    """Each new pixel as the mean of the old ones, by how much of them it covers; ``new old``."""
    edges = np.arange(new + 1) * old / new
    ends = np.minimum(edges[1:, None], np.arange(1, old + 1)[None])
    overlap = np.clip(ends - np.maximum(edges[:-1, None], np.arange(old)[None]), 0.0, None)
    return overlap * new / old


def linear_weights(old: int, new: int) -> np.ndarray:
    """Each new pixel between the two old ones that are nearest to its centre; ``new old``."""
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0.0, old - 1.0)
    return np.clip(1.0 - abs(centres[:, None] - np.arange(old)[None]), 0.0, None)


def by_axes(image: np.ndarray, width: int, height: int, *, growing: str) -> np.ndarray:
    """Resize by matrices: area where an axis shrinks, ``growing`` where it grows."""
    rows, columns = (
        area_weights(old, new) if new <= old or growing == "area" else linear_weights(old, new)
        for old, new in zip(image.shape[:2], (height, width), strict=True)
    )
    return np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float64), columns, optimize=True)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((225, 112), (224, 224)), ((112, 225), (224, 224)), ((30, 200), (64, 64)), ((301, 17), (40, 50))],
)
def test_one_axis_shrinks_while_the_other_grows(shape, size):
    """Where OpenCV's own area filter takes two of many pixels."""
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = by_axes(image, *size, growing="linear")
    # Rounded to uint8 twice, once after each axis; OpenCV's linear weights have 11 bits.
    assert abs(resize(image, *size).astype(float) - expected).max() <= 1.25
    mask = (image[..., 0] > 128).astype(np.float32)
    expected = by_axes(mask[..., None], *size, growing="area")[..., 0]
    np.testing.assert_allclose(resize_area(mask, *size), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "size"), [((90, 70), (31, 33)), ((20, 30), (64, 48)), ((40, 40), (40, 17))]
)
def test_both_axes_the_same_way_are_areas_too(shape, size):
    image = np.random.default_rng(2).random((*shape, 3)).astype(np.float32)
    expected = by_axes(image, *size, growing="area")
    np.testing.assert_allclose(resize_area(image, *size), expected, atol=1e-5)


@pytest.mark.parametrize("transpose", [False, True])
def test_half_of_the_rows_are_no_copies(transpose):
    """What the fault looked like: 225 rows became 224, one side of 112 columns grew."""
    image = np.random.default_rng(3).integers(0, 256, (450, 112, 3), dtype=np.uint8)
    out = resize(image.transpose(1, 0, 2), 224, 224) if transpose else resize(image, 224, 224)
    rows = out.transpose(1, 0, 2) if transpose else out
    # Two independent values are averaged: the spread falls by the root of two.
    nearest = image[::2].astype(float).std()
    assert rows[:, ::2].astype(float).std() < 0.75 * nearest


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("short", "long"), [(40, 100), (30, 100), (7, 100), (2, 50)])
def test_a_mirrored_mask_is_the_mirror_image(short, long, axis):
    """Without resizing it is what the border's rule makes of the mask; it folds where the image is thin."""
    rng = np.random.default_rng(short)
    inside = (rng.random((short, long)) < 0.1).astype(np.uint8) * 255
    before = (long - short) // 2
    after = long - short - before
    drawn = cv2.copyMakeBorder(inside, before, after, 0, 0, cv2.BORDER_CONSTANT, value=0)
    expected = cv2.copyMakeBorder(inside, before, after, 0, 0, cv2.BORDER_REFLECT_101)
    if axis:
        out = mirror_mask(drawn.T, Crop(-before, 0, long, long), short, long).T
    else:
        out = mirror_mask(drawn, Crop(0, -before, long, long), long, short)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("size", [16, 37, 64, 100, 160, 333])
def test_nothing_that_a_mask_hides_is_reflected_at_any_size(size):
    """The image is red under the mask alone; also where pixels lie across the border."""
    for index in range(60):
        rng = generator("mirror", size, index)
        width, height = (int(side) for side in rng.integers(2, 120, 2))
        side = max(width, height) + int(rng.integers(0, 5))
        crop = Crop(int(rng.integers(width - side, 1)), int(rng.integers(height - side, 1)), side, side)
        x1, y1 = (int(rng.integers(0, whole)) for whole in (width, height))
        x2, y2 = int(rng.integers(x1 + 1, width + 1)), int(rng.integers(y1 + 1, height + 1))
        picture = np.zeros((height, width, 3), np.uint8)
        picture[y1:y2, x1:x2, 0] = 255
        drawn = rectangle_mask(crop.to_output(Box(x1, y1, x2, y2), size), size, size)
        mask = mirror_mask(drawn, crop, width, height)
        red = cut(picture, crop, size)[..., 0]
        # A pixel beside the mask takes less than half of its colour from across the edge when enlarged.
        assert red[mask == 0].max(initial=0) <= (0 if size <= side else 127)
        # No more is hidden than what is near; at the crop's border that may lie just outside.
        near = cv2.dilate((red > 0).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        assert (near | (mask == 0))[2:-2, 2:-2].all()


def test_a_grey_border_hides_nothing_and_mirrors_nothing():
    picture = np.full((10, 20, 3), 200, np.uint8)
    crop = Crop(-2, -7, 24, 24, mirrored=False)
    out = cut(picture, crop, 24)
    assert (out[7:17, 2:22] == 200).all()
    out[7:17, 2:22] = GREY
    assert (out == GREY).all()
    mask = np.zeros((24, 24), np.uint8)
    mask[8, 5] = 255
    assert mirror_mask(mask, crop, 20, 10) is mask
