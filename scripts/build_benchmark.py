"""Build a benchmark in the form of COCOEE from annotated images or the toy world, or check one.

python scripts/build_benchmark.py --sources coco:val.json@val2017 --exemplars coco:train.json@train2017 \
        --cases 3500 --out data/test_bench
python scripts/build_benchmark.py --sources coco:mine.json@images --validation-share 0.1 --out data/my_bench
python scripts/build_benchmark.py --toy --out outputs/toy_bench
python scripts/build_benchmark.py --check data/test_bench
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pbe.cli.parser import Parser, run_command
from pbe.data.sources.reading import SourceOptions, read_source
from pbe.data.sources.records import Annotations
from pbe.data.toy.scenes import DEFAULT_WORLD, ToyWorld
from pbe.errors import UserError
from pbe.evaluation.benchmark.build import BuildSettings, build_benchmark
from pbe.evaluation.benchmark.coco_ee import SIZE, read_benchmark
from pbe.evaluation.benchmark.toy import IMAGE_SIZE, export_toy_benchmark

MAKING = frozenset({"out", "cases", "seed", "size"})
# Which options go with each of the three things to do.
OPTIONS = {
    "check": {"size"},
    "toy": MAKING | {"world"},
    "sources": MAKING | {"exemplars", "validation_share", "sources_split", "exemplars_split"},
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    default = BuildSettings()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="list what is wrong with a benchmark")
    parser.add_argument("--toy", action="store_true", help="write the toy benchmark in this form")
    parser.add_argument("--sources", metavar="KIND:PATH[@PICTURES]", help="pictures to edit")
    parser.add_argument(
        "--exemplars",
        metavar="KIND:PATH[@PICTURES]",
        help="images to take objects from; default: the other ones of --sources",
    )
    parser.add_argument(
        "--validation-share",
        type=float,
        metavar="SHARE",
        help="of --sources, take only what prepare_data.py holds out with this share",
    )
    parser.add_argument("--sources-split", help="of Open Images, or of a YOLO set of splits (validation)")
    parser.add_argument("--exemplars-split", help="the same of --exemplars (train)")
    parser.add_argument("--out", type=Path, help="new folder for the benchmark")
    parser.add_argument(
        "--cases",
        type=_cases,
        help=f"how many, or all: as many as there are (default: {default.cases} with --exemplars, else all)",
    )
    parser.add_argument("--seed", type=int, help=f"of every choice ({default.seed})")
    parser.add_argument(
        "--size",
        type=int,
        help=f"sides of the images: those they get (default {SIZE}, with --toy {IMAGE_SIZE}), "
        f"with --check those they must have (default {SIZE}, 0: any)",
    )
    parser.add_argument("--world", type=Path, help="with --toy: the toy world's archive")
    return parser.parse_args(arguments)


def _cases(text: str) -> int:
    """Read a number of cases; 0 stands for all."""
    if text == "all":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': it must be at least 1, or all")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Check, or build.

    Raises:
        UserError: something is missing.
    """
    given = {name for name, value in vars(options).items() if value is not None and value is not False}
    what = next((name for name in OPTIONS if name in given), None)
    if what is None or (what != "check" and not options.out):
        raise UserError("give --sources and --out; or --toy and --out; or --check FOLDER")
    strange = sorted(given - OPTIONS[what] - {what})
    if strange:
        raise UserError(f"--{strange[0].replace('_', '-')} does not go with --{what}; leave it out")
    if options.size is not None and options.size < 0:
        raise UserError("--size must be 0 or more")
    {"check": _check, "toy": _export_toy, "sources": _build}[what](options)


def _check(options: argparse.Namespace) -> None:
    size = SIZE if options.size is None else options.size
    count = len(read_benchmark(options.check, pixels=True, size=size))
    print(f"{count} cases, all whole: {options.check}")


def _build(options: argparse.Namespace) -> None:
    share = options.validation_share
    if share is not None and not 0 < share < 1:
        raise UserError("--validation-share must lie between 0 and 1, as 0.05 does")
    cases = (BuildSettings().cases if options.exemplars else 0) if options.cases is None else options.cases
    if options.exemplars_split and not options.exemplars:
        raise UserError("--exemplars-split goes with --exemplars only")
    settings = BuildSettings(cases, options.seed or 0, SIZE if options.size is None else options.size)
    settings.check()
    sources = _read(options.sources, options.sources_split or "validation")
    exemplars = _read(options.exemplars, options.exemplars_split or "train") if options.exemplars else None
    print(f"{build_benchmark(sources, exemplars, options.out, settings, share or 0.0)} cases: {options.out}")


def _read(source: str, split: str) -> Annotations:
    found = read_source(source, SourceOptions(split))
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    return found


def _export_toy(options: argparse.Namespace) -> None:
    size = IMAGE_SIZE if options.size is None else options.size
    world = ToyWorld(options.world or DEFAULT_WORLD)
    count = export_toy_benchmark(
        world, options.out, options.seed or 0, image_size=size, objects=options.cases or 0
    )
    print(f"{count} cases: {options.out}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
