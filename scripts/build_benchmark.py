"""Build a benchmark in the form of COCOEE from two annotated splits or the toy world, or check one.

python scripts/build_benchmark.py --sources coco:val.json@val2017 --exemplars coco:train.json@train2017 \
        --cases 3500 --out data/test_bench
python scripts/build_benchmark.py --toy --out outputs/toy_bench
python scripts/build_benchmark.py --check data/test_bench
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pbe.cli import Parser, run_command
from pbe.data.coco_ee import SIZE, BuildSettings, build_benchmark, read_benchmark
from pbe.data.sources.reading import SourceOptions, read_source
from pbe.data.toy_world import DEFAULT_WORLD, ToyWorld
from pbe.errors import UserError
from pbe.evaluation.toy.export import IMAGE_SIZE, export_toy_benchmark


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    default = BuildSettings()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="list what is wrong with a benchmark")
    parser.add_argument("--toy", action="store_true", help="write the toy benchmark in this form")
    parser.add_argument("--sources", metavar="KIND:PATH[@PICTURES]", help="pictures to edit")
    parser.add_argument("--exemplars", metavar="KIND:PATH[@PICTURES]", help="pictures to take objects from")
    parser.add_argument("--sources-split", default="validation", help="of Open Images")
    parser.add_argument("--exemplars-split", default="train", help="of Open Images")
    parser.add_argument("--out", type=Path, help="new folder for the benchmark")
    parser.add_argument("--cases", type=int, help=f"how many; default {default.cases}, with --toy all")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument(
        "--size",
        type=int,
        help=f"sides of the pictures: with --check those they must have (default {SIZE}, 0: any), "
        f"with --toy those they get (default {IMAGE_SIZE})",
    )
    parser.add_argument(
        "--world", type=Path, default=DEFAULT_WORLD, help="with --toy: the toy world's archive"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Check, or build and check.

    Raises:
        UserError: something is missing.
    """
    if options.size is not None and options.size < 0:
        raise UserError("--size must be 0 or more")
    if options.check:
        size = SIZE if options.size is None else options.size
        print(
            f"{len(read_benchmark(options.check, pixels=True, size=size))} cases, all whole: {options.check}"
        )
        return
    if options.cases is not None and options.cases < 1:
        raise UserError("--cases must be at least 1")
    if options.toy:
        _export_toy(options)
        return
    if not (options.sources and options.exemplars and options.out):
        raise UserError("give --sources, --exemplars and --out; or --toy and --out; or --check FOLDER")
    sources, exemplars = (
        read_source(source, SourceOptions(split))
        for source, split in (
            (options.sources, options.sources_split),
            (options.exemplars, options.exemplars_split),
        )
    )
    settings = BuildSettings(cases=options.cases or BuildSettings().cases, seed=options.seed)
    print(f"{build_benchmark(sources, exemplars, options.out, settings)} cases: {options.out}")


def _export_toy(options: argparse.Namespace) -> None:
    if not options.out or options.sources or options.exemplars:
        raise UserError("--toy needs --out, and neither --sources nor --exemplars")
    size = IMAGE_SIZE if options.size is None else options.size
    world = ToyWorld(options.world)
    count = export_toy_benchmark(
        world, options.out, options.seed, image_size=size, objects=options.cases or 0
    )
    print(f"{count} cases: {options.out}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
