"""Sources of annotated images: naming one, ``KIND:PATH`` or ``KIND:PATH@IMAGES``, and reading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pbe.data.sources.annotations import Annotations
from pbe.data.sources.coco import read_coco
from pbe.data.sources.masks import read_mask_folder
from pbe.data.sources.tables import read_csv, read_open_images
from pbe.data.sources.voc import read_voc
from pbe.data.sources.yolo import read_yolo
from pbe.errors import UserError

KINDS = ("open-images", "coco", "voc", "yolo", "csv", "masks")


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read."""

    split: str = "train"  # of Open Images, and of a YOLO set of splits
    masks: bool = False  # COCO: take segmentations, which then give the boxes
    zero_based: bool = False  # VOC: the first pixel is number 0
    relative: bool = False  # CSV: numbers are shares of width and height


def parse_source(text: str) -> tuple[str, Path, Path | None]:
    """Split KIND:PATH@IMAGES; the images may be left out."""
    kind, separator, rest = text.partition(":")
    if kind not in KINDS or not separator or not rest:
        raise UserError(
            f"source '{text}' is not KIND:PATH or KIND:PATH@IMAGES; KIND is one of {', '.join(KINDS)}, "
            "as in csv:boxes.csv@images"
        )
    whole = Path(rest).expanduser()
    cuts = [place for place, sign in enumerate(rest) if sign == "@" and 0 < place < len(rest) - 1]
    if whole.exists() or not cuts:
        return kind, whole, None
    parts = [(Path(rest[:cut]).expanduser(), Path(rest[cut + 1 :]).expanduser()) for cut in cuts]
    # An @ may belong to a name: what exists decides, else the last one parts.
    found = next(((path, images) for path, images in parts if path.exists() and images.exists()), None)
    path, images = found or next((part for part in reversed(parts) if part[0].exists()), parts[-1])
    return kind, path, images


def read_source(text: str, options: SourceOptions) -> Annotations:
    """Read the annotations of one source."""
    kind, path, images = parse_source(text)
    if kind == "open-images":
        return read_open_images(path, images, options.split)
    if kind == "voc":
        return read_voc(path, images, not options.zero_based)
    if kind == "yolo":
        return read_yolo(path, images, options.split)
    if kind == "masks":
        return read_mask_folder(path, images)
    if not path.is_file():
        reason = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"the annotation file '{path}' {reason}")
    if kind == "coco":
        return read_coco(path, images or path.parent, options.masks)
    return read_csv(path, images or path.parent, options.relative)
