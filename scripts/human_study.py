"""A human study: make the page on which people rank edits of several systems, and tabulate the rankings.

python scripts/human_study.py make --systems ours=outputs/ours theirs=results/theirs \
        --benchmark data/test_bench --groups 30 --out outputs/study
python scripts/human_study.py tabulate --key outputs/study/key.json rankings/*.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pbe.cli.parser import Parser, run_command
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.study.making import KEY, StudySettings, make_study, parse_systems
from pbe.evaluation.study.tables import read_key, read_rankings, study_markdown, summarise


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    default = StudySettings()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write the page and its key")
    make.add_argument("--systems", nargs="+", required=True, metavar="NAME=FOLDER", help="folders of edits")
    make.add_argument("--benchmark", type=Path, required=True, metavar="DIR", help="that was edited")
    make.add_argument("--out", type=Path, required=True, help="new folder for page/ and its key")
    make.add_argument("--groups", type=int, default=default.groups, help="cases to rank (%(default)s)")
    make.add_argument("--seed", type=int, default=default.seed, help="of the draw of cases")
    make.add_argument("--title", default=default.title, help="of the page (%(default)s)")
    make.add_argument("--copy", action="store_true", help="put pictures beside the page, not into it")
    tabulate = commands.add_parser("tabulate", help="print mean ranks, first places, wins and agreement")
    tabulate.add_argument("rankings", type=Path, nargs="+", help="JSON files that raters sent")
    tabulate.add_argument("--key", type=Path, required=True, help=f"{KEY} of the study")
    tabulate.add_argument("--partial", action="store_true", help="take files that lack groups")
    tabulate.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Make or tabulate.

    Raises:
        UserError: something is missing or damaged.
    """
    if options.command == "make":
        settings = StudySettings(options.groups, options.seed, options.title, options.copy)
        benchmark = BenchmarkFolder(options.benchmark)
        page = make_study(parse_systems(options.systems), benchmark, options.out, settings)
        given = page.parent if options.copy else page
        print(f"{options.groups} groups: give {given} to raters and keep {options.out / KEY} to yourself")
        return
    key = read_key(options.key)
    ranks = read_rankings(options.rankings, key, partial=options.partial)
    for question, array in ranks.items():
        print(study_markdown(question, summarise(array, key.systems, options.seed)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
