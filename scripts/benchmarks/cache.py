"""Time training as a run does it, from its latent cache and online: rate, waiting for data, one step, DDP.

python scripts/benchmarks/cache.py                           # the toy model, from its cache against online
python scripts/benchmarks/cache.py --paper                   # the paper's sizes, random weights, 256 px
python scripts/benchmarks/cache.py --paper --step --steps 2  # one step: time and memory
python scripts/benchmarks/cache.py --ddp                     # two processes against one on one core

Images are rendered or synthetic. Loading and the frozen networks belong to what is measured; ``train.py``
leaves them out and times steps from batches in memory, beside another module.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytorch_lightning as pl

from pbe.cli.main import main as pbe
from pbe.config import CacheConfig, Config, load_config, save_yaml
from pbe.data.datamodule import TrainingData
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.training.latent_cache.builder import ensure_cache
from pbe.training.latent_cache.dataset import CachedDataModule
from pbe.training.monitoring.loggers import read_curve
from pbe.training.resume.signals import StopSignals
from pbe.training.setup import (
    apply_performance_options,
    build_model,
    make_task,
    make_trainer,
    prepare_process,
)
from scripts.benchmarks.common import (
    ROOT,
    command_line,
    machine,
    make_parser,
    own_file,
    peak_memory,
    print_rows,
    ratio,
    read_options,
    write,
)
from scripts.benchmarks.loading import synthetic_shards

Rows = dict[str, dict[str, float]]
# Of the toy model and of the paper's, whose images and steps take seconds.
DEFAULTS = {
    "size": (64, 256),
    "batch_size": (64, 1),
    "images": (256, 8),
    "steps": (30, 4),
    "warm_up": (8, 2),
}


class StepClock(pl.Callback):
    """Notes when each optimizer step ended, and how long had been waited for data by then."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data
        self.ends: list[float] = []
        self.waits: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note the end of a step."""
        if trainer.global_step > len(self.ends):
            self.ends.append(time.perf_counter())
            self.waits.append(self.data.waited)


def render_scenes(folder: Path, count: int, size: int) -> None:
    """Render scenes of the toy world as shards, with sides of ``size`` pixels."""
    rendering = f"--scenes {count} --workers 0 --size {size}".split()
    if pbe(["toy", "render", "--out", str(folder), *rendering]):
        raise UserError("the scenes could not be rendered")


def local_config(folder: Path, name: str, *settings: str) -> Config:
    """Return a configuration of one device whose ``shards``, ``cache`` and ``run`` lie in a folder.

    Args:
        folder: see above.
        name: ``toy``, with the autoencoder that ships, or ``paper``, with random weights alone.
        settings: further ``key=value``.
    """
    here = [
        *(f"data.train_shards={folder / 'shards'}", "data.validation_shards=", "init_from=none"),
        *(f"cache.folder={folder / 'cache'}", "cache.variants=1", f"output_dir={folder / 'run'}"),
        *("trainer.devices=1", "trainer.strategy=auto"),
        f"autoencoder_from={ROOT / 'data/toy/model' if name == 'toy' else ''}",
    ]
    return load_config(ROOT / "configs" / f"{name}.yaml", [*here, *settings])


def quiet(config: Config, steps: int) -> Config:
    """Return the configuration of a short run that writes nothing and does not validate."""
    short = replace(
        config.trainer, max_steps=steps, max_epochs=0, progress=False, profiler="", resume="never"
    )
    logging = replace(config.logging, loggers=[], grid_every=0)
    return replace(config, trainer=short, logging=logging)


def random_or_built(config: Config) -> tuple[LatentDiffusion, Config]:
    """Build the model as training does where its weights are named, else with random ones."""
    prepare_process(config)
    if config.autoencoder_from or config.start:
        return build_model(config)
    return LatentDiffusion(config.model), config


def time_steps(
    config: Config, model: LatentDiffusion, warm_up: int, steps: int, *, cached: bool
) -> dict[str, float]:
    """Train some steps that are not measured, then some that are.

    Args:
        config: its ``cache.folder`` is built first when it is not there, if ``cached``.
        model: trained in place.
        warm_up: optimizer steps before the measured ones: what the loader has in store is used up in them.
        steps: that are measured.
        cached: train from the cache.

    Returns:
        Samples ``a second`` over whole steps, waiting included; ``waiting %``, its share of the time;
        ``a step, s``, the median of the optimizer steps with the waiting for a batch before each.
    """
    config = quiet(config, warm_up + steps)
    ends, waits = (times[warm_up - 1 :] for times in _fit(config, model, cached=cached))
    model.zero_grad(set_to_none=True)
    gc.collect()  # trainer and task know each other and hold the moments: the next round has its own
    passed = ends[-1] - ends[0]
    samples = steps * config.data.batch_size * config.trainer.accumulate
    lengths = [later - earlier for earlier, later in pairwise(ends)]
    return {
        "a second": samples / passed,
        "waiting %": 100 * (waits[-1] - waits[0]) / passed,
        "a step, s": statistics.median(lengths),
    }


def _fit(config: Config, model: LatentDiffusion, *, cached: bool) -> tuple[list[float], list[float]]:
    """Train; returns the times of :class:`StepClock`, and nothing that keeps the trainer alive."""
    data = CachedDataModule(config, ensure_cache(config, model)) if cached else TrainingData(config)
    clock = StepClock(data)
    with tempfile.TemporaryDirectory(prefix="pbe-timing-") as folder:
        trainer = make_trainer(config, Path(folder), StopSignals(), callbacks=[clock])
        trainer.limit_val_batches = 0
        try:
            trainer.fit(make_task(config, model), datamodule=data)
        finally:
            data.close()
    return clock.ends, clock.waits


def compare_cache(config: Config, warm_up: int, steps: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Train online and from the cache in turns; returns the rounds of ``online`` and ``cached``.

    Args:
        config: of one device; its ``cache.folder`` is built first when it is not there.
        warm_up: see :func:`time_steps`.
        steps: measured in a round.
        rounds: turns, so that a machine that slows down slows both.
    """
    model, config = random_or_built(config)
    apply_performance_options(model, config.trainer)
    ensure_cache(config, model)
    found: dict[str, list[dict[str, float]]] = {"online": [], "cached": []}
    for _ in range(rounds):
        for name, speeds in found.items():
            speeds.append(time_steps(config, model, warm_up, steps, cached=name == "cached"))
    return found


