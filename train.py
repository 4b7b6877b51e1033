"""Train a model: ``python train.py configs/toy.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from pbe.config import load_config
from pbe.errors import UserError

EPILOG = """\
overrides: trainer.max_steps=100 data.batch_size=8 ...; an unknown key is an error naming the nearest valid one.
The same command continues a run that was stopped (trainer.resume=auto); Ctrl-C and SIGTERM save a checkpoint.
"""


def main(argv: list[str] | None = None) -> int:
    """Parse, load the configuration, train. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Train Paint by Example.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, such as configs/toy.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        from pbe.training.run import train  # slow to import: bad input is told before

        result = train(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result.stopped_by:
        print(
            f"stopped at step {result.steps}; the same command continues from {result.output_dir}/checkpoints"
        )
        return 128 + result.stopped_by
    print(f"{result.steps} steps, {result.seconds:.0f} s; weights in {result.model_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
