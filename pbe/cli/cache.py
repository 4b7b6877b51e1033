"""``pbe cache``: build the latent cache of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pbe.cli.arguments import Place, options, parse_part
from pbe.errors import UserError

if TYPE_CHECKING:
    from pbe.training.latent_cache.builder import CacheSize


@options
class CacheSettings:
    """Options of ``pbe cache``."""

    shard: str = "0/1"
    """I/N: build only part I (from 0) of N"""
    size: bool = False
    """only say how large the cache will be"""
    list: bool = False
    """only list what the folder holds, and what fits this configuration"""


def cache(config: Place, /, *overrides: str, settings: CacheSettings = CacheSettings()) -> int:
    """Encode every training sample once and store the latents, so that training need not.

    pbe cache configs/toy.yaml cache.folder=outputs/cache

    Training builds a missing cache by itself; this does so beforehand, or on other machines. Started several
    times, on one machine or on several with a common folder, it shares the work; --shard gives each a part of
    its own, as in a SLURM array: --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
    Ctrl-C and SIGTERM stop after the current batch; the same command resumes. See docs/latent_cache.md.

    Args:
        config: YAML file of a training, or the name of one that ships, such as toy
        overrides: key=value, changes to the configuration
    """
    part = parse_part(settings.shard, "--shard")
    if settings.size and settings.list:
        raise UserError("--size and --list cannot go together; give one of them")
    from pbe.config import load_config

    loaded = load_config(config, list(overrides))
    folder = loaded.cache.folder
    if loaded.task == "autoencoder" or not (folder or settings.size):
        raise UserError("this configuration trains without a cache; name a folder: cache.folder=...")
    from pbe.training.run import build_cache, cache_list, cache_size  # slow: bad input is told before

    if settings.size:
        print_size(folder or "cache.folder", cache_size(loaded))
        return 0
    if settings.list:
        lines = cache_list(loaded)
        print("\n".join(lines) if lines else f"nothing in '{folder}'")
        return 0
    if stopped := build_cache(loaded, part):
        print("stopped; the same command resumes the build")
        return 128 + stopped
    return 0


def print_size(folder: str, size: CacheSize) -> None:
    """Print what a cache will take."""
    parts = ", ".join(f"{name} {count:,}" for name, count in size.parts.items())
    print(f"{size.sample:,} bytes for each variant of a sample: {parts}")
    for stream, (variants, samples) in size.samples.items():
        gib = variants * samples * size.sample / 2**30
        print(f"{stream}: {samples:,} samples x {variants} = {gib:.2f} GiB")
    if size.samples:
        print(f"{size.total / 2**30:.2f} GiB in {folder}")
    else:
        print("the shards are not there yet, so the total is not known")
