"""Which file an annotation means by a name that may have been written on another machine, for another root.

A name is first taken as it stands, then cleaned (separators, ``./``, drives, URLs, the two ways of Unicode to
write an umlaut), and then the file is taken whose path has the longest end in common with it; upper and lower
case count as the same only where nothing else fits. What is ambiguous is refused: two files that fit one name
equally well, and two names that fit one file equally well.
"""

from __future__ import annotations

import difflib
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from pbe.data.sources.parsing import shown

AMBIGUOUS = -1
MAX_COMPARED = 5000  # names, for the nearest one

Parts = tuple[str, ...]
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^/]*/?")
_DRIVE = re.compile(r"[A-Za-z]:(?=/|$)")


class _Match(NamedTuple):
    """A name's best file: its row, how many parts of both paths agree from the end, and the name's parts."""

    row: int
    common: int
    parts: Parts


def clean_name(name: str) -> str:
    """Return a name with ``/`` between its parts, relative, without ``./``, drive, host or query, in NFC."""
    plain = unicodedata.normalize("NFC", name).strip().replace("\\", "/")
    bare = _URL.sub("", plain)
    if bare != plain:
        bare = unquote(re.split(r"[?#]", bare)[0])
    bare = _DRIVE.sub("", bare)
    parts = posixpath.normpath(bare).split("/") if bare else []
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _spellings(name: str) -> list[str]:
    """Return what a name may mean, the likeliest first: a query or an escape may belong to it or not."""
    found = [clean_name(name)]
    if "?" in name:
        found += [clean_name(name.partition("?")[0]), clean_name(name.rpartition("=")[2])]
    return found + [clean_name(unquote(each)) for each in found if "%" in each]


class NameMatcher:
    """The files of a folder, to be found by the names that annotations give them.

    ``names`` are relative to ``root``, whose own name helps to tell files apart, with ``/`` between parts.
    """

    def __init__(self, names: Sequence[str], root: Path) -> None:
        self.names, self.root = names, root
        self._exact = {name: row for row, name in enumerate(names)}
        self._paths: list[Parts] = []
        self._above = 0
        self._cleaned: dict[str, list[int]] = defaultdict(list)
        # By the last part, and by the last two: videos number their frames alike.
        self._ends: dict[Parts, list[int]] = defaultdict(list)
        self._folded_ends: dict[str, list[int]] = defaultdict(list)

    def _look_closer(self) -> None:
        """Take the names apart, which takes a while for millions and is seldom needed."""
        if self._paths:
            return
        above = tuple(unicodedata.normalize("NFC", part) for part in self.root.resolve().parts)
        self._above = len(above)
        for row, name in enumerate(self.names):
            path = above + tuple(unicodedata.normalize("NFC", name).split("/"))
            self._paths.append(path)
            self._cleaned["/".join(path[len(above) :])].append(row)
            self._ends[path[-1:]].append(row)
            self._ends[path[-2:]].append(row)
            self._folded_ends[path[-1].casefold()].append(row)

    def match(self, wanted: Iterable[str]) -> dict[str, int | None]:
        """Return the row of each name's file, None where there is none, or :data:`AMBIGUOUS`."""
        different = list(dict.fromkeys(wanted))
        if all(name in self._exact for name in different):
            return {name: self._exact[name] for name in different}
        self._look_closer()
        found: dict[str, int | None] = {}
        same: dict[str, _Match] = {}  # names that are a file's own, also after cleaning
        partial: dict[str, _Match] = {}  # names of which an end fits
        for name in different:
            cleaned = clean_name(name)
            rows = [self._exact[name]] if name in self._exact else self._cleaned.get(cleaned, [])
            match = AMBIGUOUS if len(rows) > 1 else rows[0] if rows else self._longest_end(name)
            if isinstance(match, _Match):
                partial[name] = match
                continue
            found[name] = match
            if match is not None and match != AMBIGUOUS:
                parts = tuple(cleaned.split("/"))
                same[name] = _Match(match, _common_end(parts, self._paths[match]), parts)
        return found | self._checked(same, partial) if partial else found

    def _checked(self, same: dict[str, _Match], partial: dict[str, _Match]) -> dict[str, int | None]:
        """Return the rows of names of which an end fits, but for those that other names speak against."""
        # All of the name, or all of the file's name within the root, is the common end.
        covering = {
            name
            for name, match in partial.items()
            if match.common >= min(len(match.parts), len(self._paths[match.row]) - self._above)
        }
        taken = {match.row for match in same.values()}
        wanted = {
            name: match
            for name, match in partial.items()
            if match.row not in taken and (name in covering or not (same or covering))
        }
        found: dict[str, int | None] = {
            name: wanted[name].row if name in wanted else None for name in partial
        }
        found |= _rivals(wanted)
        left = {name: match for name, match in partial.items() if found[name] is not None}
        strange = _strange_folders(left, same, partial, self._paths)
        found |= {name: why for name, why in strange.items() if found[name] != AMBIGUOUS}
        # ``1.jpg`` and ``camA/1.jpg`` are two images of one set, and the folder ``camA`` holds the second.
        owners = {match.row: name for name, match in same.items()}
        for name, match in partial.items():
            inside = len(self._paths[match.row]) - self._above
            if match.row in owners and match.common == len(match.parts) > inside:
                found |= {name: AMBIGUOUS, owners[match.row]: AMBIGUOUS}
        return found

    def _longest_end(self, name: str) -> _Match | int | None:
        for folded in (False, True):
            for spelling in filter(None, _spellings(name)):
                parts = tuple(spelling.split("/"))
                if folded:
                    rows = self._folded_ends.get(parts[-1].casefold())
                else:
                    rows = (len(parts) > 1 and self._ends.get(parts[-2:])) or self._ends.get(parts[-1:])
                if not rows:
                    continue
                common = [_common_end(parts, self._paths[row], folded) for row in rows]
                best = max(common)
                if common.count(best) > 1:
                    return AMBIGUOUS
                return _Match(rows[common.index(best)], best, parts)
        return None

    def nearest(self, name: str) -> str:
        """Return the file whose name is most like ``name``; empty if none is."""
        cleaned = clean_name(name)
        end = "/" + cleaned.rpartition("/")[2]
        same = next((each for each in self.names if f"/{each}".endswith(end)), "")
        if same:
            return same
        pool = self.names[:MAX_COMPARED]
        ends = {each.rpartition("/")[2]: each for each in pool}
        found = difflib.get_close_matches(cleaned, pool, 1, 0.6)
        found = found or [ends[last] for last in difflib.get_close_matches(end[1:], ends, 1, 0.6)]
        return found[0] if found else ""

    def explain(self, names: Sequence[str], source: Path | str) -> str:
        """Return a line on names that have no file: what was looked for, where, and the nearest file."""
        nearest = self.nearest(names[0])
        hint = f"; the nearest file is {shown(nearest)}" if nearest else "; no file there has a name like it"
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        if not self.names:
            hint = ", which holds no images"
        return f"'{source}' names {shown(names[0])}{others}, which is not in '{self.root}'{hint}"


