"""Files of many edits: JSON lines, a JSON array, or CSV. No torch here."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pbe.editing.batch.jobs import FILE_KEYS, Job, check_name, single_job
from pbe.editing.settings import MAX_SEED, EditCommand
from pbe.errors import EditValueError, UserError
from pbe.files import expand_home

PAIR_KEYS = (*FILE_KEYS, "name", "seed")
SEPARATORS = ",;\t"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
ENCODINGS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # as Windows' shells write
BETWEEN = re.compile(r"[\s,]*")  # entries of an array; a comma too many does no harm


def collect_jobs(command: EditCommand) -> list[Job]:
    """Return the jobs of ``--image``, ``--mask`` and ``--exemplar``, or of ``--pairs``."""
    if command.pairs is None:
        return [single_job(command)]
    if extra := [key for key in (*FILE_KEYS, "name") if getattr(command, key) is not None]:
        raise UserError(f"--pairs and --{extra[0]} contradict each other; give one of them")
    return read_pairs(Path(command.pairs), command.seed)


def read_pairs(path: Path, seed: int) -> list[Job]:
    """Read jobs from a file of pairs.

    The file holds JSON objects, one a line or in an array, or is a CSV with a row of names on top. Each has
    ``image``, ``mask`` and ``exemplar`` (paths, relative to the file's folder) and optionally ``name``
    (default: the line's number in four digits, in an array the entry's, and the image's stem) and ``seed``
    (default: ``seed``); null and empty cells stand for what is left out. Blank lines are skipped.
    """
    jobs = []
    try:
        for number, place, values in _entries(_read(path)):
            try:
                jobs.append(_job(values, path.parent, place, seed, f"{path} line {number}: "))
            except EditValueError as error:
                raise LineError(number, str(error)) from error
    except LineError as error:
        raise UserError(f"{path} line {error.number}: {error}") from error
    if not jobs:
        raise UserError(f"pairs file '{path}' holds no pairs")
    return jobs


class LineError(EditValueError):
    """A line that cannot be read; ``number`` counts from 1."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"pairs file '{path}' cannot be read: {reason}") from error
    encoding = ENCODINGS.get(content[:2], "utf-8-sig")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"pairs file '{path}' is not {encoding[:6].upper()} text") from error


def _entries(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield number of the line, number in the name and values of each entry."""
    start = text.lstrip()[:1]
    lines = text.split("\n")
    if start == "{" and all(line.lstrip()[:1] in ("", "{") for line in lines):
        return ((number, number, values) for number, values in _json_lines(lines))
    if start not in ("[", "{"):
        return ((number, number, values) for number, values in _rows(text))
    inside = _json_values(text, text.index("[") + 1 if start == "[" else 0, in_array=start == "[")
    return ((number, place, values) for place, (number, values) in enumerate(inside, start=1))


def _json_lines(lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        values, end = _object(line, len(line) - len(line.lstrip()), number, lines_before=number - 1)
        if line[end:].strip():
            raise LineError(number, f"not valid JSON (Extra data at column {end + 1})")
        yield number, values


def _json_values(text: str, position: int, in_array: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects that follow one another until the text or its array ends."""
    number, counted = 1, 0
    while True:
        between = BETWEEN.match(text, position)
        position = between.end() if between else position
        number, counted = number + text.count("\n", counted, position), position
        if in_array and text[position : position + 1] in ("", "]"):
            if text[position + 1 :].strip() or position == len(text):
                raise LineError(number, "the array does not end where the file does; it may be cut short")
            return
        if position == len(text):
            return
        values, position = _object(text, position, number)
        yield number, values


def _object(text: str, position: int, number: int, lines_before: int = 0) -> tuple[dict[str, Any], int]:
    """Return the JSON object that starts at a position, in line ``number``, and where it ends."""
    try:
        values, end = json.JSONDecoder(object_pairs_hook=_once_each).raw_decode(text, position)
    except json.JSONDecodeError as error:
        line = lines_before + error.lineno
        raise LineError(line, f"not valid JSON ({error.msg} at column {error.colno})") from error
    except EditValueError as error:
        raise LineError(number, str(error)) from error
    except (ValueError, RecursionError) as error:
        reason = "not usable JSON: a number is too long or the nesting too deep"
        raise LineError(number, reason) from error
    if not isinstance(values, dict):
        example = '{"image": ..., "mask": ..., "exemplar": ...}'
        raise LineError(number, f"must be a JSON object such as {example}")
    return values, end


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
            raise LineError(number, f"not a row of CSV ({error})") from error
        if not any(cell.strip() for cell in row):
            continue
        if not names:
            names = _columns(row, number)
        elif len(row) != len(names):
            raise LineError(number, f"{len(row)} cells for {len(names)} columns")
        else:
            yield number, {name: cell for name, cell in zip(names, row, strict=True) if cell.strip()}


def _columns(row: list[str], number: int) -> list[str]:
    names = [cell.strip().lower() for cell in row]
    if not set(FILE_KEYS) <= set(names):
        forms = "JSON objects, one a line or in an array, or CSV with the columns image, mask and exemplar"
        raise LineError(number, f"neither of the forms that pairs come in: {forms}")
    if len(set(names)) < len(names):
        raise LineError(number, _twice(names))
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
    number: Any = value
    if isinstance(value, str):
        try:
            number = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
        except ValueError:
            number = None
    whole = not isinstance(number, bool) and isinstance(number, int | float) and number == number // 1
    if not whole or not 0 <= number <= MAX_SEED:
        raise EditValueError(f"'seed' must be a whole number from 0 to {MAX_SEED}")
    return int(number)
