"""The part of ``sample.py`` that edits: batches of jobs through the pipeline, and their output files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pbe.checkpoints.loading import of_run
from pbe.checkpoints.precision import torch_dtype
from pbe.editing.batch.jobs import Job, output_stem
from pbe.editing.batch.records import (
    make_grid,
    model_digests,
    repeat_command,
    versions,
    write_json,
    write_picture,
)
from pbe.editing.cli import build_parser
from pbe.editing.hub import Hub
from pbe.editing.images import LoadedFile, fit_mask, read_mask, read_picture
from pbe.editing.pipeline import PaintByExample
from pbe.editing.pretrained import usable_device
from pbe.errors import UserError

LESS_MEMORY = "a smaller --batch-size or a smaller image needs less; --region mask, --attention-slicing too"


@dataclass
class Work:
    """A job with its files read and the edits made so far."""

    job: Job
    image: LoadedFile
    mask: LoadedFile
    exemplar: LoadedFile
    edits: list[Image.Image] = field(default_factory=list)


def load_work(job: Job) -> Work:
    """Read the files of a job, the mask at the picture's size.

    Raises:
        UserError: a file changed since it was checked and cannot be used any more.
    """
    image, mask = read_picture(job.image), read_mask(job.mask)
    mask = replace(mask, pixels=fit_mask(mask.pixels, image.pixels.shape[:2]))
    return Work(job, image, mask, read_picture(job.exemplar, "exemplar"))


def batches(
    jobs: Sequence[Job], sizes: Sequence[tuple[int, int]], num_images: int, batch_size: int
) -> Iterator[list[tuple[Work, int]]]:
    """Yield batches of (work, number of the edit) in order, each of pictures of one size."""
    batch: list[tuple[Work, int]] = []
    last_size = None
    for job, size in zip(jobs, sizes, strict=True):
        work = load_work(job)
        for index in range(num_images):
            if batch and (len(batch) == batch_size or size != last_size):
                yield batch
                batch = []
            batch.append((work, index))
            last_size = size
    yield batch


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is a CUDA GPU where there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(name, "--device")


def load_pipeline(options: argparse.Namespace, device: torch.device) -> tuple[PaintByExample, Path]:
    """Return the pipeline that a command line asks for, and where its model lies.

    Raises:
        UserError: the model cannot be used, or not like this.
    """
    hub = Hub(options.revision, options.cache_dir, options.offline)
    place = hub.find(options.model)
    pipe = PaintByExample.from_pretrained(
        place,
        config=options.config,
        dtype=torch_dtype(options.dtype),
        device="cpu" if options.cpu_offload else device,
        solver=options.solver,
        conventions=options.conventions,
        safety_checker=None if options.safety_checker == "none" else options.safety_checker,
        watermark=options.watermark or None,
        cache_dir=options.cache_dir,
        local_files_only=options.offline,
        raw_weights=options.raw_weights,
    )
    if options.spacing or options.karras:
        choice = pipe.choice
        spacing, karras = options.spacing or choice.spacing, options.karras or choice.karras
        pipe.solver = replace(choice, spacing=spacing, karras=karras)
    if options.attention_slicing:
        pipe.enable_attention_slicing(queries=options.attention_slicing)
    if options.cpu_offload:
        pipe.enable_cpu_offload(device)
    pipe.set_progress_bar_config(disable=True)  # the bar here counts the steps of all jobs
    return pipe, place


def edit_all(jobs: Sequence[Job], sizes: Sequence[tuple[int, int]], options: argparse.Namespace) -> None:
    """Edit every job and write its files; a bar on stderr counts solver steps.

    Args:
        jobs: checked jobs.
        sizes: height and width of each job's picture.
        options: parsed command line.

    Raises:
        UserError: the model or the device cannot be used, or a file cannot be written.
    """
    device = pick_device(options.device)
    pipe, place = load_pipeline(options, device)
    total = len(jobs) * options.num_images * pipe.solver_steps(options.steps, options.eta)
    shared = _shared_record(options, pipe, place, device)
    with tqdm(total=total, desc="editing", unit="step", mininterval=0.5, disable=options.quiet) as bar:

        def advance(step: int, timestep: float, latents: Tensor) -> None:
            bar.update(len(latents))

        for batch in batches(jobs, sizes, options.num_images, options.batch_size):
            with memory_told():
                output = edit_batch(pipe, batch, options, advance)
            flags = output.nsfw_content_detected or [False] * len(batch)
            for (work, index), edit, flag in zip(batch, output.images, flags, strict=True):
                made = {"edited_at": list(output.edited_at), "blackened": flag}
                _finish(work, index, edit, shared | made, options)


@contextmanager
def memory_told() -> Iterator[None]:
    """Turn every way of running out of memory into one line.

    Raises:
        UserError: there was not enough.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(f"out of memory: {LESS_MEMORY}") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(f"out of memory: {LESS_MEMORY}") from error


