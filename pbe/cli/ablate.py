"""``pbe ablate``: train, edit, score and compare the rows of an ablation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from pbe.cli.arguments import options
from pbe.resources import find_config


@options
class AblateSettings:
    """Options of ``pbe ablate``."""

    engine: Literal["local", "ray"] = "local"
    """run processes here, or tasks on a Ray cluster"""
    jobs: int | None = None
    """number of stages that run side by side (default 1; with ray as many as possible)"""
    threads: int = 1
    """CPU threads of each stage"""
    dry_run: bool = False
    """print the plan with its times and stop"""


def ablate(ablation: Path, /, *, settings: AblateSettings = AblateSettings()) -> int:
    """Train, edit, score and compare the rows of an ablation.

    pbe ablate configs/ablations/paper.yaml --jobs 2

    If it is stopped or killed, the same command resumes. See docs/ablations.md.

    Args:
        ablation: YAML file, or the name of one that ships, such as ablations/paper
    """
    from pbe.evaluation.ablation.config import load_ablation
    from pbe.evaluation.ablation.plan import make_plan
    from pbe.evaluation.ablation.runner import Runner, Schedule, make_engine, only_one

    loaded = load_ablation(find_config(ablation))
    plan = make_plan(loaded)
    schedule = Schedule(plan.stages, vars(loaded.config.rates))
    jobs = settings.jobs
    if jobs is None:
        jobs = len(plan.stages) if settings.engine == "ray" else 1
    if settings.dry_run:
        print(schedule.text(max(jobs, 1)))
        return 0
    with only_one(Path(loaded.config.workspace)):
        engine = make_engine(settings.engine, jobs, settings.threads)
        if stopped := Runner(schedule, engine, jobs, _print_now).run():
            return 128 + stopped
        from pbe.evaluation.ablation.report import write_report  # slow to import

        print(f"results: {write_report(loaded, plan)}")
    return 0


def _print_now(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":  # python -m pbe.cli.ablate KIND FOLDER: a stage that is no command by itself
    from pbe.cli.main import run_command
    from pbe.evaluation.ablation.measuring import make

    sys.exit(run_command(lambda: make(sys.argv[1], Path(sys.argv[2]))))
