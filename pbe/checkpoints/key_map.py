"""Every weight and its names in other layouts; strict checks of a state dict; a lazily opened model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pbe.checkpoints.settings import UNSAID, Usage
from pbe.checkpoints.tensors import (
    Lazies,
    LazyTensor,
    cast,
    fuse_heads,
    lazies,
    lazy,
    reshaped,
    split_heads,
    whole,
)
from pbe.config import ModelConfig, ScheduleConfig, UNetConfig
from pbe.errors import UserError, first_line
from pbe.models import ExemplarEncoder, LatentDiffusion
from pbe.models.int8 import quantise

LARGEST, MOST_LAYERS, MOST_LEVELS = 1 << 20, 256, 32  # of a width, of layers, and of what a list counts
PARTS = ("unet", "autoencoder", "exemplar_encoder")
LISTED = 10  # keys that an error names
# What a tensor of a model may be made of: weights of floating-point numbers, counters of whole ones.
NUMBERS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
WHOLE = ("num_batches_tracked", "position_ids", "_index")  # endings of the names of counters and indices

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


def to_native(
    entries: Iterable[Entry],
    foreign: Lazies,
    expected: Lazies,
    source: str,
    hint: str = "",
    parts: Mapping[str, str] | None = None,
) -> Lazies:
    """Translate a state dict of another layout into this project's, strictly.

    It must have exactly the keys and shapes of the entries; ``expected`` are tensors of the model's shapes
    under their native names, the rest is :func:`check_shapes`'s.
    """
    entries = list(entries)
    check_shapes(foreign, to_foreign(entries, expected), source, hint, parts)
    return {entry.native: entry.to_native(foreign) for entry in entries}


def keys_of(native: Lazies, part: str) -> list[str]:
    """Return the keys of one part."""
    return [key for key in native if key.startswith(f"{part}.")]


def part_of(native: Lazies, part: str) -> Lazies:
    """Return the tensors of one part, whose name is taken off."""
    return {key.removeprefix(f"{part}."): native[key] for key in keys_of(native, part)}


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
        why = first_line(error)
        raise UserError(f"no model can be made of the sizes in its configuration: {why}") from error
    return model


def native_shapes(config: ModelConfig) -> Lazies:
    """Return the model's keys, shapes and types as tensors without numbers, in the model's order."""
    return lazies(empty_model(config).state_dict())


def check_sizes(config: Any, section: str = "model") -> None:
    """Refuse numbers in a section of a configuration that no model has, before they take memory or time."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{section}.{field.name}"
        if dataclasses.is_dataclass(value):
            check_sizes(value, name)
            continue
        values = value if isinstance(value, list) else [value]
        limit = MOST_LAYERS if field.name in ("num_res_blocks", "mapper_layers") else LARGEST
        broken = [each for each in values if isinstance(each, float) and not math.isfinite(each)]
        broken += [each for each in values if isinstance(each, int) and not 0 <= each <= limit]
        if len(values) > MOST_LEVELS or broken:
            raise UserError(f"{name} is {str(value)[:60]}; no model has that")
    if isinstance(config, UNetConfig):
        scales = config.guidance_range
        if scales and (len(scales) != 2 or not 0 <= scales[0] <= scales[1]):
            raise UserError(f"{section}.guidance_range is {scales}; it must be two numbers from 0 up, or []")
    if isinstance(config, ScheduleConfig) and not 0 < config.beta_start <= config.beta_end < 1:
        raise UserError(
            f"{section}: beta_start {config.beta_start} and beta_end {config.beta_end} must lie from 0 to "
            "1, the first no larger"
        )


def check_shapes(
    found: Lazies, expected: Lazies, source: str, hint: str = "", parts: Mapping[str, str] | None = None
) -> None:
    """Refuse missing, unexpected and misshapen keys; the error lists ten of each and counts them.

    ``hint`` says at its end what the file looks like; ``parts`` are names of networks by the prefix of their
    keys, to be told that a whole one is missing.
    """
    absent = {
        prefix: name
        for prefix, name in (parts or {}).items()
        if not any(key.startswith(prefix) for key in found)
    }
    missing = [key for key in sorted(expected.keys() - found.keys()) if not key.startswith(tuple(absent))]
    both = sorted(expected.keys() & found.keys())
    problems = {
        "missing": missing,
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [key for key in both if found[key].shape != expected[key].shape],
    }
    lines = [
        f"no {name} (all {sum(key.startswith(prefix) for key in expected)} tensors of {prefix}*)"
        for prefix, name in absent.items()
    ]
    if absent and not any(problems.values()):
        hint = "Take a file that holds the whole model"
    lines += [
        f"{len(keys)} {kind}: {', '.join(keys[:LISTED])}{', ...' if len(keys) > LISTED else ''}"
        for kind, keys in problems.items()
        if keys
    ]
    if len(problems["misshapen"]) == 1:
        (key,) = problems["misshapen"]
        lines[-1] += f" (has {list(found[key].shape)}, not {list(expected[key].shape)})"
    if lines:
        raise UserError(f"{source} does not fit the model: {'; '.join(lines)}{f'. {hint}' if hint else ''}")


