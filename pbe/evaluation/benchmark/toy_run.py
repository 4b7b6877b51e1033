"""Scores of the toy benchmark's edits, made with the right and with a shuffled exemplar.

Models in training are scored quickly, in about a minute: few objects, few steps, one guidance scale.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl

from pbe.checkpoints.tensors import DTYPES
from pbe.checkpoints.tower_weights import lite_weights
from pbe.config import ModelConfig
from pbe.data.toy.scenes import ToyWorld
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.generation import GenerateSettings
from pbe.evaluation.benchmark.toy import ToyEdits, edit_cases, make_benchmark
from pbe.evaluation.metrics.base import Case
from pbe.evaluation.metrics.bootstrap import (
    CHOICE,
    LEVEL,
    RESAMPLES,
    Estimate,
    auc_interval,
    cosine,
    derangement,
    first_of,
    mean_interval,
    win_rate,
)
from pbe.evaluation.metrics.towers import LITE_FILTER, LITE_TOWER, Tower, load_tower, region, to_grey
from pbe.evaluation.report import Table
from pbe.models import LatentDiffusion
from pbe.training.resume.callback import ends_step
from pbe.training.tasks.diffusion import DiffusionTask

FEATURE_BATCH = 64
LOGGED = ("auc", "grey_auc", "first_of_20", "grey_first_of_20", "similarity")  # of a training run
Features = list[np.ndarray]  # two: of images in colour, and of the same turned grey


@dataclass(frozen=True)
class Row:
    """Scores of one kind of edit; ``grey`` ones are of images turned grey, which leaves them shape alone.

    Attributes:
        auc: positives are painted regions against their exemplars, negatives the same regions painted
            with a shuffled exemplar against the exemplar that was not shown.
        grey_auc: the same in grey.
        first_of_20: share of painted regions that resemble their own exemplar more than 19 others, of other
            objects; None below 20 objects.
        grey_first_of_20: the same in grey.
        win_rate: share of scenes where the positive beats the negative of its own scene.
        similarity: mean cosine of the painted regions with their exemplars.
        shuffled: mean cosine of the negatives.
        gain: mean paired difference of similarity to the first guidance scale; None for that scale itself
            and for the ceilings.
    """

    auc: Estimate
    grey_auc: Estimate
    first_of_20: Estimate | None
    grey_first_of_20: Estimate | None
    win_rate: Estimate
    similarity: Estimate
    shuffled: Estimate
    gain: Estimate | None = None

    def cells(self) -> list[str]:
        """Return the scores as a table shows them."""
        return ["–" if value is None else str(value) for value in vars(self).values()]


class Scorer:
    """Turns sets of edits of the same cases into rows; the exemplars' features are made once.

    ``seed`` is that of the bootstrap.
    """

    def __init__(self, cases: Sequence[Case], tower: Tower, seed: int = 0) -> None:
        self.tower, self.seed = tower, seed
        self.masks = np.stack([case.mask for case in cases])
        self.exemplars = self._features([case.exemplar for case in cases])
        self._order = np.argsort([case.id for case in cases])  # that of the benchmark's folder

    def _features(self, images: Sequence[np.ndarray]) -> Features:
        found = []
        for shown in (images, [to_grey(image) for image in images]):
            batches = [shown[i : i + FEATURE_BATCH] for i in range(0, len(shown), FEATURE_BATCH)]
            found.append(np.concatenate([self.tower.squashed(batch) for batch in batches]))
        return found

    def regions(self, images: np.ndarray) -> Features:
        """Return the features of the masked regions of images, uint8 ``n s s 3``, in colour and in grey."""
        return self._features([region(image, mask) for image, mask in zip(images, self.masks, strict=True)])

    def similarity(self, regions: Features, partner: np.ndarray | None = None) -> Features:
        """Return the cosines ``(n,)`` of regions with their exemplars, or with their partners'."""
        pairs = zip(regions, self.exemplars, strict=True)
        return [cosine(painted, shown if partner is None else shown[partner]) for painted, shown in pairs]

    def row(self, regions: Features, negative: Features, base: np.ndarray | None = None) -> Row:
        """Score the features of what was painted with the cases' own exemplars.

        ``negative`` are the similarities ``(n,)`` of the negatives, ``base`` those in colour that the gain is
        over.
        """
        positive, seed = self.similarity(regions), self.seed
        auc, grey_auc = (auc_interval(*pair, seed=seed) for pair in zip(positive, negative, strict=True))
        first, grey_first = (self._first(*pair) for pair in zip(regions, self.exemplars, strict=True))
        return Row(
            auc,
            grey_auc,
            first,
            grey_first,
            win_rate=win_rate(positive[0], negative[0], seed=seed),
            similarity=mean_interval(positive[0], seed=seed),
            shuffled=mean_interval(negative[0], seed=seed),
            gain=None if base is None else mean_interval(positive[0] - base, seed=seed),
        )

    def _first(self, regions: np.ndarray, exemplars: np.ndarray) -> Estimate | None:
        if len(regions) < CHOICE:
            return None
        return mean_interval(first_of(regions[self._order], exemplars[self._order]), seed=self.seed)


