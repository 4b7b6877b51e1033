"""Numbers that others published on COCOEE, each with how sure it is; none was measured here.

They belong to all 3500 cases of COCOEE, to CLIP ViT-B/32 and to COCO test2017 as the real pictures. On
another benchmark they say nothing, and are not shown.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Status = Literal["published", "unverified"]
SEEN = "published: seen in the leaderboard of bcmi/Awesome-Generative-Image-Composition"
RECALLED = "unverified: recalled from the paper, which was not at hand"
MEANING: dict[Status, str] = {"published": SEEN, "unverified": RECALLED}
COLUMNS = ("FID", "QS", "CLIP score")
OURS = "Paint by Example (paper)"


@dataclass(frozen=True)
class Published:
    """A number of the paper's table, and whether it was seen where it is published."""

    value: float
    status: Status

    def __str__(self) -> str:
        """Show the number with its mark."""
        return f"{self.value:.2f} ({self.status})"


def _row(fid: float, quality: float, clip: float, *, seen: tuple[str, ...] = ()) -> dict[str, Published]:
    return {
        name: Published(value, "published" if name in seen else "unverified")
        for name, value in zip(COLUMNS, (fid, quality, clip), strict=True)
    }


# The released list of COCOEE's ids: how many there are, and how many lie above a number. Many are no ids of
# COCO, whose largest is 581929, so no benchmark that is built from COCO has them.
COCO_EE_CASES, COCO_EE_ABOVE = 3500, {581_929: 1638, 999_999: 1302}

# The paper's comparison on COCOEE: lower is better for FID, higher for the others.
TABLE: dict[str, dict[str, Published]] = {
    "Blended Diffusion (image)": _row(4.60, 67.14, 80.65),
    "Blended Diffusion (text)": _row(7.52, 55.89, 72.62),
    "DCCF": _row(3.78, 71.49, 82.18),
    "Stable Diffusion": _row(3.66, 73.20, 75.33),
    OURS: _row(3.18, 77.80, 84.97, seen=("FID", "QS")),
}
# Which column a score of the paper's family belongs to.
COLUMN_OF = {"clip-fid": "FID", "qs": "QS", "region-clip": "CLIP score"}
NOTE = (
    "Published numbers belong to the 3500 cases of COCOEE, with COCO test2017 as the real pictures. FID is a "
    "Fréchet distance of CLIP ViT-B/32 features, not of Inception's. "
    f"{SEEN[0].upper()}{SEEN[1:]}. {RECALLED[0].upper()}{RECALLED[1:]}."
)


def is_coco_ee(numbers: Collection[int]) -> bool:
    """Tell by the numbers of its cases whether a benchmark is all of the released COCOEE."""
    above = {bound: sum(number > bound for number in numbers) for bound in COCO_EE_ABOVE}
    return len(numbers) == COCO_EE_CASES and above == COCO_EE_ABOVE


def paper_number(score: str) -> Published | None:
    """Return the paper's own number for a score of the paper's family, None where there is none."""
    column = COLUMN_OF.get(score)
    return None if column is None else TABLE[OURS][column]
