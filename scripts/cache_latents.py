"""Build a training's latent cache: ``python scripts/cache_latents.py configs/toy.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from pbe.cli import Parser, run_command
from pbe.config import load_config
from pbe.errors import UserError

EPILOG = """\
Training builds its cache by itself where it is missing; this does it apart, on another machine or beforehand.
Ctrl-C and SIGTERM stop after the current batch, and the same command goes on there.
"""


def main(argv: list[str] | None = None) -> int:
    """Parse, build, tell the size. Returns the exit code."""
    parser = Parser(
        description="Encode every training sample once and store the latents.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of a training, such as configs/toy.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    parser.add_argument("--size", action="store_true", help="only tell how large the cache will be")
    stopped: list[int] = []

    def body() -> None:
        arguments = parser.parse_args(argv)
        config = load_config(arguments.config, arguments.overrides)
        if config.task != "diffusion" or not config.cache.folder:
            raise UserError("this configuration trains without a cache; name a folder: cache.folder=...")
        from pbe.training.run import build_cache, cache_size  # slow to import: bad input is told before

        if arguments.size:
            print(f"{cache_size(config) / 2**30:.2f} GiB in {config.cache.folder}")
        else:
            stopped.append(build_cache(config))

    if status := run_command(body):
        return status
    if stopped and stopped[0]:
        print("stopped; the same command goes on where the build was")
        return 128 + stopped[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
