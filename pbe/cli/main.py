"""The command ``pbe``: its subcommands, each imported only when it is called, and how errors are told."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING

from pbe.errors import UserError, first_line
from pbe.resources import packaged

if TYPE_CHECKING:
    from cyclopts import App

# Name to function; the words before the last are those of a group.
COMMANDS = {
    "train": "pbe.cli.train:train",
    "edit": "pbe.cli.edit:edit",
    "evaluate": "pbe.cli.evaluate:evaluate",
    "prepare": "pbe.cli.prepare:prepare",
    "inspect": "pbe.cli.inspect:inspect",
    "cache": "pbe.cli.cache:cache",
    "convert": "pbe.cli.convert:convert",
    "plot": "pbe.cli.plot:plot",
    "ablate": "pbe.cli.ablate:ablate",
    "benchmark build": "pbe.cli.benchmark:build",
    "benchmark crop": "pbe.cli.crop:crop",
    "fit": "pbe.cli.fit:fit",
    "study make": "pbe.cli.study:make",
    "study tabulate": "pbe.cli.study:tabulate",
    "toy render": "pbe.cli.toy:render",
    "toy train": "pbe.cli.toy:train",
    "toy score": "pbe.cli.toy:score",
    "toy naming make": "pbe.cli.naming:make",
    "toy naming score": "pbe.cli.naming:score",
    "demo": "pbe.cli.demo:demo",
    "serve": "pbe.cli.serve:serve",
    "doctor": "pbe.cli.doctor:doctor",
}
GROUPS = {
    "benchmark": "Build benchmarks to score models on.",
    "study": "Have people rank the edits of several systems.",
    "toy": "Render toy scenes, train the toy model, score models of the toy world.",
    "toy naming": "Test whether people can name what was painted, without seeing the exemplar.",
}
HELP = ("--help", "-h")


def make_app() -> App:
    """Return the command with all its subcommands."""
    from cyclopts import App, Parameter

    from pbe import __version__
    from pbe.cli.arguments import refuse_fractions, tidy

    app = App(
        name="pbe",
        help="Paint by Example: paint the object of one image into another, and train models that do.\n\n"
        "pbe demo shows everything in a few minutes; pbe COMMAND --help explains a command.",
        version=__version__,
        default_parameter=Parameter(
            negative_bool=(),  # no --no- form for every switch,
            negative_iterable=(),  # no --empty- form for every list
            consume_multiple=True,
            allow_repeating=True,  # the last counts, so that a call can be changed by adding to it
            show_default=_show_default,
        ),
        config=(tidy, refuse_fractions),
        help_format="plaintext",
        help_on_error=False,
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    for group, description in GROUPS.items():
        *above, last = group.split()
        find_app(app, " ".join(above)).command(App(name=last, help=description))
    for name, function in COMMANDS.items():
        *above, last = name.split()
        find_app(app, " ".join(above)).command(function, name=last)
    app.register_install_completion_command(help="Install shell completion (bash, zsh, fish).")
    return app


def find_app(app: App, command: str) -> App:
    """Return the command of these words, such as ``toy render``, imported."""
    return reduce(getitem, command.split(), app)


def _show_default(value: object) -> str | None:
    """Return how help shows a default; None hides what says nothing, as a switch that is off."""
    if isinstance(value, Path) and value.is_relative_to(packaged(".")):
        return value.relative_to(packaged(".")).as_posix()  # not where it happens to be installed
    if value is None or value is False or value in ("", [], ()):
        return None
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, 2 after ``error: ...`` on stderr, 128 + n when signal n stopped it.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no question to the network at its import
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_command(lambda: _call(words))


def _call(words: list[str]) -> object:
    from cyclopts import CycloptsError

    app = make_app()
    if " ".join(word for word in words if word not in HELP) in ("", *GROUPS):
        for name in COMMANDS:  # a list of commands says what each does, so they are all imported
            find_app(app, name)
    try:
        return app(words)
    except CycloptsError as error:
        raise UserError(f"{error} (--help lists the options)") from error


def run_command(body: Callable[[], object]) -> int:
    """Run a command line, parsing of its arguments included.

    Returns:
        Exit status: what ``body`` returns where that is a number, else 0; 2 after ``error: ...`` on stderr (a
        missing package is one too), 130 when interrupted.
    """
    try:
        status = body()
    except UserError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        name = str(error.name).split(".")[0]
        if name == "pbe":
            raise
        print(
            f"error: the Python package '{name}' is not installed for {sys.executable}; use the python that "
            "the project was installed for (in a clone: make setup makes .venv)",
            file=sys.stderr,
        )
        return 2
    except RuntimeError as error:
        cause = getattr(error, "inner_exception", None)  # of torch.compile, whose errors are slow to import
        if type(cause).__name__ not in ("InvalidCxxCompiler", "CppCompileError"):
            raise
        told = [line for line in str(cause).splitlines() if "error:" in line] or [first_line(cause)]
        print(f"error: the C++ compiler failed ({told[0]}); mend it, or leave compile out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
