"""Measure solvers and presets, distance to the converged edit over network calls; write plot and tables.

python scripts/benchmarks/solvers.py                 # solvers and presets
python scripts/benchmarks/solvers.py --only presets  # a few minutes; leaves the page as it is

Edits cases of the toy benchmark. The plot goes to docs/images/solvers.png, and the tables into
docs/solvers.md between the marks that name this script.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pbe.checkpoints.native import load_model
from pbe.data.toy.scenes import DEFAULT_WORLD, ToyWorld
from pbe.errors import UserError
from scripts.benchmarks.common import command_line, make_parser, print_rows, read_options, write
from scripts.benchmarks.convergence import Candidate, distance
from scripts.benchmarks.presets import HALF, HEADS, KEPT, SETTINGS, Cases, measure_settings
from scripts.benchmarks.solver_runs import (
    CANDIDATES,
    FLOW,
    FLOW_CHECK,
    SDE,
    SDE_CHECK,
    Point,
    make_bench,
    measure,
    plot,
    table,
)

BEGIN, END = (
    "<!-- made by scripts/benchmarks/solvers.py -->",
    "<!-- end of what scripts/benchmarks/solvers.py made -->",
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    parser = make_parser(__doc__, "solvers", repeats=1)
    parser.add_argument("--only", choices=["presets", "all"], default="all", help="what is measured")
    parser.add_argument(
        "--scored", type=int, default=90, help="cases that presets are scored on (%(default)s)"
    )
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="only these rows of the table")
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
    options = read_options(parser, arguments, argparse.Namespace(arguments=arguments))
    if min(options.cases, options.scored) < 1 or min(options.calls) < 2:
        raise UserError("--cases and --scored must be at least 1, --calls at least 2")
    return options


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    """Measure every candidate; write the plot and the tables.

    Raises:
        UserError: the model or the page cannot be used.
    """
    read_page(options.page)  # before minutes are spent
    model = load_model(options.model)
    world = ToyWorld(options.world)
    cases = Cases.make(model, world, options.scored, options.guidance, options.seed, options.clock)
    chosen = {name: each for name, each in SETTINGS.items() if name in (options.settings or SETTINGS)}
    rows = measure_settings(cases, options.reference, chosen)
    print_rows("settings of an edit", rows)
    title = f"settings, {options.scored} toy edits, guidance {options.guidance:g}"
    write(options, {title: rows})
    if options.only == "presets":
        return
    bench = make_bench(
        model,
        world,
        cases=options.cases,
        guidance=options.guidance,
        seed=options.seed,
    )
    budgets = sorted(set(options.calls))
    ends = {each: bench.end(each, options.reference)[0] for each in tqdm((FLOW, FLOW_CHECK, SDE, SDE_CHECK))}
    points = {each: measure(bench, each, budgets, ends) for each in tqdm(CANDIDATES, "solvers")}
    plot(points, options.plot)
    floors = [distance(ends[check], ends[kind]) for check, kind in ((FLOW_CHECK, FLOW), (SDE_CHECK, SDE))]
    tables = report(points, budgets, floors, options) + presets_table(rows, options)
    before, after = read_page(options.page)
    options.page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")
    print(f"{options.page}, {options.plot}")


def report(
    points: dict[Candidate, list[Point]],
    budgets: Sequence[int],
    floors: Sequence[float],
    options: argparse.Namespace,
) -> str:
    """Return the tables as Markdown."""
    command = shlex.join(["python", "scripts/benchmarks/solvers.py", *options.arguments])
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


def presets_table(rows: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    """Return the table of presets as Markdown."""
    digits = {
        "speed": 2,
        "full-size speed": 2,
        "cost": 1,
        "AUC": 3,
        "similarity": 3,
        "latents %": 2,
        "pixels": 2,
        "seconds": 1,
        "first of 20 %": 1,
    }
    cells = [[f"{row[head]:.{digits.get(head, 0)}f}" for head in HEADS] for row in rows.values()]
    intro = (
        f"Settings of {options.scored} edits as the pipeline makes them: network calls, how many halves they "
        f"are, what they cost in guided calls of the full size (one half {HALF}, with kept inner levels "
        f"{KEPT}) and the speed over 50 PLMS steps that follows; seconds and speed of this model; distance "
        "of latents and painted pixels to the converged edit with guidance everywhere; AUC, likeness of "
        "what was painted to its exemplar, and how often the exemplar is found first among twenty "
        "([evaluation](evaluation.md))."
    )
    return "\n\n" + "\n\n".join([intro, table(["setting", *HEADS], list(rows), cells)])


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


main = command_line(lambda arguments: run(parse(arguments)))

if __name__ == "__main__":
    sys.exit(main())
