"""The one reader of single values: numbers, ids, flags and texts, as whatever they were written.

Tools write a 3 as ``3``, ``3.0`` or ``"3"``, and a yes as ``true``, ``1`` or ``"1"``. The same forms are
accepted in every field of every format; what is none of them is no value, which the caller counts or names.
"""

from __future__ import annotations

import math
import re
from typing import Any

import polars as pl

TRUE = frozenset({"1", "1.0", "true", "t", "yes", "y"})
FALSE = frozenset({"", "0", "0.0", "-1", "-1.0", "false", "f", "no", "n", "none", "null"})  # -1: unknown
LARGEST_SIDE = 2**31 - 1
_DIGITS = re.compile(r"[+-]?\d{1,1000}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


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
    """Return a width or height in pixels; None where it is not given (absent, null, empty or 0).

    Raises:
        ValueError: it cannot be a number of pixels.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    found = whole(value)
    if found is None or not 0 <= found <= LARGEST_SIDE:
        raise ValueError("no number of pixels")
    return found or None


def identity(value: Any) -> int | str:
    """Return an id so that 3, 3.0 and "3" are one and the same; other texts stay texts.

    Raises:
        ValueError: it is neither number nor text, or is empty.
    """
    # A text with an exponent is a name: Open Images' ids are hexadecimal, and many read like 0e12.
    found = None if isinstance(value, str) and "e" in value.lower() else whole(value)
    if found is not None:
        return found
    if not isinstance(value, str) or not value.strip():
        raise ValueError("no id")
    return text(value).strip()


def flag(value: Any) -> bool:
    """Return a yes or no; what is not given, and -1 for unknown, is a no.

    Raises:
        ValueError: it is neither.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    word = value.strip().lower() if isinstance(value, str) else str(value)
    if word not in TRUE | FALSE:
        raise ValueError("neither yes nor no")
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

    Args:
        name: of the column.
        decimal_comma: a comma is a decimal point, also before three digits, where it may else part thousands.
    """
    column = pl.col(name).str.strip_chars()
    digits = r"\d+" if decimal_comma else r"(?:\d{1,2}|\d{4,})"
    return column.str.replace(rf"^([+-]?\d+),({digits})$", "$1.$2").cast(pl.Float64, strict=False)


def flag_column(name: str) -> tuple[pl.Expr, pl.Expr]:
    """Return, for a column of texts, whether each is a yes, and whether it is neither yes nor no."""
    word = pl.col(name).str.strip_chars().str.to_lowercase().fill_null("")
    return word.is_in(sorted(TRUE)), ~word.is_in(sorted(TRUE | FALSE))
