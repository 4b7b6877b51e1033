"""Seam, colour and outside scores on images whose right answer is known, and against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.color import rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pbe.evaluation.metrics.pixels import (
    border_energy,
    colour_shift,
    decibels,
    mean_lab,
    seam,
    squared_error_outside,
    ssim_map,
    ssim_outside,
)


@pytest.fixture
def hole() -> np.ndarray:
    mask = np.zeros((20, 24), np.uint8)
    mask[5:12, 6:15] = 255
    return mask


def smooth(rows: int = 20, columns: int = 24) -> np.ndarray:
    """A gentle ramp, one grey level a column."""
    return np.repeat(np.arange(columns, dtype=np.uint8)[None, :, None] + 100, rows, axis=0).repeat(3, axis=2)


def test_border_energy_by_hand():
    picture = np.zeros((4, 5, 3), np.uint8)
    picture[1, 2] = (10, 20, 30)
    hole = np.zeros((4, 5), bool)
    hole[1, 2] = True
    assert border_energy(picture, hole) == pytest.approx((100 + 400 + 900) / 3)
    hole[1, 3] = True  # the pair inside the hole no longer counts: three steps of the object, three of zero
    assert border_energy(picture, hole) == pytest.approx((100 + 400 + 900) / 3 / 2)


def test_seam_is_one_for_the_real_image_and_grows_with_the_step(hole):
    image = smooth()
    steps = [
        seam(image, np.where(hole[..., None] > 0, image + step, image).astype(np.uint8), hole)
        for step in (0, 5, 20, 60)
    ]
    assert steps[0] == 1.0
    assert steps == sorted(steps)
    # along rows the ramp's own step of one is added on one side and taken off on the other
    rows, columns = 2 * 9, 2 * 7
    expected = (rows * 20**2 + columns * (20**2 + 1)) / (rows + columns)
    real = columns * 1 / (rows + columns)
    assert steps[2] == pytest.approx((expected + 1) / (real + 1))


def test_seam_of_a_smoother_edit_is_below_one(hole):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    assert seam(image, np.full_like(image, 128), hole) < 1.0


def test_seam_without_a_border_is_no_number():
    image = smooth()
    assert math.isnan(seam(image, image, np.full((20, 24), 255, np.uint8)))


def test_lab_is_scikit_images():
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)
    region = rng.random((9, 8)) > 0.5
    expected = rgb2lab(picture)[region].mean(axis=0)
    assert mean_lab(picture, region) == pytest.approx(
        expected, abs=0.15
    )  # OpenCV reads its cube roots from a table


def test_colour_shift_inside_and_outside(hole):
    image = np.full((20, 24, 3), 128, np.uint8)
    edit = image.copy()
    edit[hole > 0] = 140
    inside, outside = hole > 127, hole <= 127
    expected = abs(rgb2lab(np.full((1, 1, 3), 140, np.uint8)) - rgb2lab(image[:1, :1]))[0, 0, 0]
    assert colour_shift(image, edit, inside) == pytest.approx(expected, abs=0.02)
    assert colour_shift(image, edit, outside) == 0.0
    assert math.isnan(colour_shift(image, edit, np.zeros_like(inside)))


def test_psnr_outside_is_scikit_images_where_nothing_is_masked(hole):
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    edit = np.clip(image.astype(int) + rng.integers(-9, 10, image.shape), 0, 255).astype(np.uint8)
    found = decibels(squared_error_outside(image, edit, np.zeros_like(hole)))
    assert found == pytest.approx(peak_signal_noise_ratio(image, edit))
    beside = edit.copy()
    beside[hole > 0] = 0
    assert squared_error_outside(image, beside, hole) == squared_error_outside(image, edit, hole)


def test_ssim_map_is_scikit_images():
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (30, 26, 3), dtype=np.uint8)
    edit = np.clip(image.astype(int) + rng.integers(-30, 31, image.shape), 0, 255).astype(np.uint8)
    _, expected = structural_similarity(
        image, edit, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2, full=True
    )
    assert np.abs(ssim_map(image, edit) - expected).max() < 1e-6


def test_ssim_outside_sees_the_outside_only(hole):
    rng = np.random.default_rng(4)
    image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    painted = image.copy()
    painted[hole > 0] = 77
    assert ssim_outside(image, painted, hole) == 1.0
    spoilt = painted.copy()
    spoilt[0, 0] = 255 - spoilt[0, 0]
    assert ssim_outside(image, spoilt, hole) < 1.0
    assert ssim_outside(image, painted, np.zeros_like(hole)) < 1.0
    assert math.isnan(ssim_outside(image, painted, np.full_like(hole, 255)))
