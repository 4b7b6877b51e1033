"""Write example triples (picture, mask, exemplar of another object) and ``pairs.jsonl`` for sample.py.

python scripts/make_examples.py --out data/examples
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from pbe.data.toy_world import DEFAULT_WORLD, ToyWorld
from pbe.errors import UserError
from pbe.evaluation.benchmark import make_benchmark


def main(argv: list[str] | None = None) -> int:
    """Render the triples and write them as PNG files. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/examples"), help="folder to write")
    parser.add_argument("--count", type=int, default=6, help="number of triples")
    parser.add_argument("--size", type=int, default=64, help="sides of the pictures, pixels")
    parser.add_argument("--seed", type=int, default=7, help="of objects, scenes and poses")
    options = parser.parse_args(argv)
    try:
        cases = make_benchmark(
            ToyWorld(DEFAULT_WORLD),
            seed=options.seed,
            image_size=options.size,
            exemplar_size=128,
            objects=options.count,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, case in enumerate(cases):
        other = cases[(number + 1) % len(cases)]
        files = {"image": case.image, "mask": case.mask, "exemplar": other.exemplar}
        for kind, pixels in files.items():
            Image.fromarray(pixels).save(options.out / f"{number}_{kind}.png")
        lines.append(json.dumps({kind: f"{number}_{kind}.png" for kind in files} | {"name": str(number)}))
    (options.out / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(cases)} triples in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
