"""``python -m pbe.cli`` is the command ``pbe``."""

import sys

from pbe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
