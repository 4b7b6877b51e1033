"""One entry for every weight: its native name, its names in another layout, and how the numbers go over."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pbe.checkpoints.tensors import Lazies, LazyTensor, fuse_heads, lazies, reshaped, split_heads
from pbe.config import ModelConfig, ScheduleConfig
from pbe.errors import UserError
from pbe.models import ExemplarEncoder, LatentDiffusion

LARGEST, MOST_LAYERS, MOST_LEVELS = 1 << 20, 256, 32  # of a width, of layers, and of what a list counts
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
    check_sizes(config)
    try:
        with torch.device("meta"):
            model = LatentDiffusion(config)
        if dict(model.named_buffers()).keys() - model.state_dict().keys():
            # such a tower computes buffers that no file holds (position tables): it has to be built for real
            model.exemplar_encoder = ExemplarEncoder(config.exemplar_encoder, config.unet.context_dim)
    except UserError:
        raise
    except Exception as error:  # torch and timm raise all kinds for sizes that do not go together
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"no model can be made of the sizes in its configuration: {why}") from error
    return model


def check_sizes(config: Any, section: str = "model") -> None:
    """Refuse numbers that no model has, before they take memory or time.

    Args:
        config: the section of a configuration.
        section: its name, for errors.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{section}.{field.name}"
        if dataclasses.is_dataclass(value):
            check_sizes(value, name)
            continue
        values = value if isinstance(value, list) else [value]
        limit = MOST_LAYERS if field.name in ("num_res_blocks", "mapper_layers") else LARGEST
        if len(values) > MOST_LEVELS or not all(_usable(each, limit) for each in values):
            raise UserError(f"{name} is {str(value)[:60]}; no model has that")
    if isinstance(config, ScheduleConfig) and not 0 < config.beta_start <= config.beta_end < 1:
        raise UserError(
            f"{section}: beta_start {config.beta_start} and beta_end {config.beta_end} must lie from 0 to "
            "1, the first no larger"
        )


def _usable(value: Any, limit: int) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or 0 <= value <= limit


def native_shapes(config: ModelConfig) -> Lazies:
    """Return the model's keys, shapes and types as tensors without numbers, in the model's order."""
    return lazies(empty_model(config).state_dict())
