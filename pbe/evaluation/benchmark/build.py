"""Builders of benchmarks in COCOEE's layout: of annotated images, or of another benchmark's own objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pbe.data.packing.plan import held_out
from pbe.data.randomness import generator
from pbe.data.samples.crops import resize, resize_area
from pbe.data.samples.decode import UnusableImageError, decode_image
from pbe.data.sources.annotations import Annotations, ImageRecord, SourceBox
from pbe.data.sources.image_files import UnreadableImageError, inspect_image
from pbe.errors import UserError
from pbe.evaluation.benchmark.coco_ee import (
    MIN_SIZE,
    SIZE,
    BenchmarkFolder,
    new_benchmark,
    write_case,
    write_ids,
)
from pbe.evaluation.metrics.towers import region

MAX_SHARE = 0.5
DRAWS = 10
DAMAGED = "images damaged, turned by EXIF or of another size than annotated"
# Of an object to show: its file, the width and height it is annotated for, and its box.
Exemplar = tuple[Path, int, int, SourceBox]


@dataclass(frozen=True)
class BuildSettings:
    """What cases are made of.

    Attributes:
        cases: how many; 0 means as many as there are.
        seed: of every choice.
        size: sides of the images and masks, pixels.
        min_share: smallest share of the square that the mask covers.
        max_share: largest.
        min_exemplar_side: pixels of the exemplar's shorter side.
    """

    cases: int = 3500
    seed: int = 0
    size: int = SIZE
    min_share: float = 0.02
    max_share: float = MAX_SHARE
    min_exemplar_side: float = 64.0

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if self.size < MIN_SIZE:
            raise UserError(
                f"images of a benchmark need sides of at least {MIN_SIZE} pixels, not {self.size}"
            )
        if self.cases < 0:
            raise UserError("the number of cases must be at least 1, or 0 for as many as there are")


@dataclass(frozen=True)
class _Place:
    """A box of a source image with the square around it: left, top and side in pixels."""

    label: str
    box: tuple[float, float, float, float]
    square: tuple[int, int, int]


def _square(box: SourceBox, width: int, height: int) -> tuple[int, int, int] | None:
    """Return the largest square of the image, as centred on the box as it can be; None if none holds it."""
    side = min(width, height)
    x = round(min(max((box.x1 + box.x2 - side) / 2, 0), width - side))
    y = round(min(max((box.y1 + box.y2 - side) / 2, 0), height - side))
    inside = x <= box.x1 and y <= box.y1 and box.x2 <= x + side and box.y2 <= y + side
    return (x, y, side) if inside else None


def _usable(box: SourceBox) -> bool:
    return bool(box.label) and "is_group_of" not in box.flags and box.x2 > box.x1 and box.y2 > box.y1


def _places(
    record: ImageRecord, settings: BuildSettings, objects: dict[str, list[Exemplar]], lost: Counter[str]
) -> list[_Place]:
    """Return the boxes of an image that can be masked, and count by reason those that cannot."""
    found = []
    for box in record.boxes:
        square = _square(box, record.width, record.height)
        share = (box.x2 - box.x1) * (box.y2 - box.y1) / min(record.width, record.height) ** 2
        others = (each for each in objects.get(box.label, ()) if each[0] != record.path)
        if not _usable(box):
            lost["empty, a group or without a label"] += 1
        elif not settings.min_share <= share <= settings.max_share:
            lost[f"box not {settings.min_share:.0%} to {settings.max_share:.0%} of the square crop"] += 1
        elif square is None:
            lost["longer than the short side"] += 1
        elif next(others, None) is None:
            side = f"{settings.min_exemplar_side:g} px or more"
            lost[f"no object of the same label, {side}, in another image"] += 1
        else:
            found.append(_Place(box.label, (box.x1, box.y1, box.x2, box.y2), square))
    return found


def _read(path: Path, width: int, height: int) -> np.ndarray | None:
    """Return an image as training sees it, uint8 ``h w 3``; None if damaged, turned or of other size."""
    try:
        encoded = path.read_bytes()
        header = inspect_image(encoded)
        if header.orientation != 1 or header.stored_size != (width, height):
            return None
        return decode_image(encoded)
    except (OSError, UnreadableImageError, UnusableImageError):
        return None


def _exemplars(records: Iterable[ImageRecord], settings: BuildSettings) -> dict[str, list[Exemplar]]:
    by_label: dict[str, list[Exemplar]] = {}
    for record in records:
        for box in filter(_usable, record.boxes):
            corners = (max(box.x1, 0), max(box.y1, 0), min(box.x2, record.width), min(box.y2, record.height))
            if min(corners[2] - corners[0], corners[3] - corners[1]) >= settings.min_exemplar_side:
                by_label.setdefault(box.label, []).append((record.path, record.width, record.height, box))
    return by_label


def _cut_exemplar(choices: Sequence[Exemplar], own: Path, rng: np.random.Generator) -> np.ndarray | None:
    """Return the crop of one of the exemplars of other images; None where all draws hit damaged ones."""
    for _ in range(DRAWS):
        drawn = (choices[int(rng.integers(len(choices)))] for _ in range(DRAWS))
        other = next((choice for choice in drawn if choice[0] != own), None)
        if other is None:  # the image itself is seldom drawn so often
            others = [choice for choice in choices if choice[0] != own]
            other = others[int(rng.integers(len(others)))]
        path, width, height, box = other
        image = _read(path, width, height)
        if image is not None:
            x1, y1 = max(round(box.x1), 0), max(round(box.y1), 0)
            return image[y1 : round(min(box.y2, height)), x1 : round(min(box.x2, width))]
    return None


def _render(image: np.ndarray, place: _Place, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the square image, uint8 ``s s 3``, and its mask, uint8 ``s s``, 255 = repaint."""
    x, y, side = place.square
    part = image[y : y + side, x : x + side]
    if side > size:
        square = resize_area(part, size, size)
    else:
        square = cv2.resize(part, (size, size), interpolation=cv2.INTER_CUBIC)
    x1, y1, x2, y2 = (
        (value - start) * size / side for value, start in zip(place.box, (x, y, x, y), strict=True)
    )
    mask = np.zeros((size, size), np.uint8)
    mask[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = 255
    return square, mask


def _number(record: ImageRecord, taken: set[int]) -> int:
    """Return the image's own number where its name is one and free, else the first free one."""
    stem = Path(record.name).stem
    number = int(stem) if stem.isdecimal() and len(stem) <= 12 else len(taken)
    while number in taken:
        number += 1
    return number


def build_benchmark(
    sources: Annotations,
    exemplars: Annotations | None,
    folder: Path,
    settings: BuildSettings,
    validation_share: float = 0.0,
) -> int:
    """Make a benchmark in the form of COCOEE, and return the number of cases.

    Every case is a source image with one of its boxes as the mask, and another image's object of the same
    label. Images that are damaged, or turned by EXIF, are passed over. The same arguments give the same
    files, and the folder is there when all of it is.

    Args:
        sources: images to edit, a validation split.
        exemplars: images to take objects from, another split; None takes them from the sources too.
        folder: the new ``test_bench`` folder.
        settings: how many, and of what sizes.
        validation_share: take only those of the sources that packing holds out with this share; 0: all.
    """
    damaged: list[Path] = []
    records = _sorted_records(sources, validation_share, damaged)
    objects = _exemplars(_others(sources, exemplars, records), settings)
    lost = Counter({DAMAGED: len(damaged)}) if damaged else Counter[str]()
    every = [(record, _places(record, settings, objects, lost)) for record in records]
    usable = [(record, places) for record, places in every if places]
    _require(len(usable), settings.cases, lost)
    with new_benchmark(folder) as partial:
        order = generator(settings.seed, "benchmark").permutation(len(records))
        chosen = (every[int(position)] for position in order)
        ids = _write_cases(chosen, objects, partial, settings, lost)
        _require(len(ids), settings.cases, lost)
        write_ids(partial, sorted(ids))
    return len(ids)


def _sorted_records(sources: Annotations, validation_share: float, bad: list[Path]) -> list[ImageRecord]:
    records = sorted(sources.records(bad), key=lambda record: record.name)
    if not validation_share:
        return records
    wanted = held_out([record.name for record in records], validation_share)
    kept = [record for record, inside in zip(records, wanted, strict=True) if inside]
    if not kept:
        raise UserError(
            f"a share of {validation_share:g} holds none of {len(records)} images out; take a larger one"
        )
    return kept


def _others(
    sources: Annotations, exemplars: Annotations | None, records: list[ImageRecord]
) -> Iterable[ImageRecord]:
    """Return the images that objects are taken from."""
    if exemplars is None:
        return records
    # Paths of the images that have boxes: two files of annotations may divide one folder.
    mine, theirs = (
        set(found.images["path"].gather(found.boxes["image"].unique()).to_list())
        for found in (sources, exemplars)
    )
    shared = mine & theirs
    if shared:
        raise UserError(
            f"sources and exemplars share {len(shared)} images, such as '{min(shared)}'; "
            "name one of them alone to take objects from its other images"
        )
    return exemplars.records([])


def _require(count: int, wanted: int, lost: Counter[str]) -> None:
    """Refuse too few cases, with what was in the way."""
    if count >= max(wanted, 1):
        return
    why = ", ".join(f"{reason}: {times}" for reason, times in lost.most_common())
    made, fewer = (f"only {count} of {wanted} cases", " or fewer cases") if wanted else ("no case", "")
    raise UserError(
        f"{made} could be made{f' (boxes left out: {why})' if why else ''}; take more images{fewer}"
    )


def _write_cases(
    chosen: Iterable[tuple[ImageRecord, list[_Place]]],
    objects: dict[str, list[Exemplar]],
    folder: Path,
    settings: BuildSettings,
    lost: Counter[str],
) -> set[int]:
    """Write as many cases as are wanted, an image each; return their numbers."""
    ids: set[int] = set()
    for record, places in chosen:
        if settings.cases and len(ids) == settings.cases:
            break
        if not places:
            continue
        rng = generator(settings.seed, "benchmark", record.name)
        place = places[int(rng.integers(len(places)))]
        image = _read(record.path, record.width, record.height)
        exemplar = None if image is None else _cut_exemplar(objects[place.label], record.path, rng)
        if image is None or exemplar is None:
            lost[DAMAGED] += 1
            continue
        number = _number(record, ids)
        write_case(folder, number, *_render(image, place, settings.size), exemplar)
        ids.add(number)
    return ids


def write_own_exemplars(source: Path, folder: Path, exemplar_size: int) -> int:
    """Write a benchmark's cases to a new folder with the true object, cut by its mask's box, as exemplar.

    A model that copies its exemplar paints such a case best of all, and pays for it where the exemplar
    stands in another pose; one that has understood the object loses nothing. The exemplars are squares of
    ``exemplar_size`` pixels. The folder is there when all of it is. Returns the number of cases.
    """
    cases = BenchmarkFolder(source)
    with new_benchmark(folder) as partial:
        for case in cases:
            exemplar = resize(region(case.image, case.mask), exemplar_size, exemplar_size)
            write_case(partial, int(case.id), case.image, case.mask, exemplar)
        write_ids(partial, map(int, cases.ids))
    return len(cases)
