"""Count what a reader of the package has to find a way through; the exit status is 1 where a limit is passed.

python scripts/house.py
"""

from __future__ import annotations

import ast
import graphlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND_LINE_LIBRARIES = {"argparse", "click", "cyclopts", "typer"}


@dataclass(frozen=True)
class Limits:
    """The most of each that the package may have; lower a number when the package has become smaller."""

    files: int = 216
    lines: int = 39_050
    file_lines: int = 400
    function_lines: int = 60


def circle(trees: dict[Path, ast.Module]) -> list[str]:
    """Return the modules of an import circle, imports for typing and in functions included; [] without."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): tree for path, tree in trees.items()}
    modules = {name.removesuffix(".__init__"): tree for name, tree in modules.items()}
    imports: dict[str, set[str]] = {}
    for name, tree in modules.items():
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        named = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        found = {each if each in modules else each.rpartition(".")[0] for each in named}
        imports[name] = (found & modules.keys()) - {name}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def longest_function(trees: dict[Path, ast.Module]) -> tuple[int, str]:
    """Return the length in lines and the name of the longest function."""
    return max(
        ((node.end_lineno or 0) - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}")
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def command_line_code(trees: dict[Path, ast.Module]) -> list[str]:
    """Return the files outside ``pbe/cli`` that import a command-line library."""
    found = []
    for path, tree in trees.items():
        nodes = list(ast.walk(tree))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        if COMMAND_LINE_LIBRARIES & {name.split(".")[0] for name in names}:
            found.append(str(path.relative_to(ROOT)))
    return sorted(each for each in found if not each.startswith("pbe/cli/"))


@cache
def counted() -> list[tuple[str, int, str]]:
    """Return what is counted, in the order of the limits: its name, its number, and where it is."""
    texts = {path: path.read_text() for path in sorted((ROOT / "pbe").rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lengths = {path: text.count("\n") for path, text in texts.items()}
    longest = max(lengths, key=lambda path: lengths[path])
    function_lines, function = longest_function(trees)
    ring, outside = circle(trees), command_line_code(trees)
    return [
        ("files", len(texts), ""),
        ("lines", sum(lengths.values()), ""),
        ("lines of the longest file", lengths[longest], str(longest.relative_to(ROOT))),
        ("lines of the longest function", function_lines, function),
        ("modules in an import circle", len(ring), " -> ".join(ring)),
        ("files with command-line code outside pbe/cli", len(outside), ", ".join(outside)),
    ]


def main(limits: Limits = Limits()) -> int:
    """Print the counts and what passes its limit; returns the exit status."""
    most = (limits.files, limits.lines, limits.file_lines, limits.function_lines, 0, 0)
    for (name, count, where), limit in zip(counted(), most, strict=True):
        mark = "  <- too many" if count > limit else ""
        print(f"{name:46} {count:7,} of {limit:,}  {where}{mark}")
    return int(any(count > limit for (_, count, _), limit in zip(counted(), most, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
