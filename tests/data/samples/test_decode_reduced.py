"""Decoding large JPEGs smaller: never smaller than needed, with boxes where they were."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from pbe.config import DataConfig, SampleConfig
from pbe.data.dataset import ExemplarDataset, read_image
from pbe.data.randomness import generator
from pbe.data.samples import decode as decode_module
from pbe.data.samples.crops import Box, plan_original_crop, plan_square_crop
from pbe.data.samples.decode import (
    UNREADABLE,
    UnusableImageError,
    choose_reduction,
    decode_image,
    reduced_box,
    smallest_crop,
)
from pbe.data.samples.masks import extend_box
from pbe.data.shards.archive import ShardImages, ShardRecord, write_shards

JPEG = b"\xff\xd8"
CONFIG = DataConfig(
    image_size=64, exemplar_size=32, reduced_decoding=True, sample=SampleConfig(shrink_fraction=0.0)
)


def jpeg(image: np.ndarray, orientation: int = 1) -> bytes:
    """Encode an RGB image as it is to be shown, stored as the orientation says."""
    stored = {1: image, 3: np.rot90(image, 2), 6: np.rot90(image), 8: np.rot90(image, -1)}[orientation]
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    return buffer.getvalue()


def scene(width: int, height: int, box: Box) -> np.ndarray:
    """A red object on blue."""
    image = np.full((height, width, 3), (20, 20, 230), np.uint8)
    image[int(box.y1) : int(box.y2), int(box.x1) : int(box.x2)] = (230, 20, 20)
    return image


@pytest.mark.parametrize(
    ("frame", "box", "factor"),
    [
        ((512, 512), Box(0, 0, 256, 256), 8),  # the crop stays 64, the exemplar 32
        ((512, 512), Box(0, 0, 255, 255), 4),  # its exemplar would be enlarged at an eighth
        ((512, 504), Box(0, 0, 256, 256), 4),  # so would the crop
        ((520, 514), Box(0, 0, 256, 256), 2),  # 4 does not divide 514
        ((513, 512), Box(0, 0, 256, 256), 1),
        ((128, 4096), Box(0, 0, 100, 100), 2),
        ((126, 4096), Box(0, 0, 100, 100), 1),
        ((512, 512), Box(0, 0, 256, 7), 2),  # a box keeps two pixels a side
    ],
)
def test_the_factor_is_the_largest_that_costs_nothing(frame, box, factor):
    assert choose_reduction(JPEG, frame, [box], CONFIG) == factor
    assert choose_reduction(JPEG, frame, [Box(0, 0, 300, 300), box], CONFIG) <= factor


def test_it_is_opt_in_and_for_jpegs():
    box = [Box(0, 0, 256, 256)]
    assert choose_reduction(JPEG, (512, 512), box, DataConfig(image_size=64, exemplar_size=32)) == 1
    assert choose_reduction(b"\x89PNG", (512, 512), box, CONFIG) == 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    width=st.integers(20, 400),
    height=st.integers(20, 400),
    shares=st.tuples(*[st.floats(0.05, 1.0)] * 4),
    fraction=st.floats(0.0, 1.0),
    squash=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_no_crop_is_smaller_than_promised(width, height, shares, fraction, squash, seed):
    sides = max(shares[0] * width, 2.0), max(shares[1] * height, 2.0)
    x, y = shares[2] * (width - sides[0]), shares[3] * (height - sides[1])
    box = Box(x, y, min(x + sides[0], width), min(y + sides[1], height)).rounded_out(width, height)
    rng = generator(seed)
    extended = extend_box(box, width, height, 0.4, rng)
    if squash:
        crop = plan_original_crop(extended, width, height, fraction, rng).crop
    else:
        crop = plan_square_crop(box, extended, width, height, fraction, rng).crop
    assert (
        min(crop.width, crop.height)
        >= smallest_crop((width, height), max(box.width, box.height), fraction) - 1e-6
    )


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_boxes_stay_on_their_object(factor, orientation):
    box = Box(48, 16, 96, 56)
    encoded = jpeg(scene(160, 80, box), orientation)
    picture = decode_image(encoded, (160, 80), factor)
    assert picture.shape == (80 // factor, 160 // factor, 3)
    small = reduced_box(box, factor)
    expected = scene(160 // factor, 80 // factor, small)
    assert abs(picture.astype(int) - expected).max() < 30


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_pixels_are_about_the_means_of_their_blocks(factor):
    coarse = np.random.default_rng(0).integers(40, 216, (12, 16, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (256, 192), interpolation=cv2.INTER_CUBIC)
    encoded = jpeg(image)
    blocks = decode_image(encoded).reshape(192 // factor, factor, 256 // factor, factor, 3).mean((1, 3))
    assert abs(decode_image(encoded, (256, 192), factor) - blocks).max() < 6


@pytest.fixture
def large(tmp_path):
    """Three images of 512 x 384 with an object each."""
    boxes = [Box(48 + 16 * number, 32, 304, 240) for number in range(3)]
    pictures = [jpeg(scene(512, 384, box)) for box in boxes]
    records = [
        ShardRecord(f"k{number}", picture, "jpg", 512, 384, [(box.x1, box.y1, box.x2, box.y2)])
        for number, (picture, box) in enumerate(zip(pictures, boxes, strict=True))
    ]
    write_shards(records, tmp_path)
    return tmp_path


def test_samples_of_reduced_images_show_the_same_objects(large):
    dataset = ExemplarDataset(ShardImages(large), CONFIG, 1)
    annotated = read_image(dataset.images, 1, CONFIG)
    assert annotated.image.shape == (96, 128, 3)
    assert annotated.boxes == [Box(16, 8, 76, 60)]
    for number in range(9):
        sample = dataset[number].sample
        red = (sample.image[..., 0] > 128) & (sample.image[..., 2] < 128) & (sample.valid > 0)
        assert red.any()
        assert (sample.mask[red] > 0).mean() > 0.85
        assert sample.exemplar[16, 16, 0] > 150


def test_nothing_of_a_long_box_is_mirrored_at_a_reduced_size(tmp_path):
    """A box longer than the short side is padded; decoded at a quarter, it is hidden there as well."""
    boxes = [Box(32, 64, 992, 448), Box(0, 128, 800, 384), Box(160, 96, 1024, 416)]
    images = [jpeg(scene(1024, 512, box)) for box in boxes]
    records = [
        ShardRecord(f"k{number}", image, "jpg", 1024, 512, [(box.x1, box.y1, box.x2, box.y2)])
        for number, (image, box) in enumerate(zip(images, boxes, strict=True))
    ]
    write_shards(records, tmp_path)
    dataset = ExemplarDataset(ShardImages(tmp_path), CONFIG, 1)
    assert read_image(dataset.images, 0, CONFIG).image.shape[0] < 512
    padded = 0
    for number in range(24):
        sample = dataset[number].sample
        red = sample.image[..., 0].astype(int) - sample.image[..., 2] > 40  # a tenth of the way is JPEG's
        padded += "padded" in sample.events
        assert red.any()
        assert not (red & (sample.mask == 0) & (sample.valid == 0)).any()
    assert padded == 24


def test_what_is_damaged_or_of_another_size_is_still_noticed(large):
    box = Box(48, 32, 304, 240)
    whole = jpeg(scene(512, 384, box))
    with pytest.raises(UnusableImageError, match=UNREADABLE):
        decode_image(whole[: len(whole) // 2], (512, 384), 4)
    for frame in ((512, 376), (384, 512), (520, 384)):
        with pytest.raises(UnusableImageError, match=decode_module.SIZE_MISMATCH):
            decode_image(whole, frame, 4)


def test_without_it_nothing_changes(large, monkeypatch):
    flags = []
    decode = decode_module.decode
    monkeypatch.setattr(
        decode_module, "decode", lambda encoded, flag: flags.append(flag) or decode(encoded, flag)
    )
    config = DataConfig(image_size=64, exemplar_size=32)
    assert read_image(ShardImages(large), 0, config).image.shape == (384, 512, 3)
    assert flags == [cv2.IMREAD_COLOR_RGB]
