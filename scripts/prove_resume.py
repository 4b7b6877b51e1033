"""Kill a small training run again and again, and compare it with one that was left alone.

python scripts/prove_resume.py                          # 300 steps, ten SIGKILLs
python scripts/prove_resume.py --steps 40 --kills 2

Both train the same small model on 64 rendered scenes, on the CPU with one thread. Every loss, learning rate,
gradient norm and validation in the log, and every weight, moment and average, must be the same to the last
bit. Time stamps and the rows of ``system/`` are not compared: they tell what the machine did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import torch

from pbe.cli.main import main as pbe, run_command
from pbe.errors import UserError
from pbe.files import sha256_of
from pbe.training.monitoring.loggers import read_rows

ROOT = Path(__file__).resolve().parents[1]
SCENES = {"train": 64, "validation": 8}
SETTINGS = (
    "autoencoder_from=data/toy/model",
    "cache.folder=",
    "model.unet.model_channels=32",
    "data.batch_size=4",
    "data.num_workers=1",
    "optimizer.warmup_steps=10",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.threads=1",
    "trainer.precision=32-true",
    "trainer.validate_every=50",
    "trainer.validation_samples=8",
    "trainer.checkpoint_every=20",
    "trainer.progress=false",
    "logging.loggers=[csv]",
    "logging.every=1",
    "logging.grid_every=0",
)
POLL = 0.005  # seconds between looks at the log
LIMIT = 600.0  # seconds without a new step


@dataclass(frozen=True)
class Life:
    """One process of a run that was killed: where it came from, how it started, where it ended.

    Attributes:
        resumed_from: optimizer step of its checkpoint, 0 for a start.
        startup_seconds: from its start to the end of its first step.
        killed_after: last step in the log when it was killed.
        seconds: it lived.
    """

    resumed_from: int
    startup_seconds: float
    killed_after: int
    seconds: float


class Proof:
    """The two runs in a folder.

    Args:
        folder: for shards and runs; it must not hold them yet.
        steps: of each run.
        settings: further ``key=value`` changes.
    """

    def __init__(self, folder: Path, steps: int, settings: tuple[str, ...] = ()) -> None:
        self.folder, self.steps, self.settings = folder, steps, settings
        self.straight, self.killed = folder / "straight", folder / "killed"

    def prepare(self) -> None:
        """Render the scenes.

        Raises:
            UserError: the folder is in use.
        """
        if self.straight.exists() or self.killed.exists():
            raise UserError(f"'{self.folder}' holds runs already; name another --out")
        for stream, count in SCENES.items():
            where = str(self.folder / stream)
            if pbe(
                ["toy", "render", "--out", where, "--scenes", str(count), "--workers", "0", "--size", "72"]
            ):
                raise UserError(f"the scenes could not be rendered into '{where}'")

    def start(self, run: Path) -> subprocess.Popen[bytes]:
        """Start training into ``run``, the same command every time."""
        shards = [f"data.{stream}_shards={self.folder / stream}" for stream in SCENES]
        arguments = [f"output_dir={run}", f"trainer.max_steps={self.steps}", *shards, *self.settings]
        command = [sys.executable, "train.py", "configs/toy.yaml", *SETTINGS, *arguments]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def finish(self, run: Path) -> float:
        """Train to the end; returns the seconds it took.

        Raises:
            UserError: training failed.
        """
        begun = time.monotonic()
        if status := self.start(run).wait():
            raise UserError(f"training into '{run}' ended with exit code {status}")
        return time.monotonic() - begun

    def live(self, step: int, delay: float) -> Life:
        """Train until ``step`` stands in the log, wait ``delay`` seconds more, and kill."""
        begun, clock = time.time(), time.monotonic()
        process = self.start(self.killed)
        try:
            first = self._wait(process, lambda: min(self._steps_since(begun), default=0))
            startup = time.monotonic() - clock
            self._wait(process, lambda: max(self._steps_since(begun), default=0) >= step)
            time.sleep(delay)
        finally:
            process.kill()
            process.wait()
        reached = max(self._steps_since(begun))
        return Life(first - 1, startup, reached, time.monotonic() - clock)

    def _steps_since(self, moment: float) -> list[int]:
        path = self.killed / "metrics.csv"
        rows = read_rows(path) if path.exists() else []
        return [int(row[0]) for row in rows if row[2] == "train/loss" and float(row[1]) > moment]

    def _wait(self, process: subprocess.Popen[bytes], seen: Callable[[], int]) -> int:
        limit = time.monotonic() + LIMIT
        while not (value := seen()):
            if process.poll() is not None or time.monotonic() > limit:
                raise UserError("training ended, or made no step, before it was to be killed")
            time.sleep(POLL)
        return value


def compared_rows(run: Path) -> list[tuple[str, str, str]]:
    """Return (step, name, value as it is written) of every row that does not tell the time, in order."""
    rows = read_rows(run / "metrics.csv")
    return [(row[0], row[2], row[3]) for row in rows if not row[2].startswith("system/")]


def differences(first: Path, second: Path) -> list[str]:
    """Return one line for everything in which two finished runs differ; none when they are the same."""
    found = []
    one, two = compared_rows(first), compared_rows(second)
    if one != two:
        index = next((i for i, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), -1)
        what = f"row {index}: {one[index]} and {two[index]}" if index >= 0 else f"{len(one)}, {len(two)} rows"
        found.append(f"the logs differ: {what}")
    files = [{path.name: sha256_of(path) for path in (run / "model").iterdir()} for run in (first, second)]
    found += [
        f"model/{name} differs"
        for name in sorted(files[0].keys() | files[1].keys())
        if files[0].get(name) != files[1].get(name)
    ]
    states = [_tensors(torch.load(run / "checkpoints" / "last.ckpt", mmap=True, weights_only=False))
              for run in (first, second)]  # fmt: skip
    if states[0].keys() != states[1].keys():
        return [*found, "the checkpoints hold other tensors"]
    unequal = [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])]
    return [*found, *(f"tensor {name} of the checkpoints differs" for name in unequal[:1])]


def _tensors(content: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors of nested dictionaries and lists: weights, average, moments, sums."""
    if isinstance(content, torch.Tensor):
        return {prefix: content}
    items = content.items() if isinstance(content, dict) else enumerate(content)
    return {
        name: tensor
        for key, value in items
        if isinstance(value, dict | list | torch.Tensor)
        for name, tensor in _tensors(value, f"{prefix}/{key}").items()
    }


