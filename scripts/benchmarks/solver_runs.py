"""Solvers measured: how far from the converged solution an edit ends, over the calls of the network.

The edits are cases of the toy benchmark; ``scripts/benchmarks/solvers.py`` makes the page of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pbe.data.toy.scenes import ToyWorld
from pbe.diffusion.guidance import PredictNoise
from pbe.diffusion.schedule import NoiseSchedule, make_schedule
from pbe.editing.engine import Conditioning, noise_predictor
from pbe.evaluation.benchmark.toy import ToyCase, make_benchmark
from pbe.files import make_folder
from pbe.models import LatentDiffusion
from pbe.models.latent_diffusion import latent_mask, masked_image
from scripts.benchmarks.convergence import BrownianPath, Candidate, distance, solve, steps_for

# Solvers that are one method on these grids (tests hold them to it) share a line.
CANDIDATES = (
    Candidate("DDIM = Euler", "ddim"),
    Candidate("Euler, Karras", "euler", karras=True),
    Candidate("PLMS = PNDM", "plms"),
    Candidate("LMS", "lms"),
    Candidate("LMS, Karras", "lms", karras=True),
    Candidate("Heun", "heun"),
    Candidate("Heun, Karras", "heun", karras=True),
    Candidate("DPM-Solver++ 2M", "dpmpp_2m"),
    Candidate("DPM-Solver++ 2M, Karras", "dpmpp_2m", karras=True),
    Candidate("UniPC", "unipc"),
    Candidate("UniPC, Karras", "unipc", karras=True),
    Candidate("Euler ancestral = DDIM, eta 1", "euler_ancestral"),
    Candidate("DPM-Solver++ 2M SDE", "dpmpp_sde"),
)
COLOURS = {
    "ddim": "tab:blue",
    "euler": "tab:blue",
    "plms": "tab:green",
    "lms": "tab:olive",
    "heun": "tab:orange",
    "dpmpp_2m": "tab:red",
    "unipc": "tab:purple",
    "euler_ancestral": "tab:cyan",
    "dpmpp_sde": "tab:pink",
}
# What is taken for the converged solution, and by which solver it is checked.
FLOW, FLOW_CHECK = Candidate("LMS", "lms"), Candidate("DPM-Solver++ 2M", "dpmpp_2m")
SDE, SDE_CHECK = (
    Candidate("DPM-Solver++ 2M SDE", "dpmpp_sde"),
    Candidate("Euler ancestral", "euler_ancestral"),
)


@dataclass(frozen=True)
class Bench:
    """Edits to make: a predictor, where they start, and how to look at them."""

    model: LatentDiffusion
    schedule: NoiseSchedule
    predict: PredictNoise
    start: Tensor
    path: BrownianPath
    mask: np.ndarray

    def end(self, candidate: Candidate, steps: int) -> tuple[Tensor, int]:
        """Return the latents and the number of network calls."""
        found = solve(candidate, self.predict, self.start, self.schedule, steps, self.path)
        return found.latents, found.calls

    def painted(self, latents: Tensor) -> np.ndarray:
        """Return the painted pixels, 0..255, of all cases in one row ``(n, 3)``."""
        pixels = (self.model.decode_latents(latents).clamp(-1.0, 1.0) + 1.0) * 127.5
        return rearrange(pixels, "b c h w -> b h w c").numpy()[self.mask]


@dataclass(frozen=True)
class Point:
    """What one run made: network calls, relative distance of latents, mean difference of painted pixels."""

    calls: int
    distance: float
    pixels: float


def make_bench(model: LatentDiffusion, world: ToyWorld, *, cases: int, guidance: float, seed: int) -> Bench:
    """Condition a model on cases of the toy benchmark.

    Args:
        model: to measure with.
        world: objects and panoramas.
        cases: how many edits.
        guidance: scale.
        seed: of cases and noise.
    """
    schedule = make_schedule(model.config.schedule)
    made = make_benchmark(
        world,
        seed=seed,
        image_size=model.config.image_size,
        exemplar_size=model.config.exemplar_encoder.image_size,
        objects=cases,
    )
    conditioning = condition_on(model, made)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(conditioning.masked_latents.shape, generator=generator)
    path = BrownianPath(schedule, tuple(start.shape), generator)
    predict = noise_predictor(model, schedule, conditioning, guidance)
    mask = np.stack([case.mask > 127 for case in made])
    return Bench(model, schedule, predict, start, path, mask)


def condition_on(model: LatentDiffusion, cases: Sequence[ToyCase]) -> Conditioning:
    """Encode exemplars and masked scenes (the mean of the posterior)."""

    def stacked(images: Sequence[np.ndarray]) -> Tensor:
        return rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w")

    images = stacked([case.image for case in cases]).float() / 127.5 - 1.0
    keep = stacked([(case.mask <= 127)[..., None] for case in cases]).float()
    exemplars = model.normalise_exemplar(stacked([case.exemplar for case in cases]))
    masked_latents = model.encode_images(masked_image(images, keep))
    size = (masked_latents.shape[-2], masked_latents.shape[-1])
    return Conditioning(model.encode_exemplar(exemplars), masked_latents, latent_mask(keep, size))


def measure(
    bench: Bench, candidate: Candidate, budgets: Sequence[int], ends: dict[Candidate, Tensor]
) -> list[Point]:
    """Run a candidate with each budget of network calls."""
    reference = ends[SDE if candidate.stochastic else FLOW]
    painted = bench.painted(reference)
    points = []
    for budget in budgets:
        latents, calls = bench.end(candidate, steps_for(candidate, budget))
        pixels = float(np.abs(bench.painted(latents) - painted).mean())
        points.append(Point(calls, distance(latents, reference), pixels))
    return points


def plot(points: dict[Candidate, list[Point]], out: Path) -> None:
    """Draw both distances over calls: the flow's solvers solid, Karras sigmas dashed, the SDE's dotted."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharex=True)
    for candidate, measured in points.items():
        style = ":" if candidate.stochastic else "--" if candidate.karras else "-"
        calls = [point.calls for point in measured]
        draw = {
            "color": COLOURS[candidate.solver],
            "linestyle": style,
            "marker": ".",
            "label": candidate.label,
        }
        axes[0].plot(calls, [100.0 * point.distance for point in measured], **draw)
        axes[1].plot(calls, [point.pixels for point in measured], **draw)
    titles = ("latents: distance to the converged ones, %", "painted pixels: mean difference, of 255")
    for each, title in zip(axes, titles, strict=True):
        each.set(xscale="log", yscale="log", xlabel="network calls", title=title)
        each.grid(visible=True, which="both", alpha=0.25)
    ticks = sorted({5, 10, 20, 50, 100} & set(range(max(p.calls for m in points.values() for p in m) + 1)))
    axes[0].set_xticks(ticks, [str(tick) for tick in ticks])
    axes[0].minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    make_folder(out.parent)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def table(head: Sequence[str], labels: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    lines += [[label, *row] for label, row in zip(labels, rows, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
