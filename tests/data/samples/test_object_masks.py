"""The object's own mask as the hole: from files of masks through shards to samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from pbe.config import DataConfig, SampleConfig
from pbe.data.dataset import ExemplarDataset
from pbe.data.packing.pack import PackRequest
from pbe.data.packing.plan import PackSettings
from pbe.data.preview import OBJECT_COLUMNS, make_row, sheet_html
from pbe.data.randomness import generator
from pbe.data.samples.crops import Box, Crop
from pbe.data.samples.decode import BAD_ANNOTATION
from pbe.data.samples.masks import (
    cut_mask,
    dilated_mask,
    encode_rle,
    object_cover,
    read_object_mask,
    rectangle_mask,
)
from pbe.data.samples.sample import NO_OBJECT_MASK, make_sample
from pbe.data.shards.archive import ShardImages, ShardRecord, write_shards
from pbe.data.shards.index import read_members
from pbe.data.sources.masks import read_mask_folder
from scripts.sample_properties import check_sample
from tests.data.packing.support import pack
from tests.scripts.test_sample_properties import cases, settings_of_samples

SIZE, EXEMPLAR = 64, 32
ORIENTATION = 0x0112
RED = (255, 0, 0)


def sample_config(**settings: float | bool) -> SampleConfig:
    return SampleConfig(**{"object_mask_share": 1.0, "object_mask_dilate": 0.0, **settings})  # type: ignore[arg-type]


def shape(width: int, height: int, seed: int) -> np.ndarray:
    """A red cross with thin arms, whose box is mostly no object."""
    rng = generator("cross", seed)
    mask = np.zeros((height, width), np.uint8)
    x, y = int(rng.integers(20, width - 60)), int(rng.integers(10, height - 40))
    mask[y + 10 : y + 14, x : x + 50] = 1
    mask[y : y + 30, x + 20 : x + 26] = 1
    return mask


def save_image(folder: Path, name: str, mask: np.ndarray, orientation: int) -> None:
    """Save an image whose red part is its mask; both as stored, before the EXIF orientation."""
    picture = np.zeros((*mask.shape, 3), np.uint8)
    picture[mask > 0] = RED
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(picture).save(folder / "images" / f"{name}.jpg", quality=98, subsampling=0, exif=exif)
    Image.fromarray(mask * 255).save(folder / "masks" / f"{name}.png")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of images in all eight orientations, the last of them made smaller when packed."""
    folder = tmp_path_factory.mktemp("masks")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    for orientation in range(1, 9):
        save_image(folder, f"p{orientation}", shape(160, 90, orientation), orientation)
    save_image(folder, "p9", cv2.resize(shape(160, 90, 9), (480, 270), interpolation=cv2.INTER_NEAREST), 6)
    settings = PackSettings(exif_frame="stored", max_side=200, perceptual=False)
    request = PackRequest(lambda: [read_mask_folder(folder)], ["masks"], settings, folder / "out")
    assert pack(request, workers=0) is not None
    return request.out


def dataset(shards: Path, **settings: float | bool) -> ExemplarDataset:
    config = DataConfig(image_size=SIZE, exemplar_size=EXEMPLAR, sample=sample_config(**settings))
    return ExemplarDataset(ShardImages(shards), config, 3)


