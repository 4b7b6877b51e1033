"""What a command asks for, edit by edit, and its files, each of which is read once. No torch here."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pbe.editing.batch.records import FORMATS
from pbe.editing.images import LoadedFile, aspect_remark, decision, fit_mask, read_image, read_mask
from pbe.editing.settings import MAX_SEED, EditCommand
from pbe.errors import EditValueError, UserError
from pbe.files import expand_home
from pbe.mask_reading import BY_LUMINANCE

FILE_KEYS = ("image", "mask", "exemplar")
PAIR_KEYS = (*FILE_KEYS, "name", "seed")
SEPARATORS = ",;\t"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
ENCODINGS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # as Windows' shells write
BETWEEN = re.compile(r"[\s,]*")  # entries of an array; a comma too many does no harm
LONGEST_SIDE = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}  # of an image in such a file, in pixels
MAX_NAME = 200  # leaves room for the seed and the ending within the 255 bytes of a file name
MANY = 50  # from this many jobs on, reading the files takes a bar of its own
KEPT_BYTES = 2**30  # of pixels; the files of jobs beyond are checked and read again in their turn


@dataclass(frozen=True)
class Job:
    """One image to edit, once or several times.

    Attributes:
        image: path of the image.
        mask: path of the mask.
        exemplar: path of the exemplar.
        name: stem of the output files.
        seed: of the first edit; edit k has ``seed + k``.
        origin: prefix of errors: ``pairs.jsonl line 3: `` or nothing.
    """

    image: Path
    mask: Path
    exemplar: Path
    name: str
    seed: int
    origin: str = ""


@dataclass
class LoadedJob:
    """A job with its files read, the mask at the image's size; ``remarks`` on the mask have kinds as keys."""

    job: Job
    image: LoadedFile
    mask: LoadedFile
    exemplar: LoadedFile
    remarks: dict[str, str] = field(default_factory=dict)
    edits: list[Image.Image] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        height, width = self.image.pixels.shape[:2]
        return height, width


def load_job(job: Job) -> LoadedJob:
    """Read every file of a job; an error names the job."""
    try:
        image, mask = read_image(job.image), read_mask(job.mask)
        size = image.pixels.shape[:2]
        remarks = {}
        if mask.read_by != BY_LUMINANCE:
            remarks[mask.read_by] = f"mask '{job.mask}': {decision(mask.pixels, mask.read_by)}"
        if stretched := aspect_remark(mask.pixels.shape, size):
            remarks["aspect"] = f"mask '{job.mask}': {stretched}"
        mask = replace(mask, pixels=fit_mask(mask.pixels, (size[0], size[1])))
        return LoadedJob(job, image, mask, read_image(job.exemplar, "exemplar"), remarks)
    except UserError as error:
        raise UserError(f"{job.origin}{error}") from error


@dataclass
class CheckedJob:
    """A job whose files can be used, with the image's size and, where they are kept until then, the files."""

    job: Job
    size: tuple[int, int]
    loaded: LoadedJob | None

    def take(self) -> LoadedJob:
        """Return the files, and let go of them."""
        loaded, self.loaded = self.loaded, None
        return loaded or load_job(self.job)


def check_files(jobs: list[Job], *, quiet: bool = True) -> list[CheckedJob]:
    """Read the files of all jobs, and print on stderr what was decided about the masks, each kind once."""
    checked, kept = [], 0
    kinds: dict[str, list[str]] = {}
    for job in tqdm(jobs, "checking files", leave=False, disable=quiet or len(jobs) < MANY):
        loaded = load_job(job)
        for kind, remark in loaded.remarks.items():
            kinds.setdefault(kind, []).append(f"{job.origin}{remark}")
        kept += sum(getattr(loaded, key).pixels.nbytes for key in FILE_KEYS)
        checked.append(CheckedJob(job, loaded.size, loaded if kept <= KEPT_BYTES else None))
    for remarks in kinds.values():
        more = f" (and {len(remarks) - 1} more like it)" if len(remarks) > 1 else ""
        print(f"{remarks[0]}{more}", file=sys.stderr)
    return checked


def single_job(command: EditCommand) -> Job:
    """Return the job of ``--image``, ``--mask`` and ``--exemplar``, which has the image's name by default."""
    files = {key: getattr(command, key) for key in FILE_KEYS}
    if missing := [f"--{key}" for key, file in files.items() if file is None]:
        raise UserError(f"{', '.join(missing)} missing: give --image, --mask and --exemplar, or --pairs")
    paths: dict[str, Any] = {key: Path(file) for key, file in files.items()}
    name = paths["image"].stem if command.name is None else command.name
    check_name(name)
    return Job(**paths, name=name, seed=command.seed)


