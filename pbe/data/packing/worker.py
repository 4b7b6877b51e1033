"""Packing one shard: a task that depends on its part of the plan and on the images, and on nothing else.

The same plan and images give the same bytes, whichever machine runs the task and however often it was
interrupted. The index appears first, then the shard, then the record that the task is done.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from pbe.data.packing.duplicates import check_and_hash
from pbe.data.packing.plan import (
    ASPECT,
    LARGE_AREA,
    NO_AREA,
    NO_BOX_LEFT,
    OUTSIDE,
    SHORT_SIDE,
    SMALL_AREA,
    PackSettings,
    load_task,
)
from pbe.data.packing.records import EXTENSIONS, IndexBuilder, Tally, box_text, write_whole
from pbe.data.samples.crops import resize_area
from pbe.data.samples.decode import TINY, UnusableImageError, decode_image
from pbe.data.samples.masks import encode_rle
from pbe.data.shards.format import ShardWriter, digest, new_shard
from pbe.data.sources.annotations import BAD_NUMBER, CORNERS, flag_names
from pbe.data.sources.image_files import (
    CANNOT_DECODE,
    ImageHeader,
    UnreadableImageError,
    first_frame,
    inspect_image,
    turn_boxes,
    turn_image,
)
from pbe.data.sources.masks import BadMaskError, load_mask, mask_box

UNREADABLE = "unreadable"
OTHER_SIZE = "annotated for an image of another size"
TURNED = "boxes turned with the EXIF orientation"
ON_TRUST = "EXIF orientation: the frame of the boxes was taken on trust"


class DroppedError(Exception):
    """An image or box is dropped; the text is the reason it is counted under."""


@dataclass(frozen=True)
class KeptBox:
    """A box that is kept, in pixels as displayed, with its mask (uint8 ``h w``) if it has one."""

    corners: tuple[float, float, float, float]
    label: int
    flags: frozenset[str]
    mask: np.ndarray | None = None


def _frame(header: ImageHeader, annotated: tuple[int | None, int | None], trust: str) -> tuple[str, bool]:
    """Return the frame that the boxes were drawn in and whether that had to be taken on trust."""
    if header.orientation == 1 and annotated in ((None, None), header.stored_size):
        return "displayed", False
    fits = {"displayed": header.displayed_size, "stored": header.stored_size}
    frames = [frame for frame, size in fits.items() if annotated in ((None, None), size)]
    if not frames:
        raise DroppedError(OTHER_SIZE)
    return (trust, True) if len(frames) > 1 else (frames[0], False)


def _check_box(box: Sequence[float], width: int, height: int, settings: PackSettings) -> None:
    """Raise a DroppedError for a box, x1 y1 x2 y2 clipped to its image, that the settings do not want."""
    across, down = box[2] - box[0], box[3] - box[1]
    share = across * down / (width * height)
    if share < settings.min_area:
        raise DroppedError(SMALL_AREA)
    if share > settings.max_area:
        raise DroppedError(LARGE_AREA)
    if min(across, down) < settings.min_side:
        raise DroppedError(SHORT_SIDE)
    if settings.max_aspect and max(across, down) > settings.max_aspect * min(across, down):
        raise DroppedError(ASPECT)


def needs_encoding(header: ImageHeader, max_side: int) -> bool:
    """Whether an image has to be encoded again: a format that shards do not hold, an animation, too long."""
    return not header.extension or header.frames > 1 or bool(max_side and max(header.stored_size) > max_side)


def encode_again(encoded: bytes, header: ImageHeader, max_side: int, quality: int) -> tuple[bytes, str]:
    """Return an image that fits, upright, and its extension: PNG for what was lossless, else JPEG.

    ``max_side`` is the longest side of the result in pixels, 0 for no limit; shrinking averages areas.

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    try:
        plain = header.extension and header.frames == 1
        image = decode_image(encoded) if plain else first_frame(encoded)
    except UnusableImageError as error:
        raise UnreadableImageError(CANNOT_DECODE) from error
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    height, width = image.shape[:2]
    scale = max_side / max(width, height) if max_side else 1.0
    if scale < 1:
        image = resize_area(image, max(1, round(width * scale)), max(1, round(height * scale)))
    extension = "jpg" if header.extension in ("jpg", "webp") else "png"
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if extension == "jpg" else []
    return cv2.imencode(f".{extension}", image, options)[1].tobytes(), extension


