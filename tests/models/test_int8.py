"""Weights in 8 bits: how far they are off, what they save, and what still works."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pbe.models import UNet, int8
from pbe.models.convolution import Convolution
from pbe.models.int8 import is_quantised, quantise
from tests.models.tiny import randomised, relative, tiny_unet_config


@pytest.fixture(autouse=True)
def _all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "ENOUGH", 1)


@pytest.mark.parametrize("layer", [nn.Linear(16, 8), nn.Conv2d(8, 6, 3), Convolution(8, 6, 3, padding=1)])
def test_each_weight_is_off_by_half_a_step_of_its_channel(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight[0] *= 100.0  # of one channel; the others' steps stay small
        layer.weight[1] = 0.0
    before = layer.weight.detach().clone()
    quantise(layer)
    step = before.flatten(1).abs().amax(1) / 127
    error = (layer.weight - before).flatten(1).abs().amax(1)
    assert bool((error <= 0.501 * step).all())
    assert layer.weight_int8.dtype == torch.int8
    assert "weight" not in dict(layer.named_parameters())


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 0.01)]
)
def test_scales_that_are_rounded_move_no_weight_by_more(dtype: torch.dtype, size: float) -> None:
    """A channel's largest numbers are 127 scales from zero, and so many times off by a scale's rounding."""
    layer = nn.Linear(64, 128)
    with torch.no_grad():
        layer.weight.mul_(size)
    before = layer.to(dtype).weight.detach().double()
    quantise(layer)
    kept = layer.weight_int8.double() * layer.weight_scale.double()
    assert bool(((kept - before).abs() <= 0.501 * layer.weight_scale.double()).all())
    assert layer.weight.dtype == dtype


@torch.no_grad()
def test_a_unet_computes_nearly_the_same_in_a_quarter_of_the_memory() -> None:
    plain = randomised(UNet(tiny_unet_config()))
    small = copy.deepcopy(plain)
    quantise(small)
    assert is_quantised(small)
    assert not is_quantised(plain)
    x, timesteps, context = torch.randn(2, 9, 8, 8), torch.tensor([5, 5]), torch.randn(2, 1, 24)
    expected = plain(x, timesteps, context)
    assert 1e-6 < relative(small(x, timesteps, context), expected) < 0.1
    prepared = small.prepare(context, x[:, 4:8], x[:, 8:], torch.tensor([5]))
    assert relative(small(x[:, :4], timesteps, prepared), small(x, timesteps, context)) < 1e-4

    def size(unet: UNet) -> int:
        return sum(each.nbytes for each in (*unet.parameters(), *unet.buffers()))

    assert size(small) < 0.4 * size(plain)


@torch.no_grad()
def test_the_type_that_it_computes_in_can_change() -> None:
    unet = randomised(UNet(tiny_unet_config()))
    quantise(unet)
    unet.to(torch.bfloat16)
    assert unet.down[0].blocks[0].conv1.weight_int8.dtype == torch.int8
    x, context = torch.randn(1, 9, 8, 8).bfloat16(), torch.randn(1, 1, 24).bfloat16()
    assert unet(x, torch.tensor([5]), context).dtype == torch.bfloat16


@pytest.mark.parametrize("layer", [nn.Linear(16, 8), nn.Conv2d(8, 6, 3), Convolution(8, 6, 3, padding=1)])
def test_gradients_flow_through_and_no_copy_of_the_weight_waits_for_them(
    layer: nn.Linear | nn.Conv2d,
) -> None:
    quantise(layer.requires_grad_(False))
    plain = copy.deepcopy(layer)
    x = torch.randn(4, 16) if isinstance(layer, nn.Linear) else torch.randn(2, 8, 5, 5)
    x.requires_grad_(True)
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = layer(x)
    assert kept == []
    weight = plain.weight
    if isinstance(layer, nn.Linear):
        expected = nn.functional.linear(x, weight, plain.bias)
    else:
        expected = nn.functional.conv2d(x, weight, plain.bias, padding=layer.padding)
    slope = torch.randn_like(output)
    (ours,) = torch.autograd.grad(output, x, slope)
    (theirs,) = torch.autograd.grad(expected, x, slope)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(ours, theirs)


def test_small_layers_and_a_second_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 4)
    monkeypatch.setattr(int8, "ENOUGH", 17)
    quantise(layer)
    assert not is_quantised(layer)
    monkeypatch.setattr(int8, "ENOUGH", 1)
    quantise(layer)
    whole = layer.weight_int8
    quantise(layer)
    assert layer.weight_int8 is whole