def check_floating(weights: Lazies, source: str) -> None:
    """Refuse weights that are no floating-point numbers."""
    wrong = [key for key, tensor in weights.items() if not tensor.dtype.is_floating_point]
    if wrong:
        kind = str(weights[wrong[0]].dtype).removeprefix("torch.")
        raise UserError(
            f"{source}: {len(wrong)} weights are not floating-point numbers, such as '{wrong[0]}' ({kind}); "
            "quantised files are not supported, take the fp16 one"
        )


def check_finite(key: str, value: torch.Tensor, source: str) -> None:
    """Refuse a tensor with NaN or infinity in it, and one of a kind in which no weights come."""
    if value.dtype not in NUMBERS or value.layout != torch.strided or value.is_meta:
        kind = f"{value.dtype}, {value.layout}, {value.device}".replace("torch.", "")
        raise UserError(
            f"{source}: '{key}' is a tensor of a kind that is not supported ({kind}); take the fp16 file"
        )
    if value.is_floating_point() and value.numel():
        low, high = torch.aminmax(value)  # NaN spreads to both
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise UserError(
                f"{source}: '{key}' holds NaN or infinity: the weights are broken; take another copy"
            )


def checked(key: str, tensor: LazyTensor, dtype: torch.dtype | None, source: str) -> torch.Tensor:
    """Read a tensor as ``dtype`` (None: its own), checking that its numbers are finite and fit."""
    value = tensor.read()
    check_finite(key, value, source)
    result = cast(lazy(value), dtype).read()
    if result.dtype == torch.float16 and value.dtype != torch.float16 and not bool(result.isfinite().all()):
        raise UserError(f"{source}: '{key}' holds numbers too large for half precision; use bf16 or fp32")
    return result


def converted(tensors: Lazies, dtype: torch.dtype | None) -> Lazies:
    """Return tensors as they are to stand in a file, :func:`checked` when read; None keeps their types."""

    def stored(key: str, tensor: LazyTensor) -> LazyTensor:
        kind = cast(tensor, dtype).dtype
        return LazyTensor(tensor.shape, kind, lambda: checked(key, tensor, kind, "the model"))

    return {key: stored(key, tensor) for key, tensor in tensors.items()}


@dataclass(frozen=True)
class OpenedModel:
    """A model in files, recognised and translated, none of whose numbers is read yet.

    Attributes:
        source: the file or folder, for errors.
        layout: ``native``, ``compvis`` or ``diffusers``.
        config: sizes of the model.
        tensors: every weight under its native name, exactly those that the model wants.
        notes: one line for each thing that was left out or assumed.
        usage: what the files say of how the model is to be run.
        safety_checker: the folder of a safety checker inside the model's.
    """

    source: str
    layout: str
    config: ModelConfig
    tensors: Lazies
    notes: tuple[str, ...] = ()
    usage: Usage = UNSAID
    safety_checker: Path | None = None

    def numbers(self) -> Lazies:
        """Return the tensors, counters and indices as whole numbers; all others must be floating-point."""
        check_floating({k: v for k, v in self.tensors.items() if not k.endswith(WHOLE)}, self.source)
        return {key: whole(value) if key.endswith(WHOLE) else value for key, value in self.tensors.items()}

    def read(self, dtype: torch.dtype | None, *, int8: bool = False) -> LatentDiffusion:
        """Read the weights into a model on the CPU, in evaluation mode; ``dtype`` None keeps the file's.

        With ``int8`` the layers of UNet and exemplar encoder keep their weights in 8 bits, as
        :mod:`pbe.models.int8` does it; one after the other, so that never more than one is there in full.
        The autoencoder then works in bands whatever the size of the image.
        """
        model = empty_model(self.config)
        layers: dict[str, Lazies] = {}
        for key, value in self.tensors.items():
            layers.setdefault(key.rpartition(".")[0] if int8 else "", {})[key] = value
        for name, tensors in layers.items():
            layer = model.get_submodule(name)
            state = {key: checked(key, value, dtype, self.source) for key, value in tensors.items()}
            own = {key.removeprefix(f"{name}."): value for key, value in state.items()}
            layer.load_state_dict(own, assign=True, strict=not int8)
            if int8 and not name.startswith("autoencoder."):
                quantise(layer)
        if int8:
            model.tile_above = 0  # what is asked for is the least memory
        return model.eval().requires_grad_(False)