@dataclass(frozen=True)
class ToyScores:
    """All scores of a model on the benchmark.

    Attributes:
        guidance: a row for each guidance scale, in the order in which they were edited.
        ceiling: the scene's true object against its own exemplar, and against the shuffled one.
        decoded: the same of the true object once encoded and decoded: the autoencoder's own ceiling.
        decoded_psnr: of those whole images, mean over them, dB.
        card: what the features are made with.
        objects: number of cases.
        cases_sha256: of all images, masks and exemplars of the benchmark.
        outside: largest difference of a pixel outside the mask, 0 to 255.
    """

    guidance: dict[float, Row]
    ceiling: Row
    decoded: Row
    decoded_psnr: float
    card: dict[str, Any]
    objects: int
    cases_sha256: str
    outside: int

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        how = {"method": "percentile bootstrap over objects", "level": LEVEL, "resamples": RESAMPLES}
        return {
            "objects": self.objects,
            "cases_sha256": self.cases_sha256,
            "features": self.card,
            "intervals": how,
            "guidance": [{"guidance_scale": scale, **asdict(row)} for scale, row in self.guidance.items()],
            "ceiling": asdict(self.ceiling),
            "autoencoder_ceiling": asdict(self.decoded) | {"psnr": self.decoded_psnr},
            "largest_change_outside_mask": self.outside,
        }

    def table(self) -> Table:
        """Return the table of scores; intervals in brackets."""
        head = ["edit", "AUC", "AUC, grey", f"first of {CHOICE}", f"first of {CHOICE}, grey", "pairs won"]
        head += ["similarity", "if shuffled", f"gain over guidance {next(iter(self.guidance)):g}"]
        rows = [[f"guidance {scale:g}", *row.cells()] for scale, row in self.guidance.items()]
        rows.append(["autoencoder alone (its ceiling)", *self.decoded.cells()])
        rows.append(["true object (ceiling)", *self.ceiling.cells()])
        note = (
            f"{self.objects} objects; {self.card['tower']} features at {self.card['input_size']} px; in "
            f"brackets {LEVEL:.0%} bootstrap intervals over objects. Autoencoder alone: the true images "
            f"encoded and decoded, {self.decoded_psnr:.1f} dB. Largest change outside the mask: "
            f"{self.outside} of 255."
        )
        return Table(head, rows, note)


def score_edits(cases: Sequence[Case], edits: ToyEdits, tower: Tower, *, seed: int = 0) -> ToyScores:
    """Score edits of the benchmark with the tower ``lite2``; ``seed`` is that of the bootstrap."""
    images, scorer = np.stack([case.image for case in cases]), Scorer(cases, tower, seed)
    rows: dict[float, Row] = {}
    base: np.ndarray | None = None
    for scale, edited in edits.own.items():
        painted = scorer.regions(edited)
        rows[scale] = scorer.row(painted, scorer.similarity(scorer.regions(edits.shuffled[scale])), base)
        base = scorer.similarity(painted)[0] if base is None else base
    # The true objects; their negatives are the same against their partners' exemplars.
    true = [scorer.regions(each) for each in (images, edits.decoded)]
    ceiling, decoded = (scorer.row(each, scorer.similarity(each, edits.partner)) for each in true)
    every = (*edits.own.values(), *edits.shuffled.values())
    outside = max(changed_outside(images, scorer.masks, edited) for edited in every)
    card = {
        "tower": LITE_TOWER,
        "weights": lite_weights(LITE_TOWER).name,
        "sha256": tower.sha256,
        "width": scorer.exemplars[0].shape[1],
        "input_size": tower.spec.size,
        "resize_filter": LITE_FILTER,
        "crop_rule": "bounding box of the mask, both axes stretched to the square; exemplars whole",
    }
    loss = mean_psnr(images, edits.decoded)
    return ToyScores(rows, ceiling, decoded, loss, card, len(cases), cases_hash(cases), outside)


