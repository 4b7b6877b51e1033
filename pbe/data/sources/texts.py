"""Text files as tools write them, with a byte order mark or in UTF-16, and YAML; errors name the place."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import yaml

from pbe.errors import UserError

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MAX_SHOWN = 100
COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


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


def file_encoding(path: Path) -> str:
    """Return the encoding of a text file.

    Raises:
        UserError: it cannot be read, or is compressed.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
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
    """Return the text of a file, without a byte order mark, and with plain line ends.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    encoding = file_encoding(path)
    try:
        content = path.read_text(encoding=encoding)  # CRLF and CR become LF
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except UnicodeError as error:
        raise UserError(f"'{path}': {undecodable(path, error)}") from error
    return content


class _Loader(yaml.BaseLoader):
    """Every scalar stays the text that was written, so that a class named "no" is no False."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key, _ in node.value:
            if key.value in keys if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shown(key.value)} stands twice", problem_mark=key.start_mark
                )
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; scalars are texts, an empty file is an empty mapping.

    Raises:
        UserError: it cannot be read, is no YAML or no mapping; it names file and line.
    """
    content = read_text(path)
    try:
        found = yaml.load(content, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        problem = error.problem or error.context
        if error.problem and error.context and error.problem.startswith("but "):
            problem = f"{error.context} {error.problem}"
        raise UserError(f"'{path}'{place}: {_one_line(problem)}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"'{path}' is not valid YAML: {_one_line(error)}") from error
    if found in (None, ""):
        return {}
    if not isinstance(found, dict):
        raise UserError(f"'{path}' holds no 'key: value' lines")
    return found


def _one_line(message: object) -> str:
    return " ".join(str(message).split()) or "damaged"
