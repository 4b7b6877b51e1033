"""Subcommands of ``pbe`` as tests call them: ``evaluate.main(["--model", ...])`` returns the exit status."""

from __future__ import annotations

from collections.abc import Sequence

from pbe.cli.main import main


class Command:
    """A subcommand, by its words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def main(self, arguments: Sequence[str]) -> int:
        """Run it as ``pbe`` does."""
        return main([*self.words, *arguments])


convert = Command("convert")
