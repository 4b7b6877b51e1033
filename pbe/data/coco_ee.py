"""COCOEE, the paper's benchmark: its folders, a check of them, and a builder of sets of the same form.

A case is three PNGs that share an id of twelve digits, listed in ``id_list.npy`` (int64)::

    test_bench/GT_3500/000000000139_GT.png            source, 512 x 512
    test_bench/Mask_bbox_3500/000000000139_mask.png   white (255) is the hole, a filled box
    test_bench/Ref_3500/000000000139_ref.png          exemplar, any size
    test_bench/id_list.npy

The ids are file names and nothing else: many of the released ones are no ids of COCO.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import cv2
import numpy as np

from pbe.data.packing_index import write_whole
from pbe.data.randomness import generator
from pbe.data.sources.pictures import UnreadablePictureError, inspect_picture
from pbe.data.sources.records import Annotations, PictureRecord, SourceBox
from pbe.errors import UserError
from pbe.files import make_folder

GT, MASK, REF = ("GT_3500", "GT"), ("Mask_bbox_3500", "mask"), ("Ref_3500", "ref")
PARTS = (GT, MASK, REF)
ID_LIST = "id_list.npy"
SIZE = 512
MAX_SHARE = 0.5
PROBLEMS_SHOWN = 20


def case_path(folder: Path, part: tuple[str, str], number: int) -> Path:
    """Return the path of one file of a case; ``part`` is :data:`GT`, :data:`MASK` or :data:`REF`."""
    return folder / part[0] / f"{number:012d}_{part[1]}.png"


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
        cases: how many.
        seed: of every choice.
        min_share: smallest share of the 512 px square that the hole covers.
        max_share: largest.
        min_exemplar_side: pixels of the exemplar's shorter side.
    """

    cases: int = 3500
    seed: int = 0
    min_share: float = 0.02
    max_share: float = MAX_SHARE
    min_exemplar_side: float = 64.0


@dataclass(frozen=True)
class _Hole:
    """A box of a source picture with the square around it: left, top and side in pixels."""

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


def _holes(record: PictureRecord, settings: BuildSettings, labels: set[str]) -> list[_Hole]:
    found = []
    for box in filter(_usable, record.boxes):
        square = _square(box, record.width, record.height)
        if square is None or box.label not in labels:
            continue
        share = (box.x2 - box.x1) * (box.y2 - box.y1) / square[2] ** 2
        if settings.min_share <= share <= settings.max_share:
            found.append(_Hole(box.label, (box.x1, box.y1, box.x2, box.y2), square))
    return found


def _read(path: Path, width: int, height: int) -> np.ndarray | None:
    """Return a picture, uint8 ``h w 3`` BGR, or None if it is damaged, turned or of another size."""
    try:
        encoded = path.read_bytes()
        header = inspect_picture(encoded)
    except (OSError, UnreadablePictureError):
        return None
    if header.orientation != 1 or header.stored_size != (width, height):
        return None
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    return None if image is None else np.asarray(image)


Exemplar = tuple[Path, int, int, SourceBox]


def _exemplars(found: Annotations, settings: BuildSettings) -> dict[str, list[Exemplar]]:
    by_label: dict[str, list[Exemplar]] = {}
    for record in found.records():
        for box in filter(_usable, record.boxes):
            corners = (max(box.x1, 0), max(box.y1, 0), min(box.x2, record.width), min(box.y2, record.height))
            if min(corners[2] - corners[0], corners[3] - corners[1]) >= settings.min_exemplar_side:
                by_label.setdefault(box.label, []).append((record.path, record.width, record.height, box))
    return by_label


def _cut_exemplar(choices: Sequence[Exemplar], rng: np.random.Generator) -> np.ndarray | None:
    """Return the crop of one of the exemplars; None where a few draws all hit damaged pictures."""
    for _ in range(10):
        path, width, height, box = choices[int(rng.integers(len(choices)))]
        image = _read(path, width, height)
        if image is not None:
            x1, y1 = max(round(box.x1), 0), max(round(box.y1), 0)
            return image[y1 : round(min(box.y2, height)), x1 : round(min(box.x2, width))]
    return None


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def _render(image: np.ndarray, hole: _Hole) -> tuple[np.ndarray, np.ndarray]:
    """Return the square source, uint8 ``512 512 3``, and its mask, uint8 ``512 512``, 255 in the hole."""
    x, y, side = hole.square
    filter_ = cv2.INTER_AREA if side > SIZE else cv2.INTER_CUBIC
    square = cv2.resize(image[y : y + side, x : x + side], (SIZE, SIZE), interpolation=filter_)
    x1, y1, x2, y2 = (
        (value - start) * SIZE / side for value, start in zip(hole.box, (x, y, x, y), strict=True)
    )
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = 255
    return square, mask


def _number(record: PictureRecord, taken: set[int]) -> int:
    """Return the picture's own number where its name is one and free, else the first free one."""
    stem = Path(record.name).stem
    number = int(stem) if stem.isdecimal() and len(stem) <= 12 else len(taken)
    while number in taken:
        number += 1
    return number


def build_benchmark(
    sources: Annotations, exemplars: Annotations, folder: Path, settings: BuildSettings
) -> int:
    """Make a benchmark in the form of COCOEE; the same arguments give the same files.

    Every case is a source picture with one of its boxes as the hole, and another picture's object of the
    same label. Pictures that are damaged, or turned by EXIF, are passed over.

    Args:
        sources: pictures to edit, a validation split.
        exemplars: pictures to take objects from, another split.
        folder: the new ``test_bench`` folder.
        settings: how many, and of what sizes.

    Returns:
        The number of cases.

    Raises:
        UserError: the splits share files, the folder holds something, or there are too few cases.
    """
    shared = set(sources.pictures["path"].to_list()) & set(exemplars.pictures["path"].to_list())
    if shared:
        raise UserError(f"sources and exemplars share {len(shared)} pictures, such as '{min(shared)}'")
    if any(make_folder(folder).iterdir()):
        raise UserError(f"'{folder}' is not empty; name a new folder")
    by_label = _exemplars(exemplars, settings)
    records = sorted(sources.records(), key=lambda record: record.name)
    order = generator(settings.seed, "benchmark").permutation(len(records))
    ids: list[int] = []
    for part in PARTS:
        make_folder(folder / part[0])
    for position in order:
        if len(ids) == settings.cases:
            break
        number = _write_case(records[int(position)], by_label, folder, settings, set(ids))
        ids += [number] if number is not None else []
    if len(ids) < settings.cases:
        raise UserError(
            f"only {len(ids)} of {settings.cases} cases could be made; take more pictures or fewer cases"
        )
    with (folder / ID_LIST).open("wb") as file:
        np.save(file, np.array(sorted(ids), np.int64), allow_pickle=False)
    return len(ids)


def _write_case(
    record: PictureRecord,
    by_label: dict[str, list[Exemplar]],
    folder: Path,
    settings: BuildSettings,
    taken: set[int],
) -> int | None:
    """Write the three files of a case, and return its number; None if the picture is no use."""
    holes = _holes(record, settings, set(by_label))
    if not holes:
        return None
    rng = generator(settings.seed, "benchmark", record.name)
    hole = holes[int(rng.integers(len(holes)))]
    image = _read(record.path, record.width, record.height)
    exemplar = _cut_exemplar(by_label[hole.label], rng) if image is not None else None
    if image is None or exemplar is None:
        return None
    number = _number(record, taken)
    square, mask = _render(image, hole)
    for part, picture in ((GT, square), (MASK, mask), (REF, exemplar)):
        write_whole(case_path(folder, part, number), _png(picture))
    return number
