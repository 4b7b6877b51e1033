"""The part of ``sample.py`` that edits: batches of jobs through the pipeline, and their output files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pbe.checkpoints.precision import torch_dtype
from pbe.diffusion.solvers import uniform_timesteps
from pbe.editing.jobs import Job, output_stem
from pbe.editing.pictures import LoadedFile, fit_mask, read_mask, read_picture
from pbe.editing.pipeline import PaintByExample
from pbe.editing.records import make_grid, model_digests, repeat_command, versions, write_json, write_png
from pbe.errors import UserError


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
    mask = LoadedFile(fit_mask(mask.pixels, image.pixels.shape[:2]), mask.sha256)
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
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error


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
    pipe = PaintByExample.from_pretrained(options.model, device, torch_dtype(options.dtype))
    shared = _shared_record(options, device)
    steps = len(uniform_timesteps(pipe.schedule, options.steps))
    total = len(jobs) * options.num_images * steps
    with tqdm(total=total, desc="editing", unit="step", mininterval=0.5) as bar:

        def advance(step: int, timestep: int, latents: Tensor) -> None:
            bar.update(len(latents))

        for batch in batches(jobs, sizes, options.num_images, options.batch_size):
            output = edit_batch(pipe, batch, options, advance)
            for (work, index), edit in zip(batch, output.images, strict=True):
                _finish(work, index, edit, shared | {"edited_at": list(output.edited_at)}, options)


def edit_batch(
    pipe: PaintByExample, batch: Sequence[tuple[Work, int]], options: argparse.Namespace, callback: Any
) -> Any:
    """Edit one batch; edit k of a job draws all its noise from its own generator, seeded ``seed + k``."""
    return pipe(
        [work.exemplar.pixels for work, _ in batch],
        [work.image.pixels for work, _ in batch],
        [work.mask.pixels for work, _ in batch],
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        eta=options.eta,
        generator=[torch.Generator().manual_seed(work.job.seed + index) for work, index in batch],
        solver=options.solver,
        preserve_background=options.preserve_background,
        callback=callback,
    )


def _finish(
    work: Work, index: int, edit: Image.Image, shared: dict[str, Any], options: argparse.Namespace
) -> None:
    """Write the edit and its JSON, and the grid once the job has all its edits."""
    out, stem = Path(options.out), output_stem(work.job, index)
    write_png(out / f"{stem}.png", edit)
    write_json(out / f"{stem}.json", _record(work, index, shared, options))
    work.edits.append(edit)
    if len(work.edits) == options.num_images:
        grid = make_grid(work.image.pixels, work.mask.pixels, work.exemplar.pixels, work.edits)
        write_png(out / f"{output_stem(work.job, 0)}_grid.png", grid)
        work.edits.clear()
    written = str(out / f"{stem}.png").encode(errors="backslashreplace").decode()  # not UTF-8, perhaps
    tqdm.write(written, file=sys.stdout)


def _shared_record(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return {
        "model": {"folder": options.model, "sha256": model_digests(Path(options.model))},
        "solver": options.solver,
        "steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "eta": options.eta,
        "preserve_background": options.preserve_background,
        "device": str(device),
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "versions": versions(),
    }


def _record(work: Work, index: int, shared: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    job, seed = work.job, work.job.seed + index
    inputs = {
        key: {"path": str(getattr(job, key)), "sha256": getattr(work, key).sha256}
        for key in ("image", "mask", "exemplar")
    }
    command = {
        "model": options.model,
        "out": options.out,
        **{key: file["path"] for key, file in inputs.items()},
        "name": job.name,
        "seed": seed,
        "solver": options.solver,
        "steps": options.steps,
        "guidance-scale": options.guidance_scale,
        "eta": options.eta,
        "device": shared["device"],
        "dtype": options.dtype,
        "preserve-background" if options.preserve_background else "no-preserve-background": True,
    }
    size = list(work.image.pixels.shape[:2])
    own = {"name": job.name, "seed": seed, "size": size}
    return inputs | own | shared | {"repeat": repeat_command(command)}
