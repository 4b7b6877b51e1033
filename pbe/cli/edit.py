"""``pbe edit``: paint an exemplar into an image."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

edit = App(name="edit", help="Paint an exemplar into the masked part of an image.", help_flags=[])


@edit.default
def _edit(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    from pbe.editing.cli import main

    return main(arguments)
