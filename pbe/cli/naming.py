"""``pbe toy naming``: a blind naming test of edits, without exemplars.

``sheets/`` is for the judge, who fills in ``answers.csv`` (a, b, c or d); ``key.csv`` is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbe.cli.arguments import Count, Model, Natural, options
from pbe.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from pbe.editing.pipeline import PaintByExample


@options
class MakeSettings:
    """Options of ``pbe toy naming make``."""

    model: Model | None = None
    """model whose edits are shown"""
    true: bool = False
    """show the true images instead"""
    out: Path
    """new folder for sheets/ and the key"""
    objects: Count = 48
    """number of objects, the first ones"""
    guidance: float = 5.0
    """guidance scale"""
    solver: str | None = None
    """solver of the edits (default plms; lcm for a few-step model)"""
    steps: Count | None = None
    """steps of the solver (default 50; its own for a few-step model)"""
    seed: int = 0
    """seed of benchmark, noise and names"""
    grey: bool = False
    """turn the images grey, so that colour cannot tell"""
    threads: Natural = 0
    """CPU threads; 0 leaves them to PyTorch"""


def make(*, settings: MakeSettings) -> None:
    """Write sheets to name objects on, an answer form and its key.

    pbe toy naming make --model toy --out outputs/naming
    pbe toy naming make --true --out outputs/naming_true

    sheets/ is for the judge, who fills in answers.csv (a, b, c or d); key.csv is not.
    """
    if (settings.model is None) == (not settings.true):
        raise UserError("give --model or --true, and only one of them")
    if settings.out.is_dir() and any(settings.out.iterdir()):
        raise UserError(f"'{settings.out}' is not empty; name a new folder")
    import numpy as np
    import torch

    from pbe.data.toy.scenes import ToyWorld
    from pbe.editing.batch.records import write_image
    from pbe.editing.pipeline import PaintByExample
    from pbe.evaluation.benchmark.toy import EXEMPLAR_SIZE, IMAGE_SIZE, make_benchmark
    from pbe.evaluation.metrics.towers import to_grey
    from pbe.evaluation.study import naming
    from pbe.files import make_folder

    if settings.threads:
        torch.set_num_threads(settings.threads)
    world = ToyWorld()
    pipe = PaintByExample.from_pretrained(settings.model, safety_checker=None) if settings.model else None
    cases = make_benchmark(
        world,
        seed=settings.seed,
        image_size=pipe.model.config.image_size if pipe else IMAGE_SIZE,
        exemplar_size=pipe.model.config.exemplar_encoder.image_size if pipe else EXEMPLAR_SIZE,
        objects=settings.objects,
    )
    if pipe is None:
        images, shown = np.stack([case.image for case in cases]), "true images"
    else:
        images = edit(pipe, cases, settings)
        shown = f"edits of {settings.model}, guidance {settings.guidance:g}"
    if settings.grey:
        images, shown = np.stack([to_grey(image) for image in images]), f"{shown}, grey"
    questions = naming.make_questions(world, cases, settings.seed)
    sheets = make_folder(settings.out / "sheets")  # not before there is something to put into it
    for number, sheet in enumerate(naming.naming_sheets(questions, images), 1):
        write_image(sheets / f"sheet_{number}.png", sheet)
    naming.write_form(sheets / naming.ANSWERS, questions)
    key = settings.out / naming.KEY
    naming.write_key(key, questions, shown)
    print(f"{len(cases)} images: give {sheets} to the judge and keep {key} to yourself")


def edit(pipe: PaintByExample, cases: list[Any], settings: MakeSettings) -> np.ndarray:
    """Edit every case with its own exemplar; return uint8 ``n s s 3``."""
    from tqdm import tqdm

    from pbe.evaluation.benchmark.generation import GenerateSettings
    from pbe.evaluation.benchmark.toy import edit_cases

    pipe.set_progress_bar_config(disable=True)
    chosen = GenerateSettings(
        settings.guidance, settings.solver, settings.steps, settings.seed, batch_size=32
    )
    with tqdm(total=len(cases), unit="edit", desc="edit") as bar:
        return edit_cases(pipe, cases, chosen, progress=bar.update)


@options
class ScoreSettings:
    """Options of ``pbe toy naming score``."""

    key: Path
    """key.csv of the test"""


def score(*answers: Path, settings: ScoreSettings) -> None:
    """Print the share of names that is right.

    pbe toy naming score outputs/naming/sheets/answers.csv --key outputs/naming/key.csv

    Args:
        answers: filled-in answers.csv, one a judge
    """
    if not answers:
        raise UserError("name the filled-in answers.csv (--help lists the options)")
    from pbe.evaluation.study.naming import score_answers

    for path in answers:
        print(f"{path}: {score_answers(path, settings.key)}")
