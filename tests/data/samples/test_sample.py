"""Training samples: mask statistics, purity, padding, switches."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from pbe.config import AugmentConfig, SampleConfig
from pbe.data.randomness import generator
from pbe.data.samples.crops import GREY, Box
from pbe.data.samples.masks import rectangle_mask
from pbe.data.samples.sample import TrainingSample, choose_box, cut_exemplar, make_sample

SIZE, EXEMPLAR = 64, 32
COUNT = 2000


def random_case(index: int) -> tuple[np.ndarray, Box]:
    """Return an image of any aspect and a box of 2 to 80 % of its area."""
    rng = generator("case", index)
    width, height = (int(side) for side in rng.integers(40, 160, 2))
    picture = np.zeros((height, width, 3), np.uint8)
    while True:
        box_width, box_height = rng.uniform(0.1, 1.0, 2) * (width, height)
        if 0.02 <= box_width * box_height / (width * height) <= 0.8:
            break
    x, y = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    return picture, Box(x, y, x + box_width, y + box_height)


@pytest.fixture(scope="module")
def samples() -> list[tuple[Box, tuple[int, int], TrainingSample]]:
    config = SampleConfig(augment=AugmentConfig(enabled=False))
    made = []
    for index in range(COUNT):
        picture, box = random_case(index)
        sample = make_sample(picture, box, generator(1, "sample", index), config, SIZE, EXEMPLAR)
        made.append((box, picture.shape[:2], sample))
    return made


def test_share_of_arbitrary_masks(samples):
    share = np.mean([sample.mask_kind == "arbitrary" for _, _, sample in samples])
    assert share == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / COUNT))


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_share_is_a_config_value(share):
    config = SampleConfig(arbitrary_mask_share=share, augment=AugmentConfig(enabled=False))
    picture, box = random_case(3)
    kinds = [make_sample(picture, box, generator(index), config, 32, 16).mask_kind for index in range(300)]
    spread = 4 * math.sqrt(share * (1 - share) / 300)
    assert np.mean([kind == "arbitrary" for kind in kinds]) == pytest.approx(share, abs=spread)


def test_rectangles_equal_the_extended_box(samples):
    rectangles = [sample for _, _, sample in samples if sample.mask_kind == "rectangle"]
    assert len(rectangles) > 800
    for sample in rectangles:
        counts = sample.valid > 0
        expected = rectangle_mask(sample.extended, SIZE, SIZE)
        np.testing.assert_array_equal(sample.mask[counts], expected[counts])
        assert (sample.mask[expected > 0] > 0).all()
        if "padded" not in sample.events:
            np.testing.assert_array_equal(sample.mask, expected)
        corners = (sample.extended.x1, sample.extended.y1, sample.extended.x2, sample.extended.y2)
        assert all(value == int(value) for value in corners)


def test_arbitrary_masks_stay_within_the_extended_box_and_jitter(samples):
    for _, _, sample in samples:
        outer, (jitter_x, jitter_y) = sample.extended, sample.jitter
        limit = Box(outer.x1 - jitter_x, outer.y1 - jitter_y, outer.x2 + jitter_x, outer.y2 + jitter_y)
        assert not sample.mask[(rectangle_mask(limit, SIZE, SIZE) == 0) & (sample.valid > 0)].any()


def test_every_mask_covers_the_box(samples):
    covers = [
        (sample.mask[rectangle_mask(sample.box, SIZE, SIZE) > 0] > 0).mean() for _, _, sample in samples
    ]
    assert min(covers) >= 0.9


def test_hole_and_rest_are_never_empty(samples):
    for _, _, sample in samples:
        assert sample.mask.any()
        assert (sample.mask == 0).mean() >= 0.02
        assert set(np.unique(sample.mask)) == {0, 255}


def test_the_hole_is_where_the_object_counts(samples):
    """Nearly all of the box lies on the image; a pixel that is partly reflection does not count."""
    for _, _, sample in samples:
        box = rectangle_mask(sample.box, SIZE, SIZE) > 0
        assert (sample.valid[box] > 0).mean() >= 0.75


def test_events_follow_from_the_shapes(samples):
    seen = set()
    for box, (height, width), sample in samples:
        seen.update(sample.events)
        if "fallback" not in sample.events:
            whole = box.rounded_out(width, height)
            assert ("padded" in sample.events) == (max(whole.width, whole.height) > min(width, height))
        assert (sample.valid.min() == 255) == ("padded" not in sample.events)
    assert {"padded", "shrunk", "redrawn"} <= seen


def test_jitter_scales_with_the_image():
    config = SampleConfig(shrink_fraction=0.0, augment=AugmentConfig(enabled=False))
    for side in (64, 512):
        picture = np.zeros((side, side, 3), np.uint8)
        box = Box(0.4 * side, 0.4 * side, 0.6 * side, 0.6 * side)
        sample = make_sample(picture, box, generator(1), config, 128, 16)
        assert sample.jitter == pytest.approx((5 * 128 / 512,) * 2)


@pytest.mark.parametrize("shape", [(100, 100), (60, 140), (140, 60)])
def test_a_box_that_fills_the_image_still_leaves_something(shape):
    picture = np.zeros((*shape, 3), np.uint8)
    box = Box(0, 0, shape[1], shape[0])
    for index in range(20):
        sample = make_sample(picture, box, generator(index), SampleConfig(), SIZE, EXEMPLAR)
        assert (sample.mask == 0).mean() >= 0.02
        assert sample.mask.any()
    if shape[0] == shape[1]:
        assert set(sample.events) == {"padded", "fallback", "redrawn"}
        assert sample.mask_kind == "rectangle"


def test_nothing_is_squashed_unless_asked():
    """A disc stays a disc; with the original's switch it becomes an ellipse."""
    picture = np.zeros((80, 160, 3), np.uint8)
    cv2.circle(picture, (80, 40), 20, (255, 255, 255), -1)
    box = Box(41, 15, 119, 65)
    aspects = {}
    for squash in (False, True):
        config = SampleConfig(squash=squash, shrink_fraction=0.0, augment=AugmentConfig(enabled=False))
        sample = make_sample(picture, box, generator(4), config, 96, 16)
        disc = cv2.boundingRect((sample.image[..., 0] > 127).astype(np.uint8))
        aspects[squash] = disc[2] / disc[3]
        assert ("squashed" in sample.events) == squash
    assert aspects[False] == pytest.approx(1.0, abs=0.1)
    assert aspects[True] == pytest.approx(0.5, abs=0.1)


