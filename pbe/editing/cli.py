"""The command line of ``sample.py``: arguments and checks, which need no torch."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pbe.checkpoints.precision import DTYPES
from pbe.cli.parser import Parser, run_command
from pbe.editing.batch.jobs import (
    FILE_KEYS,
    LONGEST,
    MARGIN,
    MAX_SEED,
    PICTURE_SUFFIXES,
    Checked,
    Job,
    check_files,
    check_outputs,
    single_job,
)
from pbe.editing.batch.pairs import read_pairs
from pbe.editing.hub import require_place
from pbe.errors import UserError
from pbe.files import expand_home, make_folder

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
LONGEST_SIDE = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}  # of an image in such a file, in pixels
MOST_IMAGES = 1_000_000  # of one picture; each has a name that is checked beforehand
MANY = 50  # from this many jobs on, checking the files takes a bar of its own
NOISY = ("PIL", "torch", "timm", "open_clip")
DESCRIPTION = "Paint an exemplar into the masked part of a picture."
EPILOG = (
    "In the folder of --out each edit leaves NAME_SEED.png and NAME_SEED.json (every setting to repeat it) "
    "and each picture NAME_SEED_grid.png. An entry of a --pairs file has image, mask and "
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
        "--model",
        type=expand_home,
        required=True,
        metavar="PATH_OR_ID",
        help="folder, checkpoint or owner/name",
    )
    group.add_argument(
        "--config",
        type=expand_home,
        metavar="FILE",
        help="YAML with the sizes of a checkpoint that says none",
    )
    group.add_argument(
        "--raw-weights", action="store_true", help="the plain weights of a training, not the average"
    )
    group.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: main)")
    group.add_argument(
        "--cache-dir", type=expand_home, metavar="FOLDER", help="where models of the Hub are kept"
    )
    group.add_argument("--offline", action="store_true", help="take models from that cache only")
    group.add_argument(
        "--safety-checker",
        type=expand_home,
        default="auto",
        metavar="PATH_OR_ID",
        help="auto takes the model's own, none turns it off (default: auto)",
    )


def _add_files(group: argparse._ArgumentGroup) -> None:
    path: dict[str, Any] = {"type": expand_home, "metavar": "FILE"}
    group.add_argument("--image", **path, help="picture to edit")
    group.add_argument("--mask", **path, help="mask, white = repaint; resized to the picture")
    group.add_argument("--exemplar", **path, help="picture of what is to be painted in")
    group.add_argument("--name", help="stem of the output files (default: the picture's)")
    group.add_argument("--pairs", **path, help="many edits instead: JSON lines, a JSON array or CSV")
    group.add_argument("--out", type=expand_home, metavar="FOLDER", help="where the edits go")
    group.add_argument("--output", **path, help="or the file of a single edit; its JSON lies beside it")
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
    """Check what can be checked without reading a picture."""
    for option in ("steps", "num_images", "batch_size", "height", "width", "attention_slicing"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be at least 1")
    for option in ("guidance_scale", "margin", "feather"):
        value = getattr(options, option)
        if value is not None and not (math.isfinite(value) and value >= 0.0):
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be a number from 0 up")
    if options.num_images > MOST_IMAGES:
        raise UserError(f"--num-images is {options.num_images}; it must be at most {MOST_IMAGES}")
    for option in ("margin", "feather", "height", "width"):
        if (getattr(options, option) or 0) > LONGEST:
            raise UserError(f"--{option} is {getattr(options, option)}; it must be at most {LONGEST}")
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
    """Return the folder that the edits go to."""
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
    if os.path.realpath(target) in [os.path.realpath(each) for each in inputs]:
        raise UserError(f"the output would replace its input '{target}'; change --output")
    return target.parent


def check_format(target: Path, size: tuple[int, int], options: argparse.Namespace) -> None:
    """Check that an edit of an image of this size (height, width) fits into the format of its file."""
    if options.region == "full":
        size = (options.height or size[0], options.width or size[1])
    longest = LONGEST_SIDE.get(target.suffix.lower())
    if longest is not None and max(size) > longest:
        raise UserError(
            f"--output '{target}': the edit has {size[1]}x{size[0]} pixels, a {target.suffix} file at most "
            f"{longest} a side; take another ending"
        )


def collect_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the jobs of ``--image``, ``--mask``, ``--exemplar`` or of ``--pairs``."""
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
    """Parse, check everything, then load the model and edit."""
    options = build_parser().parse_args(arguments)
    check_arguments(options)
    jobs = collect_jobs(options)
    folder = check_target(options)
    if options.output is None:
        check_outputs(jobs, options.num_images, folder)
    silent = options.quiet or len(jobs) < MANY
    checked = list(tqdm(check_files(jobs), "checking files", total=len(jobs), leave=False, disable=silent))
    tell_remarks(jobs, checked)
    if options.output is not None:
        check_format(Path(options.output), checked[0].size, options)
    make_folder(folder)
    from pbe.editing.batch.runner import edit_all  # imports torch, which takes seconds

    edit_all(jobs, [each.size for each in checked], options)


def tell_remarks(jobs: list[Job], checked: list[Checked]) -> None:
    """Print on stderr what was decided about the masks: each kind once, with the first of its jobs."""
    kinds: dict[str, list[tuple[Job, str]]] = {}
    for job, found in zip(jobs, checked, strict=True):
        for kind, remark in found.remarks.items():
            kinds.setdefault(kind, []).append((job, remark))
    for told in kinds.values():
        job, remark = told[0]
        more = f" (and {len(told) - 1} more like it)" if len(told) > 1 else ""
        print(f"{job.origin}{remark}{more}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, 2 after ``error: ...`` on stderr, 130 when interrupted.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs errors that it then raises
    with warnings.catch_warnings():
        for package in NOISY:  # what their users can do nothing about; what matters here is an error
            warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
        return run_command(lambda: run(arguments))
