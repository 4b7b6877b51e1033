"""Fit the Gaussian mixture of QS to the CLIP features of real pictures, and write it as safetensors.

python scripts/fit_mixture.py --pictures coco/test2017_512 --tower-weights clip=ViT-B-32.safetensors \
    --out mixture.safetensors
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pbe.cli.parser import Parser, run_command
from pbe.editing.pretrained import usable_device
from pbe.errors import UserError
from pbe.evaluation.metrics.quality import COMPONENTS, Mixture, check_fit, fit_mixture
from pbe.evaluation.metrics.sets import ImageFolder
from pbe.evaluation.metrics.towers import load_tower
from pbe.files import check_file, expand_home


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of real pictures")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument(
        "--tower-weights", required=True, metavar="clip=FILE", help="weights of CLIP's image tower"
    )
    parser.add_argument("--tower", help="another architecture than ViT-B-32-quickgelu")
    parser.add_argument("--components", type=int, default=COMPONENTS, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the start of the fit")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures at a time")
    parser.add_argument("--device", default="cpu", help="where the tower runs (default %(default)s)")
    return parser.parse_args(arguments)


def fit(options: argparse.Namespace) -> Mixture:
    """Read the pictures, fit and write; return the mixture.

    Raises:
        UserError: an option, a picture or the weights cannot be used.
    """
    role, separator, weights = options.tower_weights.partition("=")
    if role != "clip" or not separator or not weights:
        raise UserError(f"--tower-weights is clip=FILE, not '{options.tower_weights}'")
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out is '{options.out}'; its name must end in .safetensors")
    if options.components < 1 or options.batch_size < 1:
        raise UserError("--components and --batch-size must be at least 1")
    pictures = ImageFolder(options.pictures)
    check_fit(len(pictures.paths), options.components, options.seed)
    device = str(usable_device(options.device, "--device"))
    check_file(options.out, make=False)
    tower = load_tower("clip", options.tower, expand_home(weights), device)
    check_file(options.out)
    bar = tqdm(total=len(pictures.paths), desc="features", file=sys.stderr, disable=None)
    features = []
    for batch in pictures.batches(options.batch_size):
        features.append(tower.whole(batch.edits))
        bar.update(len(batch.edits))
    bar.close()
    card = {
        "feature_model": tower.spec.architecture,
        "weights_sha256": tower.sha256,
        "resize_filter": tower.whole_filter,
        "pictures": str(len(pictures.paths)),
        "pictures_sha256": pictures.digest.hexdigest(),
        "seed": str(options.seed),
    }
    found = fit_mixture(np.concatenate(features), card, components=options.components, seed=options.seed)
    found.save(options.out)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""

    def body() -> None:
        options = parse(arguments)
        found = fit(options)
        print(f"{options.out}: {len(found.weights)} Gaussians over {found.means.shape[1]} features")

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