def test_padding_reflects_and_is_left_out_of_the_loss():
    picture = np.random.default_rng(0).integers(0, 255, (40, 120, 3), dtype=np.uint8)
    config = SampleConfig(shrink_fraction=0.0, extend_fraction=0.0, augment=AugmentConfig(enabled=False))
    sample = make_sample(picture, Box(5, 10, 110, 30), generator(2), config, 120, 16)
    assert sample.events == ("padded",)
    assert sample.valid[40:80].all()
    assert np.count_nonzero(sample.valid) == 40 * 120
    np.testing.assert_array_equal(sample.image[40:80], picture)
    np.testing.assert_array_equal(sample.image[39], picture[1])


SHAPES = ("square", "wide", "tall", "tiny", "edge", "whole", "thin picture")


def red_case(shape: str, index: int) -> tuple[np.ndarray, Box, np.random.Generator]:
    """An image that is red in its box alone."""
    rng = generator("red", shape, index)
    width, height = (int(side) for side in rng.integers(40, 200, 2))
    if shape == "thin picture":
        width, height = int(rng.integers(2, 9)), int(rng.integers(60, 200))
        width, height = (height, width) if index % 2 else (width, height)
    ranges = {
        "square": ((0.3, 0.7), (0.3, 0.7)), "wide": ((0.7, 1.0), (0.1, 0.5)),
        "tall": ((0.1, 0.5), (0.7, 1.0)), "tiny": ((0.02, 0.06), (0.02, 0.06)),
        "edge": ((0.2, 0.9), (0.2, 0.9)), "whole": ((1, 1), (1, 1)),
        "thin picture": ((0.2, 1.0), (0.2, 1.0)),
    }  # fmt: skip
    sides = [max(2.0, rng.uniform(*r) * side) for r, side in zip(ranges[shape], (width, height), strict=True)]
    x, y = (rng.random() * (whole - side) for whole, side in zip((width, height), sides, strict=True))
    if shape == "edge":
        x, y = (0.0, y) if index % 2 else (x, height - sides[1])
    box = Box(x, y, min(x + sides[0], float(width)), min(y + sides[1], float(height)))
    picture = np.zeros((height, width, 3), np.uint8)
    picture[rectangle_mask(box, width, height) > 0] = (255, 0, 0)
    return picture, box, rng


def visible_red(sample: TrainingSample, where: np.ndarray) -> int:
    """How red the reddest pixel is that the network is shown there."""
    red = sample.image[..., 0].astype(int) - sample.image[..., 2]
    return int(red[(sample.mask == 0) & where].max(initial=0))


@pytest.mark.parametrize("size", [48, 256])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("squash", [False, True])
def test_nothing_of_the_box_is_visible(shape, squash, size):
    """Neither in its place nor mirrored in the padding, whatever the mask; an arbitrary one cuts corners."""
    events = set()
    for kind in (0.0, 1.0):
        config = SampleConfig(arbitrary_mask_share=kind, squash=squash, augment=AugmentConfig(enabled=False))
        for index in range(40):
            picture, box, rng = red_case(shape, index)
            sample = make_sample(picture, box, rng, config, size, EXEMPLAR)
            loose = sample.mask_kind == "arbitrary"
            # Beside the mask an enlarged pixel takes less than half of its colour from across the edge.
            assert visible_red(sample, sample.valid == 0 if loose else sample.valid < 256) <= 127
            assert (sample.mask == 0).any()
            events.update(sample.events)
    if shape in ("wide", "tall") and not squash:
        assert "padded" in events


