"""What the project's command lines share: complaints in one line, paths, and exit statuses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

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


def run_command(body: Callable[[], object]) -> int:
    """Run a command line, parsing of its arguments included.

    Returns:
        Exit status: 0, 2 after ``error: ...`` on stderr (a missing package is one too), 130 when interrupted.
    """
    try:
        body()
    except UserError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        name = str(error.name).split(".")[0]
        if name == "pbe":
            raise
        print(
            f"error: the Python package '{name}' is not installed for {sys.executable}; use the python that "
            "the project was set up with (make setup makes .venv)",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
