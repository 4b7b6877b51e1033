"""``pbe toy``: scenes of the toy world, the model that ships, and quick scores of models."""

from __future__ import annotations

import csv
import time
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pbe.cli.arguments import Count, Dtype, Model, Natural, limits, options
from pbe.errors import UserError
from pbe.files import make_folder
from pbe.resources import packaged

if TYPE_CHECKING:
    from pbe.data.toy.scenes import SceneConfig

RECOLOUR = 0.3


@options
class RenderSettings:
    """Options of ``pbe toy render``."""

    out: Path
    """folder for the shards"""
    scenes: Count
    """number of scenes"""
    split: Literal["train", "test"] = "train"
    """objects and panoramas to use; the two splits share none"""
    seed: int = 0
    """seed of objects, panoramas and poses"""
    size: Annotated[int, limits(32, 1024)] = 96
    """short side of a scene in pixels"""
    max_long_side: int | None = None
    """largest long side in pixels (default: 1.5 times --size)"""
    max_objects: Annotated[int, limits(1, 3)] = 3
    """largest number of objects in a scene"""
    recolour: Annotated[float | None, limits(0, 1)] = None
    """share of training objects that are recoloured (default: 0.3)"""
    scenes_per_shard: Count = 2000
    """largest number of scenes per shard"""
    workers: Natural = 2
    """number of processes; 0: none beside this one"""
    world: Path = field(default_factory=lambda: packaged("data/toy/toy_world.zip"))
    """archive of the toy world's objects and panoramas"""


def render(*, settings: RenderSettings) -> None:
    """Render scenes of the toy world and pack them into WebDataset shards.

    pbe toy render --out outputs/toy/train --scenes 20000 --split train --seed 0
    """
    from tqdm import tqdm

    from pbe.data.shards.archive import write_shards
    from pbe.data.toy.render import render_records
    from pbe.data.toy.scenes import ToyWorld

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
    from pbe.data.toy.scenes import SceneConfig

    long_side = settings.size * 3 // 2 if settings.max_long_side is None else settings.max_long_side
    if not settings.size <= long_side <= 3 * settings.size:
        raise UserError("--max-long-side must lie between --size and three times --size")
    if settings.recolour is not None and settings.split != "train":
        raise UserError("--recolour is for the training split only; leave it out")
    recolour = RECOLOUR if settings.recolour is None else settings.recolour
    return SceneConfig(
        short_side=settings.size,
        max_long_side=long_side,
        max_objects=settings.max_objects,
        recolour=recolour,
    )


SHARDS = Path("outputs/toy/shards")
# Several objects a scene for the autoencoder, one large one for the UNet.
SCENES = (
    RenderSettings(out=SHARDS / "train", scenes=100_000),
    RenderSettings(out=SHARDS / "single", scenes=120_000, seed=2, max_objects=1),
    RenderSettings(out=SHARDS / "validation", split="test", scenes=256, seed=1),
    RenderSettings(out=SHARDS / "validation_single", split="test", scenes=256, seed=3, max_objects=1),
)


@options
class TrainToySettings:
    """Options of ``pbe toy train``."""

    out: Path = Path("outputs/toy/model")
    """folder for the finished model"""
    score_every: Count = 1000
    """steps between scores in the log"""


def train(*overrides: str, settings: TrainToySettings = TrainToySettings()) -> int:
    """Make the model that ships: scenes, autoencoder, diffusion model, half-precision export.

    pbe toy train
    pbe toy train trainer.max_steps=20000

    It takes hours. If it is stopped, the same command skips what is finished and resumes the training.
    Everything is in outputs/toy of the current folder.

    Args:
        overrides: key=value, for the training of the diffusion model
    """
    import torch

    from pbe.checkpoints.loading import open_checkpoint
    from pbe.checkpoints.saving import convert
    from pbe.config import load_config
    from pbe.evaluation.benchmark.toy_run import ScoreCallback
    from pbe.training.run import train as run

    diffusion = load_config("toy", list(overrides))
    for rendering in SCENES:
        mark = rendering.out.with_suffix(".done")
        if not mark.is_file():
            render(settings=rendering)
            mark.touch()
    for config, scored in ((load_config("toy_autoencoder"), False), (diffusion, True)):
        result = run(config, [ScoreCallback(settings.score_every)] if scored else [])
        if result.stopped_by:
            print(f"stopped at step {result.steps} of {result.output_dir}; the same command resumes")
            return 128 + result.stopped_by
    convert(open_checkpoint(result.model_dir), settings.out, "native", torch.float16)
    print(f"the toy model is in {settings.out}")
    return 0


@options
class ScoreSettings:
    """Options of ``pbe toy score``."""

    objects: Annotated[int, limits(2)] = 90
    """number of objects of the toy benchmark, the first ones"""
    split: Literal["train", "test"] = "test"
    """objects to edit; those of train show how much better the model knows what it has seen"""
    guidance: float = 5.0
    """guidance scale"""
    steps: Count | None = None
    """steps of the solver (default 20, or what a few-step model is meant for)"""
    solver: str | None = None
    """solver (default ddim; lcm for a few-step model)"""
    dtype: Dtype = "bf16"
    """type of the weights"""
    device: str = "cpu"
    """device for the edits"""
    threads: Natural = 0
    """CPU threads; 0 leaves them to PyTorch"""
    csv: Path | None = None
    """file to append a line per model to"""


def score(*models: Model, settings: ScoreSettings = ScoreSettings()) -> None:
    """Score models of the toy world quickly, in about a minute each; one line per model.

    pbe toy score toy
    pbe toy score outputs/toy/diffusion/model --csv outputs/toy/scores.csv

    Args:
        models: models in any layout, of one size
    """
    if not models:
        raise UserError("name a model (--help lists the options)")
    import torch

    from pbe.editing.pipeline import PaintByExample
    from pbe.evaluation.benchmark.toy_run import QuickScorer, QuickSettings, quick_values

    if settings.threads:
        torch.set_num_threads(settings.threads)
    quick = QuickSettings(
        settings.guidance,
        settings.solver,
        settings.steps,
        dtype=settings.dtype,
        objects=settings.objects,
        split=settings.split,
    )
    scorer: QuickScorer | None = None
    for path in models:
        model = PaintByExample.from_pretrained(path, device=settings.device, safety_checker=None).model
        scorer = scorer or QuickScorer(model.config, quick)
        started = time.perf_counter()
        row = scorer.score(model)
        seconds = time.perf_counter() - started
        found = {name: f"{value:.4f}" for name, value in quick_values(row).items()}
        print(f"{path}: {' '.join(f'{k} {v}' for k, v in found.items())} ({seconds:.0f} s)", flush=True)
        if settings.csv:
            add_row(settings.csv, {"model": path, **found, "seconds": f"{seconds:.1f}"})


def add_row(path: Path, row: dict[str, str]) -> None:
    """Add a line to a CSV file; a new file gets the names of the columns first."""
    make_folder(path.parent)
    try:
        with path.open("a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            head = next(csv.reader(file), None)
            if head is not None and head != list(row):
                raise UserError(f"'{path}' has other columns than {', '.join(row)}; name another file")
            writer = csv.DictWriter(file, list(row))
            if head is None:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{path}' is not a table to add to ({error}); name another file") from error
