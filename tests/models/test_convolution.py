"""Convolutions in other forms: the numbers of torch's own, whatever the size, type and layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pbe.models import convolution
from pbe.models.adapters import LowRank, attach
from pbe.models.convolution import (
    Convolution,
    convolve_doubled,
    convolve_rows,
    fastest_tile,
    is_channels_last,
    winograd,
)
from tests.models.tiny import relative

LAYOUTS = [torch.contiguous_format, torch.channels_last]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 10), (5, 3), (1, 1)])
def test_tiles_give_the_plain_convolution(
    tile: int, dtype: torch.dtype, height: int, width: int, layout: torch.memory_format
) -> None:
    x = torch.randn(2, 5, height, width, dtype=dtype).to(memory_format=layout)
    weight, bias = torch.randn(3, 5, 3, 3, dtype=dtype), torch.randn(3, dtype=dtype)
    made = winograd(x, weight, bias, tile)
    assert relative(made, F.conv2d(x, weight, bias, padding=1)) < TOLERANCES[dtype]
    assert relative(winograd(x, weight, None, tile), F.conv2d(x, weight, padding=1)) < TOLERANCES[dtype]


@pytest.mark.parametrize("tile", [2, 4])
def test_strips_and_shares_of_kernels_are_all_there(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(2, 5, 13, 9), torch.randn(7, 5, 3, 3), torch.randn(7)
    monkeypatch.setattr(convolution, "STRIP", 1)
    monkeypatch.setattr(convolution, "KERNELS", (tile + 2) ** 2 * 5 * 3)
    assert relative(winograd(x, weight, bias, tile), F.conv2d(x, weight, bias, padding=1)) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0)])
@torch.no_grad()
def test_layer_is_torchs_own_and_keeps_the_layout(
    kernel: int, stride: int, padding: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "ENOUGH_CHANNELS", 4)
    layer = Convolution(4, 6, kernel, stride=stride, padding=padding).double()
    plain = nn.Conv2d(4, 6, kernel, stride=stride, padding=padding).double()
    plain.load_state_dict(layer.state_dict())
    for size in (6, 20, 64):
        x = torch.randn(2, 4, size, size, dtype=torch.float64).to(memory_format=layout)
        made = layer(x)
        assert relative(made, plain(x)) < 1e-12
        if layout == torch.channels_last:
            assert is_channels_last(made)


def test_gradients_are_those_of_the_plain_convolution() -> None:
    layer, x = Convolution(256, 256, 3, padding=1), torch.randn(1, 256, 16, 16, requires_grad=True)
    layer(x).square().sum().backward()
    expected = torch.autograd.grad(F.conv2d(x, layer.weight, layer.bias, padding=1).square().sum(), x)[0]
    assert torch.equal(x.grad, expected)


def test_form_follows_size_and_type() -> None:
    def tile(channels: int, size: int, out: int = 320, dtype: torch.dtype = torch.float32) -> int:
        return fastest_tile(dtype, size * size, channels, out)

    assert (tile(320, 64), tile(640, 32), tile(1280, 16)) == (4, 2, 2)
    assert (tile(1280, 8), tile(128, 64), tile(320, 64, out=4)) == (0, 0, 0)
    assert tile(320, 64, dtype=torch.bfloat16) == 0


@torch.no_grad()
def test_tiles_of_two_round_less_than_the_plain_convolution() -> None:
    x, weight = torch.randn(1, 256, 16, 16), torch.randn(256, 256, 3, 3)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    plain, two, four = (
        F.conv2d(x, weight, padding=1),
        winograd(x, weight, None, 2),
        winograd(x, weight, None, 4),
    )
    errors = [float((made - exact).std() / exact.std()) for made in (plain, two, four)]
    assert errors[1] < 1e-6
    assert errors[2] < 1e-5


def doubled(x: torch.Tensor) -> torch.Tensor:
    """Return the nearest-neighbour doubling."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 3), (1, 1)])
def test_a_doubled_map_is_convolved_without_being_made_gradients_included(
    dtype: torch.dtype, height: int, width: int
) -> None:
    x = torch.randn(2, 5, height, width, dtype=dtype).to(memory_format=torch.channels_last)
    given = [x, torch.randn(3, 5, 3, 3, dtype=dtype), torch.randn(3, dtype=dtype)]
    for each in given:
        each.requires_grad_()
    made, expected = convolve_doubled(*given), F.conv2d(doubled(x), *given[1:], padding=1)
    assert relative(made, expected) < TOLERANCES[dtype]
    direction = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(each, given, direction) for each in (made, expected)), strict=True)
    assert all(relative(*pair) < TOLERANCES[dtype] for pair in pairs)


