"""Time what comes before the first step of an edit: imports, help, and a toy edit from its command on.

python scripts/benchmarks/startup.py

Every run is a process of its own; runs take turns.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmarks.common import (
    ROOT,
    command_line,
    machine,
    make_parser,
    print_rows,
    read_options,
    summary,
    take_turns,
    write,
)

IMPORTS = ("pbe", "torch", "pbe.editing.pipeline", "pbe.training.run")
EXAMPLE = ROOT / "data" / "examples"
FIRST = re.compile(rb"\b[1-9]\d*/\d+ \[")  # of the bar, which is drawn twice a second at most


def run_python(*words: str) -> Callable[[], None]:
    """Return a run of Python in a process of its own."""
    return lambda: _checked([sys.executable, *words])


def _checked(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


def first_step(out: str) -> None:
    """Run a toy edit of 50 steps until its bar shows the first one, then stop it."""
    files = [f"--{name}={EXAMPLE / f'0_{name}.png'}" for name in ("image", "mask", "exemplar")]
    sizes = ["--height=64", "--width=64", f"--out={out}"]
    command = [sys.executable, "-m", "pbe.cli", "edit", "--model=toy", *files, *sizes]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        shown = b""
        while not FIRST.search(shown):
            piece = process.stderr.read1(4096)  # type: ignore[attr-defined]  # of a buffered reader
            if not piece:
                break
            shown += piece
        process.kill()
    if not FIRST.search(shown):
        raise RuntimeError(f"the edit failed: {shown.decode(errors='replace')[-400:]}")


def run(arguments: list[str] | None) -> None:
    """Measure everything and write the numbers."""
    parser = make_parser(__doc__, "startup", repeats=5, takes=())
    options = read_options(parser, arguments)
    print(machine())
    forms = {f"import {name}": run_python("-c", f"import {name}") for name in IMPORTS}
    forms["pbe --help"] = run_python("-m", "pbe.cli", "--help")
    with tempfile.TemporaryDirectory() as out:
        forms["toy edit, to its first step"] = lambda: first_step(out)
        forms["toy edit, 64 px, 50 steps"] = run_python(
            *("-m", "pbe.cli", "edit", "--model=toy", f"--out={out}", "--height=64", "--width=64"),
            *(f"--{name}={EXAMPLE / f'0_{name}.png'}" for name in ("image", "mask", "exemplar")),
        )
        started = time.perf_counter()
        times = take_turns(forms, options.repeats)
    rows = {name: summary(each) for name, each in times.items()}
    print_rows("seconds", rows)
    print(f"{time.perf_counter() - started:.0f} s")
    write(options, {"seconds from the command on": rows})


main = command_line(run)

if __name__ == "__main__":
    sys.exit(main())
