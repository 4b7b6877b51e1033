"""``python sample.py`` is ``pbe edit``: paint an exemplar into an image; docs/sampling.md has the details."""

from __future__ import annotations

import sys

from pbe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["edit", *sys.argv[1:]]))
