"""Adapters as files: one safetensors file each, and models with adapters merged in.

For every layer that it changes a file holds ``<layer>.down`` ``(rank, in[, h, w])`` and ``<layer>.up``
``(out, rank)`` by the layer's native name, and in its header the strength ``alpha``, what it was trained on
and whatever its maker says of how it is to be used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pbe.checkpoints.key_map import LISTED, OpenedModel, checked
from pbe.checkpoints.settings import reading, usage_for
from pbe.checkpoints.tensors import Lazies, LazyTensor, lazies
from pbe.checkpoints.weight_files import open_weights, write_safetensors
from pbe.config import UNetConfig
from pbe.errors import UserError
from pbe.models.adapters import adapted_layers, delta, layer_names, merged_weight

ADAPTER_NAME = "adapter.safetensors"  # in the folder of a run
FORMAT = "pbe-adapter-1"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter in a file, none of whose numbers is read yet.

    Attributes:
        source: the file, for errors.
        tensors: ``down`` and ``up`` of every layer.
        alpha: over the rank it is the factor on what a layer's adapter adds.
        base: the model that it was trained on, as its training called it.
        settings: what its maker says of how it is to be used; plain values by name.
    """

    source: str
    tensors: Lazies
    alpha: float
    base: str = ""
    settings: Mapping[str, Any] | None = None

    @property
    def layers(self) -> list[str]:
        """Names of the layers that it changes."""
        return layer_names(self.tensors)

    def read(self) -> dict[str, Tensor]:
        """Return its tensors as float32, every number checked to be finite."""
        return {key: checked(key, each, torch.float32, self.source) for key, each in self.tensors.items()}

    def adapted_unet(self, unet: UNetConfig) -> UNetConfig:
        """Return the sizes of a UNet with what the adapter makes of it: one of few steps, perhaps."""
        said = dict(self.settings or {})
        if not said.get("few_steps"):
            return unet
        if unet.few_steps:
            raise UserError(
                f"{self.source} makes a model one of {said['few_steps']} steps, which this one is already"
            )
        with reading(self.source):
            scales, steps = [float(scale) for scale in said["guidance_range"]], int(said["few_steps"])
            low, high = scales
            return replace(unet, guidance_range=[low, high], few_steps=steps)

    def check_fit(self, shapes: Mapping[str, Sequence[int]], what: str) -> None:
        """Refuse a model that lacks a layer of the adapter, or has it in another shape.

        Args:
            shapes: of the model's weights, by native name.
            what: the model is called in errors.
        """
        problems = []
        for layer in self.layers:
            down, up = (self.tensors[f"{layer}.{key}"].shape for key in ("down", "up"))
            wanted, found = (up[0], *down[1:]), tuple(shapes.get(f"{layer}.weight", ()))
            if wanted != found:
                problems.append(f"{layer} ({f'{list(found)}' if found else 'missing'}, not {list(wanted)})")
        if problems:
            more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
            raise UserError(
                f"{self.source} does not fit {what}: {', '.join(problems[:LISTED])}{more}; "
                f"it was trained on '{self.base or 'a model of other sizes'}'"
            )


def save_adapter(
    path: Path,
    state: dict[str, Tensor],
    alpha: float,
    base: str = "",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter, whole or not at all.

    Args:
        path: of the file.
        state: as :func:`pbe.models.adapters.adapter_state` gives it.
        alpha: see :class:`AdapterFile`, as for the rest.
        base: likewise.
        settings: likewise.
    """
    said = json.dumps({"alpha": alpha, "base": base, "settings": dict(settings or {})})
    write_safetensors(path, lazies(state), {"format": FORMAT, "adapter": said})


def find_adapter(path: Path) -> Path:
    """Return the file of an adapter, which may be given as the folder of the run that trained it."""
    if path.is_dir() and (path / ADAPTER_NAME).is_file():
        return path / ADAPTER_NAME
    if not path.is_file():
        what = f"has no {ADAPTER_NAME}" if path.is_dir() else "does not exist"
        raise UserError(f"the adapter '{path}' {what}; name a file, or the folder of a run that trained one")
    return path


def open_adapter(path: str | Path) -> AdapterFile:
    """Open the file of an adapter, or the folder of the run that trained it; no number is read."""
    file = find_adapter(Path(path))
    source, tensors = f"'{file}'", open_weights(file).tensors
    try:
        with safe_open(file, "pt") as content:
            said = content.metadata() or {}
    except (SafetensorError, OSError):  # torch's archives are weights, too
        said = {}
    if said.get("format") != FORMAT:
        raise UserError(f"{source} is not an adapter of this project (its format is not '{FORMAT}')")
    with reading(file):
        header = json.loads(said["adapter"])
        alpha, base, settings = float(header["alpha"]), str(header["base"]), dict(header["settings"])
    for layer in layer_names(tensors):
        _check_pair(tensors.get(f"{layer}.down"), tensors.get(f"{layer}.up"), f"{source}: '{layer}'")
    if len(tensors) != 2 * len(layer_names(tensors)):
        raise UserError(f"{source} is damaged: it holds more than adapters; copy it again")
    return AdapterFile(source, tensors, alpha, base, settings)


def _check_pair(down: LazyTensor | None, up: LazyTensor | None, where: str) -> None:
    if down is None or up is None or len(up.shape) != 2 or down.shape[:1] != up.shape[1:]:
        raise UserError(f"{where} has no down and up of one rank: the file is damaged; copy it again")


def with_adapters(opened: OpenedModel, adapters: Sequence[tuple[AdapterFile, float]]) -> OpenedModel:
    """Return a model in files with adapters, each times a factor, added to its weights when they are read."""
    tensors, notes, unet = dict(opened.tensors), list(opened.notes), opened.config.unet
    for adapter, scale in adapters:
        adapter.check_fit({key: tensor.shape for key, tensor in tensors.items()}, opened.source)
        if scale:
            unet = adapter.adapted_unet(unet)
        for layer in adapter.layers:
            key = f"{layer}.weight"
            tensors[key] = _merged(tensors[key], adapter, layer, scale)
        notes.append(f"{adapter.source} is merged in, times {scale:g}")
    config = replace(opened.config, unet=unet)
    usage = usage_for(config, opened.usage)
    return replace(opened, config=config, tensors=tensors, notes=tuple(notes), usage=usage)


def _merged(weight: LazyTensor, adapter: AdapterFile, layer: str, scale: float) -> LazyTensor:
    def read() -> Tensor:
        down, up = (
            checked(layer, adapter.tensors[f"{layer}.{key}"], torch.float32, adapter.source)
            for key in ("down", "up")
        )
        added = delta(down, up, scale * adapter.alpha / len(down))
        return (weight.read().float() + added).to(weight.dtype)

    return LazyTensor(weight.shape, weight.dtype, read)


def model_state(model: nn.Module) -> Lazies:
    """Return the weights of a model under their own names; adapters are merged in when they are read."""
    adapted = dict(adapted_layers(model))
    beside = tuple(f"{name}.adapters." for name in adapted)
    state = lazies({key: value for key, value in model.state_dict().items() if not key.startswith(beside)})
    for name, layer in adapted.items():
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = LazyTensor(
            weight.shape,
            weight.dtype,
            lambda layer=layer: merged_weight(layer),  # type: ignore[misc]
        )
    return state
