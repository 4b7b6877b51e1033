from __future__ import annotations

import numpy as np
import pytest

from pbe.editing.placement import MOST_ENLARGED, Box, paste, region_box, seam
from pbe.editing.preprocess import network_inputs

TARGET = (64, 64)


def hole(size: tuple[int, int], top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_a_hole_takes_a_quarter_of_its_region():
    assert region_box(hole((1000, 2000), 400, 700, 100, 100), TARGET) == Box(350, 650, 200, 200)
    assert region_box(hole((1000, 2000), 400, 700, 100, 100), TARGET, margin=0.0) == Box(400, 700, 100, 100)
    assert region_box(hole((1000, 2000), 400, 700, 50, 100), TARGET) == Box(325, 650, 200, 200)


def test_the_region_has_the_targets_aspect():
    box = region_box(hole((1000, 2000), 400, 700, 100, 100), (32, 64))
    assert (box.height, box.width) == (200, 400)


def test_the_region_stays_inside_the_image():
    assert region_box(hole((1000, 2000), 0, 1950, 100, 50), TARGET) == Box(0, 1800, 200, 200)
    # too tall for its margin: the margin gives way
    assert region_box(hole((1000, 2000), 100, 500, 700, 300), TARGET) == Box(0, 150, 1000, 1000)


def test_a_hole_from_edge_to_edge_reaches_beyond_a_narrow_image():
    box = region_box(hole((100, 2000), 40, 500, 20, 600), TARGET)
    assert box.width == box.height
    assert 600 < box.width < 2000
    assert box.top < 0 < 100 < box.top + box.height
    assert box.cut(np.ones((100, 2000, 3))).shape == (box.height, box.width, 3)


def test_all_of_an_image_may_be_hole():
    box = region_box(np.ones((30, 90), bool), TARGET)
    assert (box.left, box.width, box.height) == (0, 90, 90)


def test_a_tiny_hole_gets_surroundings():
    box = region_box(hole((1000, 2000), 500, 500, 1, 1), TARGET)
    assert (box.height, box.width) == (TARGET[0] // MOST_ENLARGED, TARGET[1] // MOST_ENLARGED)


@pytest.mark.parametrize("seed", range(200))
def test_any_hole_lies_in_its_region(seed: int):
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(1, 60, 2))
    mask = rng.random(size) < rng.choice([0.001, 0.3, 1.0])
    mask[rng.integers(size[0]), rng.integers(size[1])] = True
    target = tuple(int(n) for n in rng.integers(1, 40, 2))
    box = region_box(mask, target, float(rng.choice([0.0, 0.5, 3.0])))
    rows, columns = box.inside(size)
    assert mask[rows, columns].sum() == mask.sum()
    assert box.cut(mask).shape == (box.height, box.width)
    np.testing.assert_array_equal(box.trim(box.cut(mask), size), mask[rows, columns])
    for kept in (True, False):
        assert seam(mask, box, target, keep_outside=kept).shape == mask[rows, columns].shape


def test_the_seam_rises_inside_the_hole():
    mask = hole((100, 100), 20, 20, 40, 40)
    box = region_box(mask, TARGET)
    share = seam(mask, box, TARGET, keep_outside=True, feather=4)
    rows, columns = box.inside(mask.shape)
    inside = mask[rows, columns]
    assert (share[~inside] == 0).all()
    assert (share[inside] > 0).all()
    middle = share[40 - rows.start, 20 - columns.start : 30 - columns.start]
    np.testing.assert_allclose(middle, [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1], rtol=1e-5)
    hard = seam(mask, box, TARGET, keep_outside=True, feather=0)
    np.testing.assert_array_equal(hard, inside)


def test_the_seam_of_a_thin_hole_is_thin_too():
    mask = hole((1000, 1000), 500, 100, 2, 800)
    share = seam(mask, region_box(mask, TARGET), TARGET, keep_outside=True)
    assert share.max() == 1.0


def test_the_seam_of_a_whole_region_runs_along_its_border():
    mask = hole((100, 100), 40, 40, 20, 20)
    box = Box(30, 30, 40, 40)
    share = seam(mask, box, TARGET, keep_outside=False, feather=4)
    np.testing.assert_allclose(share[20, :6], [0.2, 0.4, 0.6, 0.8, 1, 1], rtol=1e-5)
    corner = seam(hole((100, 100), 0, 0, 20, 20), Box(0, 0, 40, 40), TARGET, keep_outside=False, feather=4)
    assert (corner[:36, :36] == 1).all()  # nothing to blend with beyond the image
    np.testing.assert_allclose(corner[10, -4:], [0.8, 0.6, 0.4, 0.2], rtol=1e-5)
    assert (seam(mask, Box(0, 0, 100, 100), TARGET, keep_outside=False) == 1).all()


def test_pasting_changes_nothing_where_the_share_is_zero():
    rng = np.random.default_rng(0)
    picture, edit = rng.random((20, 30, 3), np.float32), rng.random((10, 10, 3), np.float32)
    share = np.zeros((10, 10), np.float32)
    share[3:6, 3:6], share[4, 4] = 0.5, 1.0
    box = Box(5, 5, 10, 10)
    result = paste(picture, edit, box, share)
    changed = (result != picture).any(axis=2)
    assert changed.sum() == 9
    assert changed[8:11, 8:11].all()
    np.testing.assert_allclose(result[9, 9], edit[4, 4], atol=1e-6)
    np.testing.assert_allclose(result[8, 8], (edit[3, 3] + picture[8, 8]) / 2, atol=1e-6)


def test_padding_of_a_region_shows_nothing_of_what_is_repainted():
    """The image is red in its hole alone; beyond its border both are reflected or repeated alike."""
    rng, beyond = np.random.default_rng(5), 0
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(8, 120, 2))
        top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
        mask = np.zeros((height, width), bool)
        mask[top : rng.integers(top, height) + 1, left : rng.integers(left, width) + 1] = True
        image = np.where(mask[..., None], np.uint8([255, 0, 0]), np.uint8([0, 0, 255]))
        target = tuple(int(side) for side in rng.integers(16, 80, 2))
        box = region_box(mask, target, margin=float(rng.uniform(0.0, 1.5)))
        beyond += box.top < 0 or box.left < 0 or box.top + box.height > height or box.left + box.width > width
        shown, cut = box.cut(image), box.cut(mask)
        assert np.array_equal(shown[..., 0] > 0, cut)
        images, keep = network_inputs([shown], [cut], target, 8)
        red = (images[0, 0] * keep[0, 0]).numpy()
        # Bicubic overshoots by a twelfth; beside the edge less than half comes from across it.
        assert red[keep[0, 0].numpy() > 0].max(initial=-1.0) < 0.2
    assert beyond > 20
