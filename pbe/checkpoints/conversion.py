"""From one layout to another: what was found, as a table; the conversion; and the proof that it is right."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from pbe.checkpoints.compvis.format import write_original
from pbe.checkpoints.folders import CHECKER
from pbe.checkpoints.key_map import PARTS, OpenedModel, checked, empty_model, part_of
from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.saving import check_layout, layout_files, write_layout
from pbe.checkpoints.tensors import cast
from pbe.checkpoints.usage import Usage
from pbe.checkpoints.writers import check_target
from pbe.config import ModelConfig
from pbe.errors import UserError
from pbe.files import staged
from pbe.models import LatentDiffusion

FILE_SUFFIXES = (".ckpt", ".pt", ".safetensors")
logger = logging.getLogger(__name__)
TOLERANCE = 1e-4  # relative; tensors are equal to the bit, but where they lie in memory decides on kernels


def table(opened: OpenedModel) -> str:
    """Return what a model's files hold: tensors, parameters and types of each part, and what is left out."""
    rows = [("part", "tensors", "parameters", "MB", "type")]
    for part in (*PARTS, ""):
        tensors = list(part_of(opened.tensors, part).values() if part else opened.tensors.values())
        kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        rows.append(
            (
                part.replace("_", " ") or "all",
                f"{len(tensors):,}",
                f"{sum(tensor.count for tensor in tensors):,}",
                f"{sum(tensor.nbytes for tensor in tensors) / 1e6:,.1f}",
                ", ".join(kind for kind, _ in kinds.most_common()),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{opened.source}: {opened.layout}"]
    lines += [
        f"  {row[0]:<{widths[0]}}  {'  '.join(f'{row[i]:>{widths[i]}}' for i in (1, 2, 3))}  {row[4]}"
        for row in rows
    ]
    return "\n".join([*lines, *(f"  note: {note}" for note in opened.notes)])


def convert(
    opened: OpenedModel,
    target: str | Path,
    layout: str,
    dtype: torch.dtype | None = None,
    *,
    verify: bool = False,
) -> None:
    """Write a model in a layout, tensor by tensor, complete or not at all.

    Args:
        opened: the source.
        target: folder, to which a safety checker is copied too; for ``compvis`` also a file ending in
            ``.ckpt``, ``.pt`` or ``.safetensors``, beside which a YAML of the same name is written.
        layout: ``native``, ``compvis`` or ``diffusers``.
        dtype: type of the floating-point weights; None keeps each tensor's own.
        verify: read the files again, compare every tensor, run each network on a random input with the
            source's weights and with the files', and leave nothing behind when they differ.
    """
    target = Path(target)
    check_layout(opened.config, layout)
    usage, checker = _usage(opened), opened.safety_checker
    single = layout == "compvis" and target.suffix in FILE_SUFFIXES
    if single and checker is not None:
        logger.warning("'%s' is a single file: the safety checker is not carried over", target)
    if not single:
        check_target(target, layout_files(layout))
    with staged(target.parent if single else target) as staging:
        if single:
            file = staging / target.name
            write_original(file, file.with_suffix(".yaml"), opened.config, opened.tensors, dtype, usage)
        else:
            if checker is not None:
                shutil.copytree(checker, staging / CHECKER)
            write_layout(staging, layout, opened.config, opened.tensors, dtype, usage, checker is not None)
        if verify:
            _verify(opened, open_checkpoint(file if single else staging), dtype)


def _usage(opened: OpenedModel) -> Usage:
    """Return how the source runs the model; a scheduler that is not known here is passed on as it is."""
    try:
        return opened.usage.complete(opened.layout)
    except UserError as error:
        logger.warning("%s: %s; the solver is not carried over", opened.source, error)
        return opened.usage


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
    model = empty_model(opened.config)
    network = getattr(model, part)
    weights = {
        key: checked(key, cast(tensor, dtype), torch.float32, opened.source)
        for key, tensor in part_of(opened.tensors, part).items()
    }
    network.load_state_dict(weights, assign=True)
    network.eval()
    generator = torch.Generator().manual_seed(0)
    return _run(model, part, opened.config, generator)


def _run(model: LatentDiffusion, part: str, config: ModelConfig, generator: torch.Generator) -> Tensor:
    latents, autoencoder = config.autoencoder.latent_channels, model.autoencoder
    if part == "unet":
        side = 2 ** len(config.unet.channel_mult)
        x = torch.randn(1, 2 * latents + 1, side, side, generator=generator)
        # two tokens, so that queries and keys of the cross-attention count
        context = torch.randn(1, 2, config.unet.context_dim, generator=generator)
        return model.unet(x, torch.tensor([500]), context)
    if part == "autoencoder":
        side = 2 ** (len(config.autoencoder.channel_mult) + 1)
        mean = autoencoder.encode(torch.rand(1, 3, side, side, generator=generator) * 2 - 1).mean
        return torch.cat([mean.flatten(), autoencoder.decode(mean).flatten()])
    side = config.exemplar_encoder.image_size
    return model.exemplar_encoder(torch.randn(1, 3, side, side, generator=generator))
