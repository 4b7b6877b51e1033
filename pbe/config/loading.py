"""Reads configurations: YAML files and ``key=value`` overrides, merged into checked dataclasses and back."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from pbe.config.checks import PATHS, check_choices, check_values
from pbe.config.fields import flatten, to_dict
from pbe.config.training import NONE, Config
from pbe.errors import UserError
from pbe.files import write_output
from pbe.resources import config_names, find_config, find_model

MODELS = ("autoencoder_from", "init_from")  # paths that may name the model that ships
LENGTHS = ("max_steps", "max_epochs")  # of the trainer, of which one is 0
# References may repeat a part of a file, but not blow it up: ten lines of them can stand for a billion.
MAX_NODES = 100_000
T = TypeVar("T")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply ``key=value`` overrides and return the typed, checked configuration.

    A file may name another one under ``base:`` (a path relative to itself), which is read first. Of
    ``trainer.max_steps`` and ``trainer.max_epochs`` the one that is named last holds. ``~`` at the start of a
    path is the home folder.

    Args:
        path: YAML file, or the name of one that ships, such as ``toy``.
        overrides: such as ``["trainer.max_steps=100", "data.batch_size=8"]``; later ones win.
    """
    config = _defaults(Config)
    texts = {name for name, value in flatten(to_dict(Config())).items() if isinstance(value, str)}
    for file, content in _with_bases(find_config(_expanded(str(path), "the configuration"))):
        config = _merge_layer(config, [(str(file), content)])
    typed = [(f"override '{one_line(text)}'", _read_override(text, texts)) for text in overrides or []]
    config = _merge_layer(config, typed)
    return _finish(config, Config, f"{path} with overrides" if typed else str(path))


def from_dict(cls: type[T], values: dict[str, Any], source: str = "configuration") -> T:
    """Build a configuration dataclass of type ``cls`` from a dictionary; strict like :func:`load_config`."""
    try:
        given = OmegaConf.create(values)
    except Exception as error:  # half a reference, or a value that no configuration holds
        raise UserError(f"{source}: {one_line(error)}") from error
    defaults = _defaults(cls)  # type: ignore[arg-type]  # a class is hashable
    return _finish(_merge(defaults, given, source), cls, source)


@cache
def _defaults(cls: type) -> DictConfig:
    """Return a dataclass as OmegaConf has it, which takes a while to make; to be merged, never changed."""
    return OmegaConf.structured(cls)