def _common_end(left: Parts, right: Parts, folded: bool = False) -> int:
    count = 0
    for one, other in zip(reversed(left), reversed(right), strict=False):
        if one != other and not (folded and one.casefold() == other.casefold()):
            break
        count += 1
    return count


def _rivals(matches: dict[str, _Match]) -> dict[str, int | None]:
    """Refuse names that match a file that another name fits better (None) or as well (AMBIGUOUS)."""
    by_row: dict[int, dict[Parts, int]] = defaultdict(dict)
    for match in matches.values():
        by_row[match.row][match.parts] = match.common
    refused: dict[str, int | None] = {}
    for name, match in matches.items():
        rivals = by_row[match.row]
        best = max(rivals.values())
        if match.common < best:
            refused[name] = None
        elif list(rivals.values()).count(best) > 1:
            refused[name] = AMBIGUOUS
    return refused


def _strange_folders(
    left: dict[str, _Match], same: dict[str, _Match], every: dict[str, _Match], paths: Sequence[Parts]
) -> dict[str, int | None]:
    """Refuse names of a folder where another folder's names fit the same folder of files better.

    Cameras number their images alike: with ``camA/2.jpg`` and ``camB/1.jpg`` in the annotations and a folder
    ``camB`` of files, ``camA/2.jpg`` is not ``camB``'s. Folders that fit equally well, as ``train`` and
    ``val`` copied into one, are believed as long as no last part occurs in both.
    """
    folders: dict[Parts, dict[Parts, int]] = defaultdict(dict)
    for match in (*same.values(), *left.values()):
        target = paths[match.row][:-1]
        folders[target][match.parts[:-1]] = _common_end(match.parts[:-1], target)
    ends: dict[Parts, set[str]] = defaultdict(set)
    for match in (*same.values(), *every.values()):
        ends[match.parts[:-1]].add(match.parts[-1])
    refused: dict[str, int | None] = {}
    for name, match in left.items():
        rivals, own = folders[paths[match.row][:-1]], match.parts[:-1]
        # Of two folders one may be the end of the other.
        others = [each for each in rivals if _common_end(each, own) < min(len(each), len(own))]
        if any(rivals[each] > rivals[own] for each in others):
            refused[name] = None
        elif any(rivals[each] == rivals[own] and ends[each] & ends[own] for each in others):
            refused[name] = AMBIGUOUS
    return refused
