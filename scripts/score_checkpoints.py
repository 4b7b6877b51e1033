r"""Score models of the toy world quickly, in about a minute each, as while they train; one line a model.

python scripts/score_checkpoints.py data/toy/model
python scripts/score_checkpoints.py outputs/toy/diffusion/model --csv outputs/toy/scores.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import torch

from pbe.checkpoints.precision import DTYPES
from pbe.cli.parser import Parser, run_command
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.quick import QuickScorer, QuickSettings, quick_values
from pbe.files import expand_home, make_folder


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    quick = QuickSettings()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", type=expand_home, metavar="MODEL", help="models in any layout, of one size"
    )
    parser.add_argument("--objects", type=int, default=quick.objects, help="(default %(default)s)")
    parser.add_argument("--guidance", type=float, default=quick.guidance_scale, help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=quick.steps, help="(default %(default)s)")
    parser.add_argument("--solver", default=quick.solver, help="see docs/solvers.md (default %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="(default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where edits are made (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves them to PyTorch")
    parser.add_argument("--csv", type=Path, help="file that a line a model is added to")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Score model after model, printing each as it is done.

    Raises:
        UserError: an option or a model cannot be used, or models differ in size.
    """
    if options.threads < 0 or options.objects < 2:
        raise UserError("--threads must be 0 or more, --objects at least 2")
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = QuickSettings(
        options.guidance, options.solver, options.steps, dtype=options.dtype, objects=options.objects
    )
    scorer: QuickScorer | None = None
    for path in options.models:
        model = PaintByExample.from_pretrained(path, device=options.device, safety_checker=None).model
        scorer = scorer or QuickScorer(model.config, settings)
        started = time.perf_counter()
        row = scorer.score(model)
        seconds = time.perf_counter() - started
        found = {name: f"{value:.4f}" for name, value in quick_values(row).items()}
        print(f"{path}: {' '.join(f'{k} {v}' for k, v in found.items())} ({seconds:.0f} s)", flush=True)
        if options.csv:
            add_row(options.csv, {"model": path, **found, "seconds": f"{seconds:.1f}"})


def add_row(path: Path, row: dict[str, str]) -> None:
    """Add a line to a CSV file; a new file gets the names of the columns first.

    Raises:
        UserError: the file cannot be written, or has other columns.
    """
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
        raise UserError(f"'{path}' is no table to add to ({error}); name another file") from error


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
