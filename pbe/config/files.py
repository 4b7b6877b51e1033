"""Configuration as people write it: YAML files and ``key=value`` overrides, read without surprises."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from pbe.errors import UserError
from pbe.resources import config_names

# References may repeat a part of a file, but not blow it up: ten lines of them can stand for a billion.
MOST_NODES = 100_000


def read_yaml(path: Path) -> DictConfig:
    """Return the content of a YAML file.

    Raises:
        UserError: no such file, not text, not YAML, or no mapping.
    """
    if path.is_dir():
        raise UserError(f"no configuration file at '{path}': it is a folder; name a YAML file in it")
    if not path.is_file():
        raise UserError(f"no configuration file at '{path}'; by name there are {', '.join(config_names())}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: it is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from error
    try:
        _check_size(yaml.compose(text, Loader=yaml.SafeLoader))
        loaded = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # the YAML parser's errors share no base class with OmegaConf's
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from error
    if loaded is None:
        return OmegaConf.create({})
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: a configuration is a mapping of keys to values")
    return loaded


def one_line(error: BaseException) -> str:
    """Return what an error says, without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _check_size(root: yaml.Node | None) -> None:
    """Refuse a document that refers to itself, or that references make too large.

    Raises:
        UserError: it does.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if sizes[id(node)] < 0:
                raise UserError(f"a part refers to itself (line {node.start_mark.line + 1})")
            return sizes[id(node)]
        sizes[id(node)] = -1
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        inside = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        sizes[id(node)] = 1 + sum(size(part) for part in inside)
        return sizes[id(node)]

    if root is not None and size(root) > MOST_NODES:
        raise UserError(f"its references stand for more than {MOST_NODES:,} values")


def read_override(override: str, texts: Collection[str]) -> DictConfig:
    """Return what a ``key=value`` override says.

    Args:
        override: as it was typed.
        texts: keys whose value is a text, which is taken as it stands unless it is in quotes: brackets,
            braces and colons belong to many a path.

    Raises:
        UserError: it has no equals sign, no key, or a value that is not YAML.
    """
    key, sign, value = override.partition("=")
    shown = " ".join(override.split())
    if not sign or not key.strip():
        raise UserError(f"override '{shown}' is not of the form key=value")
    try:
        # shells eat the quotes of key="": nothing after the sign is an empty text, not a null
        if key in texts and not value.startswith(("'", '"')) and value != "null":
            return _nested(key, value)
        if not value:
            return _nested(key, "")
        _check_size(yaml.compose(value, Loader=yaml.SafeLoader))
        return OmegaConf.from_dotlist([override])
    except UserError as error:
        raise UserError(f"override '{shown}': {error}") from error
    except Exception as error:  # of the YAML parser, as above
        raise UserError(f"override '{shown}': its value is not valid YAML") from error


def _nested(key: str, value: str) -> DictConfig:
    content: dict[str, object] | str = value
    for name in reversed(key.split(".")):
        content = {name: content}
    made = OmegaConf.create(content)
    assert isinstance(made, DictConfig)
    return made


def check_kinds(base: DictConfig, addition: DictConfig, source: str, prefix: str = "") -> None:
    """Check that sections, lists and single values stand where they belong.

    Args:
        base: what is wanted.
        addition: what is to be merged into it; unknown keys are not looked at.
        source: named in errors.
        prefix: of the keys, with a dot behind it.

    Raises:
        UserError: the first key whose value is of another kind.
    """
    if base._is_none():  # a mapping of any keys that was not given
        return
    for key in addition:
        name = f"{prefix}{key!s}"
        if not isinstance(key, str) or key not in base or OmegaConf.is_interpolation(addition, key):
            continue
        if OmegaConf.is_missing(addition, key):  # OmegaConf would keep the default without a word
            raise UserError(f"{source}: '{name}' has no value")
        wanted, given = base._get_node(key), addition._get_node(key)
        if isinstance(wanted, DictConfig) and isinstance(given, DictConfig):
            check_kinds(wanted, given, source, f"{name}.")
            continue
        for kind, words in ((DictConfig, "a section of keys"), (ListConfig, f"a list, such as {name}=[...]")):
            if isinstance(wanted, kind) and not isinstance(given, kind) and not wanted._is_none():
                raise UserError(f"{source}: wrong value for '{name}': it is {words}, not {_shown(given)}")
        if isinstance(given, DictConfig | ListConfig) and not isinstance(wanted, DictConfig | ListConfig):
            raise UserError(f"{source}: wrong value for '{name}': it is a single value, not {_shown(given)}")


def _shown(value: object) -> str:
    text = " ".join(str(value).split())
    if text == "None":
        return "nothing"
    return f"'{text[:60]}...'" if len(text) > 60 else f"'{text}'"


def expanded(text: str, key: str) -> str:
    """Return a path with the home folder in place of a leading ``~``.

    Raises:
        UserError: there is no such home folder.
    """
    if not text.startswith("~"):
        return text
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError(f"'{key}' is '{text}', but no home folder of that name is known")
    return path
