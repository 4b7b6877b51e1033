"""COCOEE, the paper's benchmark: its folders, a check of them, and a builder of sets of the same form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import cv2
import numpy as np

from pbe.data.packing.plan import held_out
from pbe.data.randomness import generator
from pbe.data.samples.crops import resize_area
from pbe.data.samples.decode import UnusableImageError, decode_image
from pbe.data.sources.annotations import Annotations, ImageRecord, SourceBox
from pbe.data.sources.image_files import UnreadableImageError, inspect_image
from pbe.errors import UserError
from pbe.evaluation.benchmark.files import ID_LIST, PARTS, case_path, new_benchmark, write_case, write_ids

SIZE = 512
MIN_SIZE = 16
MAX_SHARE = 0.5
DRAWS = 10
PROBLEMS_SHOWN = 20
DAMAGED = "images damaged, turned by EXIF or of another size than annotated"
# Of an object to show: its file, the width and height it is annotated for, and its box.
Exemplar = tuple[Path, int, int, SourceBox]


@dataclass(frozen=True)
class Case:
    """The three files of a case."""

    number: int
    image: Path
    mask: Path
    exemplar: Path


def _ids(folder: Path, problems: list[str]) -> list[int]:
    try:
        listed = np.load(folder / ID_LIST, allow_pickle=False)
        if not isinstance(listed, np.ndarray):
            raise ValueError("it is an archive of several")
        ids = [int(number) for number in listed.ravel()]
    except FileNotFoundError:
        problems.append(f"{ID_LIST} is missing")
        return []
    except (OSError, ValueError, EOFError, OverflowError, BadZipFile) as error:
        problems.append(f"{ID_LIST} is no list of numbers ({error})")
        return []
    if not ids:
        problems.append(f"{ID_LIST} is empty: a benchmark without cases")
    for number, count in Counter(ids).items():
        if count > 1:
            problems.append(f"{ID_LIST} names {number} {count} times")
    return list(dict.fromkeys(ids))


def _check_case(case: Case, size: int) -> Iterable[str]:
    image, mask = cv2.imread(str(case.image)), cv2.imread(str(case.mask), cv2.IMREAD_GRAYSCALE)
    for path, read in (
        (case.image, image),
        (case.mask, mask),
        (case.exemplar, cv2.imread(str(case.exemplar))),
    ):
        if read is None:
            yield f"{path.parent.name}/{path.name} cannot be read"
    if image is not None or size:
        yield from _check_sizes(case, image, mask, size)
    if mask is None:
        return
    if not set(np.unique(mask).tolist()) <= {0, 255}:
        yield f"{case.mask.name} holds other values than 0 and 255"
    elif not mask.any() or mask.all():
        yield f"{case.mask.name} is all {'white' if mask.any() else 'black'}"


def _check_sizes(case: Case, image: np.ndarray | None, mask: np.ndarray | None, size: int) -> Iterable[str]:
    """Compare with the size asked for, or the mask with its picture where ``size`` is 0."""
    height, width = image.shape[:2] if image is not None and not size else (size, size)
    if image is not None and image.shape[:2] != (height, width):
        yield f"{case.image.name} is {image.shape[1]} x {image.shape[0]}, not {width} x {height}"
    if mask is not None and mask.shape != (height, width):
        yield f"{case.mask.name} is {mask.shape[1]} x {mask.shape[0]}, not {width} x {height}"


def find_problems(folder: Path, *, pixels: bool = True, size: int = SIZE) -> list[str]:
    """Return everything that is wrong with a benchmark folder, a line each; empty if nothing is.

    Args:
        folder: the ``test_bench`` folder.
        pixels: open every picture too.
        size: sides that pictures and masks must have; 0 means that a mask must fit its picture.
    """
    problems = [f"the folder {name} is missing" for name, _ in PARTS if not (folder / name).is_dir()]
    ids = _ids(folder, problems)
    for number in ids:
        case = _case(folder, number)
        paths = (case.image, case.mask, case.exemplar)
        gone = [path for path in paths if path.parent.is_dir() and not path.is_file()]
        problems += [f"{path.parent.name}/{path.name} is missing" for path in gone]
        if pixels and all(path.is_file() for path in paths):
            problems += _check_case(case, size)
    for part in PARTS:
        wanted = {case_path(folder, part, number) for number in ids}
        extra = sorted(set((folder / part[0]).glob("*.png")) - wanted) if ids else []
        if extra:
            problems.append(
                f"{part[0]} holds {len(extra)} files that {ID_LIST} does not name: {extra[0].name} ..."
            )
    return problems


def _case(folder: Path, number: int) -> Case:
    image, mask, exemplar = (case_path(folder, part, number) for part in PARTS)
    return Case(number, image, mask, exemplar)


def read_benchmark(folder: str | Path, *, pixels: bool = False, size: int = SIZE) -> list[Case]:
    """Return the cases of a benchmark folder, in the order of its list.

    Args:
        folder: the ``test_bench`` folder.
        pixels: open and check every picture.
        size: sides that they must then have; 0 means any.

    Raises:
        UserError: something is missing; the message lists what.
    """
    folder = Path(folder)
    problems = find_problems(folder, pixels=pixels, size=size)
    if problems:
        shown = "; ".join(problems[:PROBLEMS_SHOWN])
        rest = len(problems) - PROBLEMS_SHOWN
        raise UserError(
            f"'{folder}' is no whole benchmark: {shown}{f'; and {rest} more' if rest > 0 else ''}"
        )
    return [_case(folder, number) for number in _ids(folder, [])]


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

    def check(self) -> None:
        """Raise a UserError for a value that makes no sense."""
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
    """Return the largest square of the picture, as centred on the box as it can be; None if none holds it."""
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
            lost[f"not {settings.min_share:.0%} to {settings.max_share:.0%} of the square"] += 1
        elif square is None:
            lost["longer than the short side"] += 1
        elif next(others, None) is None:
            lost[f"no other image's object of its label, {settings.min_exemplar_side:g} px or more"] += 1
        else:
            found.append(_Place(box.label, (box.x1, box.y1, box.x2, box.y2), square))
    return found


def _read(path: Path, width: int, height: int) -> np.ndarray | None:
    """Return an image as training sees it, uint8 ``h w 3`` BGR; None if damaged, turned or of other size."""
    try:
        encoded = path.read_bytes()
        header = inspect_image(encoded)
        if header.orientation != 1 or header.stored_size != (width, height):
            return None
        return cv2.cvtColor(decode_image(encoded), cv2.COLOR_RGB2BGR)
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


def _draw_other(choices: Sequence[Exemplar], own: Path, rng: np.random.Generator) -> Exemplar:
    """Return one of the objects that is not of the image itself; there is one."""
    for _ in range(DRAWS):  # the image itself is seldom drawn: no need to go through all of them
        choice = choices[int(rng.integers(len(choices)))]
        if choice[0] != own:
            return choice
    others = [choice for choice in choices if choice[0] != own]
    return others[int(rng.integers(len(others)))]


def _cut_exemplar(choices: Sequence[Exemplar], own: Path, rng: np.random.Generator) -> np.ndarray | None:
    """Return the crop of one of the exemplars; None where a few draws all hit damaged images."""
    for _ in range(DRAWS):
        path, width, height, box = _draw_other(choices, own, rng)
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
    """Make a benchmark in the form of COCOEE; the same arguments give the same files.

    Every case is a source image with one of its boxes as the mask, and another image's object of the same
    label. Images that are damaged, or turned by EXIF, are passed over. The folder is there when all of it is.

    Args:
        sources: images to edit, a validation split.
        exemplars: images to take objects from, another split; None takes them from the sources too.
        folder: the new ``test_bench`` folder.
        settings: how many, and of what sizes.
        validation_share: take only those of the sources that packing holds out with this share; 0: all.

    Returns:
        The number of cases.

    Raises:
        UserError: the splits share files, the folder holds something, or there are too few cases.
    """
    settings.check()
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
    shared = _annotated(sources) & _annotated(exemplars)
    if shared:
        raise UserError(
            f"sources and exemplars share {len(shared)} pictures, such as '{min(shared)}'; "
            "name one of them alone to take objects from its other images"
        )
    return exemplars.records([])


def _annotated(found: Annotations) -> set[str]:
    """Return the paths of the images that have boxes: two files of annotations may divide one folder."""
    return set(found.images["path"].gather(found.boxes["image"].unique()).to_list())


def _require(count: int, wanted: int, lost: Counter[str]) -> None:
    """Refuse too few cases, with what was in the way.

    Raises:
        UserError: there are fewer than wanted, or none.
    """
    if count >= max(wanted, 1):
        return
    why = ", ".join(f"{reason}: {times}" for reason, times in lost.most_common())
    made, fewer = (f"only {count} of {wanted} cases", " or fewer cases") if wanted else ("no case", "")
    raise UserError(f"{made} could be made{f' ({why})' if why else ''}; take more images{fewer}")


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
