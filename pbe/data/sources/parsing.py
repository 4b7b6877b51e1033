"""Text files, YAML, streamed JSON and single values, as tools write them.

Text may carry a byte order mark or be UTF-16. Tools write a 3 as ``3``, ``3.0`` or ``"3"``, and a yes as
``true``, ``1`` or ``"1"``: the same forms are accepted in every field of every format. What is none of them
is no value, or a :class:`~pbe.data.sources.annotations.DroppedError`.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import polars as pl
import yaml

from pbe.data.sources.annotations import DroppedError, Reason
from pbe.errors import UserError

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
MAX_SHOWN = 100
CHUNK = 4 * 2**20  # characters of JSON that are read at a time
TRUE = frozenset({"1", "1.0", "true", "t", "yes", "y"})
FALSE = frozenset({"", "0", "0.0", "-1", "-1.0", "false", "f", "no", "n", "none", "null"})  # -1: unknown
LARGEST_SIDE = 2**31 - 1
_DIGITS = re.compile(r"[+-]?\d{1,1000}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NOT_WHITE = re.compile(r"[^ \t\r\n]")


def shown(value: object) -> str:
    """Return what a file says, for an error: in quotes, on one line, and not too long."""
    text = str(value)
    line = "".join(character if character.isprintable() else "?" for character in text[:MAX_SHOWN])
    return f"'{line}{'...' if len(text) > MAX_SHOWN else ''}'"


def encoding_of(start: bytes) -> str:
    """Return the encoding that the first bytes tell: by a mark, or by the zeros of UTF-16, else UTF-8."""
    for mark, name in MARKS:
        if start.startswith(mark):
            return name
    if start[1:2] == b"\0" and start[:1] != b"\0":
        return "utf-16-le"
    return "utf-16-be" if start[:1] == b"\0" and start[1:2] not in (b"", b"\0") else "utf-8"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a text file is read into a one-line UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except UnicodeError as error:
        raise UserError(f"'{path}': {undecodable(path, error)}") from error


def file_encoding(path: Path) -> str:
    """Return the encoding of a text file; a compressed one is refused."""
    with reading(path), path.open("rb") as file:
        start = file.read(8)
    for mark, name in COMPRESSED.items():
        if start.startswith(mark):
            raise UserError(f"'{path}' is compressed ({name}); unpack it first")
    return encoding_of(start)


def undecodable(path: Path, error: UnicodeError) -> str:
    """Return what is wrong with a file whose bytes are no text of its encoding, with the line."""
    if not (isinstance(error, UnicodeDecodeError) and error.encoding.startswith("utf-8")):
        return f"damaged text ({error.reason if isinstance(error, UnicodeDecodeError) else error})"
    with path.open("rb") as file:
        for place, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"line {place} is not UTF-8; save it in this encoding"
    return "not UTF-8; save it in this encoding"


def read_text(path: Path) -> str:
    """Return the text of a file, without a byte order mark, and with plain line ends."""
    with reading(path):
        return path.read_text(encoding=file_encoding(path))  # CRLF and CR become LF


class _Loader(yaml.BaseLoader):
    """Every scalar stays the text that was written, so that a class named "no" is no False."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in keys:
                problem = f"the key {shown(key.value)} stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; scalars are texts, an empty file is an empty mapping."""
    content = read_text(path)
    try:
        found = yaml.load(content, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        start, problem = f"'{path}' is not valid YAML", str(error)
        if isinstance(error, yaml.MarkedYAMLError):
            mark = error.problem_mark or error.context_mark
            start = f"'{path}', line {mark.line + 1}" if mark else f"'{path}'"
            problem = str(error.problem or error.context)
            if error.context and problem.startswith("but "):
                problem = f"{error.context} {problem}"
        raise UserError(f"{start}: {' '.join(problem.split()) or 'damaged'}") from error
    if found in (None, ""):
        return {}
    if not isinstance(found, dict):
        raise UserError(f"'{path}' holds no 'key: value' lines")
    return found


class _JsonWindow:
    """A window over the text of a JSON file, with the decoder of the standard library at its front."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.text = ""
        self.place = 0
        self.line, self.column = 1, 1  # where the window starts in the file
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        """Append a chunk, and forget what has been read; False at the end of the file."""
        chunk = self.file.read(max(CHUNK, len(self.text) - self.place))
        self.line, self.column = self.position()
        self.text, self.place = self.text[self.place :] + chunk, 0
        return bool(chunk)

    def position(self) -> tuple[int, int]:
        """Return the line and column, from 1, that have been reached."""
        newlines = self.text.count("\n", 0, self.place)
        if not newlines:
            return self.line, self.column + self.place
        return self.line + newlines, self.place - self.text.rindex("\n", 0, self.place)

    def peek(self) -> str:
        """Return the next character that is no white space; empty at the end."""
        while not (found := _NOT_WHITE.search(self.text, self.place)):
            self.place = len(self.text)
            if not self.more():
                return ""
        self.place = found.start()
        return found[0]

    def expect(self, characters: str) -> str:
        """Read past white space and one of ``characters``, and return that one; ValueError for others."""
        found = self.peek()
        if not found or found not in characters:
            wanted = " or ".join(f"'{character}'" for character in characters)
            there = f"'{found}'" if found else "the end of the file"
            raise ValueError(f"{there} stands where {wanted} belongs")
        self.place += 1
        return found

    def value(self) -> Any:
        """Return the next value, whatever it is; the window grows until it holds all of it."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                ahead = error.pos - self.place
                if not self.more():
                    self.place += ahead
                    raise ValueError(error.msg) from error
                continue
            # What touches the end of the window may go on behind it, as a number does.
            if end < len(self.text) or not self.more():
                self.place = end
                return value

    def entries(self, brackets: str) -> Iterator[None]:
        """Stop at every entry of an array or object, which the caller reads, and at last behind it."""
        self.expect(brackets[0])
        if self.peek() == brackets[1]:
            self.expect(brackets[1])
            return
        yield
        while self.expect("," + brackets[1]) == ",":
            yield


def stream_arrays(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, element) for every element of every array of the object that a JSON file holds.

    Elements are read one by one, so that memory does not grow with the file. Members that are no arrays are
    read and left out.
    """
    with reading(path), path.open(encoding=file_encoding(path)) as file:
        window = _JsonWindow(file)
        try:
            if window.peek() == "[":
                raise UserError(
                    f"'{path}' holds a list, as results of a detector do, where an object {{...}} belongs"
                )
            for _ in window.entries("{}"):
                name = str(window.value())
                window.expect(":")
                if window.peek() == "[":
                    for _ in window.entries("[]"):
                        yield name, window.value()
                else:
                    window.value()
            if window.peek():
                raise ValueError("text goes on behind the closing '}'")
        except UnicodeError:
            raise
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
            line, column = window.position()
            raise UserError(f"'{path}' is not valid JSON (line {line}, column {column}): {reason}") from error


def number(value: Any) -> float:
    """Return a number, or NaN for what is none; too large a one is infinite."""
    if isinstance(value, str):
        value = value.strip()
        return float(value) if _NUMBER.fullmatch(value) else math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def whole(value: Any) -> int | None:
    """Return a whole number, also where it is written as 3.0 or "3"; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _DIGITS.fullmatch(value.strip()):
        return int(value)  # exactly, also where floating point would round
    found = number(value)
    return int(found) if math.isfinite(found) and found == int(found) else None


def side(value: Any) -> int | None:
    """Return a width or height in pixels; None where it is not given (absent, null, empty or 0)."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    found = whole(value)
    if found is None or not 0 <= found <= LARGEST_SIDE:
        raise DroppedError(Reason.BAD_SIZE)
    return found or None


def identity(value: Any) -> int | str:
    """Return an id, a number or a text that is not empty, so that 3, 3.0 and "3" are one and the same."""
    # A text with an exponent is a name: Open Images' ids are hexadecimal, and many read like 0e12.
    found = None if isinstance(value, str) and "e" in value.lower() else whole(value)
    if found is not None:
        return found
    if not isinstance(value, str) or not value.strip():
        raise DroppedError(Reason.BAD_ENTRY)
    return text(value).strip()


def flag(value: Any) -> bool:
    """Return a yes or no; what is not given, and -1 for unknown, is a no; anything else is dropped."""
    if value is None or isinstance(value, bool):
        return bool(value)
    word = value.strip().lower() if isinstance(value, str) else str(value)
    if word not in TRUE | FALSE:
        raise DroppedError(Reason.BAD_FLAG)
    return word in TRUE


def text(value: Any) -> str:
    """Return a name or label; empty for what is none. What no encoding can hold becomes a question mark."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return str(value)


def number_column(name: str, decimal_comma: bool = False) -> pl.Expr:
    """Return a column of texts as Float64; null where there is no number.

    With ``decimal_comma`` a comma before three digits is a decimal point too; else it may part thousands.
    """
    column = pl.col(name).str.strip_chars()
    digits = r"\d+" if decimal_comma else r"(?:\d{1,2}|\d{4,})"
    return column.str.replace(rf"^([+-]?\d+),({digits})$", "$1.$2").cast(pl.Float64, strict=False)


def flag_column(name: str) -> tuple[pl.Expr, pl.Expr]:
    """Return, for a column of texts, whether each is a yes, and whether it is neither yes nor no."""
    word = pl.col(name).str.strip_chars().str.to_lowercase().fill_null("")
    return word.is_in(sorted(TRUE)), ~word.is_in(sorted(TRUE | FALSE))
