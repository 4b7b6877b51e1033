from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.editing.preprocess import (
    Triple,
    check_generator,
    draw_noise,
    matched,
    network_inputs,
    pad_to_multiple,
    reduce_mask,
    squash_exemplars,
    working_size,
)
from pbe.editing.problems import EditTypeError, EditValueError


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


def test_working_size_asked_for():
    assert working_size((500, 700), 64, height=96, width=80) == (96, 80)
    assert working_size((50, 70), 64, width=80) == (50, 80)
    with pytest.raises(EditValueError, match="height is 0"):
        working_size((50, 70), 64, height=0)


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
    images, keep = network_inputs([Triple(picture, picture, hole)] * 2, (5, 6), 8)
    assert images.shape == (2, 3, 8, 8)
    assert keep.shape == (2, 1, 8, 8)
    assert images[0, 0, 0].tolist() == [-1.0] + [1.0] * 7
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert keep[0, 0, 0, 0] == 0
    assert keep[0, 0, 4, 5] == 0
    assert (keep == 0).sum() == 4  # rows 5 and 6 reflect 3 and 2, row 7 reflects 1; column 6, 7 reflect 4, 3


def test_the_padding_reflects_the_hole_too():
    hole = np.zeros((5, 8), bool)
    hole[3, 2] = True
    picture = np.zeros((5, 8, 3), np.uint8)
    _, keep = network_inputs([Triple(picture, picture, hole)], (5, 8), 8)
    assert (keep[0, 0] == 0).nonzero().tolist() == [[3, 2], [5, 2]]


def test_exemplars_are_squashed_bicubically():
    exemplar = np.random.default_rng(0).integers(0, 256, (10, 30, 3), np.uint8)
    expected = np.asarray(Image.fromarray(exemplar).resize((16, 16), Image.Resampling.BICUBIC))
    squares = squash_exemplars([exemplar, exemplar], 16)
    assert squares.shape == (2, 3, 16, 16)
    assert squares.dtype == torch.uint8
    np.testing.assert_array_equal(squares[1].permute(1, 2, 0).numpy(), expected)


def test_noise_of_a_list_is_that_of_its_generators():
    both = draw_noise((2, 4, 3, 3), [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    for index, seed in enumerate((1, 2)):
        assert torch.equal(
            both[index : index + 1], draw_noise((1, 4, 3, 3), torch.Generator().manual_seed(seed))
        )


def test_generators_are_checked():
    check_generator(None, 3)
    check_generator(torch.Generator(), 3)
    check_generator([torch.Generator()] * 3, 3)
    with pytest.raises(EditValueError, match="2 generators for 3 images"):
        check_generator([torch.Generator()] * 2, 3)
    with pytest.raises(EditTypeError, match=r"generator: int; it must be a torch\.Generator"):
        check_generator(5, 1)
    with pytest.raises(EditTypeError, match="NoneType"):
        check_generator([None], 1)


def test_pairing():
    pictures = [np.full((4, 4, 3), value, np.uint8) for value in (1, 2)]
    exemplars = [np.full((2, 2, 3), value, np.uint8) for value in (3, 4)]
    mask = np.ones((2, 2), bool)
    triples = matched(exemplars, pictures, mask, copies=2)
    assert [(t.exemplar[0, 0, 0], t.picture[0, 0, 0]) for t in triples] == [(3, 1), (3, 1), (4, 2), (4, 2)]
    assert all(t.hole.shape == (4, 4) for t in triples)
    assert [t.exemplar[0, 0, 0] for t in matched(exemplars, pictures[0], mask)] == [3, 4]


def test_pairing_that_does_not_work_out():
    picture, mask = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), bool)
    with pytest.raises(EditValueError, match="2 exemplars, 3 pictures and 1 masks do not pair up"):
        matched([picture] * 2, [picture] * 3, mask)
    with pytest.raises(EditValueError, match="must have one size, these have 4x4, 4x5"):
        matched(picture, [picture, np.zeros((5, 4, 3), np.uint8)], mask)
    with pytest.raises(EditValueError, match="empty list"):
        matched([], picture, mask)
