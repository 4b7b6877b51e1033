"""Fields of the configuration dataclasses, with the limits of their values, and views of all values by key.

:func:`described` lists every field of a configuration, for validation and for a reference of all keys.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, field, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def number(default: T, *, low: float = 0, high: float = math.inf) -> T:
    """Return a field that holds a number in [low, high]."""
    return field(default=default, metadata={"range": (low, high)})


def choice(default: str, *others: str) -> str:
    """Return a field that holds one of several names."""
    return field(default=default, metadata={"choices": (default, *others)})


def path(default: str = "") -> str:
    """Return a field that holds a path, in which a leading ``~`` is the home folder."""
    return field(default=default, metadata={"path": True})


def described(cls: type, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Yield the dotted key and the field of every value in a configuration dataclass and its sections."""
    for item in fields(cls):
        section = item.default_factory
        if isinstance(section, type) and is_dataclass(section):
            yield from described(section, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item


def to_dict(config: Any) -> dict[str, Any]:
    """Return a plain, JSON-ready dictionary of a configuration dataclass."""
    return asdict(config)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key, in their order."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return ``key: (old, new)`` of all values that differ in flat mappings; None where one is missing."""
    pairs = {key: (old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])}
    return {key: (before, after) for key, (before, after) in pairs.items() if before != after}


def fingerprint(values: Any) -> str:
    """Return the SHA-256 of JSON-ready values, 64 hexadecimal digits; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
