"""Weights held as 8-bit integers: a quarter of float32's memory, half of bfloat16's.

Only the storage is coarser: a layer turns its weight back into the type it computes in whenever it is used,
and once more for a backward pass. Each output channel has a scale of its own, so that a weight is off by at
most 1/254 of the channel's largest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from pbe.models.adapters import Mixin, mixed

LARGEST = 127
ENOUGH = 2**14  # weights of a layer from which it is worth it
AT_ONCE = 2**20  # weights that are there in float32 at a time


class Int8Weight(Mixin):
    """What a layer inherits from first once its weight is held in 8 bits."""

    weight_int8: Tensor
    weight_scale: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight in the type of the scales, made anew each time."""
        return self.weight_int8.to(self.weight_scale.dtype).mul_(self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x``; neither input nor weight is kept for a backward pass."""
        if torch.is_grad_enabled() and x.requires_grad:
            made: Tensor = Frozen.apply(x, self)
            return made
        output: Tensor = super().forward(x)
        return output


class Frozen(torch.autograd.Function):
    """A frozen layer with a weight in 8 bits, which the backward pass makes anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Weight) -> Tensor:
        """Return the layer's output."""
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        made: Tensor = super(Int8Weight, layer).forward(x)  # without adapters, which come beside it
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the input."""
        (grad,), layer = grads, ctx.layer
        weight = layer.weight.to(grad.dtype)
        if isinstance(layer, nn.Conv2d):
            found = conv2d_input(
                ctx.shape, weight, grad, layer.stride, layer.padding, layer.dilation, layer.groups
            )
        else:
            found = grad @ weight
        return found.to(ctx.dtype), None


def quantise(module: nn.Module) -> None:
    """Hold the weights of all linear and convolutional layers inside a module in 8 bits, in place.

    Layers on the meta device, which are not loaded yet, are passed over. The module can compute and be moved
    afterwards, but neither be saved nor trained; adapters beside the weights can.
    """
    for layer in module.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or isinstance(layer, Int8Weight):
            continue
        if layer.weight.numel() < ENOUGH or layer.weight.is_meta:
            continue
        weight = layer.weight.detach()
        scale = weight.new_empty(len(weight), *[1] * (weight.ndim - 1))
        whole = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
        if weight.ndim == 4 and weight.dtype == torch.bfloat16:  # as convolutions of bfloat16 want them
            whole = whole.to(memory_format=torch.channels_last)
        share = max(AT_ONCE // weight[0].numel(), 1)
        for some in (slice(first, first + share) for first in range(0, len(weight), share)):
            part = weight[some].float()
            largest = part.abs().amax(dim=tuple(range(1, part.ndim)), keepdim=True)
            scale[some] = largest / LARGEST
            # by the scale as it is kept, rounded to the type of the weights; 1 for a channel of zeros
            kept = scale[some].float()
            whole[some] = (part / kept.where(kept > 0, 1.0)).round().clamp(-LARGEST, LARGEST)
        del layer.weight
        layer.register_buffer("weight_int8", whole)
        layer.register_buffer("weight_scale", scale)
        layer.__class__ = mixed(Int8Weight, type(layer))


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's parameters and what is held in 8 bits in place of some, by name."""
    yield from module.named_parameters()
    for name, layer in module.named_modules():
        if isinstance(layer, Int8Weight):
            yield f"{name}.weight".removeprefix("."), layer.weight_int8


def is_quantised(module: nn.Module) -> bool:
    """Return whether a module holds weights in 8 bits."""
    return any(isinstance(layer, Int8Weight) for layer in module.modules())