def test_the_hole_is_the_object_in_every_orientation_and_crop(packed: Path) -> None:
    samples = dataset(packed)
    for index in range(5 * len(samples)):
        sample = samples[index].sample
        assert sample is not None
        assert sample.mask_kind == "object"
        assert check_sample(sample, samples.config.sample, SIZE, EXEMPLAR) == []
        red = (sample.image[..., 0] > 128) & (sample.valid > 0)
        hole = sample.mask > 0
        assert red.any()
        assert hole[red].mean() > 0.99
        # No more than the object and the pixels that it touches.
        near = cv2.dilate((sample.image[..., 0] > 20).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert near[hole & (sample.valid > 0)].mean() > 0.99
        inside = rectangle_mask(sample.box, SIZE, SIZE) > 0
        assert hole[inside].mean() < 0.75


def test_dilation_is_of_an_image_of_512_px(packed: Path) -> None:
    plain, wide = dataset(packed), dataset(packed, object_mask_dilate=40.0)
    for index in range(9):
        first, second = plain[index].sample, wide[index].sample
        assert first is not None
        assert second is not None
        assert (second.mask[first.mask > 0] == 255).all()
        grown = dilated_mask((first.mask > 0).astype(np.float32), second_radius(second.jitter, 40.0))
        np.testing.assert_array_equal(second.mask, grown)
        assert check_sample(second, wide.config.sample, SIZE, EXEMPLAR) == []


def second_radius(jitter: tuple[float, float], pixels: float) -> tuple[float, float]:
    """The jitter is 5 px of 512, whatever the crop."""
    return jitter[0] * pixels / 5.0, jitter[1] * pixels / 5.0


def test_share_and_neutral_default(packed: Path) -> None:
    some = dataset(packed, object_mask_share=0.3)
    kinds = [some[index].sample.mask_kind for index in range(400)]  # type: ignore[union-attr]
    assert kinds.count("object") == pytest.approx(120, abs=40)
    assert {"rectangle", "arbitrary"} < set(kinds)
    assert dataset(packed, object_mask_share=0.0)[0].sample.object_cover is None  # type: ignore[union-attr]


def test_no_mask_falls_back_and_is_counted(shards: Path) -> None:
    samples = dataset(shards)
    usual = dataset(shards, object_mask_share=0.0)
    items = [samples[index] for index in range(40)]
    kinds = {item.sample.mask_kind for item in items if item.sample}
    assert kinds == {"rectangle", "arbitrary"}
    assert all(item.counts[NO_OBJECT_MASK] == 1 for item in items)
    assert all(usual[index].counts[NO_OBJECT_MASK] == 0 for index in range(40))
    assert all(
        check_sample(item.sample, samples.config.sample, SIZE, EXEMPLAR) == []
        for item in items
        if item.sample
    )


def rewrite(tmp_path: Path, mask: object) -> ShardImages:
    """A shard of one image whose only box, 10 10 40 30, has this mask."""
    picture = cv2.imencode(".png", np.zeros((48, 60, 3), np.uint8))[1].tobytes()
    box = {"xyxy": [10.0, 10.0, 40.0, 30.0], "label": "", "mask": mask}

    class Record(ShardRecord):
        def annotation(self) -> dict[str, object]:
            return {"width": 60, "height": 48, "boxes": [{"xyxy": [0.0, 0.0, 9.0, 9.0]}, box]}

    write_shards([Record("p", picture, "png", 60, 48, [])], tmp_path)
    return ShardImages(tmp_path)


@pytest.mark.parametrize(
    "mask",
    [
        encode_rle(np.ones((60, 48), np.uint8)),
        {"size": [48, 60], "counts": [1]},
        {"size": [48, 60], "counts": "\x00"},
        {"size": "x"},
        "text",
        7,
    ],
)
def test_damaged_masks_are_faults(tmp_path: Path, mask: object) -> None:
    pictures = rewrite(tmp_path, mask)
    config = DataConfig(image_size=SIZE, exemplar_size=EXEMPLAR, sample=sample_config(), min_box_area=0.1)
    item = ExemplarDataset(pictures, config, 3)[0]
    assert item.sample is None
    assert item.counts == {BAD_ANNOTATION: 1}
    row = make_row(ExemplarDataset(pictures, config, 3), 0, 8)
    assert f"skipped: {BAD_ANNOTATION}" in row.notes


def test_every_box_has_its_own_mask(tmp_path: Path) -> None:
    """With an epoch of boxes; the first box has no mask, the second one a dot."""
    mask = np.zeros((48, 60), np.uint8)
    mask[20, 30] = 1
    rewrite(tmp_path, encode_rle(mask))
    config = DataConfig(
        image_size=SIZE, exemplar_size=EXEMPLAR, sample=sample_config(), min_box_area=0.01, boxes="every"
    )
    samples = ExemplarDataset(ShardImages(tmp_path, count_boxes=True), config, 3)
    items = [samples[index] for index in range(2)]
    kinds = {item.sample.mask_kind: item.sample for item in items if item.sample}
    assert len(kinds) == 2
    assert 0 < cv2.countNonZero(kinds["object"].mask) < 50


def test_a_mask_outside_its_box_is_none(tmp_path: Path) -> None:
    mask = np.zeros((48, 60), np.uint8)
    mask[40:44, 50:55] = 1
    pictures = rewrite(tmp_path, encode_rle(mask))
    box = Box(10.0, 10.0, 40.0, 30.0)
    frame = (60, 48)
    assert read_object_mask(pictures, 0, box, frame, frame) is None
    assert read_object_mask(pictures, 0, Box(0.0, 0.0, 9.0, 9.0), frame, frame) is None
    mask[12, 12] = 1
    pictures = rewrite(tmp_path, encode_rle(mask))
    np.testing.assert_array_equal(read_object_mask(pictures, 0, box, frame, frame), mask)
    # For an image that was decoded at half its size: every pixel that the object touches.
    half = read_object_mask(pictures, 0, box, frame, (30, 24))
    np.testing.assert_array_equal(half, mask.reshape(24, 2, 30, 2).max(axis=(1, 3)))


def test_cutting_keeps_thin_things_and_mirrors_them_as_the_image_is() -> None:
    mask = np.zeros((100, 200), np.uint8)
    mask[30, 3:] = 1
    cover = cut_mask(mask, Crop(0, -50, 200, 200), 20)
    hole = dilated_mask(cover, (0, 0)) > 0
    assert hole[8].all()
    # Row 80 of the crop; its reflections about rows 50 and 149 are rows 20 and 218, which lies outside.
    assert np.flatnonzero(hole.any(axis=1)).tolist() == [2, 8]
    assert cover[8, 5] == pytest.approx(0.1)
    assert cover.sum() == pytest.approx(2 * mask.sum() / 100)
    plain = cut_mask(mask, Crop(0, -50, 200, 200, mirrored=False), 20)
    assert plain.sum() == pytest.approx(mask.sum() / 100)


@pytest.mark.parametrize(("crop", "sizes"), [(Crop(0, 0, 40, 160), 64), (Crop(0, 0, 160, 40), 64)])
def test_a_squashed_mask_is_an_area_along_both_axes(crop: Crop, sizes: int) -> None:
    """One axis shrinks and the other grows, as the original squashes; the object keeps its share."""
    mask = (generator("squashed").random((crop.height, crop.width)) < 0.02).astype(np.uint8)
    cover = cut_mask(mask, crop, sizes)
    assert cover.mean() == pytest.approx(mask.mean(), rel=1e-4)
    y, x = np.nonzero(mask)
    hole = dilated_mask(cover, (0, 0))
    assert (hole[y * sizes // crop.height, x * sizes // crop.width] == 255).all()


def test_half_of_an_object_is_half_covered() -> None:
    mask = np.zeros((100, 200), np.uint8)
    mask[50, 3:] = 1
    cover = cut_mask(mask, Crop(0, -50, 200, 200), 20)
    hole = dilated_mask(cover, (0, 0)) > 0
    assert object_cover(cover, hole) == 1.0
    half = hole.copy()
    half[:, 10:] = False
    assert object_cover(cover, half) == pytest.approx(0.5, abs=0.01)


def test_too_little_kept_ends_in_the_usual_fallback() -> None:
    picture = np.zeros((60, 60, 3), np.uint8)
    config = sample_config(object_mask_dilate=500.0, min_keep_share=0.02)
    whole = np.ones((60, 60), np.uint8)
    sample = make_sample(picture, Box(5, 5, 55, 55), generator(1), config, SIZE, EXEMPLAR, lambda: whole)
    assert {"fallback", "redrawn"} <= set(sample.events)
    assert sample.mask_kind == "rectangle"
    assert sample.object_cover is None
    assert check_sample(sample, config, SIZE, EXEMPLAR) == []


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    case=cases(),
    usual=settings_of_samples(),
    dilate=st.floats(0.0, 60.0),
    share=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**32),
)
def test_every_sample_with_a_mask(
    case: tuple[np.ndarray, Box], usual: SampleConfig, dilate: float, share: float, seed: int
) -> None:
    """Whatever the object's shape, down to a pixel, and the image, the crop and the dilation."""
    picture, box = case
    height, width = picture.shape[:2]
    inside = rectangle_mask(box, width, height) > 0
    mask = (inside & (generator("object", seed).random((height, width)) < share)).astype(np.uint8)
    y, x = np.argwhere(inside)[seed % inside.sum()]
    mask[y, x] = 1
    config = dataclasses.replace(usual, object_mask_share=1.0, object_mask_dilate=dilate)
    sample = make_sample(picture, box, generator(seed), config, SIZE, EXEMPLAR, lambda: mask)
    assert sample.mask_kind in ("object", "rectangle")
    assert (sample.mask_kind == "object") == ("fallback" not in sample.events)
    assert check_sample(sample, config, SIZE, EXEMPLAR) == []
    assert sample.object_cover is None or sample.object_cover > 1 - 1e-6


def test_the_check_sees_an_object_that_is_not_covered(packed: Path) -> None:
    sample = dataset(packed)[0].sample
    assert sample is not None
    broken = type(sample)(**{**vars(sample), "object_cover": 0.5})
    assert any("of the object" in fault for fault in check_sample(broken, sample_config(), SIZE, EXEMPLAR))


def test_the_sheet_shows_what_training_gets(packed: Path, shards: Path) -> None:
    samples = dataset(packed, object_mask_share=0.5)
    rows = [make_row(samples, index, 8) for index in range(12)]
    assert {row.mask_kind for row in rows} >= {"object", "rectangle"}
    for index, row in enumerate(rows):
        tiles = dict(zip(OBJECT_COLUMNS, row.tiles, strict=True))
        drawn = samples[index].sample
        assert drawn is not None
        np.testing.assert_array_equal(tiles[row.mask_kind], drawn.mask)
        assert tiles["object"].any()
    assert "<th>object</th>" in sheet_html("t", [], rows)
    without = make_row(dataset(shards), 0, 8)
    assert not dict(zip(OBJECT_COLUMNS, without.tiles, strict=True))["object"].any()
    assert NO_OBJECT_MASK in without.notes


def test_masks_lie_in_the_json_of_the_shard(packed: Path) -> None:
    """What the dataset reads is what any WebDataset reader finds."""
    (tar,) = packed.glob("*.tar")
    data = tar.read_bytes()
    for _, (start, size) in read_members(tar).values():
        note = json.loads(data[start : start + size])
        (box,) = note["boxes"]
        assert box["mask"]["size"] == [note["height"], note["width"]]
