"""Paint an exemplar into a picture: ``python sample.py --help``; docs/sampling.md has the details."""

from __future__ import annotations

import sys

from pbe.editing.cli import main

if __name__ == "__main__":
    sys.exit(main())
