"""``pbe toy score``: score models of the toy world quickly."""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from pathlib import Path

from pbe.cli.arguments import SETTINGS, Dtype, Model
from pbe.errors import UserError
from pbe.files import make_folder


@SETTINGS
@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Options of ``pbe toy score``."""

    objects: int = 90
    """the first so many of the toy benchmark"""
    guidance: float = 5.0
    """guidance scale"""
    steps: int = 20
    """of the solver"""
    solver: str = "ddim"
    """see docs/solvers.md"""
    dtype: Dtype = "bf16"
    """of the weights while edits are made"""
    device: str = "cpu"
    """where edits are made"""
    threads: int = 0
    """CPU threads; 0 leaves them to PyTorch"""
    csv: Path | None = None
    """file that a line a model is added to"""


def score(*models: Model, settings: ScoreSettings = ScoreSettings()) -> None:
    """Score models of the toy world quickly, in about a minute each, as while they train; one line a model.

    pbe toy score toy
    pbe toy score outputs/toy/diffusion/model --csv outputs/toy/scores.csv

    Args:
        models: models in any layout, of one size
    """
    if not models:
        raise UserError("name a model (--help lists the options)")
    if settings.threads < 0 or settings.objects < 2:
        raise UserError("--threads must be 0 or more, --objects at least 2")
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