def check_name(name: str) -> None:
    """Refuse a name that output files cannot have."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise EditValueError(f"name {name!a} is not Unicode text; give another name") from error
    shown = f"name {name[:300]!r} cannot be the name of a file"
    if length > MAX_NAME:
        raise EditValueError(f"{shown}: it has {length} of at most {MAX_NAME} bytes; give another")
    if not name or name.startswith(".") or any(sign in name for sign in "/\\\0\n\r"):
        reason = "it is empty, starts with a dot or holds a slash, a backslash or a line break"
        raise EditValueError(f"{shown}: {reason}; give another")


def output_stem(job: Job, index: int) -> str:
    """Return the file stem of a job's edit number ``index``: ``<name>_<seed + index>``."""
    return f"{job.name}_{job.seed + index}"


def check_outputs(jobs: list[Job], num_images: int, folder: Path) -> None:
    """Check that no two edits share an output file, and that none lands on an input."""
    inputs = {os.path.realpath(path) for job in jobs for path in (job.image, job.mask, job.exemplar)}
    folder = Path(os.path.realpath(folder))
    taken = set()
    for job in jobs:
        if job.seed + num_images - 1 > MAX_SEED:
            raise UserError(f"{job.origin}seed {job.seed} is too large for {num_images} images")
        for stem in (output_stem(job, index) for index in range(num_images)):
            if stem in taken:
                raise UserError(f"{job.origin}'{stem}' is already the output of another edit; rename one")
            taken.add(stem)
            for file in (folder / f"{stem}.png", folder / f"{stem}_grid.png"):
                if str(file) in inputs:
                    raise UserError(f"{job.origin}the output would replace its input '{file}'; change --out")


def output_folder(command: EditCommand, jobs: list[Job]) -> Path:
    """Return the folder that the edits go to, once it is sure that they can be written there."""
    if (command.out is None) == (command.output is None):
        raise UserError("give --out (a folder) or --output (the file of a single edit), and only one of them")
    if command.out is not None:
        check_outputs(jobs, command.num_images, Path(command.out))
        return Path(command.out)
    target = Path(str(command.output))
    if command.pairs is not None or command.num_images > 1:
        raise UserError("--output is the file of a single edit; --pairs and --num-images need --out")
    if target.suffix.lower() not in FORMATS:
        raise UserError(f"--output '{target}' must end in one of {', '.join(FORMATS)}")
    inputs = [getattr(job, key) for job in jobs for key in FILE_KEYS]
    if os.path.realpath(target) in [os.path.realpath(each) for each in inputs]:
        raise UserError(f"the output would replace its input '{target}'; change --output")
    return target.parent


def check_format(command: EditCommand, size: tuple[int, int]) -> None:
    """Check that an edit of an image of this size (height, width) fits into the format of ``--output``."""
    if command.output is None:
        return
    target = Path(command.output)
    if command.region == "full":
        size = (command.height or size[0], command.width or size[1])
    longest = LONGEST_SIDE.get(target.suffix.lower())
    if longest is not None and max(size) > longest:
        raise UserError(
            f"--output '{target}': the edit has {size[1]}x{size[0]} pixels, a {target.suffix} file at most "
            f"{longest} a side; take another ending"
        )


def collect_jobs(command: EditCommand) -> list[Job]:
    """Return the jobs of ``--image``, ``--mask`` and ``--exemplar``, or of ``--pairs``."""
    if command.pairs is None:
        return [single_job(command)]
    if extra := [key for key in (*FILE_KEYS, "name") if getattr(command, key) is not None]:
        raise UserError(f"--pairs and --{extra[0]} cannot go together; give one of them")
    return read_pairs(Path(command.pairs), command.seed)


def read_pairs(path: Path, seed: int) -> list[Job]:
    """Read jobs from a file of pairs.

    The file holds JSON objects, one a line or in an array, or is a CSV with a row of names on top. Each has
    ``image``, ``mask`` and ``exemplar`` (paths, relative to the file's folder) and optionally ``name``
    (default: the line's number in four digits, in an array the entry's, and the image's stem) and ``seed``
    (default: ``seed``); null and empty cells stand for what is left out. Blank lines are skipped.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"pairs file '{path}' cannot be read: {reason}") from error
    encoding = ENCODINGS.get(content[:2], "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"pairs file '{path}' is not {encoding[:6].upper()} text") from error
    jobs = []
    try:
        for number, place, values in _entries(text):
            with _in_line(number):
                jobs.append(_job(values, path.parent, place, seed, f"{path} line {number}: "))
    except EditValueError as error:
        raise UserError(f"{path} {error}") from error
    if not jobs:
        raise UserError(f"pairs file '{path}' holds no pairs")
    return jobs


@contextmanager
def _in_line(number: int) -> Iterator[None]:
    """Have an error name the line."""
    try:
        yield
    except EditValueError as error:
        raise EditValueError(f"line {number}: {error}") from error


def _entries(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield number of the line, number in the name and values of each entry."""
    start, lines = text.lstrip()[:1], text.split("\n")
    if start == "{" and all(line.lstrip()[:1] in ("", "{") for line in lines):
        for number, line in enumerate(lines, start=1):
            found = list(_objects(line, number))
            if len(found) > 1:
                raise EditValueError(f"line {number}: not valid JSON (Extra data: one object a line)")
            for _, values in found:
                yield number, number, values
    elif start in ("[", "{"):
        for place, (number, values) in enumerate(_objects(text), start=1):
            yield number, place, values
    else:
        for number, values in _rows(text):
            yield number, number, values


