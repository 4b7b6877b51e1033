"""What a command line asks for: one edit from its arguments, or many from a file of pairs. No torch here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbe.editing.pictures import fit_mask, read_mask, read_picture
from pbe.editing.problems import EditValueError
from pbe.errors import UserError

FILE_KEYS = ("image", "mask", "exemplar")
PAIR_KEYS = (*FILE_KEYS, "name", "seed")
MAX_SEED = 2**63 - 1
MARGIN = 0.5  # around the mask when only its surroundings are edited: a share of its longer side
PICTURE_SUFFIXES = (".png", ".webp", ".tif", ".tiff", ".jpg", ".jpeg")
MAX_NAME = 200  # leaves room for the seed and the ending within the 255 bytes of a file name


@dataclass(frozen=True)
class Job:
    """One picture to edit, once or several times.

    Attributes:
        image: path of the picture.
        mask: path of the mask.
        exemplar: path of the exemplar.
        name: stem of the output files.
        seed: of the first edit; edit k has ``seed + k``.
        origin: prefix of complaints: ``pairs.jsonl line 3: `` or nothing.
    """

    image: Path
    mask: Path
    exemplar: Path
    name: str
    seed: int
    origin: str = ""


def single_job(image: str, mask: str, exemplar: str, name: str | None, seed: int) -> list[Job]:
    """Return the one job of a command line; the name defaults to the picture's stem.

    Raises:
        UserError: a name that cannot be a file's.
    """
    job = Job(Path(image), Path(mask), Path(exemplar), name if name is not None else Path(image).stem, seed)
    _check_name(job.name)
    return [job]


def read_pairs(path: Path, seed: int) -> list[Job]:
    """Read jobs from a JSON-lines file.

    Each line is an object with ``image``, ``mask`` and ``exemplar`` (paths, relative to the file's folder)
    and optionally ``name`` (default: the line's number in four digits and the picture's stem) and ``seed``
    (default: ``seed``). Blank lines are skipped.

    Raises:
        UserError: the file cannot be read or holds no pairs, or a line is malformed (its number is named).
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"pairs file '{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"pairs file '{path}' is not UTF-8 text") from error
    jobs = []
    for number, line in enumerate(lines, start=1):
        origin = f"{path} line {number}: "
        if line.strip():
            try:
                jobs.append(_parse_pair(line, path.parent, number, seed, origin))
            except EditValueError as error:
                raise UserError(f"{origin}{error}") from error
    if not jobs:
        raise UserError(f"pairs file '{path}' holds no pairs")
    return jobs


def _parse_pair(line: str, folder: Path, number: int, seed: int, origin: str) -> Job:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise EditValueError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise EditValueError("not usable JSON: a number is too long or the nesting too deep") from error
    if not isinstance(values, dict):
        raise EditValueError('must be a JSON object such as {"image": ..., "mask": ..., "exemplar": ...}')
    unknown = [key for key in values if key not in PAIR_KEYS]
    if unknown:
        raise EditValueError(f"unknown key '{unknown[0]}'; there are: {', '.join(PAIR_KEYS)}")
    image, mask, exemplar = (folder / _path(values, key) for key in FILE_KEYS)
    name = _text(values, "name") if "name" in values else f"{number:04d}_{image.stem}"
    _check_name(name)
    return Job(image, mask, exemplar, name, _seed(values.get("seed", seed)), origin)


def _text(values: dict[str, Any], key: str) -> str:
    if key not in values:
        raise EditValueError(f"'{key}' is missing")
    if not isinstance(values[key], str) or not values[key]:
        raise EditValueError(f"'{key}' must be a string that is not empty")
    return values[key]


def _path(values: dict[str, Any], key: str) -> str:
    text = _text(values, key)
    try:
        possible = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise EditValueError(f"'{key}' cannot be the path of a file: {text!a}")
    return text


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise EditValueError(f"'seed' must be a whole number from 0 to {MAX_SEED}")
    return value


def _check_name(name: str) -> None:
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise EditValueError(f"name {name!a} is not Unicode text; give another name") from error
    forbidden = name.startswith(".") or any(sign in name for sign in "/\\\0")
    if not name or forbidden or length > MAX_NAME:
        raise EditValueError(f"name '{name}' cannot be the name of a file")


def output_stem(job: Job, index: int) -> str:
    """Return the file stem of a job's edit number ``index``: ``<name>_<seed + index>``."""
    return f"{job.name}_{job.seed + index}"


def check_outputs(jobs: list[Job], num_images: int, folder: Path) -> None:
    """Check that no two edits share an output file, and that none lands on an input.

    Raises:
        UserError: two edits of one name and seed, an output that would replace an input, or a seed too large.
    """
    inputs = {path.resolve() for job in jobs for path in (job.image, job.mask, job.exemplar)}
    folder = folder.resolve()
    taken: dict[str, Job] = {}
    for job in jobs:
        if job.seed + num_images - 1 > MAX_SEED:
            raise UserError(f"{job.origin}seed {job.seed} is too large for {num_images} images")
        for stem in (output_stem(job, index) for index in range(num_images)):
            if stem in taken:
                raise UserError(f"{job.origin}'{stem}' is already the output of another edit; name one anew")
            taken[stem] = job
            for file in (folder / f"{stem}.png", folder / f"{stem}_grid.png"):
                if file in inputs:
                    raise UserError(f"{job.origin}the output would replace its input '{file}'; change --out")


def check_files(jobs: list[Job]) -> Iterator[tuple[int, int]]:
    """Read every file of every job, and yield the height and width of each job's picture.

    Raises:
        UserError: the first file that cannot be used, in one line.
    """
    for job in jobs:
        try:
            size = read_picture(job.image).pixels.shape[:2]
            fit_mask(read_mask(job.mask).pixels, size)
            read_picture(job.exemplar, "exemplar")
        except UserError as error:
            raise UserError(f"{job.origin}{error}") from error
        yield size
