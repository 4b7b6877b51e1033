"""Fields of the configuration and views of its values."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import pytest

import pbe.config.fields as fields_module
from pbe.config import Config, differences, fingerprint, flatten, to_dict

ROOM = Path(fields_module.__file__).parent


def test_every_value_of_a_configuration_is_described() -> None:
    assert [key for key, _ in fields_module.described(Config)] == list(flatten(to_dict(Config())))


@pytest.mark.parametrize("name", ["model", "data", "training"])
def test_every_field_has_a_docstring_below_it(name: str) -> None:
    tree = ast.parse((ROOM / f"{name}.py").read_text())
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, below in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config"):
                described = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                assert described, f"{section.name}.{ast.unparse(field.target)}"


def test_flat_keys_are_dotted_and_keep_their_order() -> None:
    assert list(flatten({"b": {"z": 1, "a": [2]}, "a": None}, "x.").items()) == [
        ("x.b.z", 1), ("x.b.a", [2]), ("x.a", None),
    ]  # fmt: skip


def test_differences_name_old_and_new_value() -> None:
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == {"a": (1, None), "b": (2, 3), "c": (None, 4)}
    assert differences({"a": 1}, {"a": 1}) == {}


def test_a_fingerprint_is_the_hash_of_sorted_json() -> None:
    assert fingerprint({"b": 1, "a": 0.5}) == hashlib.sha256(b'{"a": 0.5, "b": 1}').hexdigest()
