"""Text files of every encoding, YAML that is damaged, and single values in every way they are written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pbe.data.sources import parsing
from pbe.data.sources.annotations import DroppedError
from pbe.data.sources.parsing import read_text, read_yaml
from pbe.errors import UserError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3.0),
        (3.5, 3.5),
        ("3", 3.0),
        (" -3.5e1\n", -35.0),
        (".5", 0.5),
        ("5.", 5.0),
        (10**400, math.inf),
        (-(10**400), -math.inf),
    ],
)
def test_numbers(value: Any, expected: float) -> None:
    assert parsing.number(value) == expected


@pytest.mark.parametrize(
    "value", [None, True, "", "nan", "inf", "1_000", "0x10", "1,5", "१", [1], {}, float("nan"), b"3"]
)
def test_what_is_no_number(value: Any) -> None:
    assert math.isnan(parsing.number(value))


@pytest.mark.parametrize("value", [3, 3.0, "3", "3.0", " 3 ", "3e0"])
def test_whole_numbers(value: Any) -> None:
    assert parsing.whole(value) == 3
    assert parsing.identity(value) == (3 if value != "3e0" else "3e0"), "hexadecimal ids look like this"
    assert parsing.side(value) == 3


@pytest.mark.parametrize("value", [3.5, "3.5", True, None, "three", math.inf, [3]])
def test_what_is_no_whole_number(value: Any) -> None:
    assert parsing.whole(value) is None


def test_ids_are_numbers_or_texts() -> None:
    assert parsing.identity("img_a") == "img_a"
    assert parsing.identity(2**80) == parsing.identity(str(2**80)) == 2**80, "however large"
    for value in (None, True, "", " ", [], {}, 1.5, math.nan):
        with pytest.raises(DroppedError, match="entry without id"):
            parsing.identity(value)


def test_sides() -> None:
    assert [parsing.side(value) for value in (None, "", 0, "0", 0.0)] == [None] * 5
    for value in (-1, 2.5, "wide", 2**31, math.inf, math.nan, True, [1]):
        with pytest.raises(DroppedError, match="that no image has"):
            parsing.side(value)


YES = [True, 1, 1.0, "1", "1.0", "true", " True ", "YES", "t"]
NO = [None, False, 0, 0.0, "0", "0.0", "", "false", "No", -1, "-1"]
NEITHER = [2, "2", "maybe", [1], {}, math.nan]


def test_flags() -> None:
    assert all(parsing.flag(value) for value in YES)
    assert not any(parsing.flag(value) for value in NO)
    for value in NEITHER:
        with pytest.raises(DroppedError, match="neither"):
            parsing.flag(value)


def test_columns_follow_the_same_rules() -> None:
    words = [str(value) for value in (*YES, *NO, "maybe", "2") if value is not None]
    yes, bad = parsing.flag_column("a")
    table = pl.DataFrame({"a": [*words, None]}).select(yes.alias("yes"), bad.alias("bad"))
    assert table["yes"].sum() == len(YES)
    assert table["bad"].sum() == 2
    texts = ["3", " 3.5 ", "1e400", "x", None, "20,5", "1,024"]
    numbers = pl.DataFrame({"a": texts}).select(
        plain=parsing.number_column("a"), comma=parsing.number_column("a", decimal_comma=True)
    )
    assert numbers["plain"].to_list() == [3, 3.5, math.inf, None, None, 20.5, None], "1,024 may be a thousand"
    assert numbers["comma"].to_list() == [3, 3.5, math.inf, None, None, 20.5, 1.024]


def test_texts() -> None:
    assert [parsing.text(value) for value in ("a", 3, 3.0, None, True, [])] == ["a", "3", "3.0", "", "", ""]
    assert parsing.text("a\ud800") == "a?"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_that_tell_themselves(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Müsli\r\n狗\r".encode(encoding))
    assert read_text(path) == "Müsli\n狗\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a\nMüsli".encode("latin-1"), "line 2 is not UTF-8; save it"),
        (b"\x1f\x8b\x08\x00", r"compressed \(gzip\)"),
        (b"PK\x03\x04....", r"compressed \(zip\)"),
        (b"\xff\xfea", "damaged text"),
    ],
)
def test_what_is_no_text_says_why(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_text(tmp_path / "a.txt")
    assert "a.txt" in str(error.value)
    with pytest.raises(UserError, match="cannot read"):
        read_text(tmp_path / "gone.txt")


def test_yaml_scalars_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("names: [no, 3.0, ~, 2020-13-45, '${x}', !!python/object:os.system x]\nnc: 010\n")
    names = ["no", "3.0", "~", "2020-13-45", "${x}", "x"]
    assert read_yaml(path) == {"names": names, "nc": "010"}
    path.write_text("")
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("names: [a: b, c]\npath: C: x", "line 2: mapping values"),
        ("names:\n\t0: dog", "line 2: found character"),
        ('path: "D:\\set"', "line 1: found unknown escape"),
        ("a: 1\na: 2", "line 2: the key 'a' stands twice"),
        ("x: {a: 1, a: 2}", "line 1: the key 'a' stands twice"),
        ("- a\n- b", "holds no 'key: value' lines"),
        ("a word", "holds no 'key: value' lines"),
        ("a: *b", "line 1: found undefined alias"),
        ("a: &b [*b", "data.yaml"),
        ("[" * 3000, "data.yaml"),
        ("? [a]\n: b", "data.yaml"),
        ("a: \x00", "data.yaml"),
        ("a: b\n---\nc: d", "data.yaml"),
    ],
)
def test_damaged_yaml_names_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_yaml(tmp_path / "data.yaml")
    assert len(str(error.value).splitlines()) == 1
