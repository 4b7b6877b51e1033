"""Low-rank adapters: the closed form, the parts they go to, and that they come and go without a trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from pbe.config.training import PARTS
from pbe.errors import UserError
from pbe.models import LatentDiffusion, int8
from pbe.models.adapters import (
    PATTERNS,
    Adapted,
    LowRank,
    adapter_state,
    adapters_of,
    add_adapter,
    attach,
    layers_of,
    load_adapter,
    merge_adapters,
    remove_adapter,
)
from pbe.models.int8 import Int8Weight, quantise
from pbe.models.layers import ResBlock
from tests.models.tiny import CONV_TOWER, randomised, relative, tiny_encoder_config, tiny_model_config

ALL = [part for part in PARTS if part != "cross_attention_keys"]


def tiny_model(tokens: str = "class") -> LatentDiffusion:
    config = tiny_model_config()
    config.exemplar_encoder = tiny_encoder_config(CONV_TOWER, tokens=tokens)
    model = LatentDiffusion(config)
    randomised(model)
    return model


def outputs(model: LatentDiffusion) -> torch.Tensor:
    """Condition and prediction for a fixed input, as one vector."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        pixels = torch.randn(2, 3, 64, 64, generator=generator)
        condition = model.exemplar_encoder(pixels)
        x = torch.randn(2, 9, 8, 8, generator=generator)
        prediction = model.unet(x, torch.tensor([10, 700]), condition)
    return torch.cat([condition.flatten(), prediction.flatten()])


def stirred(model: LatentDiffusion, name: str = "", std: float = 0.2) -> None:
    """Give an adapter weights as training would leave them, so that it changes something."""
    generator = torch.Generator().manual_seed(9)
    for _, adapter in adapters_of(model, name):
        with torch.no_grad():
            adapter.up.copy_(std * torch.randn(adapter.up.shape, generator=generator))


def test_the_closed_form_of_a_linear_layer():
    layer = nn.Linear(6, 5)
    adapter = LowRank(layer, 2, alpha=3.0)
    nn.init.normal_(adapter.up)
    attach(layer, adapter)
    x = torch.randn(3, 4, 6)
    low = torch.einsum("or,ri,bni->bno", adapter.up, adapter.down, x)
    expected = x @ layer.weight.T + layer.bias + 1.5 * low
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(adapter.delta(), 1.5 * adapter.up.detach() @ adapter.down.detach())


@pytest.mark.parametrize("options", [{"kernel_size": 1}, {"kernel_size": 3, "stride": 2, "padding": 1}])
def test_a_convolution_is_one_with_another_kernel(options: dict[str, int]):
    layer = nn.Conv2d(4, 6, **options)
    adapter = LowRank(layer, 2, alpha=1.0)
    nn.init.normal_(adapter.up)
    kernel = layer.weight + 0.5 * torch.einsum("or,rihw->oihw", adapter.up, adapter.down)
    x = torch.randn(2, 4, 9, 7)
    stride, padding = options.get("stride", 1), options.get("padding", 0)
    expected = nn.functional.conv2d(x, kernel, layer.bias, stride, padding)
    attach(layer, adapter)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_the_parts_of_a_configuration_are_the_models():
    assert set(PATTERNS) == set(PARTS)


def test_parts_are_what_they_are_called():
    """Counted by the modules themselves, not by their names: every layer but four has its part."""
    model = tiny_model()
    unet, encoder = model.unet, model.exemplar_encoder
    inside = [*unet.modules(), *encoder.modules()]
    own = {id(each) for each in inside if isinstance(each, nn.Linear | nn.Conv2d)}
    tower = {id(each) for each in encoder.tower.modules()}
    chosen = {id(layer) for layer in layers_of(model, PARTS).values()}
    edges = {id(layer) for layer in (unet.conv_in, unet.conv_out, unet.time_embed[0], unet.time_embed[2])}
    assert own - tower - edges == chosen
    blocks = [block for block in unet.modules() if isinstance(block, ResBlock)]
    convolutions = {id(layer) for layer in layers_of(model, ["residual"]).values()}
    assert {id(block.conv1) for block in blocks} <= convolutions
    attention = layers_of(model, ["self_attention"])
    assert len(attention) == 4 * sum(name.endswith("attn1.to_q") for name in attention)


