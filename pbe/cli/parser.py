"""The parser of the scripts in ``scripts/``; the commands of ``pbe`` have :mod:`pbe.cli.main`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from pbe.cli.main import run_command as run_command
from pbe.errors import UserError
from pbe.files import expand_home


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are a :class:`UserError`, one line like every other.

    In options of ``type=Path`` a leading ``~`` is the home folder: shells leave it alone in ``--out=~/x``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", Path, lambda text: Path(expand_home(text)))

    def error(self, message: str) -> NoReturn:
        """Raise the complaint."""
        raise UserError(f"{message} (--help lists the options)")