def measure_step(config: Config, steps: int) -> dict[str, float]:
    """Return the median seconds of the optimizer steps after the first, and the peak memory.

    The peak is that of this process so far: ask in a process that has done nothing else.

    Args:
        config: of the run; online.
        steps: after the first one.
    """
    model, config = random_or_built(replace(config, cache=CacheConfig()))
    apply_performance_options(model, config.trainer)
    speed = time_steps(config, model, 1, steps, cached=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    peak = peak_memory("cuda" if config.trainer.accelerator == "gpu" else "cpu")
    return {"trained weights": trained, "a step, s": speed["a step, s"], "peak GiB": peak}


def compare_processes(config: Config, steps: int) -> dict[str, float]:
    """Return the samples a second of one process that has one core, and of two processes with DDP.

    Both take the same global batch, ``data.batch_size``, and one thread a process.

    Args:
        config: its ``cache.folder`` is built by the first run; the time of that does not count.
        steps: of each run.

    Raises:
        UserError: the machine has one core, the batch is odd, or a run failed.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2 or config.data.batch_size % 2:
        raise UserError("two processes need two cores (on Linux) and an even data.batch_size")
    every = max(steps // 6, 1)
    config = replace(
        quiet(config, steps), logging=replace(config.logging, loggers=["csv"], every=every, grid_every=0)
    )
    config.trainer.threads, config.trainer.validate_every = 1, steps * 10
    found = {}
    with tempfile.TemporaryDirectory(prefix="pbe-timing-") as temporary:
        save_yaml(config, file := Path(temporary) / "run.yaml")
        half = f"data.batch_size={config.data.batch_size // 2}"
        for name, where, options in (
            ("one process, one core", {cores[0]}, ["trainer.devices=1", "trainer.strategy=auto"]),
            ("two processes, two cores", set(cores[:2]), ["trainer.devices=2", "trainer.strategy=ddp", half]),
        ):
            out = Path(temporary) / name.replace(" ", "-")
            _train([str(file), f"output_dir={out}", *options], where)
            rows = read_curve(out / "metrics.csv", "system/samples_per_second")
            found[name] = statistics.median(value for _, value in rows[1:] or rows)
    return found


def _train(arguments: list[str], cores: set[int]) -> None:
    """Run train.py on some cores, without validation."""
    command = [sys.executable, "train.py", *arguments, "data.validation_shards="]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"training failed: {done.stderr.strip().splitlines()[-1:]}")


def speed_rows(rounds: dict[str, list[dict[str, float]]]) -> Rows:
    """Return the medians of ``online`` and ``cached``, and below them the single rounds."""
    rates = {name: [each["a second"] for each in found] for name, found in rounds.items()}
    rows: Rows = {}
    for name, found in rounds.items():
        rows[name] = {column: statistics.median(each[column] for each in found) for column in found[0]}
        rows[name]["of online"] = ratio(rates[name], rates["online"])
    for name, found in rounds.items():
        rows |= {f"{name}, round {number}": each for number, each in enumerate(found, 1)}
    return rows


def make_config(options: argparse.Namespace, folder: Path) -> Config:
    """Make images in a folder, and return the configuration that is measured."""
    size, name = options.size, "paper" if options.paper else "toy"
    if options.paper:
        synthetic_shards(folder / "shards", options.images, 2 * size, 2 * size, 90)
    else:
        render_scenes(folder / "shards", options.images, size * 3 // 2)
    settings = [
        *(f"data.num_workers={options.workers}", f"data.batch_size={options.batch_size}"),
        *(f"data.image_size={size}", f"model.image_size={size}", f"trainer.threads={options.threads}"),
        f"trainer.accelerator={'gpu' if options.device == 'cuda' else 'cpu'}",
    ]
    if options.paper and options.step:  # what makes it fit into little memory
        settings += ["trainer.gradient_checkpointing=true", "trainer.precision=bf16-mixed"]
    return local_config(folder, name, *settings, *options.overrides)


def measure(options: argparse.Namespace) -> dict[str, Rows]:
    """Measure online against cached, one step, or two processes against one; returns the table."""
    with tempfile.TemporaryDirectory(prefix="pbe-benchmark-") as folder:
        config = make_config(options, Path(folder))
        if options.step:
            kind, rows = "one optimizer step", {"online": measure_step(config, options.steps)}
        elif options.ddp:
            rates = compare_processes(config, options.steps)
            first = next(iter(rates.values()))
            rows = {name: {"a second": rate, "of the first": rate / first} for name, rate in rates.items()}
            kind = "training, cached"
        else:
            rows = speed_rows(compare_cache(config, options.warm_up, options.steps, options.repeats))
            kind = "training"
    title = f"{kind}, {'paper' if options.paper else 'toy'} size, {options.size} px, "
    title += f"batch {config.data.batch_size}"
    title += "".join(f", {override}" for override in options.overrides)
    print_rows(title, rows)
    return {title: rows}


def run(arguments: list[str] | None) -> None:
    """Measure what the options ask for.

    Raises:
        UserError: an option cannot be used, or a run failed.
    """
    parser = make_parser(__doc__, "cache", repeats=2, takes=("--threads", "--device"))
    parser.add_argument("--paper", action="store_true", help="the paper's model, with random weights")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--step", action="store_true", help="only time and memory of one optimizer step")
    kind.add_argument("--ddp", action="store_true", help="two processes with DDP against one on one core")
    parser.add_argument("--size", type=int, help="sides of the training image (default: toy 64, paper 256)")
    parser.add_argument("--batch-size", type=int, help="default: toy 64, paper 1")
    parser.add_argument("--workers", type=int, default=2, help="data.num_workers (%(default)s)")
    parser.add_argument("--images", type=int, help="rendered or synthetic (default: toy 256, paper 8)")
    parser.add_argument("--steps", type=int, help="measured in each turn (default: toy 30, paper 4)")
    parser.add_argument("--warm-up", type=int, help="steps before them (default: toy 8, paper 2)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    options = read_options(parser, arguments)
    for name, (toy, paper) in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, paper if options.paper else toy)
    if min(options.size, options.images, options.steps, options.warm_up) < 1:
        raise UserError("--size, --images, --steps and --warm-up must be at least 1")
    own_file(options, "cache", "_paper" * options.paper + "_step" * options.step + "_ddp" * options.ddp)
    print(machine(options.device))
    write(options, measure(options))


main = command_line(run)

if __name__ == "__main__":
    sys.exit(main())
