"""Build a training's latent cache: ``python scripts/cache_latents.py configs/toy.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import os
import re
import sys

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from pbe.cli.parser import Parser, run_command
from pbe.config import load_config
from pbe.errors import UserError

EPILOG = """\
Training builds its cache by itself where it is missing; this does it apart, on other machines or beforehand.
Started several times, on one machine or on several with a common folder, it shares the work; --shard gives
each its own part, as in a SLURM array: --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
Ctrl-C and SIGTERM stop after the current batch; the same command goes on with the shard it was at.
"""


def parse_share(text: str) -> tuple[int, int]:
    """Read ``i/n``, part i of n counted from 0.

    Raises:
        UserError: it is something else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not part < parts:
        raise UserError(f"--shard is '{text}'; it must be i/n with i from 0 to n-1, such as 0/8")
    return part, parts


def print_size(config_folder: str, size: object) -> None:
    """Print what a cache will take."""
    from pbe.training.latent_cache.listing import CacheSize

    assert isinstance(size, CacheSize)
    parts = ", ".join(f"{name} {count:,}" for name, count in size.parts.items())
    print(f"{size.sample:,} bytes for each variant of a sample: {parts}")
    for stream, (variants, samples) in size.samples.items():
        print(
            f"{stream}: {samples:,} samples x {variants} = {variants * samples * size.sample / 2**30:.2f} GiB"
        )
    if size.samples:
        print(f"{size.total / 2**30:.2f} GiB in {config_folder}")
    else:
        print("the shards are not there yet, so the total is not known")


def main(argv: list[str] | None = None) -> int:
    """Parse, build, or tell the size or what is there. Returns the exit code."""
    parser = Parser(
        description="Encode every training sample once and store the latents.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of a training, such as configs/toy.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    parser.add_argument("--shard", metavar="I/N", default="0/1", help="build only part I of N, from 0")
    telling = parser.add_mutually_exclusive_group()
    telling.add_argument("--size", action="store_true", help="only tell how large the cache will be")
    telling.add_argument("--list", action="store_true", help="only tell what the folder holds, and what fits")
    stopped: list[int] = []

    def body() -> None:
        arguments = parser.parse_args(argv)
        share = parse_share(arguments.shard)
        config = load_config(arguments.config, arguments.overrides)
        if config.task != "diffusion" or not (config.cache.folder or arguments.size):
            raise UserError("this configuration trains without a cache; name a folder: cache.folder=...")
        from pbe.training.run import build_cache, cache_list, cache_size  # slow: bad input is told before

        if arguments.size:
            print_size(config.cache.folder or "cache.folder", cache_size(config))
        elif arguments.list:
            lines = cache_list(config)
            print("\n".join(lines) if lines else f"nothing in '{config.cache.folder}'")
        else:
            stopped.append(build_cache(config, share))

    if status := run_command(body):
        return status
    if stopped and stopped[0]:
        print("stopped; the same command goes on where the build was")
        return 128 + stopped[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
