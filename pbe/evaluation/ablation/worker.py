"""The process of a stage, started by the runner: ``python -m pbe.evaluation.ablation.worker STAGE.json``."""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pbe.cli.parser import run_command
from pbe.evaluation.ablation.stages import Stage

PR_SET_PDEATHSIG = 1
Work = Callable[[dict[str, Any], Path], int]


def die_with_parent() -> None:
    """Ask Linux to end this process when the runner dies, however that happens; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """End the process at SIGTERM, with status 143.

    Without this Lightning's own handler only notes the signal while it predicts, and the work goes on; it
    calls the one that it finds, too.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def make_scenes(job: dict[str, Any], folder: Path) -> int:
    """Render toy scenes into ``shards``, from the start if a rendering was stopped."""
    from pbe.data.shards.archive import write_shards
    from pbe.data.toy.render import render_records
    from pbe.data.toy.scenes import DEFAULT_WORLD, SceneConfig

    partial, config = folder / "partial", SceneConfig(recolour=job["recolour"])
    shutil.rmtree(partial, ignore_errors=True)
    records = render_records(DEFAULT_WORLD, job["split"], job["seed"], job["count"], config, 0)
    write_shards(records, partial, max_count=2000)
    _replace(partial, folder / "shards")
    return 0


def make_benchmark(job: dict[str, Any], folder: Path) -> int:
    """Write the toy benchmark into ``cases``."""
    from pbe.data.toy.scenes import ToyWorld
    from pbe.evaluation.benchmark.toy import export_toy_benchmark

    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    export_toy_benchmark(ToyWorld(), partial, **job)
    _replace(partial, folder / "cases")
    return 0


def _replace(partial: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)


def make_own_benchmark(job: dict[str, Any], folder: Path) -> int:
    """Write a benchmark's cases with the hidden objects as exemplars into ``cases``."""
    from pbe.evaluation.benchmark.build import write_own_exemplars

    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    write_own_exemplars(Path(job["benchmark"]), partial, job["exemplar_size"])
    _replace(partial, folder / "cases")
    return 0


def make_cache(job: dict[str, Any], folder: Path) -> int:
    """Build a latent cache; returns the signal that stopped it, or 0."""
    from pbe.config import Config, from_dict
    from pbe.training.run import build_cache

    return build_cache(from_dict(Config, job["config"], str(folder)))


def make_training(job: dict[str, Any], folder: Path) -> int:
    """Train, from the newest checkpoint if there is one; returns the signal that stopped it, or 0."""
    from pbe.config import Config, from_dict
    from pbe.training.run import train

    return train(from_dict(Config, job["config"], str(folder))).stopped_by


def make_edits(job: dict[str, Any], folder: Path) -> int:
    """Edit the benchmark's cases into ``pictures``; those that are there are not made again."""
    from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
    from pbe.evaluation.benchmark.generation import GenerateSettings, generate

    settings = GenerateSettings(**job["settings"], devices=1, progress=False)
    with leaving_on_sigterm():
        generate(job["model"], BenchmarkFolder(job["benchmark"]), folder / "pictures", settings)
    return 0


def make_scores(job: dict[str, Any], folder: Path) -> int:
    """Score the edits of a benchmark into ``scores.json``."""
    from pbe.evaluation.ablation.scoring import score_folder

    score_folder(job, folder)
    return 0


WORK: dict[str, Work] = {
    "scenes": make_scenes,
    "benchmark": make_benchmark,
    "own benchmark": make_own_benchmark,
    "cache": make_cache,
    "training": make_training,
    "edits": make_edits,
    "scores": make_scores,
}


def run_stage(path: Path) -> int:
    """Do the work of a stage and mark it as done; returns the signal that stopped it, or 0."""
    content = json.loads(path.read_text())
    resumed = bool(content.pop("resumed", False))
    content["folder"], content["needs"] = Path(content["folder"]), tuple(content["needs"])
    stage = Stage(**content)
    started = time.monotonic()
    stopped = WORK[stage.kind](stage.job, stage.folder)
    if not stopped:
        stage.finish(time.monotonic() - started, resumed)
    return stopped


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status is 2 for a mistake of the user's, 128 + n after signal n."""
    die_with_parent()
    (path,) = arguments if arguments is not None else sys.argv[1:]
    stopped: list[int] = []
    status = run_command(lambda: stopped.append(run_stage(Path(path))))
    return status or (128 + stopped[0] if stopped[0] else 0)


if __name__ == "__main__":
    sys.exit(main())
