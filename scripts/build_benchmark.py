"""Build a benchmark in the form of COCOEE from two annotated splits, or check one that is there.

python scripts/build_benchmark.py --sources coco:val.json@val2017 --exemplars coco:train.json@train2017 \
        --cases 3500 --out data/test_bench
python scripts/build_benchmark.py --check data/test_bench
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pbe.cli import Parser, run_command
from pbe.data.coco_ee import BuildSettings, build_benchmark, read_benchmark
from pbe.data.sources.reading import SourceOptions, read_source
from pbe.errors import UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    default = BuildSettings()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="list what is wrong with a benchmark")
    parser.add_argument("--sources", metavar="KIND:PATH[@PICTURES]", help="pictures to edit")
    parser.add_argument("--exemplars", metavar="KIND:PATH[@PICTURES]", help="pictures to take objects from")
    parser.add_argument("--sources-split", default="validation", help="of Open Images")
    parser.add_argument("--exemplars-split", default="train", help="of Open Images")
    parser.add_argument("--out", type=Path, help="new folder for the benchmark")
    parser.add_argument("--cases", type=int, default=default.cases)
    parser.add_argument("--seed", type=int, default=default.seed)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Check, or build and check.

    Raises:
        UserError: something is missing.
    """
    if options.check:
        print(f"{len(read_benchmark(options.check, pixels=True))} cases, all whole: {options.check}")
        return
    if not (options.sources and options.exemplars and options.out):
        raise UserError("give --sources, --exemplars and --out, or --check FOLDER")
    if options.cases < 1:
        raise UserError("--cases must be at least 1")
    sources, exemplars = (
        read_source(source, SourceOptions(split))
        for source, split in (
            (options.sources, options.sources_split),
            (options.exemplars, options.exemplars_split),
        )
    )
    settings = BuildSettings(cases=options.cases, seed=options.seed)
    print(f"{build_benchmark(sources, exemplars, options.out, settings)} cases: {options.out}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
