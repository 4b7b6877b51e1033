"""Low-rank adapters (Hu et al. 2021): small trained terms beside frozen weights, and the parts they go to.

A layer with weight W computes ``W x + scale * up(down(x))`` for each of its adapters, where ``down`` has few
rows, the rank. The package peft does the same, but brings transformers and accelerate along, wraps layers so
that all weights get other names, and cannot follow the mapper, which reads rows of its fused weights. Here a
layer keeps its place, its weights and their names, and gains adapters beside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.errors import UserError
from pbe.models.convolution import double

# Layers by part. With one condition token queries and keys of the cross-attention have no influence.
PATTERNS = {
    "self_attention": r"unet\..+\.attn1\.to_(q|k|v|out)",
    "cross_attention": r"unet\..+\.attn2\.to_(v|out)",
    "cross_attention_keys": r"unet\..+\.attn2\.to_(q|k)",
    "feed_forward": r"unet\..+\.ff\.(proj|out)",
    "projections": r"unet\..+\.proj_(in|out)",
    "residual": r"unet\.((down|mid1|mid2|up)\b.*\.(conv1|conv2|skip|time_proj|conv)|context_embed)",
    "mapper": r"exemplar_encoder\.(mapper\..+\.(qkv|proj|fc1|fc2)|reduce|layout\..+|proj)",
}


class LowRank(nn.Module):
    """One adapter of a layer: ``factor * alpha / rank * up(down(x))``, zero at the start.

    Args:
        layer: a linear layer or a convolution, whose shape it takes.
        rank: rows of ``down``, 1 and above.
        alpha: strength that belongs to the weights.
        name: of the adapter that it is a part of.
        generator: of the start of ``down``; None is torch's own.

    Attributes:
        factor: how much of the adapter is wanted; 1 is what was trained.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        rank: int,
        alpha: float,
        name: str = "",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.alpha, self.factor, self.name = alpha, 1.0, name
        weight = layer.weight
        down = torch.empty(rank, *weight.shape[1:])
        bound = 1.0 / math.sqrt(down[0].numel())  # what linear layers and convolutions start with
        self.down = nn.Parameter(down.uniform_(-bound, bound, generator=generator).to(weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        self._place = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else None

    @property
    def scale(self) -> float:
        """Factor on ``up(down(x))``."""
        return self.factor * self.alpha / len(self.down)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the output for the layer's input, in the input's type."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if self._place is None:
            return F.linear(F.linear(x, down) * self.scale, up)
        hidden = F.conv2d(x, down, None, *self._place)  # type: ignore[arg-type]  # numbers or "same"
        return F.conv2d(hidden * self.scale, up[:, :, None, None])

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return what it adds to the layer's weight, float32 and of its shape."""
        return delta(self.down, self.up, self.scale)


def delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return ``scale * up down`` as float32, ``(out, in)`` or ``(out, in, h, w)``, of ``up (out, r)``."""
    product = up.float() @ down.float().flatten(1)
    return scale * product.view(len(up), *down.shape[1:])


class Mixin(nn.Module):
    """What a layer's class may gain in front, in place (:func:`mixed`); it is copied and pickled as ever."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Name the classes that a class is made of, which no module holds."""
        return _blank, tuple(_parts_of(type(self))), self.__getstate__()


@cache
def mixed(mixin: type[Mixin], kind: Any) -> Any:
    """Return the class of layers of a kind that have a mixin in front."""
    return type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {"__doc__": kind.__doc__})


def _parts_of(kind: Any) -> list[Any]:
    mixin, *behind = kind.__bases__
    return [mixin, *_parts_of(behind[0])] if issubclass(kind, Mixin) else [kind]


def _blank(*parts: Any) -> Any:
    *mixins, kind = parts
    for mixin in reversed(mixins):
        kind = mixed(mixin, kind)
    return kind.__new__(kind)


class Adapted(Mixin):
    """What a layer inherits from first once it has adapters."""

    adapters: nn.ModuleList
    weight: Tensor
    goes_undoubled: Callable[[Tensor], bool]

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x``, with what each adapter adds."""
        return self.added_to(super().forward(x), x)

    def of_doubled(self, x: Tensor) -> Tensor:
        """Do what a convolution's ``of_doubled`` does; fresh adapters change no bit of that either."""
        if not self.goes_undoubled(x):
            made: Tensor = self(double(x))
            return made
        return self.added_to(super().of_doubled(x), double(x))  # type: ignore[misc]  # of a convolution

    def added_to(self, output: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output for ``x`` with what each adapter adds."""
        for adapter in self.adapters:
            if adapter.factor:
                output = output + adapter(x)
        return output


def layers_of(model: nn.Module, parts: Iterable[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers of parts by name; a part that the model does not have, or no part, is an error.

    Args:
        model: a :class:`pbe.models.LatentDiffusion`, or a module of the same names.
        parts: names of :data:`PATTERNS`.
    """
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)}
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for part in parts:
        if part not in PATTERNS:
            raise UserError(f"no part '{part}'; there are: {', '.join(PATTERNS)}")
        own = {name: each for name, each in layers.items() if re.fullmatch(PATTERNS[part], name)}
        if not own:
            raise UserError(f"this model has no layers in the part '{part}'; leave it out")
        found |= own
    return {name: layer for name, layer in layers.items() if name in found}


