"""The exemplar encoder: bottleneck, mapper, frozen tower, null condition, pooling that knows positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from pbe.errors import UserError
from pbe.models import ExemplarEncoder
from pbe.models.exemplar_encoder import (
    LayoutPooling,
    MapperAttention,
    MapperBlock,
    layout_features,
    layout_stages,
)
from pbe.models.image_tower import stage_widths, tower_stages
from tests.models.tiny import CONV_TOWER, TRANSFORMER_TOWER, randomised, relative, tiny_encoder_config


def batch_statistics(encoder: ExemplarEncoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in encoder.tower.named_buffers()}


def reference_mapper_attention(layer: MapperAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention with the fused rows read head by head, each head holding its queries, keys and values."""
    fused = layer.qkv(x)
    size = x.shape[-1] // layer.heads
    heads = []
    for head in range(layer.heads):
        q, k, v = fused[..., 3 * size * head : 3 * size * (head + 1)].split(size, dim=-1)
        scores = (q * size**-0.25) @ (k * size**-0.25).transpose(1, 2)
        heads.append(scores.softmax(dim=-1) @ v)
    return layer.proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_mapper_attention_equals_the_written_out_formula(heads: int, tokens: int) -> None:
    layer = randomised(MapperAttention(16, heads)).double()
    x = torch.randn(3, tokens, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference_mapper_attention(layer, x))


@pytest.mark.parametrize("heads", [1, 4])
def test_one_token_equals_two_equal_tokens(heads: int) -> None:
    block = randomised(MapperBlock(16, heads, 4)).double()
    x = torch.randn(3, 1, 16, dtype=torch.float64)
    torch.testing.assert_close(block(x).expand(3, 2, 16), block(x.repeat(1, 2, 1)))


def test_query_and_key_rows_get_zero_gradient_with_one_token() -> None:
    layer = randomised(MapperAttention(16, 2))
    layer(torch.randn(3, 1, 16)).square().sum().backward()
    rows = layer.qkv.weight.grad.reshape(2, 3, 8, 16)
    assert float(rows[:, :2].abs().max()) == 0.0
    assert float(rows[:, 2].abs().min(dim=-1).values.max()) > 0.0


def test_condition_is_mapper_norm_projection() -> None:
    encoder = ExemplarEncoder(tiny_encoder_config(), 24).eval()
    features = torch.randn(2, 1, encoder.tower_width)
    x = encoder.reduce(features)
    for block in encoder.mapper:
        x = x + block.attention(block.norm1(x))
        x = x + block.fc2(torch.nn.functional.gelu(block.fc1(block.norm2(x))))
    expected = encoder.proj(torch.nn.functional.layer_norm(x, (32,), eps=1e-5))
    torch.testing.assert_close(encoder.condition(features), expected)


@pytest.mark.parametrize("tower", [CONV_TOWER, TRANSFORMER_TOWER])
@pytest.mark.parametrize("width", [0, 32])
def test_shapes_with_the_pooled_token_and_with_all(tower: str, width: int) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    one = ExemplarEncoder(tiny_encoder_config(tower, width=width), 24).eval()
    every = ExemplarEncoder(tiny_encoder_config(tower, tokens="all", width=width), 24).eval()
    every.load_state_dict(one.state_dict())
    # a 64 px image has 2 x 2 positions of 32 px, or 4 x 4 patches of 16
    positions = 4 if tower == CONV_TOWER else 16
    assert one.features(pixels).shape == (2, 1, one.tower_width)
    assert every.features(pixels).shape == (2, 1 + positions, one.tower_width)
    assert one(pixels).shape == (2, 1, 24)
    assert every(pixels).shape == (2, 1 + positions, 24)
    # the pooled feature is the same one and comes first
    assert relative(every.features(pixels)[:, :1], one.features(pixels)) < 1e-5


def test_pooled_feature_of_a_convolutional_tower_is_the_average() -> None:
    encoder = ExemplarEncoder(tiny_encoder_config(), 24).eval()
    pixels = torch.randn(2, 3, 64, 64)
    average = encoder.tower.trunk.forward_features(pixels).mean(dim=(2, 3))
    torch.testing.assert_close(encoder.features(pixels)[:, 0], average)


def test_tower_is_frozen_and_its_statistics_stand_still_in_training() -> None:
    encoder = ExemplarEncoder(tiny_encoder_config(), 24)
    before = batch_statistics(encoder)
    assert any("running_mean" in name for name in before)
    encoder.train()
    assert encoder.mapper.training
    assert not any(module.training for module in encoder.tower.modules())
    encoder(torch.randn(4, 3, 64, 64) * 3.0 + 1.0).square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in encoder.tower.named_buffers())
    assert all(p.grad is None and not p.requires_grad for p in encoder.tower.parameters())
    trained = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert "reduce.weight" in trained
    assert "mapper.0.fc1.weight" in trained
    assert "null_condition" not in trained


