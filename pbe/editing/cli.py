"""The command line of ``sample.py``: arguments and checks, which need no torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from pbe.checkpoints.precision import DTYPES
from pbe.cli import Parser, run_command
from pbe.editing.jobs import (
    FILE_KEYS,
    MARGIN,
    MAX_SEED,
    PICTURE_SUFFIXES,
    Job,
    check_files,
    check_outputs,
    read_pairs,
    single_job,
)
from pbe.editing.places import require_place
from pbe.errors import UserError
from pbe.files import make_folder

SOLVER_NAMES = (
    "plms",
    "pndm",
    "ddim",
    "dpmpp_2m",
    "dpmpp_sde",
    "unipc",
    "euler",
    "euler_ancestral",
    "heun",
    "lms",
)
SPACING_NAMES = ("uniform", "leading", "linspace", "trailing")
CONVENTION_NAMES = ("original", "diffusers")
REGION_NAMES = ("full", "mask")
MANY = 50  # from this many jobs on, checking the files takes a bar of its own
DESCRIPTION = "Paint an exemplar into the masked part of a picture."
EPILOG = (
    "In the folder of --out each edit leaves NAME_SEED.png and NAME_SEED.json (every setting to repeat it) "
    "and each picture NAME_SEED_grid.png. A line of a --pairs file is a JSON object with image, mask and "
    "exemplar (paths relative to the file) and, if you like, name and seed. See docs/sampling.md."
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``sample.py``."""
    parser = Parser(prog="sample.py", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    _add_model(parser.add_argument_group("model"))
    _add_files(parser.add_argument_group("what to edit"))
    _add_sampling(parser.add_argument_group("how"))
    _add_painting(parser.add_argument_group("where in the picture"))
    _add_machine(parser.add_argument_group("where it runs"))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", required=True, metavar="PATH_OR_ID", help="folder, checkpoint or owner/name"
    )
    group.add_argument("--config", metavar="FILE", help="YAML with the sizes of a checkpoint that says none")
    group.add_argument(
        "--raw-weights", action="store_true", help="the plain weights of a training, not the average"
    )
    group.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: main)")
    group.add_argument("--cache-dir", metavar="FOLDER", help="where models of the Hub are kept")
    group.add_argument("--offline", action="store_true", help="take models from that cache only")
    group.add_argument(
        "--safety-checker",
        default="auto",
        metavar="PATH_OR_ID",
        help="auto takes the model's own, none turns it off (default: auto)",
    )


def _add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--image", metavar="FILE", help="picture to edit")
    group.add_argument("--mask", metavar="FILE", help="mask, white = repaint; resized to the picture")
    group.add_argument("--exemplar", metavar="FILE", help="picture of what is to be painted in")
    group.add_argument("--name", help="stem of the output files (default: the picture's)")
    group.add_argument("--pairs", metavar="FILE.jsonl", help="many edits instead, one JSON object a line")
    group.add_argument("--out", metavar="FOLDER", help="where the edits go")
    group.add_argument(
        "--output", metavar="FILE", help="or the file of a single edit; its JSON lies beside it"
    )
    group.add_argument("--watermark", action="store_true", help="put an invisible watermark into the edits")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--solver", choices=SOLVER_NAMES, help="default: the model's, plms where it names none"
    )
    group.add_argument("--spacing", choices=SPACING_NAMES, help="of the timesteps (default: the solver's)")
    group.add_argument("--karras", action="store_true", help="noise levels after Karras et al.")
    group.add_argument("--steps", type=int, default=50, help="steps of the solver (default: 50)")
    group.add_argument("--guidance-scale", type=float, default=5.0, help="1 turns guidance off (default: 5)")
    group.add_argument(
        "--eta", type=float, default=0.0, help="ancestral noise, 0 to 1, ddim only (default: 0)"
    )
    group.add_argument("--seed", type=int, default=0, help="edit k of a picture has seed + k (default: 0)")
    group.add_argument("--num-images", type=int, default=1, help="edits of each picture (default: 1)")
    group.add_argument(
        "--conventions", choices=CONVENTION_NAMES, help="of preparing the inputs (default: the model's)"
    )


def _add_painting(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--region",
        choices=REGION_NAMES,
        default="full",
        help="edit the whole picture, or the mask's surroundings at the model's size (default: full)",
    )
    group.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        help="around the mask, shares of its longer side (default: 0.5)",
    )
    group.add_argument(
        "--feather", type=float, help="width of that region's seam in pixels (default: by size)"
    )
    group.add_argument("--height", type=int, help="of the result; with --region mask, of what the model sees")
    group.add_argument("--width", type=int, help="width to edit at, likewise")
    group.add_argument(
        "--preserve-background",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep every pixel outside the mask bit by bit (default: on)",
    )


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the weights (default: fp32)")
    group.add_argument("--batch-size", type=int, default=4, help="edits at once (default: 4)")
    group.add_argument("--cpu-offload", action="store_true", help="keep idle networks off the accelerator")
    group.add_argument("--attention-slicing", type=int, metavar="N", help="queries of attention at a time")
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def check_arguments(options: argparse.Namespace) -> None:
    """Check what can be checked without reading a picture.

    Raises:
        UserError: a number out of range, a missing or contradictory argument, no such model.
    """
    for option in ("steps", "num_images", "batch_size", "height", "width", "attention_slicing"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be at least 1")
    for option in ("guidance_scale", "margin", "feather"):
        value = getattr(options, option)
        if value is not None and not (math.isfinite(value) and value >= 0.0):
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be a number from 0 up")
    if not 0 <= options.seed <= MAX_SEED:
        raise UserError(f"--seed is {options.seed}; it must lie between 0 and {MAX_SEED}")
    if not 0.0 <= options.eta <= 1.0:
        raise UserError(f"--eta is {options.eta}; it must lie between 0 and 1")
    if options.eta and options.solver not in (None, "ddim"):
        raise UserError(f"--eta above 0 is for --solver ddim, not {options.solver}")
    require_place(options.model, "--model")
    if options.safety_checker not in ("auto", "none"):
        require_place(options.safety_checker, "--safety-checker")


def check_target(options: argparse.Namespace) -> Path:
    """Return the folder that the edits go to.

    Raises:
        UserError: neither or both of ``--out`` and ``--output``, or a file that cannot be the target.
    """
    if (options.out is None) == (options.output is None):
        raise UserError("give --out (a folder) or --output (the file of a single edit), and only one of them")
    if options.output is None:
        return Path(options.out)
    if options.pairs is not None or options.num_images > 1:
        raise UserError("--output is the file of a single edit; --pairs and --num-images need --out")
    target = Path(options.output)
    if target.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--output '{target}' must end in one of {', '.join(PICTURE_SUFFIXES)}")
    inputs = [getattr(options, key) for key in FILE_KEYS if getattr(options, key) is not None]
    if target.resolve() in [Path(each).resolve() for each in inputs]:
        raise UserError(f"the output would replace its input '{target}'; change --output")
    return target.parent


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
    folder = check_target(options)
    if options.output is None:
        check_outputs(jobs, options.num_images, folder)
    silent = options.quiet or len(jobs) < MANY
    sizes = list(tqdm(check_files(jobs), "checking files", total=len(jobs), leave=False, disable=silent))
    make_folder(folder)
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
