"""Write docs/performance.md from the JSON files that the benchmarks left in outputs/performance.

python scripts/benchmarks/performance.py --run all       # every benchmark first: hours on two idle cores
python scripts/benchmarks/performance.py --run unet edit # only these
python scripts/benchmarks/performance.py                 # none: write the page from what is there
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pbe.errors import UserError
from scripts.benchmarks.common import RESULTS, ROOT, command_line

# What each file of results is called on the page, and the command that makes it.
BENCHMARKS = {
    "unet": ("One guided step of the UNet", ["unet.py", "--repeats", "5"]),
    "unet_compiled": (
        "One guided step of the UNet, compiled",
        [
            *("unet.py", "--compile", "--no-memory", "--repeats", "5", "--dtypes", "bfloat16"),
            *("--json", str(RESULTS / "unet_compiled.json"), "--forms", "prepared", "prepared, compiled"),
            *("diffusers", "diffusers, channels last", "diffusers, compiled"),
        ],
    ),
    "edit": ("One edit", ["edit.py"]),
    "train": ("Training, toy size", ["train.py"]),
    "train_compiled": (
        "Training, toy size, compiled",
        ["train.py", "--compile", "--steps", "10", "--repeats", "2"],
    ),
    "train_full": (
        "Training, half as wide as the official sizes",
        [
            *("train.py", "--full", "--steps", "3", "--warm-up", "1", "--repeats", "2"),
            "model.unet.model_channels=160",  # both sides in whole take 40 GB
        ],
    ),
    "finetune": ("Fine-tuning, half as wide as the official sizes", ["finetune.py", "--channels", "160"]),
    "solvers": ("Presets and other settings", ["solvers.py", "--only", "presets"]),
    "startup": ("Start-up", ["startup.py"]),
    "data": ("Loading", ["data.py"]),
    "scaling": ("Scaling", ["scaling.py"]),
}
MARK = "<!-- made by scripts/benchmarks/performance.py; what stands below is written anew by it -->"
SIGNIFICANT = 3


def run_all(names: list[str]) -> None:
    """Run benchmarks one after the other.

    Raises:
        UserError: one of them failed; the others' results stay.
    """
    for name in names:
        title, (script, *options) = BENCHMARKS[name]
        print(f"\n{title}: {script} {' '.join(options)}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name(script)), *options]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise UserError(f"the benchmark '{name}' failed; its message stands above")


def section(name: str, folder: Path) -> str:
    """Return a benchmark's section as Markdown: command, machine, tables."""
    title, _ = BENCHMARKS[name]
    content = json.loads((folder / f"{name}.json").read_text())
    facts = content["machine"]
    versions = [
        f"{each} {facts[each]}" for each in ("torch", "diffusers", "pytorch-lightning") if facts[each]
    ]
    place = [
        facts.get("gpu") or facts["processor"],
        f"{facts['threads']} threads",
        f"{facts['memory_gib']} GiB",
    ]
    lines = [
        f"## {title}",
        "",
        f"`{content['command']}`",
        "",
        f"{', '.join(place)}; {', '.join(versions)}; {facts['date']}",
    ]
    if facts["load"] > facts["cores"] + 1:
        lines[-1] += f"; other work ran beside it (load {facts['load']:g})"
    for heading, rows in content["tables"].items():
        lines += ["", f"{heading[0].upper()}{heading[1:]}:", "", *markdown(rows)]
    return "\n".join(lines)


def markdown(rows: dict[str, dict[str, float]]) -> list[str]:
    """Return a table with a row for each name."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(number(row.get(column)) for column in columns)} |")
    return lines


def number(value: Any) -> str:
    """Return a number with three significant digits, nothing for one that is missing."""
    if value is None or not math.isfinite(value):
        return ""
    if value == int(value) or abs(value) >= 10 ** (SIGNIFICANT - 1):
        return f"{value:.0f}"
    return f"{value:.{SIGNIFICANT}g}"


def write_page(page: Path, folder: Path) -> None:
    """Replace everything below the page's mark.

    Raises:
        UserError: the page is missing or lacks its mark, or nothing is measured.
    """
    if not page.is_file():
        raise UserError(f"--page '{page}' is not a file; name the page that holds the line '{MARK}'")
    before, mark, _ = page.read_text().partition(MARK)
    names = [name for name in BENCHMARKS if (folder / f"{name}.json").is_file()]
    if not mark:
        raise UserError(f"'{page}' lacks the line '{MARK}'")
    if not names:
        raise UserError(f"nothing is measured in '{folder}': run this with --run all")
    sections = []
    for name in names:
        sections.append(section(name, folder))
        for image in sorted(folder.glob(f"{name}*.png")):
            shutil.copy(image, page.parent / "images" / image.name)
            sections.append(f"![{BENCHMARKS[name][0]}: {image.stem}](images/{image.name})")
    page.write_text(before + "\n\n".join([mark, *sections]) + "\n")
    print(page)


def run(arguments: list[str] | None) -> None:
    """Do what the options ask for.

    Raises:
        UserError: a benchmark failed, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--run", nargs="+", choices=["all", *BENCHMARKS], default=[], help="benchmarks to run"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="with the JSON files")
    options = parser.parse_args(arguments)
    run_all(list(BENCHMARKS) if "all" in options.run else options.run)
    write_page(options.page, options.folder)


main = command_line(run)

if __name__ == "__main__":
    sys.exit(main())
