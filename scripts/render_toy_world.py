"""Render scenes of the toy world and pack them into WebDataset shards.

python scripts/render_toy_world.py --out outputs/toy/train --scenes 20000 --split train --seed 0
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
from tqdm import tqdm

from pbe.cli import Parser, run_command
from pbe.data.randomness import generator
from pbe.data.shards import ShardRecord, write_shards
from pbe.data.toy_world import DEFAULT_WORLD, SPLITS, SceneConfig, ToyWorld, render_scene
from pbe.errors import UserError
from pbe.files import make_folder

JPEG_QUALITY = 95


class SceneRenderer:
    """Renders scene ``i`` as a pure function of (seed, split, i); one a process.

    Args:
        world: path of the toy world's archive.
        split: ``train`` or ``test``.
        seed: of all scenes.
        config: sizes and limits.
    """

    def __init__(self, world: Path, split: str, seed: int, config: SceneConfig) -> None:
        self.world = ToyWorld(world)
        self.split, self.seed, self.config = split, seed, config

    def record(self, index: int) -> ShardRecord:
        """Return scene ``index`` as a JPEG with its boxes."""
        scene = render_scene(self.world, self.split, generator(self.seed, self.split, index), self.config)
        picture = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
        _, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        height, width = scene.image.shape[:2]
        key = f"{self.split}-{index:07d}"
        return ShardRecord(key, encoded.tobytes(), "jpg", width, height, scene.boxes, scene.labels)


_renderer: SceneRenderer | None = None


def _start(*arguments: object) -> None:
    global _renderer
    cv2.setNumThreads(1)
    _renderer = SceneRenderer(*arguments)  # type: ignore[arg-type]


def _render(index: int) -> ShardRecord:
    assert _renderer is not None
    return _renderer.record(index)


def render_records(
    world: Path, split: str, seed: int, scenes: int, config: SceneConfig, workers: int
) -> Iterator[ShardRecord]:
    """Yield scenes 0 .. ``scenes`` - 1 in order, rendered by ``workers`` processes (0: in this one)."""
    arguments = (world, split, seed, config)
    if workers == 0:
        _start(*arguments)
        yield from map(_render, range(scenes))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=_start, initargs=arguments) as pool:
        yield from pool.imap(_render, range(scenes), chunksize=32)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--scenes", type=int, required=True, help="number of scenes")
    parser.add_argument(
        "--split", default="train", help="train or test: they share no object and no panorama"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--size", type=int, default=96, help="short side of a scene, pixels (default %(default)s)"
    )
    parser.add_argument("--max-long-side", type=int, help="longest long side (default: 1.5 times --size)")
    parser.add_argument(
        "--max-objects", type=int, default=3, help="one to this many objects (default %(default)s)"
    )
    parser.add_argument("--recolour", type=float, default=0.3, help="share of recoloured training objects")
    parser.add_argument("--scenes-per-shard", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2, help="processes; 0 renders in this one")
    parser.add_argument("--world", type=Path, default=DEFAULT_WORLD, help="archive of objects and panoramas")
    return parser.parse_args(arguments)


def scene_config(options: argparse.Namespace) -> SceneConfig:
    """Check the options and return what scenes look like.

    Raises:
        UserError: for a value that makes no sense.
    """
    if options.split not in SPLITS:
        raise UserError(f"--split is '{options.split}'; it must be one of {', '.join(SPLITS)}")
    if min(options.scenes, options.scenes_per_shard) < 1:
        raise UserError("--scenes and --scenes-per-shard must be at least 1")
    if options.workers < 0:
        raise UserError("--workers must be 0 or more")
    if not 32 <= options.size <= 1024:
        raise UserError("--size must lie in 32 to 1024 pixels")
    long_side = options.max_long_side or options.size * 3 // 2
    if not options.size <= long_side <= 3 * options.size:
        raise UserError("--max-long-side must lie between --size and three times --size")
    if not 1 <= options.max_objects <= 3:
        raise UserError("--max-objects must be 1, 2 or 3")
    if not 0.0 <= options.recolour <= 1.0:
        raise UserError("--recolour is a share from 0 to 1")
    return SceneConfig(
        short_side=options.size,
        max_long_side=long_side,
        max_objects=options.max_objects,
        recolour=options.recolour,
    )


def run(options: argparse.Namespace) -> None:
    """Render and pack; prints where the shards are."""
    config = scene_config(options)
    ToyWorld(options.world)  # a missing archive is reported here, not by a worker
    make_folder(options.out)
    records = render_records(
        options.world, options.split, options.seed, options.scenes, config, options.workers
    )
    progress = tqdm(records, total=options.scenes, unit="scene", desc=f"render {options.split}")
    paths = write_shards(progress, options.out, max_count=options.scenes_per_shard)
    print(f"{options.scenes} scenes in {len(paths)} shards: {options.out}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