def save_yaml(config: Config, path: str | Path) -> None:
    """Write the complete configuration as YAML, whole or not at all."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    write_output(Path(path), text.encode("utf-8", "surrogateescape"))


def _with_bases(path: Path) -> list[tuple[Path, DictConfig]]:
    """Read a file and those that it is based on, in the order in which they are merged."""
    files: list[tuple[Path, DictConfig]] = []
    current = path
    while True:
        content = read_yaml(current)
        files.insert(0, (current, content))
        base = None if OmegaConf.is_interpolation(content, "base") else content.pop("base", None)
        if not base:
            return files
        if not isinstance(base, str):
            raise UserError(f"{current}: 'base' is the path of a configuration, not '{base}'")
        parent = current.parent / _expanded(base, "base")
        if parent.resolve() in [file.resolve() for file, _ in files]:
            raise UserError(f"{path}: '{parent}' is its own base")
        if not parent.is_file():
            raise UserError(f"{current}: no configuration file at its base '{parent}'")
        current = parent


def read_yaml(path: Path) -> DictConfig:
    """Return the content of a YAML file, references unresolved."""
    if path.is_dir():
        raise UserError(f"no configuration file at '{path}': it is a folder; name a YAML file in it")
    if not path.is_file():
        names = [name for name in config_names() if not name.startswith("ablations/")]
        near = difflib.get_close_matches(path.stem, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"those that ship are {', '.join(names)}"
        raise UserError(f"no configuration file at '{path}'; {hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: it is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from error
    try:
        _check_size(yaml.compose(text, Loader=yaml.SafeLoader))
        content = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # the YAML parser's errors share no base class with OmegaConf's
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from error
    if content is None:
        return OmegaConf.create({})
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: a configuration is a mapping of keys to values")
    return content


def _check_size(root: yaml.Node | None) -> None:
    """Refuse a document that refers to itself, or that references make too large."""
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

    if root is not None and size(root) > MAX_NODES:
        raise UserError(f"its references stand for more than {MAX_NODES:,} values")


def _read_override(override: str, texts: Collection[str]) -> DictConfig:
    """Parse a ``key=value`` override.

    The value of a key in ``texts`` is taken as it is, unless it is in quotes: brackets, braces and colons
    belong to many a path.
    """
    key, sign, value = override.partition("=")
    shown = one_line(override)
    if not sign or not key.strip():
        raise UserError(f"override '{shown}' is not of the form key=value")
    # shells strip the quotes of key="": nothing after the sign is an empty text, not a null
    plain = not value or (key in texts and not value.startswith(("'", '"')) and value != "null")
    try:
        if plain:
            nested: Any = value
            for name in reversed(key.split(".")):
                nested = {name: nested}
            return OmegaConf.create(nested)
        _check_size(yaml.compose(value, Loader=yaml.SafeLoader))
        return OmegaConf.from_dotlist([override])
    except UserError as error:
        raise UserError(f"override '{shown}': {error}") from error
    except Exception as error:  # of the YAML parser, as above
        raise UserError(f"override '{shown}': its value is not valid YAML") from error


def _merge_layer(config: DictConfig, parts: list[tuple[str, DictConfig]]) -> DictConfig:
    """Merge what was written in one place: a file, or all overrides."""
    lengths: dict[str, Any] = {}
    for source, part in parts:
        start = _start(config)
        config = _merge(config, part, source)
        if start not in ("", NONE) and _start(config) == "":
            raise UserError(
                f"{source}: 'init_from' is empty, and was '{start}'; name a model to start from, or "
                f"init_from={NONE} for random weights"
            )
        named = _raw(part).get("trainer") or {}
        if given := [name for name in LENGTHS if name in named]:
            merged = _raw(config)["trainer"]
            lengths |= {name: merged[name] for name in given}
        lengths = {name: value for name, value in lengths.items() if value}
        if len(lengths) == len(LENGTHS):
            raise UserError(
                f"{source}: both 'trainer.max_steps' and 'trainer.max_epochs' are given; leave one out"
            )
    for name in LENGTHS:
        if lengths and name not in lengths:
            config.trainer[name] = 0
    return config


def _start(config: DictConfig) -> Any:
    """Return ``init_from``, a reference unresolved."""
    node = config._get_node("init_from")
    assert isinstance(node, Node)
    return node._value()


def _raw(config: DictConfig) -> dict[str, Any]:
    """Return the values with references unresolved."""
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    return content  # type: ignore[return-value]


def _merge(base: DictConfig, addition: DictConfig, source: str) -> DictConfig:
    _check_kinds(base, addition, source)
    try:
        merged = OmegaConf.merge(base, addition)
    except OmegaConfBaseException as error:
        raise _explained(error, source, base) from error
    except (TypeError, ValueError, RecursionError) as error:  # OmegaConf's own, where kinds do not fit
        raise UserError(f"{source}: {one_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _check_kinds(base: DictConfig, addition: DictConfig, source: str, prefix: str = "") -> None:
    """Check that sections, lists and single values stand where ``base`` has them; skip unknown keys."""
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
            _check_kinds(wanted, given, source, f"{name}.")
            continue
        for kind, words in ((DictConfig, "a section of keys"), (ListConfig, f"a list, such as {name}=[...]")):
            if isinstance(wanted, kind) and not isinstance(given, kind) and not wanted._is_none():
                raise UserError(f"{source}: wrong value for '{name}': it is {words}, not {_shown(given)}")
        if isinstance(given, DictConfig | ListConfig) and not isinstance(wanted, DictConfig | ListConfig):
            raise UserError(f"{source}: wrong value for '{name}': it is a single value, not {_shown(given)}")


def _explained(error: OmegaConfBaseException, source: str, base: DictConfig) -> UserError:
    key = one_line(error.full_key or error.key or "")
    if isinstance(error, ConfigKeyError):
        return UserError(f"{source}: unknown key '{key}'; the nearest valid one is '{_nearest(key, base)}'")
    reason = str(error.msg or error).splitlines()[0]
    return UserError(f"{source}: wrong value for '{key}': {reason}" if key else f"{source}: {reason}")


def _nearest(key: str, base: DictConfig) -> str:
    known = _keys(base)
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    return same_leaf[0] if same_leaf else difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Return the dotted keys of sections and values."""
    keys: list[str] = []
    for key in config:
        keys.append(f"{prefix}{key!s}")
        if isinstance(config[key], DictConfig):
            keys.extend(_keys(config[key], f"{keys[-1]}."))
    return keys


def _finish(config: DictConfig, cls: type[T], source: str) -> T:
    """Resolve references, check the values and build the dataclass."""
    try:
        if cls is Config:
            for name in PATHS:
                text = str(OmegaConf.select(config, name))
                place = _expanded(text, name)
                if name in MODELS:
                    place = find_model(place)
                if place != text:
                    OmegaConf.update(config, name, place)
        result = OmegaConf.to_object(config)
    except (OmegaConfBaseException, RecursionError) as error:  # an interpolation that leads nowhere
        raise UserError(f"{source}: {str(error).splitlines()[0]}") from error
    assert isinstance(result, cls)
    try:
        check_choices(result)
        if isinstance(result, Config):
            check_values(result)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return result


def _expanded(text: str, key: str) -> str:
    """Return a path with the home folder in place of a leading ``~``."""
    if not text.startswith("~"):
        return text
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError(f"'{key}' is '{text}', but no home folder of that name is known")
    return path


def _shown(value: object) -> str:
    text = one_line(value)
    if text == "None":
        return "nothing"
    return f"'{text[:60]}...'" if len(text) > 60 else f"'{text}'"


def one_line(value: object) -> str:
    """Return a text, or what an error says, without line breaks."""
    text = " ".join(str(value).split())
    return text or (type(value).__name__ if isinstance(value, BaseException) else "")
