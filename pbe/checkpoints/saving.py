"""Models to files, in any of the three layouts: complete or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pbe.checkpoints.adapters import model_state
from pbe.checkpoints.clip import tower_sizes
from pbe.checkpoints.compvis.format import write_original
from pbe.checkpoints.diffusers.format import JSON_FILES, WEIGHT_FILES, write_diffusers
from pbe.checkpoints.folders import CHECKER
from pbe.checkpoints.key_map import PARTS, converted
from pbe.checkpoints.native import CONFIG_NAME, write_native
from pbe.checkpoints.tensors import Lazies
from pbe.checkpoints.usage import UNSAID, Usage
from pbe.checkpoints.writers import check_target
from pbe.config import ModelConfig
from pbe.errors import UserError
from pbe.files import staged
from pbe.models import LatentDiffusion

LAYOUTS = ("native", "compvis", "diffusers")
CHECKPOINT, YAML = "model.ckpt", "config.yaml"


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
        folder: made when missing; it must not hold another model's files.
        model: the weights; its adapters are merged into those in the files.
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
        state = model_state(model)
        write_layout(staging, layout, model.config, state, dtype, usage or UNSAID, checker)


def layout_files(layout: str) -> set[str]:
    """Return the paths that a layout has in its folder."""
    if layout == "compvis":
        return {CHECKPOINT, YAML}
    if layout == "diffusers":
        return {*WEIGHT_FILES.values(), *JSON_FILES}
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
    usage: Usage,
    checker: bool = False,
) -> None:
    """Write the files of a layout into an existing, empty folder, given all weights by native name."""
    if layout == "native":
        write_native(folder, config, converted(native, dtype), usage)
    elif layout == "compvis":
        write_original(folder / CHECKPOINT, folder / YAML, config, native, dtype, usage)
    else:
        write_diffusers(folder, config, native, dtype, usage, checker)
