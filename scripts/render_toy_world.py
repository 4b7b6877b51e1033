"""Render scenes of the toy world and pack them into WebDataset shards.

python scripts/render_toy_world.py --out outputs/toy/train --scenes 20000 --split train --seed 0
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from pbe.cli.parser import Parser, run_command
from pbe.data.shards.archive import write_shards
from pbe.data.toy.render import render_records
from pbe.data.toy.scenes import DEFAULT_WORLD, SPLITS, SceneConfig, ToyWorld
from pbe.errors import UserError
from pbe.files import make_folder

RECOLOUR = 0.3


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
    parser.add_argument("--recolour", type=float, help=f"share of recoloured training objects ({RECOLOUR})")
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
    long_side = options.size * 3 // 2 if options.max_long_side is None else options.max_long_side
    if not options.size <= long_side <= 3 * options.size:
        raise UserError("--max-long-side must lie between --size and three times --size")
    if not 1 <= options.max_objects <= 3:
        raise UserError("--max-objects must be 1, 2 or 3")
    if options.recolour is not None and options.split != "train":
        raise UserError("--recolour is for the training split only; leave it out")
    recolour = RECOLOUR if options.recolour is None else options.recolour
    if not 0.0 <= recolour <= 1.0:
        raise UserError("--recolour is a share from 0 to 1")
    return SceneConfig(
        short_side=options.size,
        max_long_side=long_side,
        max_objects=options.max_objects,
        recolour=recolour,
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