def prove(proof: Proof, kills: int, seed: int) -> dict[str, Any]:
    """Run both, print what happened, and return it; ``differences`` is empty when all is well."""
    proof.prepare()
    seconds, rng = proof.finish(proof.straight), random.Random(seed)
    step_seconds = seconds / proof.steps
    moments = sorted(rng.uniform(1, proof.steps - 1) for _ in range(kills))
    lives = [proof.live(max(int(moment), 1), rng.random() * step_seconds) for moment in moments]
    proof.finish(proof.killed)
    for number, life in enumerate(lives, start=1):
        print(
            f"life {number}: from step {life.resumed_from}, {life.startup_seconds:.1f} s of start-up, "
            f"killed after step {life.killed_after} and {life.seconds:.1f} s"
        )
    found = differences(proof.straight, proof.killed)
    rows = len(compared_rows(proof.straight))
    print(
        "\n".join(found)
        or f"{proof.steps} steps, {kills} kills: {rows} rows of the log and all weights are equal"
    )
    slowest = max((life.startup_seconds for life in lives), default=0.0)
    print(f"the slowest start took {slowest:.1f} s; the straight run {seconds:.0f} s")
    return {"lives": [asdict(life) for life in lives], "straight_seconds": seconds, "differences": found}


def run(arguments: list[str] | None) -> None:
    """Run the command line.

    Raises:
        UserError: an option cannot be used, training fails, or the runs differ.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep both runs in this folder")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.steps < 2 or options.kills < 0:
        raise UserError("--steps must be at least 2, and --kills at least 0")
    with tempfile.TemporaryDirectory(prefix="pbe-resume-") as temporary:
        folder = (options.out or Path(temporary)).resolve()
        numbers = prove(Proof(folder, options.steps), options.kills, options.seed)
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")
    if numbers["differences"]:
        raise UserError("the killed run is not the straight one")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 when the runs differ."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
