"""Train a model: ``python train.py configs/toy.yaml [key=value ...]``, the same as ``pbe train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pbe.cli.main import main as pbe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pbe train``; returns the exit status."""
    return pbe(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
