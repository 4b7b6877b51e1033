"""The generated page of all configuration keys shows each default as YAML spells it."""

from __future__ import annotations

import re

import yaml

from pbe.config import Config
from pbe.config.fields import described
from scripts.write_reference import configuration


def test_the_page_shows_the_defaults_of_all_keys() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", configuration(), re.MULTILINE))
    defaults = {
        key: item.default_factory() if callable(item.default_factory) else item.default
        for key, item in described(Config)
    }
    shown = {key: "" if text == "empty" else yaml.safe_load(text) for key, text in rows.items()}
    assert shown == defaults
    assert {key: type(value) for key, value in shown.items()} == {
        key: type(value) for key, value in defaults.items()
    }, "0 is not false, nor 1 true"