def attach(layer: nn.Linear | nn.Conv2d, adapter: LowRank) -> None:
    """Add an adapter to a layer, which stays the same object with the same weights."""
    if not isinstance(layer, Adapted):
        layer.__class__ = mixed(Adapted, type(layer))
        layer.adapters = nn.ModuleList()
    assert isinstance(layer, Adapted)
    layer.adapters.append(adapter)


def add_adapter(
    model: nn.Module,
    parts: Iterable[str],
    rank: int,
    alpha: float,
    name: str = "",
    generator: torch.Generator | None = None,
) -> list[LowRank]:
    """Add new, trainable adapters, zero at the start, to the layers of parts; rank 0 changes nothing.

    They are float32 whatever the type of the weights beside them. Returns them in the order of the layers.
    """
    layers = layers_of(model, parts) if rank else {}
    made = [LowRank(layer, rank, alpha, name, generator) for layer in layers.values()]
    for layer, adapter in zip(layers.values(), made, strict=True):
        attach(layer, adapter)
    return made


def load_adapter(
    model: nn.Module, state: Mapping[str, Tensor], alpha: float, factor: float, name: str
) -> None:
    """Add the adapters of a state as :func:`adapter_state` gives it, in the type of the weights beside them.

    Args:
        model: that has all the layers of the state, in the same shapes.
        state: for each layer ``<layer>.down`` and ``<layer>.up``.
        alpha: see :class:`LowRank`.
        factor: likewise.
        name: by which it is known in the model.
    """
    for layer_name in layer_names(state):
        layer = model.get_submodule(layer_name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        down, up = state[f"{layer_name}.down"], state[f"{layer_name}.up"]
        adapter = LowRank(layer, len(down), alpha, name)
        adapter.factor = factor
        adapter.load_state_dict({"down": down, "up": up})
        attach(layer, adapter.to(layer.weight.dtype).requires_grad_(False))


def layer_names(keys: Iterable[str]) -> list[str]:
    """Return the layers that the keys of an adapter's state name, in their order."""
    return list(dict.fromkeys(key.rpartition(".")[0] for key in keys))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Yield the layers that have adapters, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, Adapted):
            yield name, layer


def adapters_of(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, LowRank]]:
    """Yield layer and adapter for all adapters of a model, or those of one name."""
    for layer_name, layer in adapted_layers(model):
        for adapter in layer.adapters:
            assert isinstance(adapter, LowRank)
            if name is None or adapter.name == name:
                yield layer_name, adapter


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let a model compute what it computes without adapters for the length of a ``with`` block."""
    kept = [(adapter, adapter.factor) for _, adapter in adapters_of(model)]
    for adapter, _ in kept:
        adapter.factor = 0.0
    try:
        yield
    finally:
        for adapter, factor in kept:
            adapter.factor = factor


def adapter_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Return ``<layer>.down`` and ``<layer>.up`` of a model's only adapter, or of the one of that name."""
    return {
        f"{layer}.{key}": value.detach()
        for layer, adapter in adapters_of(model, name)
        for key, value in adapter.named_parameters()
    }


def remove_adapter(model: nn.Module, name: str | None = None) -> None:
    """Take the adapter of a name away, or all; without any the model is to the bit what it was."""
    for _, layer in list(adapted_layers(model)):
        kept = [each for each in layer.adapters if name is not None and each.name != name]
        layer.adapters = nn.ModuleList(kept)
        if not kept:
            del layer.adapters
            layer.__class__ = type(layer).__bases__[1]


def merged_weight(layer: Adapted) -> Tensor:
    """Return a layer's weight with what all of its adapters add, in its own type."""
    total = layer.weight.detach().float()
    for adapter in layer.adapters:
        assert isinstance(adapter, LowRank)
        total = total + adapter.delta()
    return total.to(layer.weight.dtype)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add all adapters to the weights beside them and take them away."""
    for _, layer in adapted_layers(model):
        layer.weight.copy_(merged_weight(layer))
    remove_adapter(model)
