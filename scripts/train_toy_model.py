"""Make the model that ships in data/toy/model: scenes, autoencoder, diffusion model, half-precision export.

Every stage can be stopped and started again with the same command, on another day too: what is finished is
passed over, a training goes on where it was.

python scripts/train_toy_model.py
python scripts/train_toy_model.py trainer.max_steps=20000    # changes the training of the diffusion model
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import torch
from tqdm import tqdm

from pbe.checkpoints.conversion import convert
from pbe.checkpoints.loading import open_checkpoint
from pbe.cli.parser import Parser, run_command
from pbe.config import Config, load_config
from pbe.data.shards.archive import write_shards
from pbe.data.toy.render import render_records
from pbe.data.toy.scenes import DEFAULT_WORLD, SceneConfig
from pbe.errors import UserError
from pbe.evaluation.benchmark.quick import ScoreCallback
from pbe.files import make_folder
from pbe.training.run import train

ROOT = Path(__file__).resolve().parents[1]
SHARDS = Path("outputs/toy/shards")
RECOLOUR, WORKERS = 0.3, 2
# Folder, split, scenes, seed, objects a scene: several for the autoencoder, one large one for the UNet.
SCENES = (
    ("train", "train", 100_000, 0, 3),
    ("single", "train", 120_000, 2, 1),
    ("validation", "test", 256, 1, 3),
    ("validation_single", "test", 256, 3, 1),
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for the diffusion model's training"
    )
    parser.add_argument("--out", type=Path, default=Path("data/toy/model"), help="(default %(default)s)")
    parser.add_argument(
        "--score-every", type=int, default=1000, help="steps between scores in its log (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.score_every < 1:
        parser.error("--score-every must be at least 1")
    return options


def render(folder: Path, split: str, scenes: int, seed: int, objects: int) -> None:
    """Render the scenes of a folder that is not finished; its mark is made last."""
    mark = folder.with_suffix(".done")
    if mark.is_file():
        return
    config = SceneConfig(max_objects=objects, recolour=RECOLOUR)
    records = render_records(DEFAULT_WORLD, split, seed, scenes, config, WORKERS)
    write_shards(tqdm(records, total=scenes, unit="scene", desc=f"render {folder.name}"), make_folder(folder))
    mark.touch()


def run_stage(config: Config, score_every: int = 0) -> Path:
    """Train a stage to its end and return the folder of its model.

    Raises:
        SystemExit: a signal ended it; the same command goes on.
    """
    result = train(config, [ScoreCallback(score_every)] if score_every else [])
    if result.stopped_by:
        print(f"stopped at step {result.steps} of {result.output_dir}; the same command goes on")
        raise SystemExit(128 + result.stopped_by)
    return result.model_dir


def run(options: argparse.Namespace) -> None:
    """Run all stages.

    Raises:
        UserError: started elsewhere than in the project's folder, or a stage cannot be run.
    """
    if Path.cwd() != ROOT:
        raise UserError(f"the toy model's files are named from the project's folder: cd {ROOT}")
    diffusion = load_config("configs/toy.yaml", options.overrides)
    for name, split, scenes, seed, objects in SCENES:
        render(SHARDS / name, split, scenes, seed, objects)
    run_stage(load_config("configs/toy_autoencoder.yaml"))
    model = run_stage(diffusion, options.score_every)
    convert(open_checkpoint(model), options.out, "native", torch.float16)
    print(f"the toy model is in {options.out}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
