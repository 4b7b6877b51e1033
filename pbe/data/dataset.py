"""Training samples out of shards, by a global counter; images that are no use are skipped and counted.

``sample_index = epoch * len(dataset) + position``. The order of an epoch is a permutation keyed by the
seed and the epoch, and every draw of a sample is keyed by the seed, the epoch and the image: workers,
ranks, batch sizes and restarts change nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from pbe.config import DataConfig
from pbe.data.randomness import generator, permutation, shuffled
from pbe.data.samples.crops import Box
from pbe.data.samples.decode import (
    AREA,
    BAD_ANNOTATION,
    FAULTS,
    NO_BOX,
    TINY,
    WITHOUT_BOXES,
    UnusableImageError,
    check_hash,
    choose_reduction,
    decode_image,
    reduced_box,
    unusable,
)
from pbe.data.samples.masks import ObjectMask, read_object_mask
from pbe.data.samples.sample import TrainingSample, choose_box, make_sample
from pbe.data.shards.archive import ShardImages, parse_annotation
from pbe.data.shards.index import ImageRow
from pbe.data.transport import Allocator, allocate
from pbe.errors import UserError

MIN_BOX_SIDE = 2.0
MAX_SIDE = 2**31 - 1  # no image format goes beyond
MAX_REPLACEMENTS = 200
PICTURES = ("image", "mask", "exemplar", "valid")


@dataclass(frozen=True)
class AnnotatedImage:
    """An image's key, its pixels (uint8 ``h w 3``, RGB) and its usable boxes, clipped to the image."""

    key: str
    image: np.ndarray
    boxes: list[Box]


@dataclass(frozen=True)
class DatasetItem:
    """What a worker hands back: the sample, or None, and what was counted on the way."""

    index: int
    key: str
    sample: TrainingSample | None
    counts: Counter[str]


def usable_boxes(boxes: Sequence[Box], width: int, height: int, config: DataConfig) -> list[Box]:
    """Clip boxes to an image and keep those of the wanted relative area.

    They are in pixels, and may reach beyond the image, be empty or hold NaN.

    Raises:
        UnusableImageError: where none is left; ``NO_BOX`` if none keeps 2 pixels a side, else ``AREA``.
    """
    clipped = [box.clipped(width, height) for box in boxes]
    solid = [box for box in clipped if box.width >= MIN_BOX_SIDE and box.height >= MIN_BOX_SIDE]
    if not solid:
        raise UnusableImageError(NO_BOX)
    total = width * height
    wanted = [box for box in solid if config.min_box_area <= box.area / total <= config.max_box_area]
    if not wanted:
        raise UnusableImageError(AREA)
    return wanted


def _read_row(images: ShardImages, position: int) -> tuple[ImageRow, tuple[int, int], list[Box]]:
    """Return an image's row, the frame of its boxes and the boxes; from the index if it knows them."""
    with unusable():
        row = images.row(position)
        if row.frame is not None and row.boxes is not None:
            return row, row.frame, [Box(*box) for box in row.boxes.tolist()]
        annotation = parse_annotation(images.read(position, row.annotation))
        if "boxes" not in annotation:  # as in sets of images and captions
            raise UnusableImageError(WITHOUT_BOXES)
        boxes = [Box(*(float(value) for value in box["xyxy"])) for box in annotation["boxes"]]
        width, height = int(annotation["width"]), int(annotation["height"])
        if max(width, height) > MAX_SIDE:
            raise UnusableImageError(BAD_ANNOTATION)
    return row, (width, height), boxes


def read_image(
    images: ShardImages, position: int, config: DataConfig, box: int | None = None
) -> AnnotatedImage:
    """Decode an image of the shards with its usable boxes, both smaller where ``reduced_decoding`` allows.

    ``box`` is the number of the one box that is wanted. Raises UnusableImageError where it cannot be used.
    """
    row, (width, height), boxes = _read_row(images, position)
    if min(width, height) < MIN_BOX_SIDE:
        raise UnusableImageError(TINY)
    wanted = usable_boxes(boxes if box is None else boxes[box : box + 1], width, height, config)
    with unusable():
        encoded = images.read(position, row.image)
    if config.verify and row.digest:
        check_hash(encoded, row.digest)
    factor = choose_reduction(encoded, (width, height), wanted, config)
    wanted = [reduced_box(box, factor) for box in wanted]
    return AnnotatedImage(row.key, decode_image(encoded, (width, height), factor), wanted)


