"""Reading a large JSON object of arrays element by element, so that memory does not grow with the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pbe.data.sources.texts import file_encoding, undecodable
from pbe.errors import UserError

CHUNK = 4 * 2**20
WHITESPACE = " \t\r\n"


class _Reader:
    """A window over the text, with the decoder of the standard library at its front."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.text = ""
        self.place = 0
        self.lines, self.column = 1, 1  # where the window starts in the file
        self.ended = False
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        """Append a chunk, and forget what has been read; False at the end of the file."""
        chunk = self.file.read(max(CHUNK, len(self.text) - self.place))
        self.lines, self.column = self.position(self.place)
        self.text, self.place = self.text[self.place :] + chunk, 0
        self.ended = not chunk
        return not self.ended

    def position(self, place: int) -> tuple[int, int]:
        """Return line and column, from 1, of a place in the window."""
        newlines = self.text.count("\n", 0, place)
        if not newlines:
            return self.lines, self.column + place
        return self.lines + newlines, place - self.text.rindex("\n", 0, place)

    def peek(self) -> str:
        """Return the next character that is no white space; empty at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in WHITESPACE:
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""

    def expect(self, characters: str) -> str:
        """Read past white space and one of ``characters``, and return that one.

        Raises:
            ValueError: something else stands there.
        """
        found = self.peek()
        if not found or found not in characters:
            wanted = " or ".join(f"'{character}'" for character in characters)
            there = f"'{found}'" if found else "the end of the file"
            raise ValueError(f"{there} stands where {wanted} belongs")
        self.place += 1
        return found

    def value(self) -> Any:
        """Return the next value, whatever it is; the window grows until it holds all of it.

        Raises:
            ValueError: there is none.
        """
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


def _elements(reader: _Reader) -> Iterator[Any]:
    """Yield the elements of an array one by one; the reader stands at its bracket, afterwards behind it."""
    reader.expect("[")
    if reader.peek() == "]":
        reader.expect("]")
        return
    while True:
        yield reader.value()
        if reader.expect(",]") == "]":
            return


def stream_arrays(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, element) for every element of every array of the object that a file holds.

    Members that are no arrays are read and left out.

    Raises:
        UserError: the file cannot be read or is no such JSON; it names the file.
    """
    encoding = file_encoding(path)
    reader: _Reader | None = None
    try:
        with path.open(encoding=encoding) as file:
            reader = _Reader(file)
            if reader.peek() == "[":
                raise UserError(
                    f"'{path}' holds a list, as results of a detector do, where an object {{...}} belongs"
                )
            yield from _members(reader)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except UnicodeError as error:
        raise UserError(f"'{path}': {undecodable(path, error)}") from error
    except (ValueError, RecursionError) as error:
        line, column = reader.position(reader.place) if reader else (1, 1)
        place = f"line {line}, column {column}"
        raise UserError(f"'{path}' is not valid JSON ({place}): {_reason(error)}") from error


def _members(reader: _Reader) -> Iterator[tuple[str, Any]]:
    reader.expect("{")
    closing = reader.expect("}") if reader.peek() == "}" else ""
    while not closing:
        name = reader.value()
        reader.expect(":")
        if reader.peek() == "[":
            for element in _elements(reader):
                yield str(name), element
        else:
            reader.value()
        closing = reader.expect(",}").strip(",")
    if reader.peek():
        raise ValueError("text goes on behind the closing '}'")


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
