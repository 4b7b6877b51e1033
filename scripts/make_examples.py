"""Write example triples (image, mask, exemplar of another object) and ``pairs.jsonl`` for sample.py.

python scripts/make_examples.py --out data/examples
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from pbe.cli.main import run_command
from pbe.data.toy.scenes import DEFAULT_WORLD, ToyWorld
from pbe.errors import UserError
from pbe.evaluation.benchmark.toy import make_benchmark
from pbe.files import make_folder


def run(arguments: list[str] | None) -> None:
    """Render the triples and write them as PNG files.

    Raises:
        UserError: an option cannot be used, or the folder cannot be written to.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/examples"), help="folder to write")
    parser.add_argument("--count", type=int, default=6, help="number of triples")
    parser.add_argument("--size", type=int, default=64, help="sides of the images, pixels")
    parser.add_argument("--seed", type=int, default=7, help="of objects, scenes and poses")
    options = parser.parse_args(arguments)
    if options.count < 2 or options.size < 8:
        raise UserError("--count must be at least 2, --size at least 8")
    cases = make_benchmark(
        ToyWorld(DEFAULT_WORLD),
        seed=options.seed,
        image_size=options.size,
        exemplar_size=128,
        objects=options.count,
    )
    make_folder(options.out)
    lines = []
    for number, case in enumerate(cases):
        other = cases[(number + 1) % len(cases)]
        files = {"image": case.image, "mask": case.mask, "exemplar": other.exemplar}
        for kind, pixels in files.items():
            Image.fromarray(pixels).save(options.out / f"{number}_{kind}.png")
        lines.append(json.dumps({kind: f"{number}_{kind}.png" for kind in files} | {"name": str(number)}))
    (options.out / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(cases)} triples in {options.out}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