def edit_batch(
    pipe: PaintByExample, batch: Sequence[tuple[Work, int]], options: argparse.Namespace, callback: Any
) -> Any:
    """Edit one batch; edit k of a job draws all its noise from its own generator, seeded ``seed + k``."""
    return pipe(
        [work.exemplar.pixels for work, _ in batch],
        [work.image.pixels for work, _ in batch],
        [work.mask.pixels for work, _ in batch],
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        eta=options.eta,
        generator=[torch.Generator().manual_seed(work.job.seed + index) for work, index in batch],
        preserve_background=options.preserve_background,
        region=options.region,
        margin=options.margin,
        feather=options.feather,
        callback=callback,
    )


def _finish(
    work: Work, index: int, edit: Image.Image, shared: dict[str, Any], options: argparse.Namespace
) -> None:
    """Write the edit and its JSON, and the grid once the job has all its edits."""
    stem = output_stem(work.job, index)
    edit.info.update(work.image.carried)
    target = Path(options.output) if options.output else Path(options.out) / f"{stem}.png"
    write_picture(target, edit)
    write_json(target.with_suffix(".json"), _record(work, index, shared, options))
    if options.output is None:
        work.edits.append(edit)
    if len(work.edits) == options.num_images:
        grid = make_grid(work.image.pixels, work.mask.pixels, work.exemplar.pixels, work.edits)
        grid.info.update(work.image.carried)
        write_picture(target.with_name(f"{output_stem(work.job, 0)}_grid.png"), grid)
        work.edits.clear()
    written = str(target).encode(errors="backslashreplace").decode()  # not UTF-8, perhaps
    tqdm.write(written, file=sys.stdout)


def _shared_record(
    options: argparse.Namespace, pipe: PaintByExample, place: Path, device: torch.device
) -> dict[str, Any]:
    same = ("steps", "guidance_scale", "eta", "preserve_background", "region", "margin", "feather")
    if place.is_dir():  # of a run, of which the files that were loaded count
        place, _ = of_run(place, raw_weights=options.raw_weights)
    return {
        "model": {"folder": options.model, "sha256": model_digests(place)},
        "solver": pipe.solver,
        "conventions": pipe.conventions,
        **{name: getattr(options, name) for name in same},
        "spacing": pipe.choice.spacing,
        "karras": pipe.choice.karras,
        "watermark": pipe.watermark,
        "device": str(device),
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "versions": versions(),
    }


def _record(work: Work, index: int, shared: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    job, seed = work.job, work.job.seed + index
    inputs: dict[str, dict[str, Any]] = {
        key: {"path": str(getattr(job, key)), "sha256": getattr(work, key).sha256}
        for key in ("image", "mask", "exemplar")
    }
    repaints = {"read_by": work.mask.read_by, "repaints": round(float(work.mask.pixels.mean()), 6)}
    kept = {"out": options.out, "name": job.name} if options.output is None else {"output": options.output}
    command = {
        "model": options.model,
        **kept,
        **{key: file["path"] for key, file in inputs.items()},
        "seed": seed,
        "steps": options.steps,
        "guidance-scale": options.guidance_scale,
        "eta": options.eta,
        "device": shared["device"],
        "dtype": options.dtype,
        "conventions": shared["conventions"],
        "region": options.region,
        **_given(options),
        "preserve-background" if options.preserve_background else "no-preserve-background": True,
    }
    size = list(work.image.pixels.shape[:2])
    own = {"name": job.name, "seed": seed, "size": size}
    inputs["mask"] |= repaints
    return inputs | own | shared | {"repeat": repeat_command(command)}


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """Return what else of the command line shapes an edit, where it was given."""
    names = ("config", "raw_weights", "revision", "cache_dir", "offline", "safety_checker", "watermark")
    more = ("solver", "spacing", "karras", "margin", "feather", "height", "width")
    defaults = build_parser()
    values = {name: getattr(options, name) for name in (*names, *more)}
    return {
        name.replace("_", "-"): value for name, value in values.items() if value != defaults.get_default(name)
    }