class ImagePacker:
    """Turns images of a plan into members of a shard and rows of its index, counting what happens."""

    def __init__(self, labels: Sequence[str], settings: PackSettings, shard: ShardWriter) -> None:
        self.labels, self.settings, self.shard = labels, settings, shard
        self.tally, self.index = Tally(), IndexBuilder()

    def pack_all(self, images: pl.DataFrame, boxes: pl.DataFrame) -> None:
        """Pack some images of the plan, with ``box_end``, and their boxes."""
        rows = boxes.to_dicts()
        start = 0
        for row in images.iter_rows(named=True):
            self._pack_or_count(row, rows[start : row["box_end"]])
            start = row["box_end"]

    def _pack_or_count(self, row: dict[str, Any], boxes: Sequence[dict[str, Any]]) -> None:
        before = self.tally.dropped_boxes.total()
        try:
            self._pack(row, boxes)
            return
        except UnreadableImageError as error:
            reason = f"{UNREADABLE}: {error}"
        except DroppedError as error:
            reason = str(error)
        lost = self.tally.dropped_boxes.total() - before
        self.tally.drop(reason, len(boxes) - lost, row["name"])

    def _pack(self, row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        timed, settings = self.tally.timed, self.settings
        with timed("read"):
            try:
                encoded = Path(row["path"]).read_bytes()
            except OSError as error:
                raise UnreadableImageError(f"cannot be opened ({error.strerror})") from error
        with timed("header"):
            header = inspect_image(encoded)
        if min(header.stored_size) < 2:
            raise DroppedError(TINY)
        frame, on_trust = _frame(header, (row["width"], row["height"]), settings.exif_frame)
        turned = frame == "stored" and header.orientation != 1
        with timed("boxes"):
            kept = self._boxes(row["name"], rows, header, turned)
        if not kept:
            raise DroppedError(NO_BOX_LEFT)
        fingerprint = 0
        if settings.perceptual:
            with timed("decode and perceptual hash"):
                fingerprint = check_and_hash(encoded, header)
        size, extension = header.displayed_size, header.extension
        if needs_encoding(header, settings.max_side):
            with timed("encode again"):
                encoded, extension = encode_again(encoded, header, settings.max_side, settings.quality)
                why = "too long" if header.extension else "a format that shards do not hold"
                self.tally.events[f"encoded again: {'animated' if header.frames > 1 else why}"] += 1
                old, size = size, inspect_image(encoded).displayed_size
                kept = _scaled(kept, old, size)
        self.tally.events[TURNED] += turned
        self.tally.events[ON_TRUST] += on_trust
        with timed("hash and write"):
            self._write(row, encoded, extension, size, kept, fingerprint)

    def _boxes(
        self, name: str, rows: Sequence[dict[str, Any]], header: ImageHeader, turned: bool
    ) -> list[KeptBox]:
        """Return the boxes of an image that are kept, as displayed; the others are counted."""
        kept = []
        for row in rows:
            try:
                kept.append(self._box(row, header, turned))
            except (BadMaskError, DroppedError) as error:
                self.tally.drop_box(str(error), box_text(name, row, self.labels[row["label"]]))
        return kept

    def _box(self, row: dict[str, Any], header: ImageHeader, turned: bool) -> KeptBox:
        """Return a box as displayed; ``turned`` says that it was drawn in the stored frame, which differs."""
        size = header.stored_size if turned else header.displayed_size
        mask = None
        if row["mask"]:
            loaded = load_mask(row["mask"], *size)
            if loaded.read_by:
                self.tally.events[f"mask read by {loaded.read_by}"] += 1
            mask, numbers = loaded.pixels, mask_box(loaded.pixels)
        else:
            across, down = size if row["relative"] else (1, 1)
            x1, y1, x2, y2 = (math.nan if row[name] is None else row[name] for name in CORNERS)
            numbers = (x1 * across, y1 * down, x2 * across, y2 * down)
        corners = np.array([numbers], np.float64)
        if not np.isfinite(corners).all():
            raise DroppedError(BAD_NUMBER)
        if turned:
            corners = turn_boxes(corners, *header.stored_size, header.orientation)
            mask = turn_image(mask, header.orientation) if mask is not None else None
        width, height = header.displayed_size
        x1, y1, x2, y2 = corners[0].tolist()
        if x2 <= x1 or y2 <= y1:
            raise DroppedError(NO_AREA)
        box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        if box[2] <= box[0] or box[3] <= box[1]:
            raise DroppedError(OUTSIDE)
        _check_box(box, width, height, self.settings)
        return KeptBox(box, row["label"], flag_names(row["flags"]), mask)

    def _write(
        self,
        row: dict[str, Any],
        encoded: bytes,
        extension: str,
        size: tuple[int, int],
        kept: Sequence[KeptBox],
        fingerprint: int,
    ) -> None:
        key, boxes = row["key"], [box.corners for box in kept]
        picture = self.shard.add(f"{key}.{extension}", encoded)
        annotation = self.shard.add(f"{key}.json", self._annotation(row, size, kept))
        self.index.add(
            picture_offset=picture[0],
            picture_size=picture[1],
            json_offset=annotation[0],
            json_size=annotation[1],
            width=size[0],
            height=size[1],
            extension=EXTENSIONS.index(extension),
            key_bytes=key.encode(),
            boxes=boxes,
            labels=[box.label for box in kept],
            picture_hash=digest(encoded),
            perceptual_hash=fingerprint,
            has_mask=[box.mask is not None for box in kept],
        )
        self.tally.keep(np.array(boxes), [box.label for box in kept], *size)

    def _annotation(self, row: dict[str, Any], size: tuple[int, int], kept: Sequence[KeptBox]) -> bytes:
        boxes = []
        for box in kept:
            fields: dict[str, Any] = {"xyxy": list(box.corners), "label": self.labels[box.label]}
            fields.update(dict.fromkeys(sorted(box.flags), True))
            if box.mask is not None:
                fields["mask"] = encode_rle(box.mask)
            boxes.append(fields)
        told = {name: row[name] for name in ("licence", "author") if row[name]}
        annotation = {"width": size[0], "height": size[1], "boxes": boxes, "source": row["name"], **told}
        return json.dumps(annotation, ensure_ascii=False, separators=(",", ":")).encode()


def _scaled(boxes: list[KeptBox], old: tuple[int, int], new: tuple[int, int]) -> list[KeptBox]:
    """Return boxes of an image of the old size as those of the new one."""
    if old == new:
        return boxes
    across, down = new[0] / old[0], new[1] / old[1]
    scaled = []
    for box in boxes:
        x1, y1, x2, y2 = box.corners
        corners = x1 * across, y1 * down, min(x2 * across, new[0]), min(y2 * down, new[1])
        mask = box.mask
        if mask is not None:
            mask = cv2.resize(mask, new, interpolation=cv2.INTER_NEAREST_EXACT)
        scaled.append(KeptBox(corners, box.label, box.flags, mask))
    return scaled


def part_path(plan: Path, number: int) -> Path:
    """Return the record that shard ``number`` of a plan is done."""
    return plan / f"part-{number:06d}.json"


def pack_shard(plan: Path, out: Path, number: int, labels: Sequence[str], settings: PackSettings) -> int:
    """Pack one shard and record that it is done; returns the number of images of the plan it dealt with.

    A shard all of whose images are dropped is not written.

    Args:
        plan: folder of the plan; the record goes there.
        out: folder of the shards.
        number: of the shard.
        labels: of the plan.
        settings: of the plan.
    """
    cv2.setNumThreads(1)
    listed: dict[str, Any] | None = None
    with new_shard(out / f"shard-{number:06d}.tar") as shard:
        packer = ImagePacker(labels, settings, shard)
        packer.pack_all(*load_task(plan, number))
        tally = packer.tally
        if tally.pictures:
            index = shard.write_index(packer.index.arrays())
            listed = index | {"pictures": tally.pictures, "boxes": tally.boxes}
    tally.events = +tally.events
    part = {"shard": listed, "tally": tally.to_dict()}
    write_whole(part_path(plan, number), json.dumps(part, sort_keys=True))
    return tally.pictures + tally.dropped_pictures.total()
