"""``pbe toy render``: scenes of the toy world, packed into shards."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING

from pbe.cli.arguments import options
from pbe.errors import UserError
from pbe.resources import packaged

if TYPE_CHECKING:
    from pbe.data.toy.scenes import SceneConfig

RECOLOUR = 0.3


@options
class RenderSettings:
    """Options of ``pbe toy render``."""

    out: Path
    """folder for the shards"""
    scenes: int
    """number of scenes"""
    split: str = "train"
    """train or test: they share no object and no panorama"""
    seed: int = 0
    """of objects, panoramas and poses"""
    size: int = 96
    """short side of a scene, pixels"""
    max_long_side: int | None = None
    """longest long side, pixels (default: 1.5 times --size)"""
    max_objects: int = 3
    """one to this many objects"""
    recolour: float | None = None
    """share of recoloured training objects (default: 0.3)"""
    scenes_per_shard: int = 2000
    """most scenes a shard"""
    workers: int = 2
    """processes; 0 renders in this one"""
    world: Path = field(default_factory=lambda: packaged("data/toy/toy_world.zip"))
    """archive of objects and panoramas"""


def render(*, settings: RenderSettings) -> None:
    """Render scenes of the toy world and pack them into WebDataset shards.

    pbe toy render --out outputs/toy/train --scenes 20000 --split train --seed 0
    """
    from tqdm import tqdm

    from pbe.data.shards.archive import write_shards
    from pbe.data.toy.render import render_records
    from pbe.data.toy.scenes import ToyWorld
    from pbe.files import make_folder

    config = scene_config(settings)
    ToyWorld(settings.world)  # a missing archive is reported here, not by a worker
    make_folder(settings.out)
    records = render_records(
        settings.world, settings.split, settings.seed, settings.scenes, config, settings.workers
    )
    progress = tqdm(records, total=settings.scenes, unit="scene", desc=f"render {settings.split}")
    paths = write_shards(progress, settings.out, max_count=settings.scenes_per_shard)
    print(f"{settings.scenes} scenes in {len(paths)} shards: {settings.out}")


def scene_config(settings: RenderSettings) -> SceneConfig:
    """Check the options and return what scenes look like."""
    from pbe.data.toy.scenes import SPLITS, SceneConfig

    if settings.split not in SPLITS:
        raise UserError(f"--split is '{settings.split}'; it must be one of {', '.join(SPLITS)}")
    if min(settings.scenes, settings.scenes_per_shard) < 1:
        raise UserError("--scenes and --scenes-per-shard must be at least 1")
    if settings.workers < 0:
        raise UserError("--workers must be 0 or more")
    if not 32 <= settings.size <= 1024:
        raise UserError("--size must lie in 32 to 1024 pixels")
    long_side = settings.size * 3 // 2 if settings.max_long_side is None else settings.max_long_side
    if not settings.size <= long_side <= 3 * settings.size:
        raise UserError("--max-long-side must lie between --size and three times --size")
    if not 1 <= settings.max_objects <= 3:
        raise UserError("--max-objects must be 1, 2 or 3")
    if settings.recolour is not None and settings.split != "train":
        raise UserError("--recolour is for the training split only; leave it out")
    recolour = RECOLOUR if settings.recolour is None else settings.recolour
    if not 0.0 <= recolour <= 1.0:
        raise UserError("--recolour is a share from 0 to 1")
    return SceneConfig(
        short_side=settings.size,
        max_long_side=long_side,
        max_objects=settings.max_objects,
        recolour=recolour,
    )
