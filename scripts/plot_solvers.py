"""Measure solvers, distance to the converged solution over network calls; write plot and tables.

python scripts/plot_solvers.py

Edits cases of the toy benchmark. The plot goes to docs/images/solvers.png, and the tables into
docs/solvers.md between the marks that name this script.
"""

from __future__ import annotations

import argparse
import shlex
import sys
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
from tqdm import tqdm

from pbe.checkpoints.native import load_model
from pbe.cli import Parser, run_command
from pbe.data.toy_world import DEFAULT_WORLD, ToyWorld
from pbe.diffusion.convergence import BrownianPath, Candidate, distance, solve, steps_for
from pbe.diffusion.guidance import PredictNoise
from pbe.diffusion.schedule import NoiseSchedule, make_schedule
from pbe.editing.conditioning import Conditioning, noise_predictor
from pbe.errors import UserError
from pbe.evaluation.benchmark import BenchmarkCase, make_benchmark
from pbe.files import make_folder
from pbe.models import LatentDiffusion
from pbe.models.latent_diffusion import latent_mask, masked_image

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
BEGIN, END = "<!-- made by scripts/plot_solvers.py -->", "<!-- end of what scripts/plot_solvers.py made -->"


@dataclass(frozen=True)
class Bench:
    """Edits to make: a predictor, where they start, and how to look at them."""

    model: LatentDiffusion
    schedule: NoiseSchedule
    predict: PredictNoise
    start: Tensor
    path: BrownianPath
    hole: np.ndarray

    def end(self, candidate: Candidate, steps: int) -> tuple[Tensor, int]:
        """Return the latents and the number of network calls."""
        found = solve(candidate, self.predict, self.start, self.schedule, steps, self.path)
        return found.latents, found.calls

    def pictures(self, latents: Tensor) -> np.ndarray:
        """Return the painted pixels, 0..255, of all cases in one row ``(n, 3)``."""
        pixels = (self.model.decode_latents(latents).clamp(-1.0, 1.0) + 1.0) * 127.5
        return rearrange(pixels, "b c h w -> b h w c").numpy()[self.hole]


@dataclass(frozen=True)
class Point:
    """What one run made: network calls, relative distance of latents, mean difference of painted pixels."""

    calls: int
    distance: float
    pixels: float


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("data/toy/model"), help="model folder")
    parser.add_argument("--page", type=Path, default=Path("docs/solvers.md"), help="page to put tables into")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/solvers.png"), help="plot to write")
    parser.add_argument("--cases", type=int, default=8, help="cases of the toy benchmark (%(default)s)")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 8, 10, 20, 25, 40, 50, 100])
    parser.add_argument("--reference", type=int, default=500, help="steps of the converged solution")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance scale (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of cases and noise")
    parser.add_argument("--world", type=Path, default=DEFAULT_WORLD, help="archive of objects and panoramas")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments, argparse.Namespace(arguments=arguments))
    if options.cases < 1 or min(options.calls) < 2:
        raise UserError("--cases must be at least 1, --calls at least 2")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure every candidate; write the plot and the tables.

    Raises:
        UserError: the model or the page cannot be used.
    """
    read_page(options.page)  # before minutes are spent
    bench = make_bench(options)
    budgets = sorted(set(options.calls))
    ends = {each: bench.end(each, options.reference)[0] for each in tqdm((FLOW, FLOW_CHECK, SDE, SDE_CHECK))}
    points = {each: measure(bench, each, budgets, ends) for each in tqdm(CANDIDATES, "solvers")}
    plot(points, options.plot)
    floors = [distance(ends[check], ends[kind]) for check, kind in ((FLOW_CHECK, FLOW), (SDE_CHECK, SDE))]
    tables = report(points, budgets, floors, options)
    before, after = read_page(options.page)
    options.page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")
    print(f"{options.page}, {options.plot}")


def make_bench(options: argparse.Namespace) -> Bench:
    """Load the model and condition it on the cases."""
    model = load_model(options.model)
    schedule = make_schedule(model.config.schedule)
    cases = make_benchmark(
        ToyWorld(options.world),
        seed=options.seed,
        image_size=model.config.image_size,
        exemplar_size=model.config.exemplar_encoder.image_size,
        objects=options.cases,
    )
    conditioning = condition_on(model, cases)
    generator = torch.Generator().manual_seed(options.seed)
    start = torch.randn(conditioning.masked_latents.shape, generator=generator)
    path = BrownianPath(schedule, tuple(start.shape), generator)
    predict = noise_predictor(model, schedule, conditioning, options.guidance)
    hole = np.stack([case.mask > 127 for case in cases])
    return Bench(model, schedule, predict, start, path, hole)


def condition_on(model: LatentDiffusion, cases: Sequence[BenchmarkCase]) -> Conditioning:
    """Encode exemplars and masked scenes (the mean of the posterior)."""

    def stacked(pictures: Sequence[np.ndarray]) -> Tensor:
        return rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w")

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
    pictures = bench.pictures(reference)
    points = []
    for budget in budgets:
        latents, calls = bench.end(candidate, steps_for(candidate, budget))
        pixels = float(np.abs(bench.pictures(latents) - pictures).mean())
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


def report(
    points: dict[Candidate, list[Point]],
    budgets: Sequence[int],
    floors: Sequence[float],
    options: argparse.Namespace,
) -> str:
    """Return the tables as Markdown."""
    command = shlex.join(["python", "scripts/plot_solvers.py", *options.arguments])
    intro = (
        f"`{command}`: {options.cases} edits of the toy benchmark by `{options.model.as_posix()}`, guidance "
        f"{options.guidance:g}. The converged solution is that of {options.reference} steps of {FLOW.label} "
        f"for the flow ({FLOW_CHECK.label} ends {floors[0]:.2%} from it) and of {SDE.label} for the SDE "
        f"({SDE_CHECK.label} ends {floors[1]:.2%} from it)."
    )
    head = ["solver", *(f"{budget} calls" for budget in budgets)]
    latents = [[f"{100.0 * point.distance:.2f}" for point in row] for row in points.values()]
    pixels = [[f"{point.pixels:.2f}" for point in row] for row in points.values()]
    labels = [each.label for each in points]
    return "\n\n".join(
        [
            intro,
            "Distance of the latents to the converged ones, %:",
            table(head, labels, latents),
            "Mean difference of the painted pixels, of 255:",
            table(head, labels, pixels),
        ]
    )


def table(head: Sequence[str], labels: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    lines += [[label, *row] for label, row in zip(labels, rows, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_page(path: Path) -> tuple[str, str]:
    """Return what stands before and after the place of the tables.

    Raises:
        UserError: there is no such page, or it lacks the marks.
    """
    if not path.is_file():
        raise UserError(f"there is no page '{path}' to put the tables into")
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"'{path}' lacks the lines '{BEGIN}' and '{END}' around the place of the tables")
    return before, after


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
