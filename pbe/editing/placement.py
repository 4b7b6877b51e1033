"""Where a model works, on the whole picture or on the surroundings of the hole, and how that goes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from pbe.editing.batch.jobs import LONGEST
from pbe.editing.compositing import composite, to_unit
from pbe.editing.inputs import Batch
from pbe.editing.output import to_pictures
from pbe.editing.preprocess import (
    Size,
    check_count,
    check_number,
    reduce_mask,
    resize_picture,
    working_size,
)
from pbe.editing.problems import EditTypeError, EditValueError
from pbe.editing.region import Box, paste, region_box, seam

REGIONS = ("full", "mask")


@dataclass(frozen=True)
class Placement:
    """What a call asks for; the fields are those of ``PaintByExample.__call__``."""

    region: str
    height: int | None
    width: int | None
    margin: float
    feather: float | None
    preserve_background: bool

    def __post_init__(self) -> None:
        """Bring numbers of numpy, and sizes that are whole floats, to Python's int and float.

        Raises:
            EditTypeError, EditValueError: a setting of the wrong kind.
        """
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_count(name, getattr(self, name)))
        for name in ("margin", "feather"):
            if getattr(self, name) is not None or name == "margin":
                object.__setattr__(self, name, check_number(name, getattr(self, name)))
        if not isinstance(self.preserve_background, bool | np.bool_):
            kind = type(self.preserve_background).__name__
            raise EditTypeError(f"preserve_background: {kind}; it must be True or False")

    def check(self) -> None:
        """Refuse what has no meaning.

        Raises:
            EditValueError: an unknown region, a margin or a feather that is no length, too large a size.
        """
        if self.region not in REGIONS:
            raise EditValueError(f"no region '{self.region}'; there are: {', '.join(REGIONS)}")
        for name, value in (("margin", self.margin), ("feather", self.feather)):
            if value is not None and not 0.0 <= value <= LONGEST:
                raise EditValueError(f"{name} is {value}; it must lie between 0 and {LONGEST}")
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and side > LONGEST:
                raise EditValueError(f"{name} is {side}; it must be at most {LONGEST}")

    def resized(self, batch: Batch) -> Batch:
        """Return the batch at the height and width asked for; of a region they are the model's sizes."""
        height, width = batch.holes[0].shape
        size = (self.height or height, self.width or width)
        if self.region == "mask" or size == (height, width):
            return batch
        pictures = [resize_picture(picture, size) for picture in batch.pictures]
        return replace(batch, pictures=pictures, holes=[reduce_mask(hole, size) for hole in batch.holes])

    def view(self, batch: Batch, image_size: int, largest_side: int) -> View:
        """Return what the model is shown of each picture.

        Args:
            batch: the pictures and their holes.
            image_size: the model's training resolution.
            largest_side: see :func:`pbe.editing.preprocess.working_size`.
        """
        if self.region == "full":
            picture_size = batch.holes[0].shape[:2]
            asked = self.height is not None or self.width is not None
            size = picture_size if asked else working_size(picture_size, image_size, largest_side)
            return View(batch.pictures, batch.holes, size, None)
        size = (self.height or image_size, self.width or image_size)
        boxes = [region_box(hole, size, self.margin) for hole in batch.holes]
        pictures = [box.cut(picture) for box, picture in zip(boxes, batch.pictures, strict=True)]
        holes = [box.cut(hole) for box, hole in zip(boxes, batch.holes, strict=True)]
        return View(pictures, holes, size, boxes)


@dataclass(frozen=True)
class View:
    """What the model is shown.

    Attributes:
        pictures: whole pictures or parts of them, ``h w 3``.
        holes: bool ``h w`` of the same sizes.
        size: height and width at which the model works, before padding.
        boxes: where the parts lie; None for whole pictures.
    """

    pictures: Sequence[np.ndarray]
    holes: Sequence[np.ndarray]
    size: Size
    boxes: Sequence[Box] | None


def put_back(painted: Tensor, index: int, batch: Batch, view: View, placement: Placement) -> np.ndarray:
    """Return an edit at its picture's size, float32 ``h w 3`` in [0, 1].

    Args:
        painted: what the model made, ``(3, h, w)`` about [-1, 1], at the working size.
        index: number of the picture in the batch.
        batch: the pictures.
        view: what the model was shown.
        placement: what was asked for.
    """
    picture, hole = batch.pictures[index], batch.holes[index]
    if view.boxes is None:
        edit = _fitted(painted, hole.shape[:2])
        return composite(picture, edit, hole) if placement.preserve_background else edit
    box = view.boxes[index]
    edit = _fitted(painted, (box.height, box.width))
    share = seam(hole, box, view.size, keep_outside=placement.preserve_background, feather=placement.feather)
    return paste(to_unit(picture), edit, box, share)


def _fitted(painted: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """Resize ``(3, h, w)`` in [-1, 1] and return float32 ``h w 3`` clipped to [0, 1]."""
    if tuple(painted.shape[-2:]) != tuple(size):
        painted = F.interpolate(painted[None], tuple(size), mode="bicubic", antialias=True)[0]
    return to_pictures(painted[None])[0]
