from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from pbe.checkpoints.tower_weights import lite_weights
from pbe.errors import UserError
from pbe.evaluation.metrics.towers import LITE_SIZE, LITE_TOWER, Tower, mask_bounds, region, to_grey, to_input


def test_features_are_those_of_the_weights_own_package(features: Tower):
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 40, 57, 3), dtype=np.uint8))
    reference = EfficientNet.from_pretrained(
        "efficientnet-lite2", weights_path=str(lite_weights(LITE_TOWER)), image_size=LITE_SIZE
    ).eval()
    with torch.no_grad():
        maps = reference.extract_features(torch.cat([to_input(picture) for picture in pictures]))
    expected = maps.mean(dim=(2, 3)).numpy()
    found = np.concatenate([features.squashed(pictures[:2]), features.squashed(pictures[2:])])
    assert found.shape == (3, 1280)
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5


def test_the_card_names_the_weights(features: Tower):
    assert features.sha256 == hashlib.sha256(lite_weights(LITE_TOWER).read_bytes()).hexdigest()
    assert (features.spec.architecture, features.spec.size) == ("timm/tf_efficientnet_lite2", 128)


def test_region_by_hand():
    """A mask of rows 2 to 4 and columns 1 to 5, with a notch, cuts just these."""
    picture = np.arange(8 * 7 * 3, dtype=np.uint8).reshape(8, 7, 3)
    mask = np.zeros((8, 7), np.uint8)
    mask[2:5, 1:6] = 255
    mask[2, 1] = 0
    mask[7, 0] = 127  # not above one half: no hole
    assert mask_bounds(mask) == (1, 2, 6, 5)
    assert np.array_equal(region(picture, mask), picture[2:5, 1:6])


def test_resizing_by_hand():
    """Two columns, 0 and 128, stretched to 128 px: constant to the pixel centres, linear between."""
    picture = np.zeros((2, 2, 3), np.uint8)
    picture[:, 1] = 128
    line = to_input(picture)[0, 0, 5] * 128.0 + 127.0
    assert line[:32].tolist() == [0.0] * 32
    assert line[96:].tolist() == [128.0] * 32
    # pixel centre i + 0.5 of 128 lies at (i + 0.5) / 64 - 0.5 of the two
    assert line[50] == pytest.approx(128.0 * ((50.5) / 64 - 0.5), abs=1e-3)


def test_empty_mask_and_wrong_size_are_refused():
    with pytest.raises(UserError, match="an empty mask"):
        mask_bounds(np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match="but its mask"):
        region(np.zeros((4, 4, 3), np.uint8), np.full((5, 4), 255, np.uint8))


def test_grey_is_the_luma_of_bt601(features: Tower):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    grey = to_grey(picture)
    luma = picture @ np.array([0.299, 0.587, 0.114])
    assert grey.dtype == np.uint8
    assert np.abs(grey - luma[..., None]).max() <= 0.51  # rounded, with weights of 14 bits
    assert np.array_equal(to_grey(grey), grey)
