"""Measure parts of the project and print tables.

python scripts/benchmark.py annotations
python scripts/benchmark.py packing --kills 10
python scripts/benchmark.py train                          # the toy model, from its cache against online
python scripts/benchmark.py train --paper                  # the paper's sizes, random weights, 256 px
python scripts/benchmark.py train --paper --step --steps 2  # one step: time and memory
python scripts/benchmark.py train --ddp                    # two processes against one on one core
python scripts/benchmark.py scoring --count 1000 --size 512
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pbe.cli.main import main as pbe, run_command
from pbe.config import Config, load_config
from pbe.errors import UserError
from scripts.benchmarks.loading import synthetic_shards
from scripts.benchmarks.packing import (
    OPEN_IMAGES_PICTURES,
    OPEN_IMAGES_ROWS,
    KillResult,
    PackingTimes,
    kill_and_resume,
    measure_annotations,
    measure_packing,
    synthetic_open_images,
    synthetic_source,
)
from scripts.benchmarks.scoring import measure_scoring, synthetic_edits

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Subject:
    """Something that can be measured: its options, and what prints its tables and returns the numbers."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], dict[str, Any]]


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for number, row in enumerate([head, *rows]):
        texts = [row[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(texts).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def add_annotation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``annotations``."""
    parser.add_argument("--rows", type=int, default=OPEN_IMAGES_ROWS, help="boxes in the CSV")
    parser.add_argument("--images", type=int, default=OPEN_IMAGES_PICTURES, help="files in the 16 folders")
    parser.add_argument("--folder", type=Path, help="for everything that is written; default a temporary one")


def measure_open_images(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the way from Open Images' annotations to the packing plan.

    Raises:
        UserError: an option makes no sense.
    """
    if min(options.rows, options.images) < 1:
        raise UserError("--rows and --images must be at least 1")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        synthetic_open_images(Path(folder) / "open-images", options.images, options.rows)
        numbers = measure_annotations(Path(folder) / "open-images", Path(folder) / "plan")
    head = ["annotations of Open Images", "", ""]
    rows = [
        ["boxes in the CSV", f"{numbers['boxes_seen']:,}", ""],
        ["boxes planned", f"{numbers['boxes']:,}", f"of {numbers['pictures']:,} images"],
        *([name, f"{numbers[name]:.1f}", "s"] for name in ("read annotations", "plan", "whole", "cpu")),
        ["peak memory", f"{numbers['peak_mib']:,.0f}", "MiB"],
    ]
    print_table(head, rows)
    return numbers


def add_packing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``packing``."""
    parser.add_argument("--images", type=int, default=10_000, help="number of synthetic images")
    parser.add_argument("--width", type=int, default=1024, help="of the images")
    parser.add_argument("--height", type=int, default=768, help="of the images")
    parser.add_argument("--quality", type=int, default=90, help="of their JPEG encoding")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that pack")
    parser.add_argument("--shard-images", type=int, default=500, help="images a shard")
    parser.add_argument("--no-perceptual", action="store_true", help="no hashes of near duplicates")
    parser.add_argument("--kills", type=int, default=0, help="kill and resume it that often, and compare")
    parser.add_argument("--folder", type=Path, help="for everything that is written; default a temporary one")


def measure_pack(options: argparse.Namespace) -> dict[str, Any]:
    """Measure packing without encoding again, and what remains of it when it is killed.

    Raises:
        UserError: an option makes no sense, or packing failed.
        SystemExit: a packing that was killed and resumed came out otherwise.
    """
    counts = (options.images, options.width, options.height, options.shard_images)
    if min(counts) < 1 or min(options.kills, options.workers) < 0:
        raise UserError("numbers must be at least 1, --kills and --workers at least 0")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        sizes = options.width, options.height, options.quality
        table = synthetic_source(folder, options.images, *sizes)

        def command(out: Path) -> list[str]:
            limits = ["--workers", str(options.workers), "--shard-images", str(options.shard_images)]
            limits += ["--no-perceptual"] if options.no_perceptual else []
            prepare = [sys.executable, "-m", "pbe.cli", "prepare"]
            return [*prepare, f"csv:{table}@{folder / 'pictures'}", "--out", str(out), *limits]

        times = measure_packing(table, command, workers=options.workers, chunk=options.shard_images)
        _print_packing(times)
        if not options.kills:
            return vars(times)
        latest = times.work * min(3 / options.kills, 1)
        killed = kill_and_resume(command, folder / "straight", options.images, options.kills, latest)
        _print_kills(killed)
        return {**vars(times), "kills": vars(killed)}


def _print_packing(times: PackingTimes) -> None:
    rows = [["copying and hashing alone", f"{times.copying:.0f}", "1.00"]]
    rows.append(["packing", f"{times.packing:.0f}", f"{times.packing / times.copying:.2f}"])
    print_table([f"{times.pictures} images", "a second", "of copying"], rows)
    print()
    stages = [[stage, f"{1e3 * spent / times.pictures:.3f}"] for stage, spent in times.stages.items()]
    stages.append(["CPU time of everything", f"{times.cpu:.3f}"])
    print_table(["stages, wall time of all processes", "ms an image"], stages)


def _print_kills(killed: KillResult) -> None:
    left = ", ".join(str(count) for count in killed.shards_left)
    print(f"\n{len(killed.shards_left)} kills, which left {left} whole shards")
    if killed.faults:
        raise SystemExit(f"error: resumed is not what was packed at once: {'; '.join(killed.faults)}")
    print("resumed: the same bytes as packed at once, every image once")


# Of the toy model and of the paper's, whose images and steps take seconds.
TRAIN_DEFAULTS = {
    "size": (64, 256),
    "batch_size": (64, 1),
    "images": (256, 8),
    "steps": (30, 4),
    "warm_up": (8, 2),
}


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train``."""
    parser.add_argument("--paper", action="store_true", help="the paper's model, with random weights")
    parser.add_argument("--step", action="store_true", help="only time and memory of one optimizer step")
    parser.add_argument("--ddp", action="store_true", help="two processes with DDP against one on one core")
    parser.add_argument("--size", type=int, help="sides of the training image (default: toy 64, paper 256)")
    parser.add_argument("--batch-size", type=int, help="default: toy 64, paper 1")
    parser.add_argument("--workers", type=int, default=2, help="data.num_workers of the online training")
    parser.add_argument("--images", type=int, help="rendered or synthetic (default: toy 256, paper 8)")
    parser.add_argument("--steps", type=int, help="measured in each round (default: toy 30, paper 4)")
    parser.add_argument("--warm-up", type=int, help="steps before them (default: toy 8, paper 2)")
    parser.add_argument("--rounds", type=int, default=2, help="online and cached in turns")
    parser.add_argument("--threads", type=int, default=0, help="trainer.threads; 0: torch's choice")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")


def measure_train(options: argparse.Namespace) -> dict[str, Any]:
    """Measure training: online against cached, one step, or two processes against one.

    Raises:
        UserError: an option makes no sense.
    """
    from scripts.benchmarks import training as timing  # slow to import

    for name, (toy, paper) in TRAIN_DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, paper if options.paper else toy)
    with tempfile.TemporaryDirectory(prefix="pbe-benchmark-") as folder:
        config = _train_config(Path(folder), options)
        if options.step:
            step = timing.measure_step(config, options.steps)
            rows = [[name, f"{value:,.2f}"] for name, value in step.items()]
            print_table(["one optimizer step", ""], rows)
            return step
        if options.ddp:
            rates = timing.compare_processes(config, options.steps, ROOT)
            base = next(iter(rates.values()))
            rows = [[name, f"{rate:.2f}", f"{rate / base:.2f}"] for name, rate in rates.items()]
            print_table(["training, cached", "samples a second", "of the first"], rows)
            return rates
        rounds = timing.compare_cache(config, options.warm_up, options.steps, options.rounds)
    speeds = {name: timing.median(found) for name, found in rounds.items()}
    base_rate = speeds["online"].samples_per_second
    print_table(
        ["training", "samples a second", "of online", "waiting %", "step s"],
        [
            [name, f"{speed.samples_per_second:.2f}", f"{speed.samples_per_second / base_rate:.2f}",
             f"{100 * speed.wait_share:.1f}", f"{speed.step_seconds:.3f}"]
            for name, speed in speeds.items()
        ],
    )  # fmt: skip
    return {name: [vars(speed) for speed in found] for name, found in rounds.items()}


def _train_config(folder: Path, options: argparse.Namespace) -> Config:
    """Make images and return the configuration that is measured."""
    size, shards = options.size, folder / "shards"
    rendering = f"--scenes {options.images} --workers 0 --size {size * 3 // 2}".split()
    if options.paper:
        synthetic_shards(shards, options.images, 2 * size, 2 * size, 90)
    elif pbe(["toy", "render", "--out", str(shards), *rendering]):
        raise UserError("the scenes could not be rendered")
    settings = [
        f"data.train_shards={shards}", "data.validation_shards=", f"data.num_workers={options.workers}",
        f"data.image_size={size}", f"model.image_size={size}", f"data.batch_size={options.batch_size}",
        f"cache.folder={folder / 'cache'}", "cache.variants=1", "trainer.devices=1", "trainer.strategy=auto",
        f"trainer.threads={options.threads}", f"output_dir={folder / 'run'}",
    ]  # fmt: skip
    # the shipped autoencoder for the toy world, random weights for the paper's model
    settings.append(f"autoencoder_from={'' if options.paper else ROOT / 'data/toy/model'}")
    settings.append("init_from=none")
    if options.paper and options.step:  # what makes it fit into little memory
        settings += ["trainer.gradient_checkpointing=true", "trainer.precision=bf16-mixed"]
    name = "paper" if options.paper else "toy"
    return load_config(ROOT / "configs" / f"{name}.yaml", [*settings, *options.overrides])


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``scoring``."""
    parser.add_argument("--count", type=int, default=1000, help="edits (default %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="of the images, pixels (default %(default)s)")


def measure_scores(options: argparse.Namespace) -> dict[str, Any]:
    """Measure how long finished edits take to be scored."""
    with tempfile.TemporaryDirectory() as folder:
        times = measure_scoring(*synthetic_edits(Path(folder), options.count, options.size))
    rows = [["reading alone", f"{times.read:.1f}"], ["scoring", f"{times.score:.1f}"]]
    print_table([f"{times.cases} edits of {options.size} px", "s"], rows)
    print(f"\nscores: {', '.join(times.ran)}")
    return vars(times)


SUBJECTS = {
    "annotations": Subject(
        "Open Images' annotations to the packing plan", add_annotation_options, measure_open_images
    ),
    "packing": Subject(
        "packing, against bare copying; killed and resumed", add_packing_options, measure_pack
    ),
    "scoring": Subject("scores of finished edits, against reading them", add_scoring_options, measure_scores),
    "train": Subject("training: cached or online, one step, two processes", add_train_options, measure_train),
}


def run(arguments: list[str] | None) -> None:
    """Measure the subject that the arguments name.

    Raises:
        UserError: an option cannot be used.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, subject in SUBJECTS.items():
        options = subjects.add_parser(name, help=subject.help)
        subject.add_options(options)
        options.add_argument("--json", type=Path, help="also write the numbers to this file")
    chosen = parser.parse_args(arguments)
    numbers = SUBJECTS[chosen.subject].measure(chosen)
    if chosen.json:
        chosen.json.write_text(json.dumps(numbers, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