def test_tower_stays_in_evaluation_inside_a_larger_module() -> None:
    outer = torch.nn.Sequential(ExemplarEncoder(tiny_encoder_config(), 24)).train()
    assert not any(module.training for module in outer[0].tower.modules())
    assert not outer.eval()[0].mapper.training


def test_training_does_not_change_what_the_encoder_gives() -> None:
    encoder = ExemplarEncoder(tiny_encoder_config(), 24)
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(encoder.train()(pixels), encoder.eval()(pixels))


def test_null_condition_is_a_trainable_standard_normal_vector() -> None:
    null = ExemplarEncoder(tiny_encoder_config(), 4096).null_condition
    assert null.shape == (1, 1, 4096)
    assert null.requires_grad
    # 4,096 draws: the standard error of the mean is 0.016, of the deviation 0.011
    assert null.mean().item() == pytest.approx(0.0, abs=0.06)
    assert null.std().item() == pytest.approx(1.0, abs=0.05)


def test_pooled_stages_follow_the_pooled_feature() -> None:
    plain = ExemplarEncoder(tiny_encoder_config(), 24).eval()
    staged = ExemplarEncoder(replace(tiny_encoder_config(), pooled_stages=True), 24).eval()
    staged.tower.load_state_dict(plain.tower.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    collected: list[torch.Tensor] = []
    trunk = staged.tower.trunk
    for stage in trunk.feature_info:
        trunk.get_submodule(stage["module"]).register_forward_hook(
            lambda _module, _inputs, output: collected.append(output.mean(dim=(2, 3)))
        )
    with torch.no_grad():
        expected, features = plain.features(pixels), staged.features(pixels)
    width = plain.tower_width
    assert features.shape == (2, 1, staged.tower_width)
    assert staged.tower_width > width
    torch.testing.assert_close(features[..., :width], expected)
    torch.testing.assert_close(features[:, 0, width:], torch.cat(collected, dim=1))


def test_pooled_stages_where_they_cannot_be() -> None:
    config = replace(tiny_encoder_config("ViT-B-32", tokens="all"), pooled_stages=True)
    with torch.device("meta"), pytest.raises(UserError, match="timm"):
        ExemplarEncoder(config, 24).features(torch.randn(1, 3, 64, 64))


def staged_encoder(tokens: str, grid: int = 0, tower: str = CONV_TOWER) -> ExemplarEncoder:
    config = replace(tiny_encoder_config(tower, tokens=tokens), pooled_stages=True, token_grid=grid)
    torch.manual_seed(0)
    return randomised(ExemplarEncoder(config, 24))


@pytest.mark.parametrize(("grid", "positions"), [(0, 4), (1, 1), (4, 16)])
def test_all_tokens_of_stages_have_the_pooled_ones_as_their_mean(grid: int, positions: int) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    one, every = staged_encoder("class").features(pixels), staged_encoder("all", grid).features(pixels)
    assert every.shape == (2, 1 + positions, one.shape[2])
    # the first token is the class token's, so that features of all tokens also serve one
    assert torch.equal(every[:, :1], one)
    torch.testing.assert_close(every[:, 1:].mean(dim=1, keepdim=True), one)


def test_all_tokens_of_stages_tell_where_and_one_token_does_not() -> None:
    pixels = torch.randn(1, 3, 64, 64)
    changed = pixels.clone()
    changed[:, :, :8, :8] += 3.0  # the upper left corner
    encoder = staged_encoder("all", 4)
    change = (encoder.features(changed) - encoder.features(pixels))[0, 1:].abs().amax(dim=1).view(4, 4)
    assert change.argmax() == 0
    assert change[0, 0] > 3 * change[3, 3]


def test_equal_features_at_different_places_give_different_conditions() -> None:
    encoder = staged_encoder("all", 4)
    features = torch.randn(1, 1, encoder.tower_width).repeat(1, 17, 1)
    condition = encoder.condition(features)[0].detach()
    distances = torch.cdist(condition, condition) + 1e9 * torch.eye(17)
    assert float(distances.min()) > 1e-3
    # one token has no place, so that models with the bottleneck are what they were
    torch.testing.assert_close(
        encoder.condition(features[:, :1]), staged_encoder("class").condition(features[:, :1])
    )


@pytest.mark.parametrize("tower", [CONV_TOWER, TRANSFORMER_TOWER])
def test_token_grid_averages_the_positions(tower: str) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    config = tiny_encoder_config(tower, tokens="all")
    encoder = ExemplarEncoder(config, 24).eval()
    tokens = encoder.features(pixels)
    encoder.config = replace(config, token_grid=1)
    torch.testing.assert_close(encoder.features(pixels)[:, 1], tokens[:, 1:].mean(dim=1))
    assert torch.equal(encoder.features(pixels)[:, 0], tokens[:, 0])


def test_all_tokens_of_stages_need_maps() -> None:
    encoder = staged_encoder("all", tower=TRANSFORMER_TOWER)
    with pytest.raises(UserError, match="no maps"):
        encoder.features(torch.randn(1, 3, 64, 64))


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