@pytest.mark.parametrize("tokens", ["class", "all"])
def test_rank_zero_and_fresh_adapters_change_no_bit(tokens: str):
    model = tiny_model(tokens)
    before = outputs(model)
    assert add_adapter(model, ALL, 0, 1.0) == []
    assert torch.equal(outputs(model), before)
    assert len(add_adapter(model, ALL, 4, 1.0)) == len(layers_of(model, ALL))
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("tokens", ["class", "all"])
def test_merged_equals_unmerged(tokens: str):
    model = tiny_model(tokens)
    before, names = outputs(model), list(model.state_dict())
    add_adapter(model, ALL, 3, 0.7)
    stirred(model)
    adapted = outputs(model)
    assert relative(adapted, before) > 1e-2
    merge_adapters(model)
    assert relative(outputs(model), adapted) < 1e-5
    assert list(model.state_dict()) == names
    assert not any(adapters_of(model))


def test_adapters_are_loaded_combined_and_taken_away():
    model = tiny_model()
    before = outputs(model)
    add_adapter(model, ["self_attention", "mapper"], 3, alpha=6.0)
    stirred(model)
    state, alone = adapter_state(model), outputs(model)
    remove_adapter(model)
    assert torch.equal(outputs(model), before)
    load_adapter(model, state, alpha=6.0, factor=0.25, name="first")
    load_adapter(model, state, alpha=6.0, factor=0.75, name="second")
    assert relative(outputs(model), alone) < 1e-5
    remove_adapter(model, "second")
    quarter = outputs(model)
    assert relative(quarter, alone) > 1e-3
    assert {adapter.name for _, adapter in adapters_of(model)} == {"first"}
    remove_adapter(model, "first")
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("eighths", [False, True])
def test_adapted_layers_are_copied_and_pickled_as_ever(eighths: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(int8, "ENOUGH", 1)
    model = tiny_model()
    if eighths:
        quantise(model.unet)
    add_adapter(model, ALL, 2, 4.0)
    stirred(model)
    layer, kind = "mid_attention.block.attn1.to_v", Int8Weight if eighths else nn.Linear
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(made), outputs(model))
        assert type(made.unet.get_submodule(layer)) is type(model.unet.get_submodule(layer))
        remove_adapter(made)
        assert isinstance(made.unet.get_submodule(layer), kind)
        assert not isinstance(made.unet.get_submodule(layer), Adapted)


def test_gradients_reach_adapters_alone():
    model = tiny_model().requires_grad_(False)
    made = add_adapter(model, ["mapper", "residual"], 2, 1.0)
    stirred(model)
    condition = model.exemplar_encoder(torch.randn(1, 3, 64, 64))
    model.unet(torch.randn(1, 9, 8, 8), torch.tensor([3]), condition).square().mean().backward()
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    assert with_gradient == {id(p) for adapter in made for p in adapter.parameters()}
    assert all(p.grad.abs().sum() > 0 for adapter in made for p in adapter.parameters())


def test_a_bfloat16_base_keeps_its_type():
    model = tiny_model().to(torch.bfloat16)
    made = add_adapter(model, ["feed_forward"], 2, 1.0)
    stirred(model)
    assert {adapter.up.dtype for adapter in made} == {torch.float32}
    name, layer = next(iter(layers_of(model, ["feed_forward"]).items()))
    assert name.endswith("ff.proj")
    assert layer(torch.randn(1, 4, layer.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_unknown_and_missing_parts_are_told():
    model = tiny_model()
    with pytest.raises(UserError, match="no part 'attention'; there are: self_attention, "):
        layers_of(model, ["attention"])
    model.unet.mid_attention = nn.Identity()
    for level in (*model.unet.down, *model.unet.up):
        level.attentions = nn.ModuleList()
    with pytest.raises(UserError, match="no layers in the part 'self_attention'"):
        layers_of(model, ["self_attention"])
