"""What the rows of an ablation are measured with: the benchmarks, and the scores of one row and seed.

Those stages that no command of the project does: ``python -m pbe.cli.ablate KIND FOLDER``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from omegaconf import OmegaConf

from pbe.data.toy.scenes import ToyWorld
from pbe.editing.batch.runner import pick_device
from pbe.errors import UserError
from pbe.evaluation.ablation.config import EvaluationConfig
from pbe.evaluation.ablation.stages import SETTINGS_FILE, fingerprint_of, write_json
from pbe.evaluation.benchmark.build import write_own_exemplars
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.benchmark.edits import EditFolder
from pbe.evaluation.benchmark.toy import export_toy_benchmark
from pbe.evaluation.metrics.base import Case, Score, ScoreCard, case_score
from pbe.evaluation.metrics.bootstrap import Bootstrap
from pbe.evaluation.metrics.copy_paste import LAYOUT_TRUE_CARD, layout_true
from pbe.evaluation.metrics.feature_scores import load_mixture
from pbe.evaluation.metrics.scoring import ScoreSettings, score
from pbe.evaluation.metrics.sets import ImageFolder
from pbe.evaluation.metrics.towers import LITE_TOWER, TOWERS, load_tower, region
from pbe.files import sha256_of

BENCHMARK, OWN_BENCHMARK, SCORES = "benchmark", "own benchmark", "scores"  # kinds of stages
CASES, SCORES_FILE = "cases", "scores.json"
FROM_OUTSIDE = ("tower_weights", "mixture", "reference")  # keys of what scores need
EXEMPLAR_AUC = "toy-exemplar-auc"
POSE = ("layout-true-own", "pose-gap")
BATCH = 64


def exemplar_auc(cases: Sequence[Case], edits: Sequence[np.ndarray], bootstrap: Bootstrap) -> Score:
    """Score each case by the chance that its own exemplar is nearer to its region than another one's.

    The mean over cases is the area under the curve of own against shuffled exemplars, 0.5 being chance. It
    asks whether the exemplar decided what was painted, whatever the pose, and needs no further edits. There
    must be two cases or more.
    """
    tower = load_tower("lite2", None, None)
    regions, exemplars = [], []
    for start in range(0, len(cases), BATCH):
        places = range(start, min(start + BATCH, len(cases)))
        batch = [cases[place] for place in places]
        shown = [region(edits[place], case.mask) for place, case in zip(places, batch, strict=True)]
        regions.append(tower.squashed(shown))
        exemplars.append(tower.squashed([case.exemplar for case in batch]))
    values = own_share(np.concatenate(regions), np.concatenate(exemplars))
    card = ScoreCard(
        feature_model=LITE_TOWER,
        weights_sha256=tower.sha256,
        resize_filter="bilinear to 128 x 128",
        crop_rule="bounding box of the mask's pixels above 127, whole; exemplars whole",
        notes="share of other cases' exemplars that the region resembles less than its own; ties half",
    )
    return case_score(EXEMPLAR_AUC, "toy", "higher", values, card, bootstrap)


def own_share(regions: np.ndarray, exemplars: np.ndarray) -> np.ndarray:
    """Return the share of other exemplars that each region resembles less than its own, ``(n,)`` in [0, 1].

    Of the features ``(n, d)`` of the painted regions and of their exemplars.
    """
    a, b = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (regions, exemplars))
    similarity = a.astype(np.float64) @ b.T.astype(np.float64)
    own = np.diagonal(similarity)[:, None]
    wins = (own > similarity) + 0.5 * (own == similarity)
    np.fill_diagonal(wins, 0.0)
    return wins.sum(axis=1) / (len(wins) - 1)


def pose_scores(
    cases: Sequence[Case], edits: Sequence[np.ndarray], own: Sequence[np.ndarray], bootstrap: Bootstrap
) -> list[Score]:
    """Score the edits ``own``, made from own exemplars, and what the benchmark's exemplars lose against them.

    Both edits of a case have the same image, mask and noise; only the exemplar differs. How near they
    come to the real image is measured by the layout of colours (``layout-true``). A model that copies
    does well with the object itself and loses where it stands in another pose; one that knows what the
    object is, and no more, does equally well with both. Returns ``layout-true-own`` and ``pose-gap``, the
    paired difference.
    """
    values = np.empty((len(cases), 2))
    for place in range(len(cases)):
        case = cases[place]
        values[place] = [layout_true(case.image, edit[place], case.mask) for edit in (edits, own)]
    own_card = replace(LAYOUT_TRUE_CARD, notes=f"{LAYOUT_TRUE_CARD.notes}; exemplars cut from it")
    gap_card = replace(
        LAYOUT_TRUE_CARD, notes="layout-true from own exemplars, less that from the benchmark's"
    )
    return [
        case_score(POSE[0], "clean", "higher", values[:, 1], own_card, bootstrap),
        case_score(POSE[1], "clean", "lower", values[:, 1] - values[:, 0], gap_card, bootstrap),
    ]


def identities(options: EvaluationConfig) -> dict[str, Any]:
    """Return hashes of the files that scores need, or the tag of a tower; nothing where none is given."""
    ScoreSettings(weights=options.tower_weights)
    found: dict[str, Any] = {}
    for role, text in options.tower_weights.items():
        tag = role == "clip" and text in open_clip.list_pretrained_tags_by_model(TOWERS[role].architecture)
        if not (tag or Path(text).is_file()):
            raise UserError(f"'evaluation.tower_weights' gives '{text}' for {role}; there is no such file")
        weights = found.setdefault("tower_weights", {})
        weights[role] = sha256_of(text) if Path(text).is_file() else text
    if options.mixture:
        load_mixture(Path(options.mixture))
        found["mixture"] = sha256_of(options.mixture)
    if options.reference:
        paths = ImageFolder(Path(options.reference)).paths
        found["reference"] = fingerprint_of([(path.name, sha256_of(path)) for path in paths])
    return found


def read_edits(folder: Path, cases: BenchmarkFolder) -> EditFolder:
    """Return the edits of all cases of a benchmark, each read when it is asked for."""
    edits = EditFolder(folder, cases)
    if edits.missing:
        raise UserError(f"'{folder}' lacks edits; delete '{folder.parent}', and the same command edits again")
    return edits


def score_edits(settings: dict[str, Any], folder: Path) -> None:
    """Score the edits that the settings of a stage name, and write ``scores.json`` into its folder."""
    cases = BenchmarkFolder(settings["benchmark"])
    edits: Any = read_edits(Path(settings["edits"]), cases)
    bootstrap = Bootstrap(level=settings["level"], resamples=settings["resamples"])
    weights, mixture, reference = (settings.get(name) for name in FROM_OUTSIDE)
    how = ScoreSettings(
        metrics=tuple(settings["metrics"]),
        bootstrap=bootstrap,
        weights=weights or {},
        mixture=Path(mixture) if mixture else None,
        device=str(pick_device("auto")) if weights else "cpu",
    )
    scores = score(cases, edits, how, Path(reference) if reference else None, why_absent=edits.why_not)
    if settings["exemplar_auc"]:
        scores.append(exemplar_auc(cases, edits, bootstrap))
    if settings["own_edits"]:
        own: Any = read_edits(Path(settings["own_edits"]), cases)
        scores += pose_scores(cases, edits, own, bootstrap)
    write_json(folder / SCORES_FILE, [one.to_dict() for one in scores])


def read_scores(folder: Path) -> dict[str, Score]:
    """Read what :func:`score_edits` wrote, by name of the score."""
    try:
        return {one["name"]: Score.from_dict(one) for one in json.loads((folder / SCORES_FILE).read_text())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{folder / SCORES_FILE}' is missing or damaged; delete the folder '{folder}', and the same "
            "command scores once more"
        ) from error


def make(kind: str, folder: Path) -> None:
    """Do the work of a stage, from the start where an earlier process was stopped."""
    settings: Any = OmegaConf.to_container(OmegaConf.load(folder / SETTINGS_FILE))
    shutil.rmtree(folder / CASES, ignore_errors=True)
    if kind == SCORES:
        score_edits(settings, folder)
    elif kind == BENCHMARK:
        export_toy_benchmark(ToyWorld(), folder / CASES, **settings)
    else:
        write_own_exemplars(Path(settings["benchmark"]), folder / CASES, settings["exemplar_size"])
