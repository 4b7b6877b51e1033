"""Check many samples of random images and boxes: python scripts/check_samples.py --count 100000."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pbe.cli.main import run_command
from pbe.config import SampleConfig
from pbe.data.randomness import generator
from pbe.data.samples.crops import Box
from pbe.data.samples.sample import make_sample
from pbe.errors import UserError
from scripts.sample_properties import box_cover, check_sample

A_TASK = 250  # samples
LONG_EVERY = 10  # one image of so many is only a few pixels wide or high


def random_case(seed: int, number: int) -> tuple[np.ndarray, Box, np.random.Generator]:
    """Return an image, a box in it of at least 2 % of its area, and a generator.

    Most images are up to 5:1 and their boxes up to 80 %; some are up to 100:1, their boxes as wide.
    """
    rng = generator(seed, "check", number)
    width, height = (int(side) for side in rng.integers(40, 201, 2))
    share = rng.uniform(0.02, 0.8)
    box_width = rng.uniform(share, 1.0)  # so that the height is at most the image's
    box_height = share / box_width
    if number % LONG_EVERY == 0:
        height, box_width, box_height = int(rng.integers(2, 9)), max(share, 2 / width), 1.0
    if number % (2 * LONG_EVERY) == 0:
        width, height, box_width, box_height = height, width, box_height, box_width
    sides = box_width * width, box_height * height
    x, y = rng.random() * (width - sides[0]), rng.random() * (height - sides[1])
    box = Box(x, y, min(x + sides[0], float(width)), min(y + sides[1], float(height)))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), box, rng


def check_some(
    first: int, *, count: int, size: int, exemplar_size: int, seed: int
) -> tuple[Counter[str], float, str]:
    """Check the samples from ``first`` on, up to ``count``, of one task.

    Returns:
        How many were of which kind; the least share of its box that a mask covers; what is wrong with the
        first bad sample, empty where all are good.
    """
    config, seen, least = SampleConfig(), Counter[str](), 1.0
    for number in range(first, min(first + A_TASK, count)):
        picture, box, rng = random_case(seed, number)
        sample = make_sample(picture, box, rng, config, size, exemplar_size)
        if faults := check_sample(sample, config, size, exemplar_size):
            return seen, least, f"sample {number} of seed {seed}: {'; '.join(faults)}"
        cover = box_cover(sample)
        least = min(least, cover)
        seen.update([sample.mask_kind, *sample.events, *(["box not wholly covered"] if cover < 1 else [])])
    return seen, least, ""


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="number of samples")
    parser.add_argument("--size", type=int, default=64, help="sides of the image, pixels")
    parser.add_argument("--exemplar-size", type=int, default=32, help="sides of the exemplar, pixels")
    parser.add_argument("--seed", type=int, default=0, help="of images, boxes and draws")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes; the result is the same"
    )
    options = parser.parse_args(arguments)
    if min(options.count, options.size, options.exemplar_size, options.workers) < 1:
        raise UserError("--count, --size, --exemplar-size and --workers must be at least 1")
    return options


class BadSampleError(Exception):
    """A sample is not what every sample must be."""


def run(arguments: list[str] | None) -> None:
    """Check the samples and print what they were.

    Raises:
        UserError: the options make no sense.
        BadSampleError: a sample is wrong; its number is named.
    """
    options = _parse(arguments)
    sizes = {"size": options.size, "exemplar_size": options.exemplar_size}
    task = partial(check_some, count=options.count, seed=options.seed, **sizes)
    seen, least = Counter[str](), 1.0
    starts = range(0, options.count, A_TASK)
    # One thread a process: OpenCV's own would fight over the cores.
    with multiprocessing.Pool(min(options.workers, len(starts)), cv2.setNumThreads, (0,)) as pool:
        for some, lowest, fault in tqdm(
            pool.imap(task, starts), total=len(starts), desc="tasks", disable=None
        ):
            if fault:
                raise BadSampleError(fault)
            seen.update(some)
            least = min(least, lowest)
    print(f"{options.count} samples are good; the mask covers at least {least:.1%} of its box")
    for name, count in sorted(seen.items(), key=lambda item: (-item[1], item[0])):
        print(f"  {name}: {count} ({count / options.count:.1%})")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 for a bad sample, 2 for a mistake of the user's."""
    try:
        return run_command(lambda: run(arguments))
    except BadSampleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
