"""Scores of a model in about a minute, for models in training: few objects, few steps, one guidance scale."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from pbe.checkpoints.tensors import DTYPES
from pbe.config import ModelConfig
from pbe.data.toy.scenes import ToyWorld
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.generation import GenerateSettings
from pbe.evaluation.benchmark.toy import make_benchmark
from pbe.evaluation.benchmark.toy_run import Row, Scorer, edit_cases
from pbe.evaluation.metrics.bootstrap import derangement
from pbe.evaluation.metrics.towers import load_tower
from pbe.models import LatentDiffusion
from pbe.training.resume.callback import ends_step
from pbe.training.tasks.diffusion import DiffusionTask

LOGGED = ("auc", "grey_auc", "first_of_20", "grey_first_of_20", "similarity")


@dataclass(frozen=True)
class QuickSettings(GenerateSettings):
    """How a model is scored quickly, on the first so many ``objects`` of the toy benchmark.

    On a CPU batches of more than 32 gain nothing, and bfloat16 halves the time where the CPU knows it.
    """

    solver: str = "ddim"
    steps: int = 20
    batch_size: int = 32
    dtype: str = "bf16"
    objects: int = 90


class QuickScorer:
    """Scores one model after another on the same cases, which are made once, as their features are.

    Nothing is drawn from PyTorch's global generators: a run that is scored on its way draws what it would
    have drawn without. The models share the config's sizes of images and exemplars.
    """

    def __init__(
        self, config: ModelConfig, settings: QuickSettings | None = None, world: ToyWorld | None = None
    ) -> None:
        self.settings = settings = settings or QuickSettings()
        self.sizes = image_size, exemplar_size = _sizes(config)
        self.partner = derangement(settings.objects, settings.seed, "partner")
        self.cases = make_benchmark(
            world or ToyWorld(),
            seed=settings.seed,
            image_size=image_size,
            exemplar_size=exemplar_size,
            objects=settings.objects,
        )
        self.scorer = Scorer(self.cases, load_tower("lite2", None, None), settings.seed)

    def score(self, model: LatentDiffusion) -> Row:
        """Edit the cases with a model and score the edits.

        The model may be on any device, in any type and mode, and is left as it is.
        """
        if _sizes(model.config) != self.sizes:
            raise UserError(
                f"images and exemplars of {_sizes(model.config)} px, not {self.sizes} as the cases have: "
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


def _sizes(config: ModelConfig) -> tuple[int, int]:
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
