"""Training samples out of shards, by a global counter; pictures that are no use are skipped and counted.

``sample_index = epoch * len(dataset) + position``. The order of an epoch is a permutation keyed by the
seed and the epoch, and every draw of a sample is keyed by the seed, the epoch and the picture: workers,
ranks, batch sizes and restarts change nothing.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from pbe.config import DataConfig
from pbe.data.masks import Box
from pbe.data.randomness import generator, permutation
from pbe.data.sample import TrainingSample, choose_box, make_sample
from pbe.data.shards import ShardPictures

UNREADABLE = "unreadable picture"
BAD_ANNOTATION = "unreadable annotation"
TINY = "picture under 2 px"
SIZE_MISMATCH = "picture of another size than annotated"
NO_BOX = "no valid box"
AREA = "no box of the wanted area"
FAULTS = frozenset({UNREADABLE, BAD_ANNOTATION, TINY, SIZE_MISMATCH, NO_BOX})
MIN_BOX_SIDE = 2.0
MAX_SIDE = 2**31 - 1  # no picture format goes beyond
MAX_REPLACEMENTS = 200
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"


class UnusablePictureError(Exception):
    """A picture is no use; ``reason`` is one of this module's constants."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class AnnotatedPicture:
    """A decoded picture (uint8 ``h w 3``, RGB) and its usable boxes, clipped to the picture."""

    image: np.ndarray
    boxes: list[Box]


@dataclass(frozen=True)
class DatasetItem:
    """What a worker hands back: the sample, or None, and what was counted on the way."""

    index: int
    key: str
    sample: TrainingSample | None
    counts: Counter[str]


