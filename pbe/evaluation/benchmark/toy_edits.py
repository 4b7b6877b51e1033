"""Edits of the benchmark's cases, with the right and with a shuffled exemplar, from the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from pbe.data.randomness import generator
from pbe.diffusion.solvers import get_solver
from pbe.editing.images import to_bytes, to_unit
from pbe.editing.output import EditOutput
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.toy import BenchmarkCase
from pbe.evaluation.metrics.bootstrap import derangement
from pbe.models.codec import known_pixels

GUIDANCE = (1.0, 2.0, 3.0, 5.0)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EditSettings:
    """How the benchmark is edited.

    Attributes:
        guidance: guidance scales, each at least 0; the first is what the others are compared with.
        solver: name of one, see :data:`pbe.diffusion.solvers.SOLVERS`.
        steps: of the solver.
        seed: of the noise and of the shuffling.
        batch_size: edits at a time; it does not change the noise.

    Raises:
        UserError: no, repeated or negative guidance scales, an unknown solver, no steps, an empty batch.
    """

    guidance: tuple[float, ...] = GUIDANCE
    solver: str = "plms"
    steps: int = 50
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse what cannot be used before any time is spent on it."""
        if not self.guidance or len(set(self.guidance)) != len(self.guidance):
            raise UserError("guidance scales must be given, each once")
        if not all(math.isfinite(scale) and scale >= 0.0 for scale in self.guidance):
            raise UserError(
                f"guidance scales are numbers from 0 up, not {', '.join(map(str, self.guidance))}"
            )
        get_solver(self.solver)
        if self.steps < 1:
            raise UserError(f"the number of steps is {self.steps}; it must be at least 1")
        if self.batch_size < 1:
            raise UserError(f"the batch size is {self.batch_size}; it must be at least 1")


@dataclass(frozen=True)
class BenchmarkEdits:
    """Edited pictures, uint8 ``n s s 3``, keyed by guidance scale.

    Attributes:
        own: scene i with exemplar i.
        shuffled: scene i with exemplar ``partner[i]``, from the same noise.
        partner: ``(n,)`` a permutation without fixed points.
        decoded: the true images, encoded and decoded: the best that the autoencoder lets through.
    """

    own: dict[float, np.ndarray]
    shuffled: dict[float, np.ndarray]
    partner: np.ndarray
    decoded: np.ndarray


def make_edits(
    pipe: PaintByExample,
    cases: Sequence[BenchmarkCase],
    settings: EditSettings,
    progress: Progress | None = None,
) -> BenchmarkEdits:
    """Edit every case twice at every guidance scale.

    Args:
        pipe: the pipeline; pixels outside the mask are kept.
        cases: at least two.
        settings: scales, solver, seed.
        progress: called with (edits made, edits in all) after each batch.

    Raises:
        UserError: fewer than two cases, or more steps than the model's schedule has.
    """
    partner = derangement(len(cases), settings.seed, "partner")
    total, made = 2 * len(settings.guidance) * len(cases), 0
    exemplars = [case.exemplar for case in cases]
    others = [exemplars[i] for i in partner]
    own: dict[float, np.ndarray] = {}
    shuffled: dict[float, np.ndarray] = {}
    for scale in settings.guidance:
        for target, shown in ((own, exemplars), (shuffled, others)):
            told = None if progress is None else partial(_shifted, progress, made, total)
            target[scale] = edit_cases(pipe, cases, shown, scale, settings, told)
            made += len(cases)
    return BenchmarkEdits(own, shuffled, partner, decode_images(pipe, cases, settings.batch_size))


def _shifted(progress: Progress, made: int, total: int, done: int, _count: int) -> None:
    progress(made + done, total)


def edit_cases(
    pipe: PaintByExample,
    cases: Sequence[BenchmarkCase],
    exemplars: Sequence[np.ndarray],
    guidance_scale: float,
    settings: EditSettings,
    progress: Progress | None = None,
) -> np.ndarray:
    """Edit cases batch by batch, each with the exemplar at its place; return uint8 ``n s s 3``."""
    batches, size = [], settings.batch_size
    for start in range(0, len(cases), size):
        part = slice(start, start + size)
        batches.append(edit_batch(pipe, cases[part], exemplars[part], guidance_scale, settings))
        if progress is not None:
            progress(min(start + size, len(cases)), len(cases))
    return np.concatenate(batches)


def edit_batch(
    pipe: PaintByExample,
    cases: Sequence[BenchmarkCase],
    exemplars: Sequence[np.ndarray],
    guidance_scale: float,
    settings: EditSettings,
) -> np.ndarray:
    """Edit some cases at once; return uint8 ``b s s 3``. Noise belongs to (seed, case), not to the batch."""
    output = pipe(
        list(exemplars),
        [case.image for case in cases],
        [case.mask for case in cases],
        num_inference_steps=settings.steps,
        guidance_scale=guidance_scale,
        generator=[noise_generator(settings.seed, case.index) for case in cases],
        output_type="np",
        solver=settings.solver,
    )
    assert isinstance(output, EditOutput)
    return to_bytes(output.images)


@torch.no_grad()
def decode_images(pipe: PaintByExample, cases: Sequence[BenchmarkCase], batch_size: int = 32) -> np.ndarray:
    """Return the true images encoded (posterior means) and decoded, uint8 ``n s s 3``."""
    model, decoded = pipe.model, []
    for start in range(0, len(cases), batch_size):
        part = cases[start : start + batch_size]
        images = torch.stack([torch.from_numpy(case.image) for case in part]).permute(0, 3, 1, 2)
        keep = torch.stack([torch.from_numpy(case.mask) for case in part])[:, None] <= 127
        pixels = (images.float() / 127.5 - 1.0).to(model.device, model.dtype)
        known = None
        if model.config.autoencoder.mask_aware_decoder:
            known = known_pixels(pixels, keep.to(pixels))
        painted = model.decode_latents(model.encode_images(pixels), known).float().clamp(-1.0, 1.0)
        decoded.append(to_bytes(to_unit(painted.permute(0, 2, 3, 1).cpu().numpy())))
    return np.concatenate(decoded)


def noise_generator(seed: int, index: int) -> torch.Generator:
    """Return torch's CPU generator for the noise of case ``index``."""
    return torch.Generator().manual_seed(int(generator(seed, "edit-noise", index).integers(2**62)))
