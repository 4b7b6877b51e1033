"""The start of a training: UNet and autoencoder of Stable Diffusion v1, with room for masked image and mask.

As the original does, the UNet's first convolution is widened from the noisy latents to those, the masked
image's latents and the mask, with zeros, so that the untrained model computes what Stable Diffusion's UNet
computes for the same context.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pbe.checkpoints.compvis.format import clean
from pbe.checkpoints.compvis.names import AUTOENCODER, CONDITION, UNET, entries as compvis_entries
from pbe.checkpoints.diffusers.format import find_parts, named, read_autoencoder, read_schedule, read_unet
from pbe.checkpoints.diffusers.names import current_names, entries as diffusers_entries
from pbe.checkpoints.folders import open_folder
from pbe.checkpoints.key_map import Entry, OpenedModel, keys_of, native_shapes, to_native
from pbe.checkpoints.recognise import choose, describe, sort_out, text_to_image
from pbe.checkpoints.settings import Settings, read_json, reading
from pbe.checkpoints.tensors import Lazies, LazyTensor, lazies
from pbe.checkpoints.tower_weights import load_tower_weights
from pbe.checkpoints.weight_files import open_weights
from pbe.config import ModelConfig
from pbe.errors import UserError
from pbe.models import ExemplarEncoder

INPUT = "unet.conv_in.weight"
TAKEN = ("unet", "autoencoder")


def open_stable_diffusion(
    path: str | Path, config: ModelConfig, seed: int = 0, *, raw_weights: bool = False
) -> OpenedModel:
    """Open a Stable Diffusion v1 model as the start of a training.

    Args:
        path: checkpoint file, or folder in diffusers' layout.
        config: the exemplar encoder to begin with and, for a checkpoint, the sizes of the rest; a folder
            gives its own. ``exemplar_encoder.pretrained`` names the tower's weights; empty leaves the tower
            as random as what is behind it.
        seed: of the exemplar encoder's fresh weights.
        raw_weights: take a checkpoint's plain weights where it has averaged ones.
    """
    path = Path(path)
    if path.is_dir() and (parts := find_parts(path)):
        config, tensors, notes = _from_folder(path, parts, config)
    else:
        config, tensors, notes = _from_checkpoint(path, config, raw_weights)
    width = native_shapes(config)[INPUT].shape[1]
    notes.append(f"first convolution widened from {tensors[INPUT].shape[1]} to {width} channels, with zeros")
    tensors[INPUT] = _widened(tensors[INPUT], width)
    encoder, note = _fresh_encoder(config, seed)
    return OpenedModel(str(path), "stable diffusion", config, tensors | encoder, (*notes, note))


def _from_folder(
    path: Path, parts: dict[str, Path], config: ModelConfig
) -> tuple[ModelConfig, Lazies, list[str]]:
    if missing := [part for part in TAKEN if part not in parts]:
        raise UserError(f"'{path}' is not a Stable Diffusion model: it has no {' and no '.join(missing)}")
    unet, autoencoder = (
        Settings(read_json(file), str(file)) for file in (parts[part] / "config.json" for part in TAKEN)
    )
    scheduler = named(path, "scheduler_config.json")
    with reading(path):
        config = replace(config, unet=read_unet(unet), autoencoder=read_autoencoder(autoencoder))
        if scheduler is not None:
            schedule, prediction = read_schedule(Settings(scheduler, str(path / "scheduler")))
            config = replace(config, schedule=schedule, prediction=prediction)
    native = native_shapes(config)
    tensors: Lazies = {}
    for part in TAKEN:
        found = current_names(part, open_folder(parts[part]).tensors)
        names = diffusers_entries(part, config.exemplar_encoder, keys_of(native, part))
        tensors |= _checked(names, native, found, found, str(parts[part]))
    notes = ["text encoder: left out"] if "text_encoder" in parts else []
    return config, tensors, notes


def _from_checkpoint(
    path: Path, config: ModelConfig, raw_weights: bool
) -> tuple[ModelConfig, Lazies, list[str]]:
    if not path.exists():
        raise UserError(f"--from-sd '{path}' does not exist")
    weights = open_weights(path) if path.is_file() else open_folder(path)
    found, notes = clean(sort_out(weights))
    text = [key for key in found.plain if key.startswith(CONDITION)]
    native = native_shapes(config)
    names = compvis_entries(config, [key for part in TAKEN for key in keys_of(native, part)])
    expected = [key for entry in names for key in entry.foreign]
    chosen, said = choose(found, expected, weights.source, raw_weights=raw_weights)
    kept = {key: value for key, value in chosen.items() if key.startswith((UNET, AUTOENCODER))}
    tensors = _checked(names, native, kept, weights.tensors, weights.source)
    notes = [*said, *weights.notes, *notes]
    return config, tensors, [*notes, *([f"{len(text)} tensors of the text encoder"] if text else [])]


def _checked(names: list[Entry], native: Lazies, found: Lazies, whole: Lazies, source: str) -> Lazies:
    """Translate, strictly but for the number of input channels, which has to be that of the latents."""
    latents = native["unet.conv_out.bias"].shape[0]
    first, wide, *kernel = native[INPUT].shape
    narrow = LazyTensor((first, latents, *kernel), native[INPUT].dtype, native[INPUT].read)
    name = next((entry.foreign[0] for entry in names if entry.native == INPUT), "")
    given = found[name].shape if name in found else ()
    if len(given) == 4 and given[1] == wide:
        raise UserError(f"{source}: --from-sd wants a text-to-image model. {text_to_image(given[1])}")
    return to_native(names, found, native | {INPUT: narrow}, source, describe(whole))


def _widened(weight: LazyTensor, channels: int) -> LazyTensor:
    """Append zeros for the channels of the masked image and the mask, which stand behind the latents."""
    first, latents, *kernel = weight.shape

    def read() -> Tensor:
        value = weight.read()
        return torch.cat([value, value.new_zeros(first, channels - latents, *kernel)], dim=1)

    return LazyTensor((first, channels, *kernel), weight.dtype, read)


def _fresh_encoder(config: ModelConfig, seed: int) -> tuple[Lazies, str]:
    """Return an exemplar encoder to begin with, and what to say of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ExemplarEncoder(config.exemplar_encoder, config.unet.context_dim)
    said = "its tower too: name the tower's weights with --tower"
    if config.exemplar_encoder.pretrained:
        said = f"its tower is {load_tower_weights(encoder.tower, config.exemplar_encoder)}"
    state = {f"exemplar_encoder.{key}": value for key, value in lazies(encoder.state_dict()).items()}
    return state, f"exemplar encoder: fresh (seed {seed}); {said}"