@pytest.mark.parametrize("dilate", [0.0, 12.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_of_an_object_is_visible_where_its_own_mask_is_the_hole(shape, dilate):
    config = SampleConfig(
        object_mask_share=1.0, object_mask_dilate=dilate, augment=AugmentConfig(enabled=False)
    )
    for index in range(40):
        picture, box, rng = red_case(shape, index)
        own = (picture[..., 0] > 0) & (rng.random(picture.shape[:2]) < rng.uniform(0.05, 1.0))
        own[np.argwhere(picture[..., 0])[0][0], np.argwhere(picture[..., 0])[0][1]] = True
        picture[~own] = 0
        sample = make_sample(picture, box, rng, config, SIZE, EXEMPLAR, lambda own=own: own.astype(np.uint8))
        assert sample.mask_kind in ("object", "rectangle")
        assert visible_red(sample, sample.valid < 256) <= 127


def test_padding_shows_no_more_than_the_image_at_its_own_size():
    """Without resizing, the masked padding is the mirror image of the masked image."""
    picture = np.random.default_rng(0).integers(1, 255, (40, 120, 3), dtype=np.uint8)
    config = SampleConfig(shrink_fraction=0.0, arbitrary_mask_share=0.0, augment=AugmentConfig(enabled=False))
    for index in range(20):
        sample = make_sample(picture, Box(5, 12, 110, 30), generator("p", index), config, 120, 16)
        masked = np.where(sample.mask[..., None] > 0, np.uint8(0), sample.image)
        expected = cv2.copyMakeBorder(masked[40:80], 40, 40, 0, 0, cv2.BORDER_REFLECT_101)
        np.testing.assert_array_equal(masked, expected)


def test_the_border_of_the_last_resort_is_grey():
    """A box that is the whole image leaves nothing to reflect."""
    picture = np.full((60, 100, 3), (255, 0, 0), np.uint8)
    sample = make_sample(picture, Box(0, 0, 100, 60), generator(1), SampleConfig(), SIZE, EXEMPLAR)
    assert "fallback" in sample.events
    border = sample.image[(sample.valid == 0) & (sample.mask == 0)]
    assert len(border) > 0.02 * SIZE**2
    assert (border == GREY).all()


def test_exemplar_padding_scales_and_stops_at_the_border():
    def padded(side: int, padding: int = 10) -> tuple[int, ...]:
        picture = np.zeros((side, side, 3), np.uint8)
        return cut_exemplar(picture, Box(side // 4, side // 4, side // 2, side // 2), padding).shape

    assert padded(512) == (148, 148, 3)
    assert padded(256) == (74, 74, 3)
    assert padded(32) == (10, 10, 3)
    assert padded(512, 0) == (128, 128, 3)
    assert cut_exemplar(np.zeros((512, 512, 3), np.uint8), Box(4, 0, 512, 20), 10).shape == (30, 512, 3)


def test_the_exemplar_shows_the_object():
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[40:60, 30:70] = (200, 40, 10)
    sample = make_sample(picture, Box(30, 40, 70, 60), generator(3), SampleConfig(), SIZE, 64)
    assert sample.exemplar.shape == (64, 64, 3)
    np.testing.assert_allclose(sample.exemplar[32, 32], (200, 40, 10), atol=3)


def test_choose_box_is_uniform():
    boxes = [Box(0, 0, index + 1, 1) for index in range(3)]
    chosen = [choose_box(boxes, generator("box", index)).x2 for index in range(1500)]
    assert np.bincount(np.array(chosen, int))[1:] == pytest.approx(500, abs=75)


def fingerprint(sample: TrainingSample) -> bytes:
    arrays = (sample.image, sample.mask, sample.exemplar, sample.valid)
    return b"".join(array.tobytes() for array in arrays) + repr((sample.box, sample.events)).encode()


def test_pure_function_of_the_counter(scenes):
    def make(index: int, epoch: int) -> bytes:
        scene = scenes[index]
        rng = generator(7, "sample", epoch, index)
        box = choose_box([Box(*box) for box in scene.boxes], rng)
        return fingerprint(make_sample(scene.image, box, rng, SampleConfig(), SIZE, EXEMPLAR))

    first = {index: make(index, 0) for index in range(30)}
    again = {index: make(index, 0) for index in reversed(range(30))}
    other = {index: make(index, 1) for index in range(30)}
    assert first == again
    assert all(first[index] != other[index] for index in range(30))


def test_the_image_is_not_changed(scenes):
    scene = scenes[0]
    before = scene.image.copy()
    make_sample(scene.image, Box(*scene.boxes[0]), generator(0), SampleConfig(), SIZE, EXEMPLAR)
    np.testing.assert_array_equal(scene.image, before)
