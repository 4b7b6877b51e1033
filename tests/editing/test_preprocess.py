from __future__ import annotations

import numpy as np
import pytest
import torch

from pbe.editing.preprocess import (
    check_count,
    mask_at_latent_size,
    network_inputs,
    pad_to_multiple,
    reduce_mask,
    resize_picture,
    to_signed,
    working_size,
)
from pbe.errors import EditTypeError, EditValueError


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


def test_float_pictures_are_resized_like_bytes():
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    ours = resize_picture(to_signed(picture), (10, 12))
    assert ours.dtype == np.float32
    assert np.abs(ours - to_signed(resize_picture(picture, (10, 12)))).max() <= 1.5 / 127.5


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
