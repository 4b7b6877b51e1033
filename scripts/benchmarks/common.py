"""What all benchmarks share: the machine, runs in turns, medians and ratios, JSON and plots."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import psutil
import torch
from matplotlib.ticker import LogFormatter
from torch import nn

from pbe.cli.main import run_command
from pbe.config import ModelConfig
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.training.monitoring.callbacks import process_peak

Module = TypeVar("Module", bound=nn.Module)
Form = Callable[[], object]
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "outputs" / "performance"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
GIB = 2**30
# Options that several benchmarks share, and how argparse is told of them.
OPTIONS: dict[str, dict[str, Any]] = {
    "--threads": {"type": int, "default": 0, "help": "0: torch's choice"},
    "--device": {"default": "cpu", "help": "cpu or cuda"},
    "--clock": {"choices": list(CLOCKS), "default": "wall", "help": "cpu: this process's time"},
}
PEAK_SIDE = 2048  # of the matrices whose product gives the peak


def command_line(run: Callable[[list[str] | None], object]) -> Callable[..., int]:
    """Return the command line of ``run``, from arguments to exit status, 2 for a mistake of the user's."""

    def main(arguments: list[str] | None = None) -> int:
        return run_command(lambda: run(arguments))

    return main


def make_parser(
    doc: str | None, name: str, *, repeats: int = 0, takes: Sequence[str] = tuple(OPTIONS)
) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks share.

    Args:
        doc: the script's docstring.
        name: of its JSON.
        repeats: default of ``--repeats``; 0 where nothing takes turns: there is no such option then.
        takes: which of :data:`OPTIONS` mean something to it.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if repeats:
        parser.add_argument("--repeats", type=int, default=repeats, help="turns that are timed (%(default)s)")
    for option in takes:
        parser.add_argument(option, **OPTIONS[option])
    parser.add_argument(
        "--json", type=Path, default=RESULTS / f"{name}.json", help="where the numbers go (%(default)s)"
    )
    return parser


def add_channels(parser: argparse.ArgumentParser) -> None:
    """Add the width of the UNet, from which small models for a trial follow."""
    parser.add_argument("--channels", type=int, default=320, help="model.unet.model_channels")


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Add the place of what a benchmark writes and removes again: the disk counts in some."""
    parser.add_argument("--folder", type=Path, help="for everything that is written; default a temporary one")


def read_options(
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    into: argparse.Namespace | None = None,
) -> argparse.Namespace:
    """Read the options, and take as many threads as they say.

    Raises:
        UserError: a number that no benchmark can use, or a folder that is not there.
    """
    options = parser.parse_args(arguments, into)
    threads, folder = getattr(options, "threads", 0), getattr(options, "folder", None)
    if getattr(options, "repeats", 1) < 1 or threads < 0:
        raise UserError("--repeats must be 1 or more, --threads 0 or more")
    if hasattr(options, "channels") and (options.channels % 32 or getattr(options, "size", 64) < 64):
        raise UserError("--channels must be a multiple of 32, --size 64 or more")
    if folder is not None and not folder.is_dir():
        raise UserError(f"--folder '{folder}' is not a folder; make it, or leave the option out")
    if threads:
        torch.set_num_threads(threads)
    return options


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what was measured on, and with which versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "load": round(os.getloadavg()[0], 1),
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    for package in ("torch", "diffusers", "pytorch-lightning"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a reference that not everyone has
            found[package] = None
    return found


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def wait_for(device: str | torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    forms: Mapping[str, Form], repeats: int, clock: str = "wall", device: str = "cpu"
) -> dict[str, list[float]]:
    """Time all forms in turns, so that what slows the machine slows them all; seconds."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    read = CLOCKS[clock]
    for _ in range(repeats):
        for name, form in forms.items():
            wait_for(device)
            started = read()
            form()
            wait_for(device)
            times[name].append(read() - started)
    return times


def ratio(mine: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the ratios of each turn."""
    return median(one / another for one, another in zip(mine, other, strict=True))


def summary(times: Sequence[float], base: Sequence[float] | None = None) -> dict[str, float]:
    """Return median and spread of times, and the ratio to those of ``base`` in the same turns."""
    found = {"median": median(times), "least": min(times), "most": max(times)}
    return found if base is None else found | {"ratio": ratio(times, base)}


def matmul_peak(dtype: torch.dtype, device: str = "cpu", repeats: int = 5) -> float:
    """Return what matrix products reach on this machine now, in GFLOP/s."""
    side = PEAK_SIDE if torch.device(device).type == "cpu" else 4 * PEAK_SIDE
    matrix = torch.randn(side, side, device=device).to(dtype)
    seconds = take_turns({"product": lambda: matrix @ matrix}, repeats + 1, device=device)["product"]
    return 2 * side**3 / min(seconds[1:]) / 1e9


def peak_memory(device: str | torch.device = "cpu") -> float:
    """Return the most memory that this process, or the GPU where one is used, has held so far, GiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return process_peak() / GIB


def alone(script: str, *options: object) -> dict[str, Any]:
    """Run a benchmark in a process of its own, for its memory; returns the JSON that it prints last."""
    command = [sys.executable, script, *map(str, options)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def random_model(config: ModelConfig, dtype: torch.dtype, device: str | torch.device) -> LatentDiffusion:
    """Build a model whose weights are drawn in ``dtype``: no float32 copy ever exists."""
    with torch.device("meta"):
        model = LatentDiffusion(config)
    return drawn(model, dtype, device)


def drawn(module: Module, dtype: torch.dtype, device: str | torch.device) -> Module:
    """Give a module on the meta device random weights, and switch it to evaluation.

    Norms start as the identity, everything else is normal with a variance of one over its inputs, so that
    numbers stay finite through all layers.
    """
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
    return module


def print_rows(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print a table of numbers with a row for each name; four digits, whole and large ones in full."""
    widths = {column: max(12, len(column) + 2) for row in rows.values() for column in row}
    first = max(36, *map(len, [title, *rows])) + 2
    print("\n" + title.ljust(first) + "".join(f"{column:>{width}}" for column, width in widths.items()))
    for name, row in rows.items():
        cells = (_cell(row.get(column)).rjust(width) for column, width in widths.items())
        print(f"{name.ljust(first)}{''.join(cells)}".rstrip())


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def own_file(options: argparse.Namespace, name: str, kinds: str) -> None:
    """Give runs of other kinds than the usual one a JSON of their own, unless one was named."""
    if options.json == RESULTS / f"{name}.json":
        options.json = options.json.with_name(f"{name}{kinds}.json")


def write(options: argparse.Namespace, tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Write a benchmark's tables (title, row, column) with machine and command as JSON."""
    command = shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    place = machine(getattr(options, "device", "cpu"))
    content = {"command": command, "machine": place, "tables": tables}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{options.json}")


MOST_TICKS = 8  # that can be read side by side


def plot(path: Path, lines: Mapping[str, Mapping[float, float]], *, x: str, y: str) -> dict[str, float]:
    """Draw lines on logarithmic axes; returns the exponent fitted to each."""
    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    exponents = {}
    for name, points in lines.items():
        across, up = list(points), list(points.values())
        label = name
        if len(points) > 1:
            exponents[name] = float(np.polyfit(np.log(across), np.log(up), 1)[0])
            label = f"{name}: exponent {exponents[name]:.2f}"
        axes.plot(across, up, marker=".", label=label)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    measured = sorted({each for points in lines.values() for each in points})
    if len(measured) <= MOST_TICKS:
        axes.set_xticks(measured, [f"{each:g}" for each in measured])
        axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return exponents
