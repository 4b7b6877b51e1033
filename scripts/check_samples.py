"""Check many samples of random pictures and boxes: python scripts/check_samples.py --count 100000."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
from tqdm import tqdm

from pbe.cli import Parser, run_command
from pbe.config import SampleConfig
from pbe.data.masks import Box
from pbe.data.properties import box_cover, check_sample
from pbe.data.randomness import generator
from pbe.data.sample import make_sample
from pbe.errors import UserError


def random_case(seed: int, number: int) -> tuple[np.ndarray, Box, np.random.Generator]:
    """Return a picture of any aspect up to 5:1, a box in it of 2 to 80 % of its area, and a generator."""
    rng = generator(seed, "check", number)
    width, height = (int(side) for side in rng.integers(40, 201, 2))
    share = rng.uniform(0.02, 0.8)
    box_width = rng.uniform(share, 1.0)  # so that the height is at most the picture's
    sides = box_width * width, share / box_width * height
    x, y = rng.random() * (width - sides[0]), rng.random() * (height - sides[1])
    box = Box(x, y, min(x + sides[0], float(width)), min(y + sides[1], float(height)))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), box, rng


def run(arguments: list[str] | None) -> None:
    """Check the samples and print what they were.

    Raises:
        UserError: a sample is wrong; its number is named.
    """
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="number of samples")
    parser.add_argument("--size", type=int, default=64, help="sides of the image, pixels")
    parser.add_argument("--exemplar-size", type=int, default=32, help="sides of the exemplar, pixels")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, boxes and draws")
    options = parser.parse_args(arguments)
    if min(options.count, options.size, options.exemplar_size) < 1:
        raise UserError("--count, --size and --exemplar-size must be at least 1")
    config, seen, least = SampleConfig(), Counter[str](), 1.0
    for number in tqdm(range(options.count), desc="samples", disable=None):
        picture, box, rng = random_case(options.seed, number)
        sample = make_sample(picture, box, rng, config, options.size, options.exemplar_size)
        if faults := check_sample(sample, config, options.size, options.exemplar_size):
            raise UserError(f"sample {number} of seed {options.seed}: {'; '.join(faults)}")
        cover = box_cover(sample)
        least = min(least, cover)
        seen.update([sample.mask_kind, *sample.events, *(["box not wholly covered"] if cover < 1 else [])])
    print(f"{options.count} samples are good; the hole covers at least {least:.1%} of its box")
    for name, count in seen.most_common():
        print(f"  {name}: {count} ({count / options.count:.1%})")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
