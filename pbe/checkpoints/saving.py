"""Models to files, in any of the three layouts: complete or not at all; and from one layout to another."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pbe.checkpoints.adapters import model_state
from pbe.checkpoints.clip import tower_sizes
from pbe.checkpoints.compvis.format import write_original
from pbe.checkpoints.diffusers.format import JSON_FILES, WEIGHT_FILES, write_diffusers
from pbe.checkpoints.folders import CHECKER
from pbe.checkpoints.key_map import PARTS, OpenedModel, checked, converted, empty_model, part_of
from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.native import CONFIG_NAME, share_parts, write_native
from pbe.checkpoints.settings import UNSAID, Usage
from pbe.checkpoints.tensors import Lazies, cast
from pbe.config import ModelConfig
from pbe.errors import UserError
from pbe.files import staged
from pbe.models import LatentDiffusion
from pbe.models.int8 import is_quantised

LAYOUTS = ("native", "compvis", "diffusers")
CHECKPOINT, YAML = "model.ckpt", "config.yaml"
FILE_SUFFIXES = (".ckpt", ".pt", ".safetensors")
# Files that are a model's, or would be taken for it, by their ending or name.
MODEL_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".index.json", ".yaml")
MODEL_NAMES = ("config.json", "model_index.json")
TOLERANCE = 1e-4  # relative; tensors are equal to the bit, but where they lie in memory decides on kernels
logger = logging.getLogger(__name__)


def save_checkpoint(
    folder: str | Path,
    model: LatentDiffusion,
    layout: str = "native",
    dtype: torch.dtype | None = None,
    usage: Usage = UNSAID,
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a model in one of the layouts; a failure on the way leaves what was there as it was.

    ``native`` is this project's folder, ``compvis`` the original's ``model.ckpt`` with a ``config.yaml``,
    ``diffusers`` the folder of a pipeline, which diffusers' own classes load.

    Args:
        folder: made when missing; it must not hold another model's files.
        model: the weights; its adapters are merged into those in the files.
        layout: of the files.
        dtype: type of the floating-point weights in the files; None keeps each tensor's own.
        usage: how the model is to be run; what it leaves open is the layout's default.
        beside: writes what else belongs into the folder, such as a safety checker, into the one it is given.
    """
    folder = Path(folder)
    if is_quantised(model):
        raise UserError("weights in 8 bits cannot be saved; load the model without int8, and save that")
    check_layout(model.config, layout)
    _check_target(folder, layout)
    with staged(folder) as staging:
        beside(staging)
        checker = any((place / CHECKER / "config.json").is_file() for place in (staging, folder))
        write_layout(staging, layout, model.config, model_state(model), dtype, usage, checker)


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
        "guidance in one call of few steps": bool(config.unet.guidance_range),
        "a layout pooling in the condition": encoder.layout_grid != 0,
        "an exemplar encoder with a mapper narrower or wider than its tower": encoder.mapper_width != 0,
        "a condition of all tokens": encoder.tokens != "class",
        f"the tower '{encoder.tower}'": encoder.tower.startswith("timm/"),
        "first levels wider than the first convolution": layout == "diffusers"
        and (config.unet.channel_mult[0] != 1 or config.autoencoder.channel_mult[0] != 1),
    }
    found = [name for name, has in problems.items() if has]
    if found:
        raise UserError(f"the {layout} layout has no place for {', '.join(found)}; keep the native layout")
    tower_sizes(encoder)


def _check_target(folder: Path, layout: str) -> None:
    """Refuse to write a model's files between others that would be taken for parts of it."""
    if folder.is_file():
        raise UserError(f"'{folder}' is a file; name a folder to write the model to")
    places = [
        path.relative_to(folder)
        for path in sorted([*folder.glob("*"), *folder.glob("*/*")])
        if path.is_file() and path.parent.name != CHECKER  # a network of its own, not the model's
    ]
    models = [path for path in places if path.name.endswith(MODEL_SUFFIXES) or path.name in MODEL_NAMES]
    others = [str(path) for path in models if str(path) not in layout_files(layout)]
    if others:
        raise UserError(
            f"'{folder}' holds other files of a model ({', '.join(others[:3])}); name an empty folder"
        )


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


