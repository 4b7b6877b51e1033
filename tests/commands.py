"""Subcommands of ``pbe`` as tests call them: ``evaluate.main(["--model", ...])`` returns the exit status."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from pbe.cli.main import find_app, main, make_app


class Command:
    """A subcommand, by its words."""

    def __init__(self, words: str) -> None:
        self.words = words.split()

    def main(self, arguments: Sequence[str]) -> int:
        """Run it as ``pbe`` does."""
        return main([*self.words, *arguments])


@cache
def options_of(command: str) -> frozenset[str]:
    """The options that a subcommand takes."""
    found = find_app(make_app(), command).assemble_argument_collection()
    return frozenset(name for each in found for name in (*each.names, *each.negatives))


ablate = Command("ablate")
build_benchmark = Command("benchmark build")
cache = Command("cache")
convert = Command("convert")
crop = Command("benchmark crop")
demo = Command("demo")
evaluate = Command("evaluate")
fit = Command("fit")
inspect = Command("inspect")
naming = Command("toy naming")
prepare = Command("prepare")
render = Command("toy render")
score = Command("toy score")
study = Command("study")
