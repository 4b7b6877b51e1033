"""Single values in every way they are written."""

from __future__ import annotations

import math
from typing import Any

import polars as pl
import pytest

from pbe.data.sources import scalars


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
    assert scalars.number(value) == expected


@pytest.mark.parametrize(
    "value", [None, True, "", "nan", "inf", "1_000", "0x10", "1,5", "१", [1], {}, float("nan"), b"3"]
)
def test_what_is_no_number(value: Any) -> None:
    assert math.isnan(scalars.number(value))


@pytest.mark.parametrize("value", [3, 3.0, "3", "3.0", " 3 ", "3e0"])
def test_whole_numbers(value: Any) -> None:
    assert scalars.whole(value) == 3
    assert scalars.identity(value) == (3 if value != "3e0" else "3e0"), "hexadecimal ids look like this"
    assert scalars.side(value) == 3


@pytest.mark.parametrize("value", [3.5, "3.5", True, None, "three", math.inf, [3]])
def test_what_is_no_whole_number(value: Any) -> None:
    assert scalars.whole(value) is None


def test_ids_are_numbers_or_texts() -> None:
    assert scalars.identity("img_a") == "img_a"
    assert scalars.identity(2**80) == scalars.identity(str(2**80)) == 2**80, "however large"
    for value in (None, True, "", " ", [], {}, 1.5, math.nan):
        with pytest.raises(ValueError, match="no id"):
            scalars.identity(value)


def test_sides() -> None:
    assert [scalars.side(value) for value in (None, "", 0, "0", 0.0)] == [None] * 5
    for value in (-1, 2.5, "wide", 2**31, math.inf, math.nan, True, [1]):
        with pytest.raises(ValueError, match="no number of pixels"):
            scalars.side(value)


YES = [True, 1, 1.0, "1", "1.0", "true", " True ", "YES", "t"]
NO = [None, False, 0, 0.0, "0", "0.0", "", "false", "No", -1, "-1"]
NEITHER = [2, "2", "maybe", [1], {}, math.nan]


def test_flags() -> None:
    assert all(scalars.flag(value) for value in YES)
    assert not any(scalars.flag(value) for value in NO)
    for value in NEITHER:
        with pytest.raises(ValueError, match="neither"):
            scalars.flag(value)


def test_columns_follow_the_same_rules() -> None:
    words = [str(value) for value in (*YES, *NO, "maybe", "2") if value is not None]
    yes, bad = scalars.flag_column("a")
    table = pl.DataFrame({"a": [*words, None]}).select(yes.alias("yes"), bad.alias("bad"))
    assert table["yes"].sum() == len(YES)
    assert table["bad"].sum() == 2
    texts = ["3", " 3.5 ", "1e400", "x", None, "20,5", "1,024"]
    numbers = pl.DataFrame({"a": texts}).select(
        plain=scalars.number_column("a"), comma=scalars.number_column("a", decimal_comma=True)
    )
    assert numbers["plain"].to_list() == [3, 3.5, math.inf, None, None, 20.5, None], "1,024 may be a thousand"
    assert numbers["comma"].to_list() == [3, 3.5, math.inf, None, None, 20.5, 1.024]


def test_texts() -> None:
    assert [scalars.text(value) for value in ("a", 3, 3.0, None, True, [])] == ["a", "3", "3.0", "", "", ""]
    assert scalars.text("a\ud800") == "a?"
