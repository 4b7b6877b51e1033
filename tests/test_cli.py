"""What all command lines share."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pbe.cli.parser import Parser

ROOT = Path(__file__).parent.parent


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser()
    parser.add_argument("--out", type=Path)
    group = parser.add_argument_group("more")
    group.add_argument("files", type=Path, nargs="*")
    commands = Parser().add_subparsers(dest="what")
    commands.add_parser("make").add_argument("--key", type=Path)
    options = parser.parse_args(["--out=~/x", "~/a.json", "b~.json", "./~"])
    assert options.out == Path("/home/me/x")
    assert options.files == [Path("/home/me/a.json"), Path("b~.json"), Path("~")]
    assert commands.choices["make"].parse_args(["--key=~"]).key == Path("/home/me")


def test_every_command_line_is_parsed_by_it() -> None:
    """Then its complaints are one line, and its paths may begin with a tilde."""
    files = [*(ROOT / "scripts").rglob("*.py"), *(ROOT / "pbe").rglob("*.py"), *ROOT.glob("*.py")]
    own = [
        path.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser")
    ]
    assert own == []
