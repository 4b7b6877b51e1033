"""Write docs/configuration.md and docs/commands.md from the settings dataclasses, before the site is built.

python scripts/write_reference.py
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

os.environ["COLUMNS"] = "110"  # the width of help

from pbe.cli.main import COMMANDS, main as pbe
from pbe.config import Config
from pbe.errors import UserError
from pbe.files import write_output

DOCS = Path(__file__).resolve().parents[1] / "docs"


def meanings(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, by the field's name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for item, after in zip(body.body, body.body[1:], strict=False):
        text = (
            after.value.value
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            else None
        )
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(text, str):
            found[item.target.id] = " ".join(text.replace("``", "`").split())
    return found


def is_section(item: Field[Any]) -> bool:
    """Tell whether a field holds a section of its own."""
    return isinstance(item.default_factory, type) and is_dataclass(item.default_factory)


def sections(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield the dotted name and the dataclass of each section, the whole one first under an empty name."""
    yield prefix.rstrip("."), cls
    for item in fields(cls):
        if is_section(item):
            yield from sections(item.default_factory, f"{prefix}{item.name}.")  # type: ignore[arg-type]


def row(key: str, item: Field[Any], meaning: str) -> str:
    """Return the table row of one value."""
    default: Any = item.default
    if item.default_factory is not MISSING:
        default = item.default_factory()
    allowed = ", ".join(f"`{each}`" for each in item.metadata.get("choices", ()) if each != "")
    if "range" in item.metadata:
        low, high = item.metadata["range"]
        last = f"{high:,}" if isinstance(high, int) else f"{high:g}"
        allowed = f"from {low:g}" if high == float("inf") else f"{low:g} to {last}"
    return f"| `{key}` | {shown_default(default)} | {allowed} | {meaning} |"


def shown_default(default: Any) -> str:
    """Return a default as a YAML file spells it; an empty text is called empty."""
    if isinstance(default, bool):  # before numbers: True equals 1
        return str(default).lower()
    if isinstance(default, list):
        return f"[{', '.join(map(shown_default, default))}]"
    if isinstance(default, float) and "." not in str(default):
        return str(default).replace("e", ".0e")  # YAML takes 1e-05 for a text
    return "empty" if default == "" else str(default)


def configuration() -> str:
    """Return the page of all sections, keys, defaults and ranges."""
    parts = [
        "# Configuration",
        "Every key of a configuration, with its default, its allowed values and its meaning. A configuration "
        "is a YAML file that sets some of them; `base:` names another file to start from. The files that "
        "ship are in `configs/`.",
        "The same keys change a configuration on the command line:",
        "```bash\npbe train toy optimizer.learning_rate=1e-3 model.unet.channel_mult=[1,2,2] "
        "data.validation_shards=\n```",
    ]
    for name, cls in sections(Config):
        told = meanings(cls)
        own = [item for item in fields(cls) if not is_section(item)]
        if missing := [item.name for item in own if item.name not in told]:
            raise UserError(f"{cls.__name__} has no docstring under: {', '.join(missing)}")
        parts.append(f"## {name or 'Top level'}\n\n{inspect.getdoc(cls)}")
        if own:
            keys = [row(f"{name}.{item.name}".lstrip("."), item, told[item.name]) for item in own]
            parts.append("\n".join(["| key | default | allowed | meaning |", "|---|---|---|---|", *keys]))
    return "\n\n".join(parts) + "\n"


def commands() -> str:
    """Return the page of all commands with their help."""
    parts = ["# Commands", "The output of `pbe COMMAND --help` for every command."]
    for name in COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = pbe([*name.split(), "--help"])
        if status:
            raise UserError(f"pbe {name} --help ended with exit status {status}")
        parts.append(f"## pbe {name}\n\n```text\n{printed.getvalue().strip()}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    write_output(DOCS / "configuration.md", configuration())
    write_output(DOCS / "commands.md", commands())
    sys.exit(0)
