"""Reading a large JSON object of arrays element by element, so that memory does not grow with the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pbe.errors import UserError

CHUNK = 4 * 2**20
WHITESPACE = " \t\r\n"


class _Reader:
    """A window over the text, with the decoder of the standard library at its front."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.text = ""
        self.place = 0
        self.ended = False
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        """Append a chunk, and forget what has been read; False at the end of the file."""
        chunk = self.file.read(max(CHUNK, len(self.text) - self.place))
        self.text, self.place = self.text[self.place :] + chunk, 0
        self.ended = not chunk
        return not self.ended

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
            raise ValueError(f"{found!r} stands where one of {characters!r} belongs")
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
            except json.JSONDecodeError:
                if not self.more():
                    raise
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
    try:
        with path.open(encoding="utf-8-sig") as file:
            reader = _Reader(file)
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
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not valid JSON: {error}") from error