class ExemplarDataset(Dataset[DatasetItem]):
    """Samples by global counter: epoch and position follow from the index, which may be any size.

    An epoch visits every image once, with one of its boxes (``config.boxes`` is ``one``), or every box once
    (``every``; the images must have been opened with their boxes counted). The name of the ``stream`` keeps
    training and validation draws apart.
    """

    def __init__(self, images: ShardImages, config: DataConfig, seed: int, stream: str = "train") -> None:
        self.images, self.config, self.seed, self.stream = images, config, seed, stream
        self.length = images.box_count if config.boxes == "every" else len(images)
        self._orders: dict[int, Callable[[int], int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the permutations behind when sent to a worker."""
        return {**self.__dict__, "_orders": {}}

    def _turn(self, epoch: int, position: int) -> int:
        """Return the image or box whose turn it is at a position of an epoch."""
        if epoch not in self._orders:
            # The last two: a worker may still be at the end of one epoch when it starts the next.
            self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
            self._orders[epoch] = self._order(epoch)
        return self._orders[epoch](position)

    def _order(self, epoch: int) -> Callable[[int], int]:
        if self.config.boxes == "every":  # many times as many: computed one by one, nothing is kept
            key = (self.seed, self.stream, "box order", epoch)
            return lambda position: shuffled(position, len(self), *key)
        order = permutation(len(self), self.seed, self.stream, "order", epoch).astype(np.uint32)
        return lambda position: int(order[position])

    def __len__(self) -> int:
        """Return the number of samples an epoch: one an image, or one a box."""
        return self.length

    def __getitem__(self, index: int) -> DatasetItem:
        """Return the sample of a global counter.

        Where its image is no use the next ones of the epoch's order stand in, with draws of their own.
        Only the image (or box) whose turn it was is counted, so that counts add up to the epoch's length.
        """
        epoch, counts = int(index) // len(self), Counter[str]()
        for attempt, turn in enumerate(self.turns(index)):
            try:
                key, sample = self._make(turn, epoch, attempt)
            except UnusableImageError as skip:
                if attempt == 0:
                    counts[skip.reason] += 1
                continue
            counts.update(sample.events)
            return DatasetItem(int(index), key, sample, counts)
        return DatasetItem(int(index), "", None, counts)

    def turns(self, index: int) -> Iterator[int]:
        """Yield the image (or box) of a global counter, then those that stand in where it is no use."""
        epoch, position = divmod(int(index), len(self))
        for attempt in range(min(len(self), MAX_REPLACEMENTS)):
            yield self._turn(epoch, (position + attempt) % len(self))

    def _make(self, turn: int, epoch: int, attempt: int) -> tuple[str, TrainingSample]:
        annotated, box, rng = self.choose(turn, epoch, attempt)
        sizes = self.config.image_size, self.config.exemplar_size
        mask = self.object_mask(turn, annotated, box)
        return annotated.key, make_sample(annotated.image, box, rng, self.config.sample, *sizes, mask)

    def object_mask(self, turn: int, annotated: AnnotatedImage, box: Box) -> ObjectMask:
        """Return what reads the mask of the object in a box that :meth:`choose` gave, when it is called."""
        return partial(self._read_mask, turn, annotated, box)

    def _read_mask(self, turn: int, annotated: AnnotatedImage, box: Box) -> np.ndarray | None:
        position, number = self._owner(turn) if self.config.boxes == "every" else (turn, None)
        _, frame, boxes = _read_row(self.images, position)
        # The boxes of the image that was decoded, as they are written in the shard.
        written = usable_boxes(boxes if number is None else boxes[number : number + 1], *frame, self.config)
        height, width = annotated.image.shape[:2]
        which = written[annotated.boxes.index(box)]
        return read_object_mask(self.images, position, which, frame, (width, height))

    def choose(
        self, turn: int, epoch: int, attempt: int = 0
    ) -> tuple[AnnotatedImage, Box, np.random.Generator]:
        """Return the image of a turn, its box of this epoch, and the generator of the sample's draws.

        A turn is the position of an image in the shards, or the number of a box where every one has its turn.
        Other epochs, and other attempts to stand in for an unusable image, draw otherwise.

        Raises:
            UnusableImageError: where the image cannot be used.
        """
        if self.config.boxes == "every":
            image, number = self._owner(turn)
            annotated = read_image(self.images, image, self.config, number)
            rng = generator(self.seed, self.stream, "box", epoch, turn, attempt)
            return annotated, annotated.boxes[0], rng
        annotated = read_image(self.images, turn, self.config)
        rng = generator(self.seed, self.stream, "sample", epoch, turn, attempt)
        return annotated, choose_box(annotated.boxes, rng), rng

    def _owner(self, box: int) -> tuple[int, int]:
        with unusable():
            return self.images.owner(box)


def _shape(arrays: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Return ``b c h w`` of images ``h w 3`` or ``h w`` of one shape."""
    height, width, *rest = arrays[0].shape
    return (len(arrays), *(rest or [1]), height, width)


def _stack(arrays: Sequence[np.ndarray], stacked: np.ndarray) -> torch.Tensor:
    """Stack images ``h w 3`` or ``h w`` into ``b c h w``; return that as a tensor."""
    for channels, array in zip(stacked, arrays, strict=True):
        if array.ndim == 3:  # OpenCV parts the channels several times faster than a transposed copy
            cv2.split(array, list(channels))
        else:
            channels[0] = array
    return torch.from_numpy(stacked)


def collate(items: Sequence[DatasetItem], allocate: Allocator = allocate) -> dict[str, Any]:
    """Stack samples into the batch that :class:`pbe.data.datamodule.TrainingData` describes.

    ``missing`` is the number of samples that no image could be found for; the loader ends the run then.
    ``allocate`` gives the arrays that the tensors look into.
    """
    counts: Counter[str] = sum((item.counts for item in items), Counter())
    found = [(item, item.sample) for item in items if item.sample is not None]
    batch: dict[str, Any] = {"counts": dict(counts), "missing": len(items) - len(found)}
    if found:
        images = {name: [getattr(sample, name) for _, sample in found] for name in PICTURES}
        wanted = [(_shape(arrays), np.dtype(np.uint8)) for arrays in images.values()]
        *rooms, indices = allocate([*wanted, ((len(found),), np.dtype(np.int64))])
        indices[:] = [item.index for item, _ in found]
        for (name, arrays), room in zip(images.items(), rooms, strict=True):
            batch[name] = _stack(arrays, room)
        batch |= {"sample_index": torch.from_numpy(indices), "key": [item.key for item, _ in found]}
    return batch


def describe(counts: Counter[str] | dict[str, int]) -> str:
    """Return counts as text, the most frequent first: ``unreadable image: 3, shrunk: 1``."""
    return ", ".join(f"{name}: {count}" for name, count in Counter(counts).most_common())


def check_counts(stream: str, counts: Counter[str], max_faults: float, missing: int = 0) -> None:
    """Raise a UserError where too many images cannot be used, or no image was found for ``missing`` samples.

    ``counts`` is what was skipped or adjusted; ``max_faults`` of it may be images that cannot be used.
    """
    faults = {name: count for name, count in counts.items() if name in FAULTS}
    if sum(faults.values()) > max_faults:
        raise UserError(
            f"too many {stream} images cannot be used ({describe(faults)}); "
            "fix the shards or raise data.max_bad_share"
        )
    if missing:
        raise UserError(
            f"no usable image found in a long series of {stream} images ({describe(counts)}); "
            "check the shards, data.min_box_area and data.max_box_area"
        )
