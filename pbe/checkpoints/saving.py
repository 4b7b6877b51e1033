"""Models to files, in any of the three layouts: complete or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf

from pbe.checkpoints.clip import tower_sizes
from pbe.checkpoints.compvis.config import write_config
from pbe.checkpoints.compvis.format import derived_buffers, original_weights
from pbe.checkpoints.diffusers.config import (
    write_autoencoder,
    write_encoder,
    write_index,
    write_preprocessor,
    write_scheduler,
    write_unet,
)
from pbe.checkpoints.diffusers.names import entries
from pbe.checkpoints.folders import CHECKER
from pbe.checkpoints.layout import PARTS, to_foreign
from pbe.checkpoints.native import CONFIG_NAME, part_of, write_config as write_native_config, write_part
from pbe.checkpoints.tensors import Lazies, lazies
from pbe.checkpoints.usage import KEY, UNSAID, Usage
from pbe.checkpoints.writers import check_target, converted, staged, write_checkpoint, write_safetensors
from pbe.config import ModelConfig
from pbe.errors import UserError
from pbe.models import LatentDiffusion

LAYOUTS = ("native", "compvis", "diffusers")
CHECKPOINT = "model.ckpt"
YAML = "config.yaml"
DIFFUSERS_FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "autoencoder": "vae/diffusion_pytorch_model.safetensors",
    "exemplar_encoder": "image_encoder/model.safetensors",
}
DIFFUSERS_JSON = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "image_encoder/config.json",
    "feature_extractor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
)


def save_checkpoint(
    folder: str | Path,
    model: LatentDiffusion,
    layout: str = "native",
    dtype: torch.dtype | None = None,
    usage: Usage | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a model in one of the layouts; a failure on the way leaves what was there as it was.

    ``native`` is this project's folder, ``compvis`` the original's ``model.ckpt`` with a ``config.yaml``,
    ``diffusers`` the folder of a pipeline, which diffusers' own classes load.

    Args:
        folder: made when missing.
        model: the weights.
        layout: of the files.
        dtype: type of the floating-point weights in the files; None keeps each tensor's own.
        usage: how the model is to be run; None leaves that to the layout's default.
        beside: writes what else belongs into the folder, such as a safety checker, into the one it is given.
    """
    folder = Path(folder)
    check_layout(model.config, layout)
    check_target(folder, layout_files(layout))
    with staged(folder) as staging:
        if beside is not None:
            beside(staging)
        checker = any((place / CHECKER / "config.json").is_file() for place in (staging, folder))
        write_layout(staging, layout, model.config, lazies(model.state_dict()), dtype, usage, checker)


def layout_files(layout: str) -> set[str]:
    """Return the paths that a layout has in its folder."""
    if layout == "compvis":
        return {CHECKPOINT, YAML}
    if layout == "diffusers":
        return {*DIFFUSERS_FILES.values(), *DIFFUSERS_JSON}
    return {CONFIG_NAME, *(f"{part}.safetensors" for part in PARTS)}


def check_layout(config: ModelConfig, layout: str) -> None:
    """Refuse a model that has parts for which a layout has no place."""
    if layout not in LAYOUTS:
        raise UserError(f"no layout '{layout}'; there are: {', '.join(LAYOUTS)}")
    if layout == "native":
        return
    encoder = config.exemplar_encoder
    problems = {
        "an autoencoder with a patch shortcut": config.autoencoder.patch_shortcut,
        "a mask-aware decoder": config.autoencoder.mask_aware_decoder,
        "an autoencoder that folds patches": config.autoencoder.patch != 1,
        "norms over channels": config.unet.norm != "group",
        "modulation by time and condition": config.unet.modulation,
        "a token of the layout": encoder.layout_grid != 0,
        "an exemplar encoder with a mapper narrower or wider than its tower": encoder.mapper_width != 0,
        "a condition of all tokens": encoder.tokens != "class",
        f"the tower '{encoder.tower}'": encoder.tower.startswith("timm/"),
    }
    if layout == "diffusers":
        problems["first levels wider than the first convolution"] = (
            config.unet.channel_mult[0] != 1 or config.autoencoder.channel_mult[0] != 1
        )
    found = [name for name, has in problems.items() if has]
    if found:
        raise UserError(f"the {layout} layout has no place for {' and '.join(found)}; keep the native layout")
    tower_sizes(encoder)


def write_layout(
    folder: Path,
    layout: str,
    config: ModelConfig,
    native: Lazies,
    dtype: torch.dtype | None,
    usage: Usage | None = None,
    checker: bool = False,
) -> None:
    """Write the files of a layout into an existing, empty folder.

    Args:
        folder: where to.
        layout: of the files.
        config: sizes of the model.
        native: every weight under its native name.
        dtype: type of the floating-point weights; None keeps each tensor's own.
        usage: as for :func:`save_checkpoint`.
        checker: whether a safety checker lies beside the networks.
    """
    if layout == "native":
        for part in PARTS:
            write_part(folder / f"{part}.safetensors", *converted(part_of(native, part), dtype))
        write_native_config(folder, config, usage)
    elif layout == "compvis":
        write_original(folder / CHECKPOINT, config, native, dtype)
        write_original_yaml(folder / YAML, config, usage)
    else:
        _write_diffusers_json(folder, config, usage or UNSAID, checker)
        _write_diffusers_weights(folder, config, native, dtype)


def write_original(path: Path, config: ModelConfig, native: Lazies, dtype: torch.dtype | None) -> None:
    """Write one file in the original's layout: safetensors if it is called so, else a checkpoint of torch."""
    weights = original_weights(config, native)
    rest = derived_buffers(config, native)
    stored, read = converted(weights | rest, dtype)
    stored |= rest  # the schedule keeps its precision
    if path.suffix == ".safetensors":
        write_safetensors(path, stored, read, {"format": "pt"})
    else:
        write_checkpoint(path, stored, read, {"global_step": 0, "epoch": 0})


def write_original_yaml(path: Path, config: ModelConfig, usage: Usage | None) -> None:
    """Write the original's YAML and, in a section that its code does not read, how the model is to be run."""
    content = write_config(config)
    if usage is not None and (section := usage.to_json(layout="compvis")):
        content[KEY] = section
    OmegaConf.save(OmegaConf.create(content), path)


def _write_diffusers_json(folder: Path, config: ModelConfig, usage: Usage, checker: bool) -> None:
    scheduler = write_scheduler(config, usage.scheduler_config())
    noted = usage.to_json(layout="diffusers")
    preprocessor = write_preprocessor(config, usage.preprocessor)
    contents = (
        write_index(scheduler, safety_checker=checker, noted=noted),
        write_unet(config),
        write_autoencoder(config),
        write_encoder(config, preprocessor),
        preprocessor,
        scheduler,
    )
    for name, content in zip(DIFFUSERS_JSON, contents, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_diffusers_weights(
    folder: Path, config: ModelConfig, native: Lazies, dtype: torch.dtype | None
) -> None:
    for part, name in DIFFUSERS_FILES.items():
        names = entries(part, config.exemplar_encoder, [key for key in native if key.startswith(f"{part}.")])
        write_safetensors(folder / name, *converted(to_foreign(names, native), dtype), {"format": "pt"})
