"""Train, edit, score and compare the rows of an ablation: ``python scripts/run_ablation.py ABLATION.yaml``.

The same command goes on where it was stopped or killed; what is finished is not made again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from pbe.cli.parser import Parser, run_command
from pbe.evaluation.ablation.config import load_ablation
from pbe.evaluation.ablation.plan import make_plan
from pbe.evaluation.ablation.runner import Runner, Schedule, make_engine, only_one


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ablation", type=Path, help="YAML file, such as configs/ablations/paper.yaml")
    parser.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="processes here, or a Ray cluster"
    )
    parser.add_argument("--jobs", type=int, help="stages side by side (default 1; with ray all that can run)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only print the plan with its times")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Run an ablation to its page; returns the number of the signal that stopped it, or 0.

    Raises:
        UserError: a mistake in the file, something that is not there, or a stage that failed.
    """
    ablation = load_ablation(options.ablation)
    plan = make_plan(ablation)
    schedule = Schedule(plan.stages, vars(ablation.config.rates))
    jobs = options.jobs if options.jobs is not None else len(plan.stages) if options.engine == "ray" else 1
    if options.dry_run:
        print(schedule.text(max(jobs, 1)))
        return 0
    with only_one(Path(ablation.config.workspace)):
        engine = make_engine(options.engine, jobs, options.threads)
        if stopped := Runner(schedule, engine, jobs, _say).run():
            return stopped
        from pbe.evaluation.ablation.report import write_report  # slow to import

        print(f"results: {write_report(ablation, plan)}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status is 2 for a mistake of the user's, 128 + n after signal n."""
    stopped: list[int] = []
    status = run_command(lambda: stopped.append(run(parse(arguments))))
    return status or (128 + stopped[0] if stopped[0] else 0)


if __name__ == "__main__":
    sys.exit(main())
