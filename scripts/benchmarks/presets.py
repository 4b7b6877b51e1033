"""Settings of an edit measured on the toy model: distance to the converged edit and scores, over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pbe.data.toy.scenes import ToyWorld
from pbe.diffusion.schedule import make_schedule
from pbe.diffusion.solvers import SolverChoice
from pbe.editing.engine import (
    Conditioning,
    merge_choice,
    network_timesteps,
    noise_predictor,
    prepared_predictor,
    solve,
)
from pbe.editing.output import to_images
from pbe.editing.settings import PRESETS, EditSettings, SolverName
from pbe.evaluation.benchmark.toy import ToyCase, make_benchmark
from pbe.evaluation.benchmark.toy_run import Scorer, edit_sizes
from pbe.evaluation.metrics.bootstrap import derangement
from pbe.evaluation.metrics.towers import load_tower
from pbe.models import LatentDiffusion
from scripts.benchmarks.common import CLOCKS
from scripts.benchmarks.convergence import BrownianPath, Candidate, distance, solve as converge
from scripts.benchmarks.solver_runs import condition_on

# What a user may ask for: the original's 50 PLMS steps, the presets, what makes calls cheaper or saves some.
GRID: tuple[tuple[SolverName, bool], ...] = (
    ("dpmpp_2m", True),
    ("dpmpp_2m", False),
    ("unipc", True),
    ("lms", True),
)
SETTINGS: dict[str, EditSettings] = {
    "50 PLMS steps": EditSettings(solver="plms", steps=50),
    **{f"preset {name}": EditSettings(preset=name) for name in PRESETS},
    "normal, guidance in 0.2 to 1": EditSettings(preset="normal", guidance_interval=(0.2, 1.0)),
    "normal, inner levels kept for 2": EditSettings(preset="normal", reuse_features=2),
    **{
        f"{steps} steps of {solver}, {'Karras' if karras else 'trailing'}": EditSettings(
            solver=solver, karras=karras, spacing=None if karras else "trailing", steps=steps
        )
        for solver, karras in GRID
        for steps in (8, 10, 12, 16, 20, 30)
    },
}
HEADS = (
    *("calls", "halves", "cost", "full-size speed", "seconds", "speed"),
    *("latents %", "pixels", "AUC", "similarity", "first of 20 %"),
)
# Of a call of the full-size UNet for both halves, bfloat16, 512 px: one half, and kept inner levels.
HALF, KEPT = 0.53, 0.45


@dataclass(frozen=True)
class Edited:
    """Where an edit ended, and what it took: calls, half calls, cost in guided full-size calls, seconds."""

    latents: Tensor
    calls: int
    halves: int
    cost: float
    seconds: float


@dataclass(frozen=True)
class Cases:
    """Cases of the toy benchmark, encoded once, with the noise that all edits start from."""

    model: LatentDiffusion
    cases: Sequence[ToyCase]
    conditioning: Conditioning
    start: Tensor
    guidance: float
    clock: str = "wall"

    @staticmethod
    def make(
        model: LatentDiffusion, world: ToyWorld, count: int, guidance: float, seed: int, clock: str = "wall"
    ) -> Cases:
        """Return the first ``count`` cases."""
        size, exemplar_size = edit_sizes(model.config)
        cases = make_benchmark(world, seed=seed, image_size=size, exemplar_size=exemplar_size, objects=count)
        conditioning = condition_on(model, cases)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(conditioning.masked_latents.shape, generator=generator)
        return Cases(model, cases, conditioning, start, guidance, clock)

    def converged(self, steps: int) -> Tensor:
        """Return where the guided flow ends with very many steps."""
        schedule = make_schedule(self.model.config.schedule)
        predict = noise_predictor(self.model, schedule, self.conditioning, self.guidance)
        path = BrownianPath(schedule, (1, 1, 1, 1))
        fast = Candidate("LMS, Karras", "lms", karras=True)  # of all nearest with many steps
        return converge(fast, predict, self.start, schedule, steps, path).latents

    def edit(self, settings: EditSettings) -> Edited:
        """Edit all cases with settings, as the pipeline does it."""
        settings, model = replace(settings, guidance_scale=self.guidance).checked(), self.model
        schedule = make_schedule(model.config.schedule)
        choice = merge_choice(SolverChoice("plms"), settings)
        timesteps = network_timesteps(choice, settings, schedule)
        rows, inner = Counter[int](), Counter[int]()  # calls of so many rows, and those with inner levels
        handles = [
            module.register_forward_hook(lambda _, given, __, seen=seen: seen.update([len(given[0])]))
            for module, seen in ((model.unet.conv_out, rows), (model.unet.mid1, inner))
        ]
        started = CLOCKS[self.clock]()
        predict = prepared_predictor(
            model,
            schedule,
            self.conditioning,
            self.guidance,
            timesteps,
            interval=settings.guidance_interval,
            reuse=settings.reuse_features,
        )
        latents = solve(choice, settings, predict, self.start, schedule, generator=torch.Generator())
        seconds = CLOCKS[self.clock]() - started
        for handle in handles:
            handle.remove()
        edits = len(self.start)
        cost = sum(
            (1.0 if size > edits else HALF) * (inner[size] + KEPT * (count - inner[size]))
            for size, count in rows.items()
        )
        halves = sum(size * count for size, count in rows.items()) // edits
        return Edited(latents, rows.total(), halves, cost, seconds)

    def images(self, latents: Tensor) -> np.ndarray:
        """Return uint8 ``n s s 3`` with the true image outside the mask."""
        painted = to_images(self.model.decode_latents(latents))
        made = np.stack([np.round(255.0 * each).astype(np.uint8) for each in painted])
        masks = np.stack([case.mask for case in self.cases])[..., None] > 127
        return np.where(masks, made, np.stack([case.image for case in self.cases]))


def measure_settings(
    cases: Cases, reference_steps: int, settings: Mapping[str, EditSettings] = SETTINGS
) -> dict[str, dict[str, float]]:
    """Edit with every setting; return calls, seconds, distances to the converged edit and scores."""
    scorer = Scorer(cases.cases, load_tower("lite2", None, None))
    masks = np.stack([case.mask for case in cases.cases]) > 127
    partner = derangement(len(cases.cases), 0, "partner")
    reference = cases.converged(reference_steps)
    exact = Edited(reference, reference_steps, 2 * reference_steps, reference_steps, float("nan"))
    shown, base = cases.images(reference), exact
    rows = {}
    for name, each in {"converged": None, **settings}.items():
        end = exact if each is None else cases.edit(each)
        base = end if base is exact else base  # the first of the settings
        images = cases.images(end.latents)
        regions = scorer.regions(images)
        difference = np.abs(images[masks].astype(float) - shown[masks]).mean()
        row = scorer.row(regions, scorer.similarity(regions, partner))
        rows[name] = {
            "calls": float(end.calls),
            "halves": float(end.halves),
            "cost": end.cost,
            "full-size speed": base.cost / end.cost,
            "seconds": end.seconds,
            "speed": base.seconds / end.seconds,
            "latents %": 100.0 * distance(end.latents, reference),
            "pixels": float(difference),
            "AUC": row.auc.value,
            "similarity": row.similarity.value,
            "first of 20 %": 100.0 * row.first_of_20.value if row.first_of_20 is not None else float("nan"),
        }
        print(f"{name}: {rows[name]['latents %']:.2f} % from the converged edit", flush=True)
    return rows
