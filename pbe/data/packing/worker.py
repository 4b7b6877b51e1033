"""Packing one shard: a task that depends on its part of the plan and on the pictures, and on nothing else.

The same plan and pictures give the same bytes, whichever machine runs the task and however often it was
interrupted. The index appears first, then the shard, then the record that the task is done.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np

from pbe.data.packing.index import IndexEntry, digest, make_table, write_whole
from pbe.data.packing.pixels import check_and_hash, encode_again, needs_encoding
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
from pbe.data.packing.tally import Tally, box_text
from pbe.data.samples.rle import encode_rle
from pbe.data.shards.index import HASH_BYTES
from pbe.data.sources.annotations import BAD_NUMBER, flag_names
from pbe.data.sources.image_files import (
    ImageHeader,
    UnreadableImageError,
    inspect_image,
    turn_boxes,
    turn_image,
)
from pbe.data.sources.masks import BadMaskError, load_mask, mask_box
from pbe.files import HashingFile

UNREADABLE = "unreadable"
OTHER_SIZE = "annotated for an image of another size"
TINY = "image under 2 px"
TURNED = "boxes turned with the EXIF orientation"
ON_TRUST = "EXIF orientation: the frame of the boxes was taken on trust"
BLOCK = tarfile.BLOCKSIZE


class DroppedPictureError(Exception):
    """A picture is dropped; the text is the reason it is counted under."""


@dataclass(frozen=True)
class KeptBox:
    """A box that is kept, in pixels as displayed, with its mask (uint8 ``h w``) if it has one."""

    corners: tuple[float, float, float, float]
    label: int
    flags: frozenset[str]
    mask: np.ndarray | None = None


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Write a member and return its data's offset and size. Fixed owner and time: same data, same bytes."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    member.uname = member.gname = "pbe"
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - -(-len(data) // BLOCK) * BLOCK, len(data)


def _frame(header: ImageHeader, annotated: tuple[int | None, int | None], trust: str) -> tuple[str, bool]:
    """Return the frame that the boxes were drawn in and whether that had to be taken on trust."""
    if header.orientation == 1 and annotated in ((None, None), header.stored_size):
        return "displayed", False
    if annotated == (None, None):
        return trust, True
    fits = [annotated == header.displayed_size, annotated == header.stored_size]
    if not any(fits):
        raise DroppedPictureError(OTHER_SIZE)
    if all(fits):
        return trust, True
    return ("displayed" if fits[0] else "stored"), False


def box_problem(box: Sequence[float], width: int, height: int, settings: PackSettings) -> str:
    """Return why a box, clipped to its picture, is not wanted; empty if it is.

    Args:
        box: x1 y1 x2 y2 in pixels, inside the picture.
        width: of the picture.
        height: of the picture.
        settings: the limits.
    """
    across, down = box[2] - box[0], box[3] - box[1]
    share = across * down / (width * height)
    if share < settings.min_area:
        return SMALL_AREA
    if share > settings.max_area:
        return LARGE_AREA
    if min(across, down) < settings.min_side:
        return SHORT_SIDE
    if settings.max_aspect and max(across, down) > settings.max_aspect * min(across, down):
        return ASPECT
    return ""


class PicturePacker:
    """Turns pictures of a plan into members of a shard, counting what happens.

    Args:
        labels: of the plan.
        settings: of the plan.
        tally: is added to.
    """

    def __init__(self, labels: Sequence[str], settings: PackSettings, tally: Tally) -> None:
        self.labels, self.settings, self.tally = labels, settings, tally

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.tally.spend(stage, time.perf_counter() - start)

    def boxes(
        self, name: str, rows: Sequence[dict[str, Any]], header: ImageHeader, stored: bool
    ) -> list[KeptBox]:
        """Return the boxes of a picture that are kept, as displayed; the others are counted."""
        frame_size = header.stored_size if stored else header.displayed_size
        kept = []
        for row in rows:
            try:
                kept.append(self._box(row, header, stored, frame_size))
            except (BadMaskError, DroppedPictureError) as error:
                self.tally.drop_box(str(error), box_text(name, row, self.labels[row["label"]]))
        return kept

    def _box(self, row: dict[str, Any], header: ImageHeader, stored: bool, size: tuple[int, int]) -> KeptBox:
        across, down = size if row["relative"] else (1, 1)
        loaded = load_mask(row["mask"], *size) if row["mask"] else None
        mask = loaded.pixels if loaded else None
        if loaded and loaded.read_by:
            self.tally.events[f"mask read by {loaded.read_by}"] += 1
        if mask is not None:
            corners = np.array([mask_box(mask)], np.float64)
        else:
            factors = (across, down, across, down)
            numbers = [math.nan if row[name] is None else row[name] for name in ("x1", "y1", "x2", "y2")]
            corners = np.array([numbers], np.float64) * np.array(factors, np.float64)
        if not np.isfinite(corners).all():
            raise DroppedPictureError(BAD_NUMBER)
        if stored:
            corners = turn_boxes(corners, *header.stored_size, header.orientation)
            mask = turn_image(mask, header.orientation) if mask is not None else None
        width, height = header.displayed_size
        x1, y1, x2, y2 = corners[0].tolist()
        if x2 <= x1 or y2 <= y1:
            raise DroppedPictureError(NO_AREA)
        box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        if box[2] <= box[0] or box[3] <= box[1]:
            raise DroppedPictureError(OUTSIDE)
        problem = box_problem(box, width, height, self.settings)
        if problem:
            raise DroppedPictureError(problem)
        return KeptBox(box, row["label"], flag_names(row["flags"]), mask)

    def pack(
        self, row: dict[str, Any], boxes: Sequence[dict[str, Any]], tar: tarfile.TarFile
    ) -> IndexEntry | None:
        """Put a picture into a shard, or count why not."""
        before = sum(self.tally.dropped_boxes.values())
        try:
            return self._pack(row, boxes, tar)
        except UnreadableImageError as error:
            reason = f"{UNREADABLE}: {error}"
        except DroppedPictureError as error:
            reason = str(error)
        lost = sum(self.tally.dropped_boxes.values()) - before
        self.tally.drop(reason, len(boxes) - lost, row["name"])
        return None

    def _read(self, row: dict[str, Any]) -> tuple[bytes, ImageHeader]:
        with self._timed("read"):
            try:
                encoded = Path(row["path"]).read_bytes()
            except OSError as error:
                raise UnreadableImageError(f"cannot be opened ({error.strerror})") from error
        with self._timed("header"):
            return encoded, inspect_image(encoded)

    def _pack(self, row: dict[str, Any], rows: Sequence[dict[str, Any]], tar: tarfile.TarFile) -> IndexEntry:
        encoded, header = self._read(row)
        if min(header.stored_size) < 2:
            raise DroppedPictureError(TINY)
        frame, on_trust = _frame(header, (row["width"], row["height"]), self.settings.exif_frame)
        with self._timed("boxes"):
            turned = frame == "stored" and header.orientation != 1
            kept = self.boxes(row["name"], rows, header, turned)
        if not kept:
            raise DroppedPictureError(NO_BOX_LEFT)
        fingerprint = 0
        if self.settings.perceptual:
            with self._timed("decode and perceptual hash"):
                fingerprint = check_and_hash(encoded, header)
        size, extension = header.displayed_size, header.extension
        if needs_encoding(header, self.settings.max_side):
            with self._timed("encode again"):
                encoded, extension, size, kept = self._shrink(encoded, header, kept)
        self.tally.events[TURNED] += turned
        self.tally.events[ON_TRUST] += on_trust
        with self._timed("hash and write"):
            return self._write(row, encoded, extension, size, kept, fingerprint, tar)

    def _shrink(
        self, encoded: bytes, header: ImageHeader, boxes: list[KeptBox]
    ) -> tuple[bytes, str, tuple[int, int], list[KeptBox]]:
        encoded, extension = encode_again(encoded, header, self.settings.max_side, self.settings.quality)
        why = "too long" if header.extension else "a format that shards do not hold"
        self.tally.events[f"encoded again: {'animated' if header.frames > 1 else why}"] += 1
        size = inspect_image(encoded).displayed_size
        old = header.displayed_size
        if size == old:
            return encoded, extension, size, boxes
        across, down = size[0] / old[0], size[1] / old[1]
        scaled = []
        for box in boxes:
            x1, y1, x2, y2 = box.corners
            corners = x1 * across, y1 * down, min(x2 * across, size[0]), min(y2 * down, size[1])
            mask = box.mask
            if mask is not None:
                mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
            scaled.append(KeptBox(corners, box.label, box.flags, mask))
        return encoded, extension, size, scaled

    def _write(
        self,
        row: dict[str, Any],
        encoded: bytes,
        extension: str,
        size: tuple[int, int],
        kept: Sequence[KeptBox],
        fingerprint: int,
        tar: tarfile.TarFile,
    ) -> IndexEntry:
        annotation = json.dumps(self._annotation(row, size, kept), ensure_ascii=False, separators=(",", ":"))
        entry = IndexEntry(
            key=row["key"],
            picture=_add(tar, f"{row['key']}.{extension}", encoded),
            annotation=_add(tar, f"{row['key']}.json", annotation.encode()),
            size=size,
            extension=extension,
            boxes=[box.corners for box in kept],
            labels=[box.label for box in kept],
            masks=[box.mask is not None for box in kept],
            picture_hash=digest(encoded),
            perceptual_hash=fingerprint,
        )
        self.tally.keep(np.array(entry.boxes), entry.labels, *size)
        return entry

    def _annotation(
        self, row: dict[str, Any], size: tuple[int, int], kept: Sequence[KeptBox]
    ) -> dict[str, Any]:
        boxes = []
        for box in kept:
            fields: dict[str, Any] = {"xyxy": list(box.corners), "label": self.labels[box.label]}
            fields.update(dict.fromkeys(sorted(box.flags), True))
            if box.mask is not None:
                fields["mask"] = encode_rle(box.mask)
            boxes.append(fields)
        told = {name: row[name] for name in ("licence", "author") if row[name]}
        return {"width": size[0], "height": size[1], "boxes": boxes, "source": row["name"], **told}


def shard_name(number: int) -> str:
    """Return the name of shard ``number``."""
    return f"shard-{number:06d}.tar"


def _pack_rows(
    packer: PicturePacker, plan: Path, number: int, out: IO[bytes]
) -> tuple[list[IndexEntry], HashingFile]:
    pictures, boxes = load_task(plan, number)
    rows = boxes.to_dicts()
    hashing = HashingFile(out, hashlib.blake2b(digest_size=HASH_BYTES))
    entries = []
    start = 0
    with tarfile.open(fileobj=hashing, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
        for row in pictures.iter_rows(named=True):
            entry = packer.pack(row, rows[start : row["box_end"]], tar)
            entries += [entry] if entry else []
            start = row["box_end"]
    return entries, hashing


def pack_shard(plan: Path, out: Path, number: int, labels: Sequence[str], settings: PackSettings) -> int:
    """Pack one shard and record that it is done; returns the number of pictures of the plan it dealt with.

    A shard all of whose pictures are dropped is not written.

    Args:
        plan: folder of the plan; the record goes to ``part-NUMBER.json`` in it.
        out: folder of the shards.
        number: of the shard.
        labels: of the plan.
        settings: of the plan.

    Raises:
        OSError: the shard cannot be written.
    """
    cv2.setNumThreads(1)
    tally = Tally()
    packer = PicturePacker(labels, settings, tally)
    path = out / shard_name(number)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shard: dict[str, Any] | None = None
    try:
        with temporary.open("wb") as file:
            entries, hashing = _pack_rows(packer, plan, number, file)
            file.flush()
            os.fsync(file.fileno())
        if entries:
            index = make_table(entries).to_bytes()
            index_path = path.with_suffix(".index.npz")
            write_whole(index_path, index)
            os.replace(temporary, path)
            shard = {
                "name": path.name,
                "bytes": hashing.size,
                "pictures": tally.pictures,
                "boxes": tally.boxes,
                "blake2b": hashing.hash.hexdigest(),
                "index": index_path.name,
                "index_bytes": len(index),
                "index_blake2b": digest(index).hex(),
            }
    finally:
        temporary.unlink(missing_ok=True)
    tally.events = +tally.events
    part = {"shard": shard, "tally": tally.to_dict()}
    write_whole(plan / f"part-{number:06d}.json", json.dumps(part, sort_keys=True).encode())
    return tally.pictures + sum(tally.dropped_pictures.values())
