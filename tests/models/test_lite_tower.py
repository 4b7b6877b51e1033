"""EfficientNet-Lite0: bit for bit timm's, weights and keys included."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from pbe.models.lite_tower import NAME, EfficientNetLite0


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, EfficientNetLite0]:
    torch.manual_seed(0)
    theirs = timm.create_model(NAME, pretrained=False)
    theirs.reset_classifier(0)
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight, norm.running_var):
                values.data.uniform_(0.5, 2.0)
            for values in (norm.bias, norm.running_mean):
                values.data.normal_()
    ours = EfficientNetLite0()
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize(("height", "width"), [(128, 128), (97, 64), (33, 130)])
@torch.no_grad()
def test_maps_and_pooled_feature_are_those_of_timm(networks, height, width):
    theirs, ours = networks
    pixels = torch.randn(2, 3, height, width)
    (last, maps), (own_last, own_maps) = (each.forward_intermediates(pixels) for each in networks)
    for expected, found in zip([last, *maps], [own_last, *own_maps], strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(ours(pixels), theirs(pixels))
    assert torch.equal(ours.forward_head(own_last), theirs.forward_head(last, pre_logits=True))


def test_widths_are_those_of_timm(networks):
    theirs, ours = networks
    assert [each["num_chs"] for each in ours.feature_info] == [
        each["num_chs"] for each in theirs.feature_info
    ]
    assert ours.num_features == theirs.num_features


@torch.no_grad()
def test_fresh_weights_keep_the_size_of_what_passes_through():
    torch.manual_seed(0)
    _, maps = EfficientNetLite0().eval().forward_intermediates(torch.randn(2, 3, 128, 128))
    assert all(0.05 < float(each.std()) < 20 for each in maps)
