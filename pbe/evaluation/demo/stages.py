"""The stages of the demo: render, train, edit, score, and a page that shows it all."""

from __future__ import annotations

import math
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tqdm import tqdm

from pbe.checkpoints.native import load_config as load_model_config
from pbe.config import Config, ModelConfig, load_config
from pbe.data.toy.scenes import DEFAULT_WORLD, ToyWorld
from pbe.diffusion.schedule import make_schedule
from pbe.diffusion.solvers import uniform_timesteps
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.generation import GenerateSettings, at_scales
from pbe.evaluation.benchmark.toy import ToyCase, ToyEdits, check_count, make_benchmark, make_edits
from pbe.evaluation.benchmark.toy_run import Row, Scorer, ToyScores, edit_sizes, score_edits
from pbe.evaluation.demo import DemoSettings
from pbe.evaluation.demo.page import (
    TEMPLATE,
    Student,
    TrainingCurve,
    edit_outside,
    machine_facts,
    page_values,
    read_training,
)
from pbe.evaluation.metrics.towers import load_tower
from pbe.evaluation.report import markdown, sheet
from pbe.files import make_folder
from pbe.html import Tile, render_page, write_html
from pbe.resources import model_name, packaged
from pbe.training.monitoring.loggers import read_rows
from pbe.training.tasks.diffusion import VALIDATION_TIMESTEPS

if TYPE_CHECKING:
    from pbe.training.run import TrainResult

RENDER = ("-m", "pbe.cli", "toy", "render")
EDITS, SHOWN = "edits.png", 16  # the first cases, which the README shows
OWN_FOLDERS = ("scenes", "cache", "pilot", "run")
MARKER = ".made-by-demo"
PILOT_STEPS, PILOT_SKIP = 14, 4
MIN_STEPS = 20
BATCH = 32  # edits at a time


class StageError(Exception):
    """A stage went wrong for another reason than the user's input; the cause has the details."""


