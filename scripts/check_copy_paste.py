"""Show that copy-paste and layout scores tell copies, true objects and fills apart, on the toy benchmark.

python scripts/check_copy_paste.py
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from pbe.cli.main import run_command
from pbe.data.randomness import generator
from pbe.data.toy.scenes import DEFAULT_WORLD, ToyWorld
from pbe.evaluation.benchmark.toy import ToyCase, make_benchmark
from pbe.evaluation.metrics.bootstrap import auc
from pbe.evaluation.metrics.copy_paste import explained_shares, layout_copy, layout_true
from pbe.evaluation.metrics.towers import mask_bounds, region

BRIGHTER = 1.1
KINDS = ("pasted", "true", "inpainted", "grey")
LAYOUT_KINDS = ("stretched", "mirrored", "true", "inpainted")


def paste(case: ToyCase, turn: float, scale: float, flip: float, shift: float) -> np.ndarray:
    """Return the case's scene with its exemplar warped over the masked region and a tenth brighter.

    Args:
        case: of the toy benchmark.
        turn: degrees.
        scale: below 1 enlarges the exemplar; 1 shows the whole of it.
        flip: -1 mirrors it, 1 does not.
        shift: along both axes, half sides of the exemplar.
    """
    x1, y1, x2, y2 = mask_bounds(case.mask)
    cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    linear = scale * np.array([[flip * cosine, -flip * sine], [sine, cosine]])
    axes = [(np.arange(n) + 0.5) * 2 / n - 1 for n in (x2 - x1, y2 - y1)]
    places = np.stack(np.meshgrid(*axes), axis=-1) @ linear.T + shift
    side = np.array(case.exemplar.shape[1::-1])
    at = ((places + 1) * side / 2 - 0.5).astype(np.float32)
    x, y = np.ascontiguousarray(at[..., 0]), np.ascontiguousarray(at[..., 1])
    shown = cv2.remap(case.exemplar, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    edit = case.image.copy()
    edit[y1:y2, x1:x2] = np.clip(shown * BRIGHTER, 0, 255)
    return edit


def paste_at_random(case: ToyCase, seed: int) -> np.ndarray:
    """Return :func:`paste` turned up to 25 degrees, scaled by 0.8 to 1.05, a little shifted, or mirrored."""
    rng = generator(seed, "paste", case.index)
    flip = -1.0 if rng.random() < 0.5 else 1.0
    return paste(case, rng.uniform(-25, 25), rng.uniform(0.8, 1.05), flip, rng.uniform(-0.1, 0.1))


def inpaint(case: ToyCase) -> np.ndarray:
    """Return the scene with its masked region filled by OpenCV."""
    return cv2.inpaint(case.image, (case.mask > 127).astype(np.uint8), 3, cv2.INPAINT_TELEA)


def shares_by_kind(cases: Sequence[ToyCase], seed: int) -> dict[str, np.ndarray]:
    """Return the explained shares ``(n,)`` of each of :data:`KINDS`."""
    pictures = {
        "pasted": [paste_at_random(case, seed) for case in cases],
        "true": [case.image for case in cases],
        "inpainted": [inpaint(case) for case in cases],
        "grey": [case.masked for case in cases],
    }
    masks, exemplars = [case.mask for case in cases], [case.exemplar for case in cases]
    return {kind: explained_shares(pictures[kind], masks, exemplars) for kind in KINDS}


def layouts_by_kind(cases: Sequence[ToyCase]) -> dict[str, np.ndarray]:
    """Return ``layout-copy`` and ``layout-true``, ``(n, 2)``, of each of :data:`LAYOUT_KINDS`.

    ``stretched`` has the exemplar over the masked region as it is, ``mirrored`` its mirror image.
    """
    pictures = {
        "stretched": [paste(case, 0.0, 1.0, 1.0, 0.0) for case in cases],
        "mirrored": [paste(case, 0.0, 1.0, -1.0, 0.0) for case in cases],
        "true": [case.image for case in cases],
        "inpainted": [inpaint(case) for case in cases],
    }

    def both(case: ToyCase, edit: np.ndarray) -> tuple[float, float]:
        copied = layout_copy(region(edit, case.mask), case.exemplar)
        return copied, layout_true(case.image, edit, case.mask)

    return {
        kind: np.array([both(case, edit) for case, edit in zip(cases, pictures[kind], strict=True)])
        for kind in LAYOUT_KINDS
    }


def layout_table(layouts: dict[str, np.ndarray]) -> str:
    """Return the means and their standard errors as Markdown."""
    lines = ["| region | layout-copy | layout-true |", "|---|---|---|"]
    for kind, values in layouts.items():
        errors = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else [math.nan] * 2
        shown = [f"{mean:.2f} ± {error:.2f}" for mean, error in zip(values.mean(axis=0), errors, strict=True)]
        lines.append(f"| {kind} | {' | '.join(shown)} |")
    return "\n".join(lines)


def table(shares: dict[str, np.ndarray]) -> str:
    """Return the distributions and how well they are told apart, as Markdown."""
    lines = ["| region | mean | 10 % | median | 90 % |", "|---|---|---|---|---|"]
    for kind, values in shares.items():
        numbers = [values.mean(), *np.quantile(values, [0.1, 0.5, 0.9])]
        lines.append(f"| {kind} | {' | '.join(f'{number:.2f}' for number in numbers)} |")
    pairs = [("pasted", "true"), ("true", "inpainted"), ("true", "grey")]
    apart = [f"{a} over {b} {auc(shares[a], shares[b]):.3f}" for a, b in pairs]
    return "\n".join([*lines, "", f"AUC: {', '.join(apart)} ({len(shares['true'])} cases)"])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objects", type=int, default=0, help="test objects to use; 0 means all of them")
    parser.add_argument("--seed", type=int, default=0, help="of the benchmark and of the warps")
    parser.add_argument("--image-size", type=int, default=64, help="of scenes and exemplars, pixels")
    parser.add_argument("--world", type=Path, default=DEFAULT_WORLD, help="archive of objects and panoramas")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""

    def body() -> None:
        options = parse(arguments)
        size, world = options.image_size, ToyWorld(options.world)
        cases = make_benchmark(
            world, seed=options.seed, image_size=size, exemplar_size=size, objects=options.objects
        )
        print(table(shares_by_kind(cases, options.seed)))
        print(f"\n{layout_table(layouts_by_kind(cases))}")

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
