"""One entry for every weight: its native name, its names in another layout, and how the numbers go over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from pbe.checkpoints.tensors import Lazies, LazyTensor, fuse_heads, lazies, reshaped, split_heads
from pbe.config import ModelConfig
from pbe.models import ExemplarEncoder, LatentDiffusion

PARTS = ("unet", "autoencoder", "exemplar_encoder")

# The same numbers; a 1x1 convolution that is a linear layer there; one fused projection that is three there.
Kind = Literal["same", "linear", "fused"]


@dataclass(frozen=True)
class Entry:
    """A weight of this project's model and what it is called elsewhere.

    Attributes:
        native: its key here, with the part in front (``unet.conv_in.weight``).
        foreign: its key there; three keys for ``fused``.
        kind: how the numbers differ.
        heads: for ``fused``, attention heads by which the rows interleave.
    """

    native: str
    foreign: tuple[str, ...]
    kind: Kind = "same"
    heads: int = 1

    def to_foreign(self, tensor: LazyTensor) -> Lazies:
        """Return the tensors of the other layout."""
        if self.kind == "fused":
            return dict(zip(self.foreign, split_heads(tensor, self.heads), strict=True))
        return {self.foreign[0]: reshaped(tensor, tensor.shape[:2]) if self.kind == "linear" else tensor}

    def to_native(self, source: Lazies) -> LazyTensor:
        """Return the tensor of this project's layout."""
        if self.kind == "fused":
            return fuse_heads([source[key] for key in self.foreign], self.heads)
        tensor = source[self.foreign[0]]
        return reshaped(tensor, (*tensor.shape, 1, 1)) if self.kind == "linear" else tensor


def to_foreign(entries: Iterable[Entry], native: Lazies) -> Lazies:
    """Translate a whole state dict of this project into another layout."""
    return {key: value for entry in entries for key, value in entry.to_foreign(native[entry.native]).items()}


def to_native(entries: Iterable[Entry], foreign: Lazies) -> Lazies:
    """Translate a whole state dict of another layout, which has every key, into this project's."""
    return {entry.native: entry.to_native(foreign) for entry in entries}


def empty_model(config: ModelConfig) -> LatentDiffusion:
    """Build the model without memory for its weights, on the meta device."""
    with torch.device("meta"):
        model = LatentDiffusion(config)
    if dict(model.named_buffers()).keys() - model.state_dict().keys():
        # such a tower computes buffers that no file holds (position tables), so it has to be built for real
        model.exemplar_encoder = ExemplarEncoder(config.exemplar_encoder, config.unet.context_dim)
    return model


def native_shapes(config: ModelConfig) -> Lazies:
    """Return the model's keys, shapes and types as tensors without numbers, in the model's order."""
    return lazies(empty_model(config).state_dict())