class Clock:
    """Prints a heading for each stage, and keeps name, seconds and ``note`` of those that are done.

    The note is a sentence on what came out, set by the running stage.
    """

    def __init__(self) -> None:
        self.stages: list[tuple[str, float, str]] = []
        self.note = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; errors say which one it was."""
        print(f"\n== {len(self.stages) + 1}. {name} ==", flush=True)
        started, self.note = time.perf_counter(), ""
        try:
            yield
        except UserError as error:
            raise UserError(f"stage '{name}': {error}") from error
        except Exception as error:
            raise StageError(f"stage '{name}' failed: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - started
        self.stages.append((name, seconds, self.note))
        print(f"   {self.note} ({seconds:.1f} s)", flush=True)


def check(options: DemoSettings) -> Config:
    """Find mistakes before minutes have passed; return the training configuration."""
    if min(options.scenes, options.objects, options.shown) < 2:
        raise UserError("--scenes, --objects and --shown must be at least 2")
    if not (math.isfinite(options.seconds) and options.seconds > 0) or options.steps < 0:
        raise UserError("--seconds must be a number above 0, --steps 0 or more")
    if not (options.model / "config.json").is_file():
        raise UserError(f"no model at '{options.model}', where it ships with the project (or: pbe toy train)")
    model, student = load_model_config(options.model), student_config(options)
    if student is not None and edit_sizes(student) != edit_sizes(model):
        raise UserError(
            f"--student edits {edit_sizes(student)} px (image and exemplar), --model {edit_sizes(model)}; "
            "give the student of that model, or none"
        )
    uniform_timesteps(make_schedule(model.schedule), options.sampling_steps)
    at_scales(edit_settings(options), options.guidance)
    check_count(ToyWorld(DEFAULT_WORLD), options.objects)
    return training_config(options, 1, "run")


def student_config(options: DemoSettings) -> ModelConfig | None:
    """Return the sizes of the student, which must be one; None where there is none."""
    if options.student in ("", "none"):
        return None
    config = load_model_config(options.student)
    if not config.unet.few_steps:
        raise UserError(
            f"--student '{options.student}' is not distilled into few steps; give another, or none"
        )
    return config


def edit_settings(options: DemoSettings) -> GenerateSettings:
    """Return how the benchmark is edited, at whatever guidance scale."""
    return GenerateSettings(solver="plms", steps=options.sampling_steps, seed=options.seed, batch_size=BATCH)


def training_config(options: DemoSettings, steps: int, name: str) -> Config:
    """Return the toy configuration, cut down to a short run with its own small cache."""
    scenes, pilot = options.out / "scenes", name == "pilot"
    return load_config(
        options.config,
        [
            f"output_dir={options.out / name}",
            f"autoencoder_from={options.model}",
            f"data.train_shards={scenes / 'train'}",
            f"data.validation_shards={scenes / 'validation'}",
            f"cache.folder={options.out / 'cache'}",
            "cache.variants=1",
            f"trainer.max_steps={steps}",
            f"trainer.validate_every={2 * steps if pilot else max(1, steps // 4)}",
            f"trainer.checkpoint_every={steps}",
            "trainer.resume=never",
            f"optimizer.warmup_steps={max(1, steps // 10)}",
            "optimizer.ema_decay=0.98",
            "logging.loggers=[csv]",
            f"logging.every={1 if pilot else max(1, steps // 200)}",
            f"logging.grid_every={0 if pilot else steps}",
            "logging.grid_samples=8",
            *options.set,
        ],
    )


def clean(out: Path) -> None:
    """Remove what an earlier demo left, and the page first, so that no stale one is taken for a new one."""
    marker = make_folder(out) / MARKER
    if not marker.exists() and any((out / name).exists() for name in (*OWN_FOLDERS, "index.html")):
        raise UserError(f"'{out}' holds files that the demo did not make; give another --out")
    marker.touch()
    (out / "index.html").unlink(missing_ok=True)
    for name in OWN_FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)


def render(options: DemoSettings, clock: Clock) -> None:
    """Stage one: scenes of both splits as shards, by the command that a person would use."""
    validation = max(16, options.scenes // 8)
    paths = [str(Path(__file__).parents[3]), *filter(None, [os.getenv("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for split, folder, scenes in (("train", "train", options.scenes), ("test", "validation", validation)):
        command = [sys.executable, *RENDER, "--split", split]
        command += ["--out", str(options.out / "scenes" / folder), "--scenes", str(scenes)]
        command += ["--seed", str(options.seed), "--workers", "0"]
        if subprocess.run(command, env=environment, check=False).returncode:
            raise UserError("rendering failed; see its message above")
    clock.note = (
        f"{options.scenes} training and {validation} validation scenes with boxes, packed into shards"
    )


def _train(config: Config) -> TrainResult:
    from pbe.training.run import train

    result = train(config)
    if result.stopped_by:
        raise KeyboardInterrupt
    return result


def pilot(options: DemoSettings, clock: Clock) -> int:
    """Stage two: encode the samples once and time a few steps; return the number of steps to train."""
    result = _train(training_config(options, PILOT_STEPS, "pilot"))
    times = [float(row[1]) for row in read_rows(result.output_dir / "metrics.csv") if row[2] == "train/loss"]
    per_step = (times[-1] - times[PILOT_SKIP]) / (len(times) - 1 - PILOT_SKIP)
    shutil.rmtree(result.output_dir)
    steps = options.steps or max(MIN_STEPS, round(options.seconds / max(per_step, 1e-4)))
    clock.note = (
        f"frozen autoencoder and tower ran once; {1000 * per_step:.0f} ms a step, hence {steps} steps"
    )
    return steps


def train_model(options: DemoSettings, clock: Clock, steps: int) -> TrainingCurve:
    """Stage three: train a fresh UNet, mapper, projection and null condition."""
    result = _train(training_config(options, steps, "run"))
    curve = read_training(result.output_dir / "metrics.csv", VALIDATION_TIMESTEPS)
    before, after = curve.ends
    change = f"{before:.4f} untrained, {after:.4f} trained"
    clock.note = f"{result.steps} steps; validation loss {change}"
    if not after < before:
        raise UserError(f"the validation loss did not fall ({change}); train longer")
    return curve


def edit(
    options: DemoSettings, clock: Clock
) -> tuple[list[ToyCase], ToyEdits, Student | None, list[list[Tile]]]:
    """Stage four: the shipped model edits unseen scenes, right and shuffled exemplars, and photographs."""
    pipe = PaintByExample.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    size, exemplar_size = edit_sizes(pipe.model.config)
    cases = make_benchmark(
        ToyWorld(), seed=options.seed, image_size=size, exemplar_size=exemplar_size, objects=options.objects
    )
    scales, settings = options.guidance, edit_settings(options)
    edits, seconds = timed_edits(pipe, cases, scales, settings)
    student = edit_by_student(options, cases, seconds)
    outside = edit_outside(pipe, packaged("data/examples/outside/pairs.jsonl"), scales, settings)
    each = 2 * len(cases)  # edits at a guidance scale
    clock.note = f"{each * len(scales)} edits of {size} px at {settings.steps} {settings.solver} steps"
    if student is not None:
        clock.note += f", {each} at {student.steps} steps of the student"
    return cases, edits, student, outside


def timed_edits(
    pipe: PaintByExample, cases: list[ToyCase], scales: list[float], settings: GenerateSettings
) -> tuple[ToyEdits, float]:
    """Edit the cases behind a progress bar; return the edits, and the seconds of one at the last scale."""
    each = 2 * len(cases)
    reached = {0: time.perf_counter()}
    with tqdm(total=each * len(scales), unit="edit", desc="edit") as bar:

        def count(done: int, _total: int) -> None:
            reached[done] = time.perf_counter()
            bar.update(done - bar.n)

        edits = make_edits(pipe, cases, scales, settings, count)
        return edits, (reached[bar.total] - reached[bar.total - each]) / each


def edit_by_student(options: DemoSettings, cases: list[ToyCase], seconds: float) -> Student | None:
    """Edit the cases in few steps, at the last guidance scale or the nearest that the student knows.

    ``seconds`` are those that an edit of the model itself took at that scale.
    """
    config = student_config(options)
    if config is None:
        return None
    pipe = PaintByExample.from_pretrained(options.student)
    pipe.set_progress_bar_config(disable=True)
    low, high = config.unet.guidance_range
    scale = min(max(options.guidance[-1], low), high)
    settings = GenerateSettings(seed=options.seed, batch_size=BATCH).completed(config)
    assert settings.steps is not None
    edits, own = timed_edits(pipe, cases, [scale], settings)
    calls = (options.sampling_steps + 1) * (1 if options.guidance[-1] == 1.0 else 2)
    return Student(edits, settings.steps, own, calls, seconds)


def score(
    options: DemoSettings, clock: Clock, cases: list[ToyCase], edits: ToyEdits, student: Student | None
) -> tuple[ToyScores, tuple[Student, Row] | None]:
    """Stage five: similarity of what model and student painted to the exemplars."""
    tower = load_tower("lite2", None, None)
    scores = score_edits(cases, edits, tower, seed=options.seed)
    few = None
    if student is not None:
        scorer = Scorer(cases, tower, options.seed)
        (own,), (shuffled,) = student.edits.own.values(), student.edits.shuffled.values()
        few = student, scorer.row(scorer.regions(own), scorer.similarity(scorer.regions(shuffled)))
    scale, row = list(scores.guidance.items())[-1]
    print(markdown(scores.table()))
    clock.note = f"AUC {row.auc} at guidance {scale:g}"
    if few is not None:
        clock.note += f", {few[1].auc} in {few[0].steps} steps"
    return scores, few


def next_steps(options: DemoSettings) -> list[tuple[str, str]]:
    """Return what one may do next, with the commands."""
    example, model = options.out / "example", shlex.quote(model_name(options.model))
    files = f"--image {example}/image.png --mask {example}/mask.png --exemplar {example}/exemplar.png"
    return [
        ("Edit an image of your own; these files are the first case of this page:",
         f"pbe edit --model {model} {files} --out outputs/edit"),
        ("Score the model on all test objects:",
         f"pbe evaluate --model {model} --out outputs/evaluation"),
        ("Train the model that ships again, which takes hours:", "pbe toy train"),
    ]  # fmt: skip


def peak_memory() -> float:
    """Return the largest memory in GB of this process or of one that it started (kilobytes on Linux)."""
    unit = 1 if sys.platform == "darwin" else 1024
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(each).ru_maxrss for each in who) * unit / 1e9


def run(options: DemoSettings) -> Path:
    """Run all stages; return the path of the page.

    Raises:
        StageError: a stage failed otherwise. Neither leaves a page behind.
    """
    started, clock = time.perf_counter(), Clock()
    config = check(options)
    clean(options.out)
    with clock.stage("Render scenes and pack shards"):
        render(options, clock)
    with clock.stage("Encode samples, time a step"):
        steps = pilot(options, clock)
    with clock.stage("Train a fresh model"):
        curve = train_model(options, clock, steps)
    with clock.stage("Edit unseen scenes with the shipped model"):
        cases, edits, student, outside = edit(options, clock)
    with clock.stage("Score the edits"):
        scores, few = score(options, clock, cases, edits, student)
    with clock.stage("Write the page"):
        grid = sorted((options.out / "run" / "grids").glob("*.png"))[-1]
        scales = ", ".join(f"{scale:g}" for scale in config.logging.grid_guidance)
        caption = (
            f"Edits of validation scenes by the model trained just now, after {steps} steps: "
            f"source, masked, exemplar (augmented), and guidance {scales}."
        )
        page = render_page(
            TEMPLATE,
            **page_values(cases, edits, scores, curve, few, options.shown),
            outside=outside,
            grids=[Tile(caption, np.asarray(Image.open(grid)))],
            stages=clock.stages,
            machine=[*machine_facts(), ("Peak memory", f"{peak_memory():.2f} GB")],
            steps=next_steps(options),
        )
        example = make_folder(options.out / "example")
        for name in ("image", "mask", "exemplar"):  # the first case, as files for `pbe edit`
            Image.fromarray(getattr(cases[0], name)).save(example / f"{name}.png")
        shown, last = cases[:SHOWN], list(edits.own.values())[-1]
        rows = {
            "masked": [case.masked for case in shown],
            "exemplar": [case.exemplar for case in shown],
            "edit": list(last[: len(shown)]),
            "hidden": [case.image for case in shown],
        }
        Image.fromarray(sheet(rows, tile=128, columns=8)).save(options.out / EDITS)
        write_html(page, options.out / "index.html")
        clock.note = f"{options.out / 'index.html'}"
    total = time.perf_counter() - started
    print(f"\n{total:.0f} s in all, peak memory {peak_memory():.2f} GB, page: {options.out / 'index.html'}")
    return options.out / "index.html"
