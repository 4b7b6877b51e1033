r"""A blind naming test of edits: sheets to name objects on, without exemplars, and the share that is right.

python scripts/naming_test.py make --model data/toy/model --out outputs/naming
python scripts/naming_test.py make --true --out outputs/naming_true
python scripts/naming_test.py score outputs/naming/sheets/answers.csv --key outputs/naming/key.csv

`sheets/` is for the judge, who fills in `answers.csv` (a, b, c or d); `key.csv` is not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pbe.cli.parser import Parser, run_command
from pbe.data.toy.scenes import ToyWorld
from pbe.editing.batch.records import write_picture
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.generation import GenerateSettings
from pbe.evaluation.benchmark.toy import EXEMPLAR_SIZE, IMAGE_SIZE, ToyCase, make_benchmark
from pbe.evaluation.benchmark.toy_run import edit_cases
from pbe.evaluation.metrics.features import to_grey
from pbe.evaluation.study.naming import (
    ANSWERS,
    KEY,
    OBJECTS,
    make_questions,
    naming_sheets,
    score_answers,
    write_form,
    write_key,
)
from pbe.files import expand_home, make_folder


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write sheets, answer form and key")
    what = make.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=expand_home, metavar="PATH", help="whose edits are shown")
    what.add_argument("--true", action="store_true", help="show the true images instead")
    make.add_argument("--out", type=Path, required=True, help="new folder for sheets/ and the key")
    make.add_argument("--objects", type=int, default=OBJECTS, help="the first so many (default %(default)s)")
    make.add_argument("--guidance", type=float, default=5.0, help="guidance scale (default %(default)s)")
    make.add_argument("--solver", default="plms", help="see docs/solvers.md (default %(default)s)")
    make.add_argument("--steps", type=int, default=50, help="of the solver (default %(default)s)")
    make.add_argument("--seed", type=int, default=0, help="of benchmark, noise and drawn names")
    make.add_argument("--grey", action="store_true", help="turn the images grey, so that colour cannot tell")
    make.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves them to PyTorch")
    score = commands.add_parser("score", help="print the share that is right")
    score.add_argument("answers", type=Path, nargs="+", help=f"filled-in {ANSWERS}, one a judge")
    score.add_argument("--key", type=Path, required=True, help=f"{KEY} of the test")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Make the test or score answers.

    Raises:
        UserError: something is missing or damaged.
    """
    if options.command == "score":
        for path in options.answers:
            print(f"{path}: {score_answers(path, options.key)}")
        return
    if options.objects < 1 or options.threads < 0:
        raise UserError("--objects must be at least 1, --threads 0 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.out.is_dir() and any(options.out.iterdir()):
        raise UserError(f"'{options.out}' is not empty; name a new folder")
    world = ToyWorld()
    pipe = None if options.true else PaintByExample.from_pretrained(options.model, safety_checker=None)
    cases = make_benchmark(
        world,
        seed=options.seed,
        image_size=pipe.model.config.image_size if pipe else IMAGE_SIZE,
        exemplar_size=pipe.model.config.exemplar_encoder.image_size if pipe else EXEMPLAR_SIZE,
        objects=options.objects,
    )
    if pipe is None:
        images, shown = np.stack([case.image for case in cases]), "true images"
    else:
        images, shown = edit(pipe, cases, options), f"edits of {options.model}, guidance {options.guidance:g}"
    if options.grey:
        images, shown = np.stack([to_grey(image) for image in images]), f"{shown}, grey"
    questions = make_questions(world, cases, options.seed)
    sheets = make_folder(options.out / "sheets")  # not before there is something to put into it
    for number, sheet in enumerate(naming_sheets(questions, images), 1):
        write_picture(sheets / f"sheet_{number}.png", sheet)
    write_form(sheets / ANSWERS, questions)
    write_key(options.out / KEY, questions, shown)
    print(f"{len(cases)} images: give {sheets} to the judge and keep {options.out / KEY} to yourself")


def edit(pipe: PaintByExample, cases: list[ToyCase], options: argparse.Namespace) -> np.ndarray:
    """Edit every case with its own exemplar; return uint8 ``n s s 3``."""
    pipe.set_progress_bar_config(disable=True)
    settings = GenerateSettings(options.guidance, options.solver, options.steps, options.seed, batch_size=32)
    with tqdm(total=len(cases), unit="edit", desc="edit") as bar:
        return edit_cases(pipe, cases, settings, progress=bar.update)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
