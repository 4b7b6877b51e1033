"""The command line of ``sample.py``: arguments and checks, which need no torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from pbe.checkpoints.precision import DTYPES
from pbe.cli import Parser, run_command
from pbe.editing.jobs import FILE_KEYS, MAX_SEED, Job, check_files, check_outputs, read_pairs, single_job
from pbe.errors import UserError
from pbe.files import make_folder

SOLVER_NAMES = ("plms", "ddim")
MANY = 50  # from this many jobs on, checking the files takes a bar of its own
DESCRIPTION = "Paint an exemplar into the masked part of a picture."
EPILOG = (
    "Each edit leaves NAME_SEED.png and NAME_SEED.json (every setting to repeat it) and each picture "
    "NAME_SEED_grid.png in the output folder. A line of a --pairs file is a JSON object with image, mask and "
    "exemplar (paths relative to the file) and, if you like, name and seed. See docs/sampling.md."
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``sample.py``."""
    parser = Parser(prog="sample.py", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="model folder of this project")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the edits go")
    what = parser.add_argument_group("what to edit")
    what.add_argument("--image", metavar="FILE", help="picture to edit")
    what.add_argument("--mask", metavar="FILE", help="mask, white = repaint; resized to the picture")
    what.add_argument("--exemplar", metavar="FILE", help="picture of what is to be painted in")
    what.add_argument("--name", help="stem of the output files (default: the picture's)")
    what.add_argument("--pairs", metavar="FILE.jsonl", help="many edits instead, one JSON object a line")
    how = parser.add_argument_group("how")
    how.add_argument("--solver", choices=SOLVER_NAMES, default="plms", help="default: plms")
    how.add_argument("--steps", type=int, default=50, help="steps of the solver (default: 50)")
    how.add_argument("--guidance-scale", type=float, default=5.0, help="1 turns guidance off (default: 5)")
    how.add_argument("--eta", type=float, default=0.0, help="ancestral noise, 0 to 1, ddim only (default: 0)")
    how.add_argument("--seed", type=int, default=0, help="edit k of a picture has seed + k (default: 0)")
    how.add_argument("--num-images", type=int, default=1, help="edits of each picture (default: 1)")
    how.add_argument(
        "--preserve-background",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep every pixel outside the mask bit by bit (default: on)",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    where.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the weights (default: fp32)")
    where.add_argument("--batch-size", type=int, default=4, help="edits at once (default: 4)")
    return parser


def check_arguments(options: argparse.Namespace) -> None:
    """Check what can be checked without reading a picture.

    Raises:
        UserError: a number out of range, a missing or contradictory argument, no model folder.
    """
    for option in ("steps", "num_images", "batch_size"):
        value = getattr(options, option)
        if value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be at least 1")
    if not 0 <= options.seed <= MAX_SEED:
        raise UserError(f"--seed is {options.seed}; it must lie between 0 and {MAX_SEED}")
    if not (math.isfinite(options.guidance_scale) and options.guidance_scale >= 0.0):
        raise UserError(f"--guidance-scale is {options.guidance_scale}; it must be a number from 0 up")
    if not 0.0 <= options.eta <= 1.0:
        raise UserError(f"--eta is {options.eta}; it must lie between 0 and 1")
    if options.eta and options.solver == "plms":
        raise UserError("plms is deterministic: --eta must be 0 (use --solver ddim for eta above 0)")
    if not (Path(options.model) / "config.json").is_file():
        raise UserError(f"--model '{options.model}' is not a model folder: it has no config.json")


def collect_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the jobs of ``--image``, ``--mask``, ``--exemplar`` or of ``--pairs``.

    Raises:
        UserError: neither or both are given, or the pairs file is malformed.
    """
    if options.pairs is not None:
        extra = [key for key in (*FILE_KEYS, "name") if getattr(options, key) is not None]
        if extra:
            raise UserError(f"--pairs and --{extra[0]} contradict each other; give one of them")
        return read_pairs(Path(options.pairs), options.seed)
    missing = [f"--{key}" for key in FILE_KEYS if getattr(options, key) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: give --image, --mask and --exemplar, or --pairs")
    return single_job(options.image, options.mask, options.exemplar, options.name, options.seed)


def run(arguments: Sequence[str] | None) -> None:
    """Parse, check everything, then load the model and edit.

    Raises:
        UserError: anything that the user can put right.
    """
    options = build_parser().parse_args(arguments)
    check_arguments(options)
    jobs = collect_jobs(options)
    check_outputs(jobs, options.num_images, Path(options.out))
    bar = tqdm(check_files(jobs), "checking files", total=len(jobs), leave=False, disable=len(jobs) < MANY)
    sizes = list(bar)
    make_folder(Path(options.out))
    from pbe.editing.runner import edit_all  # imports torch, which takes seconds

    edit_all(jobs, sizes, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, 2 after ``error: ...`` on stderr, 130 when interrupted.
    """
    return run_command(lambda: run(arguments))
