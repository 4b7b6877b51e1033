"""From images, masks and exemplars to what the networks take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from pbe.config import ExemplarEncoderConfig
from pbe.editing.preprocess import (
    check_embeds,
    clip_crop,
    crop_settings,
    exemplar_pixels,
    mask_at_latent_size,
    network_inputs,
    pad_to_multiple,
    reduce_mask,
    resize_image,
    to_signed,
    working_size,
)
from pbe.editing.settings import check_count
from pbe.errors import EditTypeError, EditValueError, UserError


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (64, 64)),
        ((1, 1), (1, 1)),
        ((128, 128), (128, 128)),
        ((64, 256), (64, 256)),  # as many pixels as (2 * 64)^2
        ((129, 128), (64, 64)),
        ((3000, 4000), (64, 85)),
        ((4000, 3000), (85, 64)),
        ((100, 10_000), (13, 1280)),  # a strip: the number of pixels decides
        ((20_000, 1), (18_102, 1)),
    ],
)
def test_working_size(size: tuple[int, int], expected: tuple[int, int]):
    assert working_size(size, 64) == expected


def test_a_size_that_is_edited_as_it_is_whatever_the_model():
    assert working_size((500, 700), 64, largest_side=1024) == (500, 700)
    assert working_size((1100, 1100), 64, largest_side=1024) == (64, 64)


def test_padding_reflects_where_it_can_and_repeats_where_it_cannot():
    row = np.array([[1, 2, 3, 4, 5]])
    assert pad_to_multiple(row, 8).tolist() == [[1, 2, 3, 4, 5, 4, 3, 2]] * 8
    assert pad_to_multiple(row[:, :2], 8)[0].tolist() == [1, 2, 2, 2, 2, 2, 2, 2]
    assert pad_to_multiple(np.ones((8, 16, 3)), 8).shape == (8, 16, 3)


def test_a_reduced_hole_covers_every_pixel_that_it_touches():
    hole = np.zeros((64, 64), bool)
    hole[15, 17] = True
    reduced = reduce_mask(hole, (8, 8))
    assert reduced.sum() == 1
    assert reduced[1, 2]


def test_network_inputs():
    picture = np.full((5, 6, 3), 255, np.uint8)
    picture[:, 0] = 0
    hole = np.zeros((5, 6), bool)
    hole[0, 0] = hole[4, 5] = True
    images, keep = network_inputs([picture] * 2, [hole] * 2, (5, 6), 8)
    assert images.shape == (2, 3, 8, 8)
    assert images.is_contiguous()
    assert keep.shape == (2, 1, 8, 8)
    assert images[0, 0, 0].tolist() == [-1.0] + [1.0] * 7
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert keep[0, 0, 0, 0] == 0
    assert keep[0, 0, 4, 5] == 0
    assert (keep == 0).sum() == 4  # rows 5 and 6 reflect 3 and 2, row 7 reflects 1; column 6, 7 reflect 4, 3


def test_the_padding_reflects_the_hole_too():
    hole = np.zeros((5, 8), bool)
    hole[3, 2] = True
    _, keep = network_inputs([np.zeros((5, 8, 3), np.uint8)], [hole], (5, 8), 8)
    assert (keep[0, 0] == 0).nonzero().tolist() == [[3, 2], [5, 2]]


def test_float_images_are_resized_like_bytes():
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    ours = resize_image(to_signed(picture), (10, 12))
    assert ours.dtype == np.float32
    assert np.abs(ours - to_signed(resize_image(picture, (10, 12)))).max() <= 1.5 / 127.5


def test_the_mask_at_latent_size():
    keep = torch.rand(1, 1, 16, 24).round()
    nearest = mask_at_latent_size(keep, (2, 3), "nearest")
    assert torch.equal(nearest, keep[:, :, ::8, ::8])
    middle = keep.unfold(2, 8, 8).unfold(3, 8, 8)[..., 3:5, 3:5].mean(dim=(-2, -1))
    torch.testing.assert_close(mask_at_latent_size(keep, (2, 3), "bilinear"), middle)


@pytest.mark.parametrize(
    ("value", "kind"), [(0, EditValueError), (1.5, EditTypeError), (True, EditTypeError)]
)
def test_counts(value: object, kind: type[Exception]):
    with pytest.raises(kind, match="steps"):
        check_count("steps", value)


TOWER = ExemplarEncoderConfig(image_size=32, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.25])


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_the_original_squashes_bicubically():
    exemplar = picture(10, 30)
    square = np.asarray(Image.fromarray(exemplar).resize((32, 32), Image.Resampling.BICUBIC))
    expected = (square / 255.0 - np.array(TOWER.mean)) / np.array(TOWER.std)
    pixels = exemplar_pixels([exemplar, exemplar], TOWER, None)
    assert pixels.shape == (2, 3, 32, 32)
    np.testing.assert_allclose(pixels[1].permute(1, 2, 0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (50, 91), (91, 50), (20, 31), (33, 32), (200, 67), (7, 7)])
def test_cropping_is_that_of_clips_processor(size: tuple[int, int]):
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=TOWER.mean,
        image_std=TOWER.std,
    )
    exemplar = picture(*size)
    expected = processor(images=Image.fromarray(exemplar), return_tensors="pt").pixel_values
    ours = exemplar_pixels([exemplar], TOWER, crop_settings(TOWER, processor.to_dict()))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(exemplar_pixels([exemplar], TOWER, crop_settings(TOWER)), ours)


def test_a_crop_larger_than_the_resized_image_is_black_around_it():
    square = clip_crop(np.full((8, 8, 3), 200, np.uint8), 12, shortest_edge=0)
    assert square.shape == (12, 12, 3)
    assert (square[2:10, 2:10] == 200).all()
    assert square.sum() == 200 * 8 * 8 * 3


def test_settings_of_any_age():
    old = crop_settings(TOWER, {"size": 32, "crop_size": 32, "resample": 2})
    new = crop_settings(TOWER, {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}})
    assert (old.shortest_edge, old.crop, old.resample) == (32, 32, "bilinear")
    assert (new.shortest_edge, new.crop, new.resample) == (32, 32, "bicubic")
    assert crop_settings(TOWER, {"do_resize": False}).shortest_edge == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 0}, "resample 0 is not supported"),
        ({"crop_size": 64}, "crop_size is 64, but the image tower takes 32"),
        ({"resample": []}, r"resample \[\] is not supported"),
        ({"crop_size": {"height": [], "width": []}}, "crop_size must be one length"),
        ({"size": {}}, "size must be one length"),
        ({"do_center_crop": False}, r"do_center_crop is False, which is not supported \(only true\)"),
        ({"do_normalize": None}, "do_normalize is None"),
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor is 0.0078.*, which is not supported \(only 1/255\)"),
        ({"rescale_factor": None}, "rescale_factor is None"),
        ({"image_mean": 3}, "image_mean is 3; it must be three numbers"),
        ({"image_mean": None}, "image_mean is None"),
        ({"image_mean": ["a", "b", "c"]}, "image_mean is .'a'"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean is .*nan"),
        ({"image_std": [0.5, 0.5]}, "image_std is .* three numbers above 0"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std is .* three numbers above 0"),
        ({"size": {"height": 3, "width": 4}}, "size must be one length"),
    ],
)
def test_settings_that_are_not_supported(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        crop_settings(TOWER, settings)


def test_tensors_pass_as_they_are():
    pixels = torch.randn(3, 32, 32)
    assert torch.equal(exemplar_pixels([pixels], TOWER, None)[0], pixels)
    with pytest.raises(EditValueError, match=r"must be \(3, 32, 32\) or \(b, 3, 32, 32\), not \(3, 16, 32\)"):
        exemplar_pixels([pixels[:, ::2]], TOWER, None)


def test_conditions_are_checked():
    assert check_embeds(torch.zeros(2, 1, 5), 5).shape == (2, 1, 5)
    with pytest.raises(EditTypeError, match="exemplar_embeds: list"):
        check_embeds([[0.0]], 5)
    with pytest.raises(EditTypeError, match="floating-point"):
        check_embeds(torch.zeros(1, 1, 5, dtype=torch.int64), 5)
    with pytest.raises(EditValueError, match=r"must be \(b, tokens, 5\)"):
        check_embeds(torch.zeros(2, 5), 5)