def _parse_annotation(annotation: dict[str, Any]) -> tuple[int, int, list[Box]]:
    try:
        boxes = [Box(*(float(value) for value in box["xyxy"])) for box in annotation["boxes"]]
        width, height = int(annotation["width"]), int(annotation["height"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UnusablePictureError(BAD_ANNOTATION) from error
    if max(width, height) > MAX_SIDE:
        raise UnusablePictureError(BAD_ANNOTATION)
    return width, height, boxes


def usable_boxes(boxes: Sequence[Box], width: int, height: int, config: DataConfig) -> list[Box]:
    """Clip boxes to a picture and keep those of the wanted relative area.

    Args:
        boxes: in pixels; they may reach beyond the picture, be empty or hold NaN.
        width: of the picture, pixels.
        height: of the picture, pixels.
        config: ``min_box_area`` and ``max_box_area``, shares of the picture's area.

    Raises:
        UnusablePictureError: where none is left; ``NO_BOX`` if none keeps 2 pixels a side, else ``AREA``.
    """
    clipped = [box.clipped(width, height) for box in boxes]
    solid = [box for box in clipped if box.width >= MIN_BOX_SIDE and box.height >= MIN_BOX_SIDE]
    if not solid:
        raise UnusablePictureError(NO_BOX)
    total = width * height
    wanted = [box for box in solid if config.min_box_area <= box.area / total <= config.max_box_area]
    if not wanted:
        raise UnusablePictureError(AREA)
    return wanted


def decode_picture(encoded: bytes) -> np.ndarray:
    """Decode a JPEG, PNG or WebP file to uint8 ``h w 3``, RGB, turned as its EXIF orientation says.

    Raises:
        UnusablePictureError: where it is damaged. A JPEG that was cut short counts as damaged too; OpenCV
            would fill it up with grey.
    """
    if encoded[:2] == JPEG_START and JPEG_END not in encoded[len(encoded) // 2 :]:
        raise UnusablePictureError(UNREADABLE)
    try:
        decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise UnusablePictureError(UNREADABLE) from error
    if decoded is None:
        raise UnusablePictureError(UNREADABLE)
    return decoded


def read_picture(pictures: ShardPictures, position: int, config: DataConfig) -> AnnotatedPicture:
    """Decode a picture of the shards with its usable boxes.

    Raises:
        UnusablePictureError: where it cannot be used.
    """
    try:
        annotation = pictures.annotation(position)
        encoded = pictures.picture(position)
    except (ValueError, RecursionError) as error:
        raise UnusablePictureError(BAD_ANNOTATION) from error
    except OSError as error:
        raise UnusablePictureError(UNREADABLE) from error
    width, height, boxes = _parse_annotation(annotation)
    if min(width, height) < MIN_BOX_SIDE:
        raise UnusablePictureError(TINY)
    wanted = usable_boxes(boxes, width, height, config)
    image = decode_picture(encoded)
    if image.shape[:2] != (height, width):
        raise UnusablePictureError(SIZE_MISMATCH)
    return AnnotatedPicture(image, wanted)


class ExemplarDataset(Dataset[DatasetItem]):
    """Samples by global counter: epoch and position follow from the index, which may be any size.

    Args:
        pictures: where they come from.
        config: sizes, filters and sample settings.
        seed: of the run.
        stream: keeps training and validation draws apart.
    """

    def __init__(self, pictures: ShardPictures, config: DataConfig, seed: int, stream: str = "train") -> None:
        self.pictures = pictures
        self.config = config
        self.seed = seed
        self.stream = stream
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache of permutations behind when sent to a worker."""
        return {name: value for name, value in self.__dict__.items() if name != "order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with an empty cache of permutations."""
        self.__dict__.update(state)
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return permutation(len(self.pictures), self.seed, self.stream, "order", epoch)

    def __len__(self) -> int:
        """Return the number of samples an epoch: one a picture."""
        return len(self.pictures)

    def __getitem__(self, index: int) -> DatasetItem:
        """Return the sample of a global counter.

        Where its picture is no use the next ones of the epoch's order stand in, with draws of their own.
        Only the picture whose turn it was is counted, so that counts add up to the epoch's length.
        """
        epoch, position = divmod(int(index), len(self))
        order, counts = self.order(epoch), Counter[str]()
        for attempt in range(min(len(self), MAX_REPLACEMENTS)):
            picture = int(order[(position + attempt) % len(self)])
            try:
                sample = self.sample(picture, epoch, attempt)
            except UnusablePictureError as skip:
                if attempt == 0:
                    counts[skip.reason] += 1
                continue
            counts.update(sample.events)
            return DatasetItem(int(index), self.pictures[picture].key, sample, counts)
        return DatasetItem(int(index), "", None, counts)

    def sample(self, picture: int, epoch: int, attempt: int = 0) -> TrainingSample:
        """Return the sample of a picture (its position in the shards) in an epoch.

        Args:
            picture: position in the shards.
            epoch: other epochs draw other boxes, masks, crops and augmentations.
            attempt: other than zero where the picture stands in for an unusable one.

        Raises:
            UnusablePictureError: where the picture cannot be used.
        """
        config = self.config
        annotated = read_picture(self.pictures, picture, config)
        rng = generator(self.seed, self.stream, "sample", epoch, picture, attempt)
        box = choose_box(annotated.boxes, rng)
        return make_sample(annotated.image, box, rng, config.sample, config.image_size, config.exemplar_size)


def _stack(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """Stack pictures ``h w 3`` or ``h w`` of one shape to a tensor ``b c h w``."""
    height, width, *rest = arrays[0].shape
    stacked = np.empty((len(arrays), *(rest or [1]), height, width), np.uint8)
    for channels, array in zip(stacked, arrays, strict=True):
        if rest:  # OpenCV parts the channels several times faster than a transposed copy
            cv2.split(array, list(channels))
        else:
            channels[0] = array
    return torch.from_numpy(stacked)


def collate(items: Sequence[DatasetItem]) -> dict[str, Any]:
    """Stack samples into the batch that :class:`pbe.data.datamodule.ExemplarDataModule` describes.

    ``missing`` is the number of samples that no picture could be found for; the loader ends the run then.
    """
    counts: Counter[str] = sum((item.counts for item in items), Counter())
    found = [(item, item.sample) for item in items if item.sample is not None]
    batch: dict[str, Any] = {"counts": dict(counts), "missing": len(items) - len(found)}
    if found:
        batch |= {
            "image": _stack([sample.image for _, sample in found]),
            "mask": _stack([sample.mask for _, sample in found]),
            "exemplar": _stack([sample.exemplar for _, sample in found]),
            "valid": _stack([sample.valid for _, sample in found]),
            "sample_index": torch.tensor([item.index for item, _ in found], dtype=torch.int64),
            "key": [item.key for item, _ in found],
        }
    return batch


def describe(counts: Counter[str] | dict[str, int]) -> str:
    """Return counts as text, the most frequent first: ``unreadable picture: 3, shrunk: 1``."""
    return ", ".join(f"{name}: {count}" for name, count in Counter(counts).most_common())
