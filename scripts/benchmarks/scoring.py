"""How long scoring takes: a benchmark of the toy world at any size, with finished edits of it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pbe.data.toy.scenes import ToyWorld
from pbe.evaluation.benchmark.coco_ee import (
    ID_LIST,
    PARTS,
    BenchmarkFolder,
    case_id,
    case_paths,
)
from pbe.evaluation.benchmark.edits import EditFolder
from pbe.evaluation.benchmark.toy import make_case
from pbe.evaluation.metrics.scoring import ScoreSettings, score
from pbe.files import make_folder

EXEMPLAR = 224
DISTINCT = 100  # cases that are rendered; further ones are links to their files


@dataclass(frozen=True)
class ScoringTimes:
    """Wall times in seconds of reading all files, and of scoring, which reads them too."""

    cases: int
    read: float
    score: float
    ran: tuple[str, ...]


def synthetic_edits(folder: Path, count: int, size: int) -> tuple[Path, Path]:
    """Write a benchmark and edits of it: scenes of the toy world, the mask filled from its border.

    Args:
        folder: made when missing.
        count: of cases.
        size: sides of the images, pixels.

    Returns:
        The folders of the benchmark and of the edits.
    """
    world, cases, edits = ToyWorld(), folder / "cases", make_folder(folder / "edits")
    for name, _ in PARTS:
        make_folder(cases / name)
    for number in range(min(count, DISTINCT)):
        case = make_case(world, number, 0, size, EXEMPLAR)
        edit = cv2.inpaint(case.image, (case.mask > 127).astype(np.uint8), 3, cv2.INPAINT_TELEA)
        for path, picture in zip(
            _files(cases, edits, number), (case.image, case.mask, case.exemplar, edit), strict=True
        ):
            cv2.imwrite(str(path), picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    for number in range(DISTINCT, count):
        pairs = zip(_files(cases, edits, number % DISTINCT), _files(cases, edits, number), strict=True)
        for source, target in pairs:
            os.link(source, target)
    with (cases / ID_LIST).open("wb") as file:
        np.save(file, np.arange(count, dtype=np.int64), allow_pickle=False)
    return cases, edits


def _files(cases: Path, edits: Path, number: int) -> list[Path]:
    return [*case_paths(cases, number), edits / f"{case_id(number)}.png"]


def measure_scoring(cases: Path, edits: Path) -> ScoringTimes:
    """Time the scores of finished edits, all that run without weights from elsewhere, and bare reading."""
    benchmark = BenchmarkFolder(cases)
    folder = EditFolder(edits, benchmark)
    started = time.perf_counter()
    for place in range(len(benchmark)):
        _ = benchmark[place], folder[place]
    read = time.perf_counter()
    scores = score(benchmark, folder, ScoreSettings())
    ended = time.perf_counter()
    ran = tuple(one.name for one in scores if one.run)
    return ScoringTimes(len(benchmark), read - started, ended - read, ran)