def mean_psnr(images: np.ndarray, decoded: np.ndarray) -> float:
    """Return the mean over images of the peak signal-to-noise ratio, dB, each uint8 ``n h w 3``."""
    error = (images.astype(np.float64) - decoded.astype(np.float64)) ** 2
    return float(np.mean(10.0 * np.log10(255.0**2 / error.mean(axis=(1, 2, 3)).clip(1e-6))))


def changed_outside(images: np.ndarray, masks: np.ndarray, edited: np.ndarray) -> int:
    """Return the largest difference of two sets of images (uint8 ``n h w 3``) outside the masks."""
    difference = np.abs(images.astype(np.int16) - edited.astype(np.int16))
    return int(np.max(difference * (masks <= 127)[..., None]))


def cases_hash(cases: Sequence[Case]) -> str:
    """Return the SHA-256 of all images, masks and exemplars, which names the benchmark."""
    digest = hashlib.sha256()
    for case in cases:
        for array in (case.image, case.mask, case.exemplar):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class QuickSettings(GenerateSettings):
    """How a model is scored quickly, on the first so many ``objects`` of the toy benchmark.

    On a CPU batches of more than 32 gain nothing, and bfloat16 halves the time where the CPU knows it.
    """

    USUAL: ClassVar[tuple[str, int]] = ("ddim", 20)

    batch_size: int = 32
    dtype: str = "bf16"
    objects: int = 90
    split: str = "test"


class QuickScorer:
    """Scores one model after another on the same cases, which are made once, as their features are.

    Nothing is drawn from PyTorch's global generators: a run that is scored on its way draws what it would
    have drawn without. The models share the config's sizes of images and exemplars.
    """

    def __init__(
        self, config: ModelConfig, settings: QuickSettings | None = None, world: ToyWorld | None = None
    ) -> None:
        self.settings = settings = settings or QuickSettings()
        self.sizes = image_size, exemplar_size = edit_sizes(config)
        self.partner = derangement(settings.objects, settings.seed, "partner")
        self.cases = make_benchmark(
            world or ToyWorld(),
            seed=settings.seed,
            image_size=image_size,
            exemplar_size=exemplar_size,
            objects=settings.objects,
            split=settings.split,
        )
        self.scorer = Scorer(self.cases, load_tower("lite2", None, None), settings.seed)

    def score(self, model: LatentDiffusion) -> Row:
        """Edit the cases with a model and score the edits.

        The model may be on any device, in any type and mode, and is left as it is.
        """
        if edit_sizes(model.config) != self.sizes:
            raise UserError(
                f"images and exemplars of {edit_sizes(model.config)} px, not {self.sizes} as the cases have: "
                "score models of different sizes by calls of their own"
            )
        pipe = PaintByExample(copy.deepcopy(model).to(dtype=DTYPES[self.settings.dtype]).eval())
        pipe.set_progress_bar_config(disable=True)
        others = [self.cases[place].exemplar for place in self.partner]
        own, shuffled = (
            self.scorer.regions(edit_cases(pipe, self.cases, self.settings, shown))
            for shown in (None, others)
        )
        return self.scorer.row(own, self.scorer.similarity(shuffled))


def edit_sizes(config: ModelConfig) -> tuple[int, int]:
    """Return the sides of a model's images and exemplars, pixels."""
    return config.image_size, config.exemplar_encoder.image_size


def quick_values(row: Row) -> dict[str, float]:
    """Return what a training run logs of a row: AUC and first-of-20, each also in grey, and similarity."""
    found = {name: getattr(row, name) for name in LOGGED}
    return {name: estimate.value for name, estimate in found.items() if estimate is not None}


class ScoreCallback(pl.Callback):
    """Scores the averaged weights of a training of the toy model on its way; rows ``toy/...`` of its log.

    ``every`` is the number of optimizer steps between scores.
    """

    def __init__(self, every: int, settings: QuickSettings | None = None) -> None:
        self.every, self.settings = every, settings
        self.scorer: QuickScorer | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Score after every so many optimizer steps, on the first process."""
        if (
            not ends_step(trainer, batch_idx)
            or trainer.global_step % self.every
            or not trainer.is_global_zero
        ):
            return
        assert isinstance(pl_module, DiffusionTask)
        self.scorer = self.scorer or QuickScorer(pl_module.config.model, self.settings)
        with pl_module.averaged_weights():
            row = self.scorer.score(pl_module.model)
        values = {f"toy/{name}": value for name, value in quick_values(row).items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
