"""The learned pooling that knows positions: whose maps, in which order, and that position matters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from pbe.errors import UserError
from pbe.models.exemplar_encoder import ExemplarEncoder
from pbe.models.layout import LayoutPooling, layout_features, layout_stages, stage_widths, tower_stages
from tests.models.tiny import CONV_TOWER, TRANSFORMER_TOWER, randomised, relative, tiny_encoder_config

TOWERS = [CONV_TOWER, TRANSFORMER_TOWER, "vit/32x8-patch16-heads2-mlp64", "RN50"]


def encoder_of(tower: str, **options: object) -> ExemplarEncoder:
    torch.manual_seed(0)
    config = replace(tiny_encoder_config(tower), layout_grid=2, layout_width=8, **options)
    return ExemplarEncoder(config, 24).eval()


@pytest.mark.parametrize("tower", TOWERS)
def test_widths_are_those_of_the_maps(tower: str) -> None:
    encoder = encoder_of(tower)
    with torch.no_grad():
        pooled, maps = tower_stages(encoder.tower, torch.randn(2, 3, 64, 64))
        expected = encoder.tower(torch.randn(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == stage_widths(encoder.tower)
    assert pooled.shape == expected.shape


@pytest.mark.parametrize("tower", TOWERS)
def test_pooled_feature_is_the_tower_s(tower: str) -> None:
    encoder = encoder_of(tower)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, expected = encoder.features(pixels), encoder.tower(pixels)
    assert features.shape[:2] == (2, 1)
    assert relative(features[:, 0, : expected.shape[1]], expected) < 1e-5


def test_stages_that_a_layout_is_read_from() -> None:
    assert layout_stages(5) == [0, 2, 3, 4]
    assert layout_stages(4) == [0, 1, 2, 3]
    assert layout_stages(2) == [0, 1]
    assert layout_stages(12) == [2, 5, 8, 11]
    assert layout_stages(24) == [5, 11, 17, 23]


def test_layout_features_are_means_of_the_cells_row_by_row() -> None:
    maps = [torch.randn(1, 3, 8, 8), torch.randn(1, 2, 4, 4), torch.randn(1, 2, 2, 2)]
    features = layout_features(maps, 2).view(2, 2, 7)
    for row in range(2):
        for column in range(2):
            fine = maps[0][0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean(dim=(1, 2))
            middle = maps[1][0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(dim=(1, 2))
            expected = torch.cat([fine, middle, maps[2][0, :, row, column]])
            torch.testing.assert_close(features[row, column], expected)


def test_pooling_is_a_map_of_each_position_and_one_of_all() -> None:
    pooling = LayoutPooling(channels=5, grid=2, hidden=3, width=7)
    features = torch.randn(2, 1, 20)
    hidden = [
        F.gelu(features[:, 0, 5 * p : 5 * p + 5] @ pooling.read.weight.T + pooling.read.bias)
        for p in range(4)
    ]
    expected = torch.cat(hidden, dim=1) @ pooling.gather.weight.T + pooling.gather.bias
    torch.testing.assert_close(pooling(features)[:, 0], expected)


def test_a_layout_knows_where_things_are_and_global_averages_do_not() -> None:
    """The condition of an exemplar whose maps are turned upside down changes with a layout only."""
    with_layout = encoder_of(CONV_TOWER, pooled_stages=True)
    without = randomised(ExemplarEncoder(replace(with_layout.config, layout_grid=0), 24))
    randomised(with_layout)
    features = torch.randn_like(with_layout.features(torch.randn(1, 3, 64, 64)))
    split = [with_layout.tower_width, features.shape[2] - with_layout.tower_width]
    averages, layout = features.split(split, dim=2)
    turned = torch.cat([averages, layout.view(1, 4, -1).flip(1).reshape(1, 1, -1)], dim=2)
    assert relative(with_layout.condition(turned), with_layout.condition(features)) > 0.01
    assert torch.equal(without.condition(averages), without.condition(turned[..., : split[0]]))
    assert with_layout.condition(features).shape == (1, 1, 24)


def test_one_token_only() -> None:
    with pytest.raises(UserError, match="tokens=class"):
        ExemplarEncoder(replace(tiny_encoder_config(tokens="all"), layout_grid=2), 24)


def test_a_checkpoint_without_a_layout_has_no_new_weights() -> None:
    assert not any("layout" in key for key in ExemplarEncoder(tiny_encoder_config(), 24).state_dict())
