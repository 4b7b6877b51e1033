"""``pbe toy train``: make the model that ships."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pbe.cli.arguments import SETTINGS
from pbe.cli.toy import RECOLOUR
from pbe.errors import UserError

SHARDS = Path("outputs/toy/shards")
WORKERS = 2
# Folder, split, scenes, seed, objects a scene: several for the autoencoder, one large one for the UNet.
SCENES = (
    ("train", "train", 100_000, 0, 3),
    ("single", "train", 120_000, 2, 1),
    ("validation", "test", 256, 1, 3),
    ("validation_single", "test", 256, 3, 1),
)


@SETTINGS
@dataclass(frozen=True, kw_only=True)
class TrainToySettings:
    """Options of ``pbe toy train``."""

    out: Path = Path("data/toy/model")
    """folder of the finished model"""
    score_every: int = 1000
    """steps between scores in its log"""


def train(*overrides: str, settings: TrainToySettings = TrainToySettings()) -> int:
    """Make the model that ships: scenes, autoencoder, diffusion model, half-precision export.

    pbe toy train
    pbe toy train trainer.max_steps=20000

    Every stage can be stopped and started again with the same command, on another day too: what is finished
    is passed over, a training resumes where it was. All of it lies in outputs/toy of the current folder.

    Args:
        overrides: key=value, for the training of the diffusion model
    """
    if settings.score_every < 1:
        raise UserError("--score-every must be at least 1 (--help lists the options)")
    import torch

    from pbe.checkpoints.loading import open_checkpoint
    from pbe.checkpoints.saving import convert
    from pbe.config import load_config
    from pbe.evaluation.benchmark.toy_run import ScoreCallback
    from pbe.training.run import train as run

    diffusion = load_config("toy", list(overrides))
    for name, split, scenes, seed, objects in SCENES:
        render(SHARDS / name, split, scenes, seed, objects)
    for config, scored in ((load_config("toy_autoencoder"), False), (diffusion, True)):
        result = run(config, [ScoreCallback(settings.score_every)] if scored else [])
        if result.stopped_by:
            print(f"stopped at step {result.steps} of {result.output_dir}; the same command resumes")
            return 128 + result.stopped_by
    convert(open_checkpoint(result.model_dir), settings.out, "native", torch.float16)
    print(f"the toy model is in {settings.out}")
    return 0


def render(folder: Path, split: str, scenes: int, seed: int, objects: int) -> None:
    """Render the scenes of a folder that is not finished; its mark is made last."""
    from tqdm import tqdm

    from pbe.data.shards.archive import write_shards
    from pbe.data.toy.render import render_records
    from pbe.data.toy.scenes import DEFAULT_WORLD, SceneConfig
    from pbe.files import make_folder

    mark = folder.with_suffix(".done")
    if mark.is_file():
        return
    config = SceneConfig(max_objects=objects, recolour=RECOLOUR)
    records = render_records(DEFAULT_WORLD, split, seed, scenes, config, WORKERS)
    write_shards(tqdm(records, total=scenes, unit="scene", desc=f"render {folder.name}"), make_folder(folder))
    mark.touch()
