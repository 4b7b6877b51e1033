"""The exemplar's augmentation: what it does, how often, and how far it moves pixels."""

from __future__ import annotations

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from pbe.config import AugmentConfig
from pbe.data.randomness import generator
from pbe.data.samples.crops import resize
from pbe.data.samples.sample import ExemplarAugmentation, ThreePointAffine, blur_range

SIZE = 224


def matrices(count: int, size: int = SIZE, jitter: float = 50.0) -> np.ndarray:
    """Draw affine matrices, ``count 2 3``."""
    transform = ThreePointAffine(jitter=jitter, p=1.0)
    drawn = []
    for index in range(count):
        transform.random_generator = generator("affine", index)
        drawn.append(transform.get_params_dependent_on_data({"shape": (size, size, 3)}, {})["matrix"])
    return np.stack(drawn)


def displacements(matrix: np.ndarray, size: int = SIZE, step: int = 8) -> np.ndarray:
    """Return how far pixels move, ``n points``, in pixels."""
    y, x = np.mgrid[step / 2 : size : step, step / 2 : size : step]
    points = np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    return np.linalg.norm(matrix @ points - points[:2], axis=1)


def test_affine_moves_pixels_as_the_three_points_say():
    """The displacement at a point is the anchors' shifts weighted by its barycentric coordinates.

    With u, v = (x - 38) / 148, (y - 38) / 148 the weights are v, u - v and 1 - u. Over the image u and v
    are uniform with mean 1/2 and variance s = (224 / 148)^2 / 12, so the weights' mean squares are
    1/4 + s, 2 s and 1/4 + s, and the mean square of the displacement is their sum times 2 * 50^2 / 3.
    """
    moved = displacements(matrices(4000))
    variance = (224 / 148) ** 2 / 12
    root_mean_square = np.sqrt((0.5 + 4 * variance) * 2 * 50**2 / 3)
    assert root_mean_square == pytest.approx(45.9, abs=0.1)
    assert np.sqrt((moved**2).mean()) == pytest.approx(root_mean_square, rel=0.02)
    # The mean displacement itself, by Monte Carlo: a fifth of the image's side.
    assert moved.mean() == pytest.approx(40.5, abs=1.0)


def test_affine_keeps_within_the_jitter_at_the_anchors():
    anchors = np.array([[186, 186, 1], [186, 38, 1], [38, 38, 1]], float).T
    shift = matrices(500) @ anchors - anchors[:2]
    assert np.abs(shift).max() <= 50.0 + 1e-3
    assert np.abs(shift).max() > 49.0
    assert np.abs(shift.mean(axis=0)).max() < 5.0


def test_affine_scales_with_the_image():
    large, small = displacements(matrices(50)), displacements(matrices(50, 112), 112, 4)
    np.testing.assert_allclose(large, 2 * small, rtol=1e-4, atol=1e-3)


def test_affine_really_warps_the_image():
    """An image of its own coordinates shows where each pixel came from."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    transform = ThreePointAffine(jitter=20.0, p=1.0)
    transform.set_random_state(generator(1), None)
    out = transform(image=np.dstack([x, y, np.ones_like(x)]))["image"]
    matrix = cv2.invertAffineTransform(transform.params["matrix"])
    expected = matrix @ np.array([112.0, 112.0, 1.0])
    np.testing.assert_allclose(out[112, 112, :2], expected, atol=0.1)
    assert np.linalg.norm(out[112, 112, :2] - 112) > 1.0


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Smooth colours with an edge, so that every transform shows."""
    rng = np.random.default_rng(0)
    base = cv2.resize(
        rng.integers(0, 255, (7, 7, 3), dtype=np.uint8), (150, 110), interpolation=cv2.INTER_CUBIC
    )
    base[:40, :30] = (255, 0, 0)
    return base


@pytest.mark.parametrize(("name", "share"), [("flip", 0.5), ("rotate", 0.5), ("blur", 0.3), ("affine", 0.3)])
def test_shares_and_that_each_moves_pixels(picture, name, share):
    config = AugmentConfig(**dict.fromkeys(("flip", "rotate", "blur", "affine"), 0.0) | {name: share})
    augment, plain = ExemplarAugmentation(config, 64), resize(picture, 64, 64).astype(int)
    changes = [np.abs(augment(picture, generator(name, i)).astype(int) - plain).mean() for i in range(800)]
    changed = [value for value in changes if value > 0]
    assert len(changed) / 800 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 800))
    assert np.mean(changed) > (1.0 if name == "blur" else 8.0)


def test_transforms_are_drawn_independently(picture):
    """Flip and rotation coincide in a quarter of the draws, not always."""
    config = AugmentConfig(blur=0.0, affine=0.0)
    augment, plain = ExemplarAugmentation(config, 32), resize(picture, 32, 32)
    untouched = [np.array_equal(augment(picture, generator("i", i)), plain) for i in range(800)]
    assert np.mean(untouched) == pytest.approx(0.25, abs=0.06)


def test_pure_function_of_the_generator(picture):
    augment = ExemplarAugmentation(AugmentConfig(), 48)
    forward = [augment(picture, generator(i)).tobytes() for i in range(20)]
    backward = [augment(picture, generator(i)).tobytes() for i in reversed(range(20))][::-1]
    assert forward == backward
    assert len(set(forward)) > 15


def test_disabled_only_resizes(picture):
    out = ExemplarAugmentation(AugmentConfig(enabled=False), 40)(picture, generator(0))
    np.testing.assert_array_equal(out, resize(picture, 40, 40))


def test_blur_kernels_scale_with_the_exemplar():
    assert blur_range(224) == (3, 7)
    assert blur_range(128) == (3, 5)
    assert blur_range(64) == (3, 3)
    assert blur_range(448) == (5, 13)  # the nearest odd ones to 6 and 14


def test_albumentations_is_kept_from_the_network(project_root):
    """Without the variable in its environment, importing the package still asks for no newer release."""
    script = (
        "import urllib.request\n"
        "def refuse(*a, **k): raise SystemExit('the network was asked')\n"
        "urllib.request.urlopen = urllib.request.OpenerDirector.open = refuse\n"
        "import pbe.data.samples.sample\n"
    )
    bare = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=project_root, env=bare, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