def convert(
    opened: OpenedModel,
    target: str | Path,
    layout: str,
    dtype: torch.dtype | None = None,
    *,
    share: Path | None = None,
    verify: bool = False,
) -> None:
    """Write a model in a layout, tensor by tensor, complete or not at all.

    Args:
        opened: the source.
        target: folder, to which a safety checker is copied too; for ``compvis`` also a file ending in
            ``.ckpt``, ``.pt`` or ``.safetensors``, beside which a YAML of the same name is written.
        layout: ``native``, ``compvis`` or ``diffusers``.
        dtype: type of the floating-point weights; None keeps each tensor's own.
        share: native folder whose equal networks are named instead of written again.
        verify: read the files again, compare every tensor, run each network on a random input with the
            source's weights and with the files', and leave nothing behind when they differ.
    """
    target = Path(target)
    check_layout(opened.config, layout)
    config, tensors, checker, usage = opened.config, opened.tensors, opened.safety_checker, opened.usage
    try:
        usage = usage.complete(opened.layout)
    except UserError as error:  # a scheduler that is not known here is passed on as it is
        logger.warning("%s: %s; the solver is not carried over", opened.source, error)
    if share is not None and share.resolve() == target.resolve():
        raise UserError(f"'{target}' cannot share networks with itself; name another folder for the model")
    single = layout == "compvis" and target.suffix in FILE_SUFFIXES
    if single and checker is not None:
        logger.warning("'%s' is a single file: the safety checker is not carried over", target)
    if not single:
        _check_target(target, layout)
    with staged(target.parent if single else target) as staging:
        written = staging / target.name if single else staging
        if single:
            write_original(written, written.with_suffix(".yaml"), config, tensors, dtype, usage)
        else:
            if checker is not None:
                shutil.copytree(checker, staging / CHECKER)
            write_layout(staging, layout, config, tensors, dtype, usage, checker is not None)
        if verify:
            _verify(opened, open_checkpoint(written), dtype)
        if share is not None and not share_parts(staging, share, target):
            raise UserError(f"no network of the model is equal to that in '{share}'; leave --share out")


def _verify(source: OpenedModel, written: OpenedModel, dtype: torch.dtype | None) -> None:
    """Compare the source, rounded to the type of the files, with the files: every tensor, then outputs."""
    for key, tensor in source.tensors.items():
        if not torch.equal(cast(tensor, dtype).read(), written.tensors[key].read()):
            raise UserError(f"the converted model differs from its source in '{key}'; nothing was written")
    for part in PARTS:
        expected, found = _output(source, part, dtype), _output(written, part, None)
        difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not difference <= TOLERANCE:  # NaN is a difference too
            raise UserError(
                f"the {part.replace('_', ' ')} of the converted model differs from its source by "
                f"{difference:.1e} on a random input; nothing was written"
            )


@torch.no_grad()
def _output(opened: OpenedModel, part: str, dtype: torch.dtype | None) -> Tensor:
    """Run one network in float32 on a fixed random input."""
    config, generator = opened.config, torch.Generator().manual_seed(0)
    network = getattr(empty_model(config), part).eval()
    weights = {
        key: checked(key, cast(tensor, dtype), torch.float32, opened.source)
        for key, tensor in part_of(opened.tensors, part).items()
    }
    network.load_state_dict(weights, assign=True)
    if part == "unet":
        side, latents = 2 ** len(config.unet.channel_mult), config.autoencoder.latent_channels
        x = torch.randn(1, 2 * latents + 1, side, side, generator=generator)
        # two tokens, so that queries and keys of the cross-attention count
        context = torch.randn(1, 2, config.unet.context_dim, generator=generator)
        guidance = torch.tensor(config.unet.guidance_range[:1]) if config.unet.guidance_range else None
        return network(x, torch.tensor([500]), context, guidance=guidance)
    if part == "autoencoder":
        side = 2 ** (len(config.autoencoder.channel_mult) + 1)
        mean = network.encode(torch.rand(1, 3, side, side, generator=generator) * 2 - 1).mean
        return torch.cat([mean.flatten(), network.decode(mean).flatten()])
    side = config.exemplar_encoder.image_size
    return network(torch.randn(1, 3, side, side, generator=generator))


def table(opened: OpenedModel) -> str:
    """Return what a model's files hold: tensors, parameters and types of each part, and what is left out."""
    rows = [("part", "tensors", "parameters", "MB", "type")]
    for part in (*PARTS, ""):
        tensors = list(part_of(opened.tensors, part).values() if part else opened.tensors.values())
        kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        count, size = sum(tensor.count for tensor in tensors), sum(tensor.nbytes for tensor in tensors) / 1e6
        named, kind = part.replace("_", " ") or "all", ", ".join(kind for kind, _ in kinds.most_common())
        rows.append((named, f"{len(tensors):,}", f"{count:,}", f"{size:,.1f}", kind))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{opened.source}: {opened.layout}"]
    lines += [
        f"  {row[0]:<{widths[0]}}  {'  '.join(f'{row[i]:>{widths[i]}}' for i in (1, 2, 3))}  {row[4]}"
        for row in rows
    ]
    return "\n".join([*lines, *(f"  note: {note}" for note in opened.notes)])
