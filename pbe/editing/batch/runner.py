"""Edits batches of jobs with a pipeline, and writes their output files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pbe.checkpoints.adapters import find_adapter
from pbe.checkpoints.loading import of_run
from pbe.checkpoints.tensors import DTYPES
from pbe.editing.batch.jobs import FILE_KEYS, CheckedJob, LoadedJob, output_stem
from pbe.editing.batch.records import (
    make_grid,
    model_digests,
    repeat_command,
    versions,
    write_image,
    write_json,
)
from pbe.editing.engine import complete, merge_choice
from pbe.editing.loading import Hub
from pbe.editing.offload import usable_device
from pbe.editing.output import EditOutput
from pbe.editing.pipeline import PaintByExample
from pbe.editing.settings import EditCommand, parse_adapter
from pbe.errors import UserError
from pbe.files import sha256_of

LESS_MEMORY = "a smaller --batch-size or a smaller image needs less; --region mask, --attention-slicing too"
# What a record holds of the settings, and what the command that repeats an edit holds where it was given.
RECORDED = (
    *("guidance_scale", "guidance_interval", "reuse_features", "eta"),
    *("preserve_background", "region", "margin", "feather"),
)
GIVEN = (
    *("config", "raw_weights", "int8", "compile", "adapter", "revision", "cache_dir", "offline"),
    *("safety_checker", "watermark", "solver", "spacing", "karras", "guidance_interval", "reuse_features"),
    *("margin", "feather", "height", "width"),
)
Batch = list[tuple[LoadedJob, int]]  # jobs and numbers of their edits


def batches(jobs: Sequence[CheckedJob], num_images: int, batch_size: int) -> Iterator[Batch]:
    """Yield batches of (job, number of the edit) in order, each of images of one size."""
    batch: Batch = []
    for checked in jobs:
        loaded = checked.take()
        for index in range(num_images):
            if batch and (len(batch) == batch_size or checked.size != batch[-1][0].size):
                yield batch
                batch = []
            batch.append((loaded, index))
    yield batch


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is a CUDA GPU where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(name, "--device")


def load_pipeline(command: EditCommand, device: torch.device) -> tuple[PaintByExample, Path]:
    """Return the pipeline that a command asks for, and where its model lies."""
    hub = Hub(command.revision, command.cache_dir, command.offline)
    place = hub.find(command.model)
    pipe = PaintByExample.from_pretrained(
        place,
        config=command.config,
        dtype=DTYPES[command.dtype],
        device="cpu" if command.cpu_offload else device,
        solver=command.solver,
        conventions=command.conventions,
        safety_checker=None if command.safety_checker == "none" else command.safety_checker,
        watermark=command.watermark or None,
        cache_dir=command.cache_dir,
        local_files_only=command.offline,
        raw_weights=command.raw_weights,
        int8=command.int8,
        compile=command.compile,
    )
    for text in command.adapter:
        path, scale = parse_adapter(text)
        pipe.load_adapter(path, scale, str(path))
    if command.attention_slicing:
        pipe.enable_attention_slicing(queries=command.attention_slicing)
    if command.cpu_offload:
        pipe.enable_cpu_offload(device)
    pipe.set_progress_bar_config(disable=True)  # the bar here counts the steps of all jobs
    return pipe, place


def edit_all(jobs: Sequence[CheckedJob], command: EditCommand) -> None:
    """Edit every job and write its files; a bar on stderr counts solver steps."""
    device = pick_device(command.device)
    pipe, place = load_pipeline(command, device)
    command = complete(command, pipe.model)
    pipe.solver = merge_choice(pipe.choice, command)
    total = len(jobs) * command.num_images * pipe.solver_steps(command.count, command.eta)
    shared = _shared_record(command, pipe, place, device)
    with tqdm(total=total, desc="editing", unit="step", mininterval=0.5, disable=command.quiet) as bar:

        def advance(step: int, timestep: float, latents: Tensor) -> None:
            bar.update(len(latents))

        for batch in batches(jobs, command.num_images, command.batch_size):
            with memory_errors():
                output = edit_batch(pipe, batch, command, advance)
            flags = output.nsfw_content_detected or [False] * len(batch)
            for (loaded, index), edit, flag in zip(batch, output.images, flags, strict=True):
                made = {"edited_at": list(output.edited_at), "blackened": flag}
                _finish(loaded, index, edit, shared | made, command)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn every way of running out of memory into one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        if full:
            raise UserError(f"out of memory: {LESS_MEMORY}") from error
        raise


def edit_batch(pipe: PaintByExample, batch: Batch, command: EditCommand, callback: Any) -> EditOutput:
    """Edit one batch; edit k of a job draws all its noise from its own generator, seeded ``seed + k``."""
    return pipe.edit(
        [loaded.exemplar.pixels for loaded, _ in batch],
        [loaded.image.pixels for loaded, _ in batch],
        [loaded.mask.pixels for loaded, _ in batch],
        replace(command, num_images=1),
        generator=[torch.Generator().manual_seed(loaded.job.seed + index) for loaded, index in batch],
        callback=callback,
    )


def _finish(
    loaded: LoadedJob, index: int, edit: Image.Image, shared: dict[str, Any], command: EditCommand
) -> None:
    """Write the edit and its JSON, and the grid once the job has all its edits."""
    stem = output_stem(loaded.job, index)
    edit.info.update(loaded.image.carried)
    target = Path(command.output) if command.output else Path(str(command.out)) / f"{stem}.png"
    write_image(target, edit)
    write_json(target.with_suffix(".json"), _record(loaded, index, shared, command))
    if command.output is None:
        loaded.edits.append(edit)
    if len(loaded.edits) == command.num_images:
        grid = make_grid(loaded.image.pixels, loaded.mask.pixels, loaded.exemplar.pixels, loaded.edits)
        grid.info.update(loaded.image.carried)
        write_image(target.with_name(f"{output_stem(loaded.job, 0)}_grid.png"), grid)
        loaded.edits.clear()
    written = str(target).encode(errors="backslashreplace").decode()  # not UTF-8, perhaps
    tqdm.write(written, file=sys.stdout)


def _shared_record(
    command: EditCommand, pipe: PaintByExample, place: Path, device: torch.device
) -> dict[str, Any]:
    if place.is_dir():  # of a run, of which the files that were loaded count
        place, _ = of_run(place, raw_weights=command.raw_weights)
    return {
        "model": {"folder": command.model, "sha256": model_digests(place)},
        "adapters": [_adapter_record(text) for text in command.adapter],
        "solver": pipe.solver,
        "conventions": pipe.conventions,
        "steps": command.count,
        **{name: getattr(command, name) for name in RECORDED},
        "spacing": pipe.choice.spacing,
        "karras": pipe.choice.karras,
        "watermark": pipe.watermark,
        "device": str(device),
        "dtype": command.dtype,
        "int8": command.int8,
        "batch_size": command.batch_size,
        "versions": versions(),
    }


def _adapter_record(text: str) -> dict[str, Any]:
    path, scale = parse_adapter(text)
    return {"file": str(path), "scale": scale, "sha256": sha256_of(find_adapter(path))}


def _record(loaded: LoadedJob, index: int, shared: dict[str, Any], command: EditCommand) -> dict[str, Any]:
    job, seed = loaded.job, loaded.job.seed + index
    inputs: dict[str, dict[str, Any]] = {
        key: {"path": str(getattr(job, key)), "sha256": getattr(loaded, key).sha256} for key in FILE_KEYS
    }
    kept = {"out": command.out, "name": job.name} if command.output is None else {"output": command.output}
    usual = {each.name: each.default for each in fields(command) if each.default is not MISSING}
    given = {name: getattr(command, name) for name in GIVEN if getattr(command, name) != usual[name]}
    repeat = {
        "model": command.model,
        **kept,
        **{key: file["path"] for key, file in inputs.items()},
        "seed": seed,
        "steps": command.count,
        "guidance-scale": command.guidance_scale,
        "eta": command.eta,
        "device": shared["device"],
        "dtype": command.dtype,
        "conventions": shared["conventions"],
        "region": command.region,
        **{name.replace("_", "-"): value for name, value in given.items()},
        "preserve-background" if command.preserve_background else "no-preserve-background": True,
    }
    inputs["mask"] |= {
        "read_by": loaded.mask.read_by,
        "repaints": round(float(loaded.mask.pixels.mean()), 6),
    }
    own = {"name": job.name, "seed": seed, "size": list(loaded.size)}
    return inputs | own | shared | {"repeat": repeat_command(repeat)}
