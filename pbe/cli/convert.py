"""``pbe convert``: models between layouts and precisions."""

from __future__ import annotations

from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pbe.cli.arguments import Dtype, Place, Repeatable, options
from pbe.editing.settings import parse_adapter
from pbe.errors import UserError
from pbe.resources import find_model

if TYPE_CHECKING:
    from pbe.checkpoints.key_map import OpenedModel


@options
class ConvertSettings:
    """Options of ``pbe convert``."""

    to: Literal["native", "compvis", "diffusers"] = "native"
    """layout of OUT"""
    dtype: Dtype | None = None
    """type of the weights in OUT (default: as in IN)"""
    verify: bool = False
    """compare all tensors and outputs of OUT with IN, and keep OUT only if they agree"""
    raw_weights: bool = False
    """use the plain weights of a training checkpoint, not their moving average"""
    merge: Repeatable = field(default_factory=list)
    """adapter to merge into the weights, FILE or FILE:SCALE; repeatable"""
    share: Place | None = None
    """native model next to OUT: networks equal to its own are referred to, not written again"""
    config: Place | None = None
    """YAML with the sizes of a checkpoint that does not give its own"""
    from_sd: Place | None = None
    """Stable Diffusion v1 (file or folder): make a model to start training from"""
    tower: Place = ""
    """with --from-sd: weights of the image tower (open_clip tag or file)"""
    seed: int = 0
    """with --from-sd: seed of the new weights"""


def convert(*paths: Place, settings: ConvertSettings = ConvertSettings()) -> None:
    """Convert a model between the native layout, the original's and diffusers'.

    pbe convert IN OUT --to diffusers --dtype fp16 --verify
    pbe convert --from-sd SD OUT --tower openai
    pbe convert IN OUT --merge outputs/mug/adapter.safetensors:0.8

    Args:
        paths: IN OUT: model to read (any layout), and what to write.
    """
    if len(paths) != (1 if settings.from_sd else 2):
        raise UserError("name IN and OUT, or with --from-sd OUT alone (--help lists the options)")
    if settings.tower and not settings.from_sd:
        raise UserError("--tower goes with --from-sd only")
    if settings.share and settings.to != "native":
        raise UserError("--share goes with --to native only")
    from pbe.checkpoints import saving
    from pbe.checkpoints.adapters import open_adapter, with_adapters
    from pbe.checkpoints.loading import open_checkpoint
    from pbe.checkpoints.tensors import DTYPES

    target = Path(paths[-1])
    adapters = [parse_adapter(text, "--merge") for text in settings.merge]
    if settings.from_sd:
        opened = _start(settings.from_sd, settings)
    else:
        opened = open_checkpoint(find_model(paths[0]), settings.config, raw_weights=settings.raw_weights)
    opened = with_adapters(opened, [(open_adapter(path), scale) for path, scale in adapters])
    print(saving.table(opened))
    if opened.safety_checker is not None and target.suffix in saving.FILE_SUFFIXES:
        print(f"  note: a single file holds no safety checker; '{opened.safety_checker}' stays behind")
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    share = Path(find_model(settings.share)) if settings.share else None
    saving.convert(opened, target, settings.to, dtype, share=share, verify=settings.verify)
    count = sum(tensor.count for tensor in opened.tensors.values())
    kind = settings.dtype or "they were"
    print(f"{count:,} parameters as {kind} in {target}{', verified' if settings.verify else ''}")


def _start(stable_diffusion: str, settings: ConvertSettings) -> OpenedModel:
    """Open Stable Diffusion's weights as the start of a training."""
    from pbe.checkpoints.warm_start import open_stable_diffusion
    from pbe.config import ModelConfig, load_config

    sizes = load_config(settings.config).model if settings.config else ModelConfig()
    encoder = replace(sizes.exemplar_encoder, pretrained=settings.tower or sizes.exemplar_encoder.pretrained)
    return open_stable_diffusion(
        stable_diffusion,
        replace(sizes, exemplar_encoder=encoder),
        settings.seed,
        raw_weights=settings.raw_weights,
    )
