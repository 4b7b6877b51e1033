"""``pbe fit``: the Gaussian mixture of QS."""

from __future__ import annotations

import sys
from pathlib import Path

from pbe.cli.arguments import Count, options
from pbe.errors import UserError
from pbe.files import check_file, expand_home


@options
class FitSettings:
    """Options of ``pbe fit``."""

    images: Path
    """folder of real images"""
    out: Path
    """file to write, .safetensors"""
    tower_weights: str
    """clip=FILE: weights of CLIP's image tower"""
    tower: str | None = None
    """architecture of the tower (default: ViT-B-32-quickgelu)"""
    components: Count = 20
    """number of Gaussians"""
    seed: int = 0
    """seed of the fit"""
    batch_size: Count = 32
    """images per batch"""
    device: str = "cpu"
    """device for the tower"""


def fit(*, settings: FitSettings) -> None:
    """Fit the Gaussian mixture of the quality score (QS) to the CLIP features of real images.

    pbe fit --images coco/test2017_512 --tower-weights clip=ViT-B-32.safetensors --out mixture.safetensors
    """
    role, separator, weights = settings.tower_weights.partition("=")
    if role != "clip" or not separator or not weights:
        raise UserError(f"--tower-weights is clip=FILE, not '{settings.tower_weights}'")
    if settings.out.suffix != ".safetensors":
        raise UserError(f"--out is '{settings.out}'; its name must end in .safetensors")
    import numpy as np
    from tqdm import tqdm

    from pbe.editing.offload import usable_device
    from pbe.evaluation.metrics.feature_scores import check_fit, fit_mixture
    from pbe.evaluation.metrics.sets import ImageFolder
    from pbe.evaluation.metrics.towers import load_tower

    images = ImageFolder(settings.images)
    check_fit(len(images.paths), settings.components, settings.seed)
    device = str(usable_device(settings.device, "--device"))
    check_file(settings.out, make=False)
    tower = load_tower("clip", settings.tower, expand_home(weights), device)
    check_file(settings.out)
    features = []
    with tqdm(total=len(images.paths), desc="features", file=sys.stderr, disable=None) as bar:
        for batch in images.batches(settings.batch_size):
            features.append(tower.whole(batch.edits))
            bar.update(len(batch.edits))
    card = {
        "feature_model": tower.spec.architecture,
        "weights_sha256": tower.sha256,
        "resize_filter": tower.whole_filter,
        "pictures": str(len(images.paths)),
        "pictures_sha256": images.digest.hexdigest(),
        "seed": str(settings.seed),
    }
    found = fit_mixture(np.concatenate(features), card, components=settings.components, seed=settings.seed)
    found.save(settings.out)
    print(f"{settings.out}: {len(found.weights)} Gaussians over {found.means.shape[1]} features")