def _objects(text: str, first: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line and values of JSON objects that follow one another, or lie in an array; ``first`` line."""
    in_array = text.lstrip().startswith("[")
    position, number, counted = text.index("[") + 1 if in_array else 0, first, 0
    decoder = json.JSONDecoder(object_pairs_hook=_once_each)
    while True:
        between = BETWEEN.match(text, position)
        position = between.end() if between else position
        number, counted = number + text.count("\n", counted, position), position
        if in_array and text[position : position + 1] in ("", "]"):
            if text[position + 1 :].strip() or position == len(text):
                reason = "the array does not end where the file does; it may be cut short"
                raise EditValueError(f"line {number}: {reason}")
            return
        if position == len(text):
            return
        try:
            with _in_line(number):
                values, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            reason = f"not valid JSON ({error.msg} at column {error.colno})"
            raise EditValueError(f"line {first - 1 + error.lineno}: {reason}") from error
        except EditValueError:
            raise
        except (ValueError, RecursionError) as error:
            reason = "not usable JSON: a number is too long or the nesting too deep"
            raise EditValueError(f"line {number}: {reason}") from error
        if not isinstance(values, dict):
            example = '{"image": ..., "mask": ..., "exemplar": ...}'
            raise EditValueError(f"line {number}: must be a JSON object such as {example}")
        yield number, values


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise EditValueError(_twice([key for key, _ in pairs]))
    return values


def _twice(keys: list[str]) -> str:
    return f"'{next(key for key in keys if keys.count(key) > 1)}' is there twice"


def _rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a CSV, whose first row names the columns."""
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    header = lines[first] if lines else ""
    separator = max(SEPARATORS, key=header.count)
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True, strict=True)
    names: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise EditValueError(f"line {number}: not a row of CSV ({error})") from error
        if not any(cell.strip() for cell in row):
            continue
        if not names:
            with _in_line(number):
                names = _columns(row)
        elif len(row) != len(names):
            raise EditValueError(f"line {number}: {len(row)} cells for {len(names)} columns")
        else:
            yield number, {name: cell for name, cell in zip(names, row, strict=True) if cell.strip()}


def _columns(row: list[str]) -> list[str]:
    names = [cell.strip().lower() for cell in row]
    if not set(FILE_KEYS) <= set(names):
        forms = "JSON objects, one per line or in an array, or CSV with the columns image, mask and exemplar"
        raise EditValueError(f"not in a form of pairs: {forms}")
    if len(set(names)) < len(names):
        raise EditValueError(_twice(names))
    return names


def _job(values: dict[str, Any], folder: Path, place: int, seed: int, origin: str) -> Job:
    values = {key: value for key, value in values.items() if value is not None}
    unknown = [key for key in values if key not in PAIR_KEYS]
    if unknown:
        raise EditValueError(f"unknown key '{unknown[0]}'; there are: {', '.join(PAIR_KEYS)}")
    image, mask, exemplar = (_file(values, key, folder) for key in FILE_KEYS)
    name = _text(values, "name") if "name" in values else f"{place:04d}_{image.stem}"
    check_name(name)
    return Job(image, mask, exemplar, name, _seed(values.get("seed", seed)), origin)


def _text(values: dict[str, Any], key: str) -> str:
    if key not in values:
        raise EditValueError(f"'{key}' is missing")
    if not isinstance(values[key], str) or not values[key]:
        raise EditValueError(f"'{key}' must be a string that is not empty")
    return values[key]


def _file(values: dict[str, Any], key: str, folder: Path) -> Path:
    """Return the path of a file; backslashes separate folders where that alone leads to a file."""
    text = _text(values, key)
    try:
        possible = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise EditValueError(f"'{key}' cannot be the path of a file: {text!a}")
    path = folder / expand_home(text)
    if os.path.exists(path):
        return path
    if URL.match(text):
        raise EditValueError(f"'{key}' is the URL '{text}'; download it and give the path of the file")
    other = folder / expand_home(text.replace("\\", "/"))
    return other if os.path.exists(other) else path


def _seed(value: Any) -> int:
    """Return a seed that is written as a whole number in any form: 3, 3.0 or "3"."""
    number = value
    try:
        if isinstance(value, str):
            number = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
        if isinstance(value, bool) or number != int(number) or not 0 <= number <= MAX_SEED:
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise EditValueError(f"'seed' must be a whole number from 0 to {MAX_SEED}") from error
    return int(number)
