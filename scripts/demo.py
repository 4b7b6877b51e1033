"""The whole project in a few minutes: render, train, edit, score, and a page that shows it all.

python scripts/demo.py --out outputs/demo
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from pbe.cli.parser import Parser, run_command
from pbe.evaluation.demo.stages import StageError, run

ROOT = Path(__file__).resolve().parent.parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder (default %(default)s)")
    parser.add_argument("--model", type=Path, default=ROOT / "data/toy/model", help="the model that edits")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/toy.yaml", help="of the training run")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to that configuration"
    )
    parser.add_argument(
        "--scenes", type=int, default=1500, help="training scenes to render (default %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="about how long to train (default %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="optimizer steps; 0 means as many as --seconds allow"
    )
    parser.add_argument("--objects", type=int, default=60, help="test objects to edit (default %(default)s)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 5.0], help="guidance scales")
    parser.add_argument("--sampling-steps", type=int, default=50, help="of the solver (default %(default)s)")
    parser.add_argument("--shown", type=int, default=16, help="edits on the page (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments, argparse.Namespace(root=ROOT))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for a mistake of the user's, 1 for a defect."""
    try:
        return run_command(lambda: run(parse(arguments)))
    except StageError as error:
        traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