@torch.no_grad()
def test_doubling_in_bfloat16_rounds_at_most_twice_as_much_as_the_plain_convolution() -> None:
    x, weight = torch.randn(2, 64, 16, 16).bfloat16(), (torch.randn(64, 64, 3, 3) / 24.0).bfloat16()
    exact = F.conv2d(doubled(x.double()), weight.double(), padding=1)
    plain, quarters = F.conv2d(doubled(x), weight, padding=1), convolve_doubled(x, weight, None)
    errors = [float((made - exact).std() / exact.std()) for made in (plain, quarters)]
    assert errors[1] < 2.0 * errors[0]


@pytest.mark.parametrize("kind", ["large", "small", "adapted", "watched", "columns first"])
@torch.no_grad()
def test_doubling_is_the_layers_own_whatever_is_around_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, side, seen = Convolution(4, 4, 3, padding=1).double(), 4 if kind == "small" else 24, []
    monkeypatch.setattr(
        convolution, "convolve_doubled", lambda *given: seen.append(1) or convolve_doubled(*given)
    )
    if kind == "adapted":
        adapter = LowRank(layer, 2, 1.0)
        nn.init.normal_(adapter.up)
        attach(layer, adapter)
    if kind == "watched":
        layer.register_forward_hook(lambda *_: None)
    order = torch.contiguous_format if kind == "columns first" else torch.channels_last
    x = torch.randn(1, 4, side, side, dtype=torch.float64).to(memory_format=order)
    assert relative(layer.of_doubled(x), layer(doubled(x))) < 1e-12
    assert bool(seen) == (kind in ("large", "adapted"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_of_rows_has_the_gradients_of_a_1x1_convolution(layout: torch.memory_format) -> None:
    layer, x = Convolution(5, 3, 1).double(), torch.randn(2, 5, 4, 6, dtype=torch.float64)
    x = x.to(memory_format=layout).requires_grad_()
    given, direction = (x, layer.weight, layer.bias), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    made, expected = layer(x), F.conv2d(*given)
    assert made.is_contiguous(memory_format=layout)
    pairs = zip(*(torch.autograd.grad(each, given, direction) for each in (made, expected)), strict=True)
    assert all(relative(*pair) < 1e-12 for pair in pairs)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 3), (1, 1)])
def test_a_product_of_patches_is_the_plain_convolution(height: int, width: int) -> None:
    x, weight = (
        torch.randn(2, 5, height, width, dtype=torch.float64),
        torch.randn(3, 5, 3, 3, dtype=torch.float64),
    )
    bias, last = torch.randn(3, dtype=torch.float64), torch.channels_last
    made = convolve_rows(x.to(memory_format=last), weight.to(memory_format=last), bias)
    assert relative(made, F.conv2d(x, weight, bias, padding=1)) < 1e-12
    assert made.is_contiguous(memory_format=last)


@pytest.mark.parametrize("side", [8, 24])  # of few positions and of many
@torch.no_grad()
def test_frozen_bfloat16_weights_are_laid_out_once_and_stay_the_same_numbers(side: int) -> None:
    layer = Convolution(16, 24, 3, padding=1).bfloat16().requires_grad_(False)
    before, x = layer.weight.clone(), torch.randn(2, 16, side, side).bfloat16()
    made = layer(x.to(memory_format=torch.channels_last))
    assert is_channels_last(layer.weight)
    assert torch.equal(layer.weight, before)
    assert relative(made, F.conv2d(x.double(), before.double(), layer.bias.double(), padding=1)) < 0.01
    place = layer.weight.data_ptr()
    layer(x.to(memory_format=torch.channels_last))
    assert layer.weight.data_ptr() == place


@torch.no_grad()
def test_weights_that_train_keep_their_layout() -> None:
    layer = Convolution(16, 24, 3, padding=1).bfloat16()  # an optimizer's state lies as they do
    layer(torch.randn(2, 16, 8, 8).bfloat16().to(memory_format=torch.channels_last))
    assert layer.weight.is_contiguous()
