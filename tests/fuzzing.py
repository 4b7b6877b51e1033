"""Damage for files and values, drawn with a seed, and the one thing that is asked of every reader.

A reader of what a user hands over either succeeds or raises ``UserError`` with one line. :func:`outcome`
checks that; :func:`damaged_bytes`, :func:`damaged_text` and :func:`damaged_json` make the inputs.
"""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable
from typing import Any

from pbe.errors import UserError

LARGE = "@1e400@", "@" + "9" * 30 + "@", "@" + "7" * 5000 + "@"  # become bare numbers of JSON
ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3.5,
        -0.0,
        1e308,
        -1e308,
        float("nan"),
        float("inf"),
        2**31,
        2**63,
        -(2**70),
    ),
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "3.0",
        " 7 ",
        "1e400",
        "nan",
        "inf",
        "true",
        "no",
        "1,5",
        "a/b",
        "..",
        "\ud800",
    ),
    *("ä", "a\u0308", "\x00", "a\nb", "x" * 3000, "१२", "1_000", "0x10", "~", "*", "[", "{}"),
    *(
        [],
        {},
        [[]],
        [None],
        [[1, 2], [3]],
        {"a": 1},
        {"size": [3, 3]},
        {"size": [30, 40], "counts": "o" * 400},
    ),
    *({"size": [2**40, 2**40], "counts": [2**80]}, {"size": [30, 40], "counts": [float("nan"), 1]}, LARGE[0]),
    *LARGE[1:],
)
ODD_WORDS = (
    *(
        "",
        "nan",
        "NaN",
        "inf",
        "-inf",
        "1e400",
        "-1",
        "0",
        "1",
        "2.5",
        "true",
        "None",
        "null",
        "[]",
        "{}",
        "[",
        '"',
    ),
    *(
        "'",
        ",",
        ";",
        "\t",
        "\x00",
        "9" * 30,
        "7" * 5000,
        "ä",
        "🐶",
        "१",
        "..",
        "/",
        "\\",
        "%",
        "&amp;",
        "<a>",
        "]]>",
    ),
    *(
        "&x;",
        "!!python/object:os.system",
        "*a",
        "&a [*a]",
        "- -",
        ": :",
        "${x}",
        "2020-13-45",
        "\r",
        "\ufeff",
        "x" * 500,
    ),
)
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "cp037", "utf-7")


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return bytes that were cut, flipped, repeated, lost, swapped or written in another encoding."""
    start = rng.randrange(len(content) + 1)
    end = min(len(content), start + rng.choice((1, 2, 8, 64, 512)))
    noise = rng.randbytes(rng.choice((1, 3, 40)))
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: content[:start],
        lambda: content[:start] + content[end:],
        lambda: content[:start] + noise + content[end:],
        lambda: content[:start] + content[start:end] * 3 + content[end:],
        lambda: content[:start] + b"\0" * rng.choice((1, 100)) + content[start:],
        lambda: content[:end] + content[:start],
        lambda: content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"\0"))),
        lambda: _encoded(content, rng.choice(ENCODINGS)),
        lambda: rng.choice((b"", b"\0", noise, b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b\x08" + noise)),
    )
    return rng.choice(kinds)()


def _encoded(content: bytes, encoding: str) -> bytes:
    return content.decode("utf-8", "replace").encode(encoding, "replace")


def damaged_text(content: bytes, rng: random.Random, separators: str = ",;: \t\n<>/[]") -> bytes:
    """Return a text one to three of whose words, between ``separators``, are odd ones."""
    text = content.decode()
    for _ in range(rng.randint(1, 3)):
        places = [place for place, character in enumerate(text) if character in separators] or [0]
        start = rng.choice(places) + 1
        end = next((place for place in places if place >= start), len(text))
        text = text[:start] + rng.choice(ODD_WORDS) + text[end:]
    return text.encode("utf-8", "replace")


def damaged_json(value: Any, rng: random.Random) -> bytes:
    """Return JSON one to three of whose nodes are odd values, lost or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        nodes = list(_nodes(value))
        parent, key = rng.choice(nodes)
        kind = rng.random()
        if kind < 0.1 and isinstance(parent, dict):
            del parent[key]
        elif kind < 0.2 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    text = json.dumps(value)
    for number in LARGE:
        text = text.replace(json.dumps(number), number.strip("@"))
    return text.encode()


def _nodes(value: Any) -> Any:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _nodes(inner)


def outcome(action: Callable[[], object], told: str) -> str:
    """Run a reader, and return what it returned, as text, or the line that it refuses with.

    Args:
        action: reads the damaged input.
        told: what to say of the input where something else happens.
    """
    line = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return repr(action())
    except UserError as error:
        line = str(error)
    except Exception as error:
        raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error
    assert len(line.splitlines()) == 1, f"{told}: not one line: {line}"
    assert line.strip(), f"{told}: an empty line"
    return line
