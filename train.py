"""Train a model: ``python train.py configs/toy.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from pbe.cli.parser import Parser, run_command  # without packages that might be missing

EPILOG = """\
overrides: trainer.max_steps=100 data.batch_size=8 ...; an unknown key is an error naming the nearest.
The same command continues a stopped run; Ctrl-C and SIGTERM save a checkpoint and the weights so far.
"""


def main(argv: list[str] | None = None) -> int:
    """Parse, load the configuration, train. Returns the exit code."""
    parser = Parser(
        description="Train Paint by Example.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, such as configs/toy.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="only tell parameters, memory, speed and length"
    )
    parser.add_argument("--find-batch-size", action="store_true", help="only try batch sizes on this machine")
    parser.add_argument(
        "--memory-limit", type=float, default=0.0, metavar="GB", help="for them (80%% of what is available)"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes to the configuration"
    )
    results: list[Any] = []

    def body() -> None:
        arguments = parser.parse_intermixed_args(argv)  # overrides may stand after options
        if arguments.memory_limit and not arguments.find_batch_size:
            parser.error("--memory-limit goes with --find-batch-size")
        from pbe.config import load_config

        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            from pbe.training.planning.plan import make_plan

            for line in make_plan(config):
                print(line, flush=True)  # counts stand there while the rest is measured
            return
        if arguments.find_batch_size:
            from pbe.training.planning.batch_size import find_batch_size

            find_batch_size(config, arguments.memory_limit)
            return
        from pbe.training.run import train  # slow to import: bad input is told before

        results.append(train(config))

    if status := run_command(body):
        return status
    if not results:
        return 0
    (result,) = results
    if result.rank == 0:  # the first process speaks for all
        there = (result.model_dir / "config.json").is_file()
        weights = f"; weights so far in {result.model_dir}" if there else ""
        said = f"the same command continues from {result.output_dir}/checkpoints{weights}"
        done = f"{result.steps} steps, {result.seconds:.0f} s; weights in {result.model_dir}"
        print(f"stopped at step {result.steps}; {said}" if result.stopped_by else done)
    return 128 + result.stopped_by if result.stopped_by else 0


if __name__ == "__main__":
    sys.exit(main())
