"""Time and memory of the official size: ``python scripts/edit_full_size.py --dtype bf16 --steps 4``.

The weights are random, made in the type that they are stored in, written as a model folder by a process of
their own and loaded from there like any other, with ``--int8`` in 8 bits; so this measures time and memory,
not images. On a GPU ``--levers`` measures what each way to save memory saves.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pbe.checkpoints.native import save_model
from pbe.checkpoints.tensors import DTYPES
from pbe.cli.main import run_command
from pbe.config import ModelConfig
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.training.monitoring.callbacks import process_peak
from scripts.benchmarks.common import random_model

GIB = 2**30
LARGE = 2048  # pixels of the images that the autoencoder is measured with
HALF_LARGE = 1024  # and of those that the UNet is measured with


def peak_memory(device: torch.device) -> str:
    """Return the most memory that this process, and the GPU where one is used, has held so far."""
    text = f"{process_peak() / GIB:.2f} GiB"
    if device.type == "cuda":
        text += f", GPU {torch.cuda.max_memory_allocated(device) / GIB:.2f} GiB"
    return text


def edit(pipe: PaintByExample, size: int, steps: int) -> None:
    """Edit a noisy image of ``size`` x ``size`` pixels whose middle is masked."""
    rng = np.random.default_rng(0)
    mask = np.zeros((size, size), dtype=bool)
    mask[size // 4 : -size // 4, size // 4 : -size // 4] = True
    exemplar, picture = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (224, size))
    generator = torch.Generator().manual_seed(0)
    pipe(exemplar, picture, mask, num_inference_steps=steps, generator=generator)


def make_model(folder: Path, dtype: str) -> None:
    """Write a model in a process of its own, whose memory is not to be counted."""
    command = [sys.executable, __file__, "--make", str(folder), "--dtype", dtype]
    subprocess.run(command, check=True)


def measure_edit(
    folder: Path, dtype: torch.dtype, device: torch.device, size: int, steps: int, int8: bool
) -> None:
    """Load the model from ``folder`` and edit once; print time and peak memory of each."""
    started = time.perf_counter()

    def report(stage: str) -> None:
        print(f"{stage}: done at {time.perf_counter() - started:.1f} s; peak memory {peak_memory(device)}")

    pipe = PaintByExample.from_pretrained(folder, device=device, dtype=dtype, int8=int8)
    report("loaded")
    before = time.perf_counter()
    edit(pipe, size, steps)
    seconds = time.perf_counter() - before
    report("edited")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    kind = f"{dtype}{' with weights in 8 bits' if int8 else ''}"
    print(f"{size}x{size} at {steps} steps in {kind} on {device}{threads}: {seconds:.1f} s")


@torch.no_grad()
def measure_levers(dtype: torch.dtype, device: torch.device, size: int, steps: int) -> None:
    """Print a table of time and GPU memory with and without each lever."""
    model = random_model(ModelConfig(), dtype, device)
    pipe = PaintByExample(model)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {dtype}")
    print("\n| what | lever | seconds | GiB on the GPU |\n| --- | --- | --- | --- |")
    _measure_autoencoder(model, dtype, device)
    _measure_attention(model, dtype, device)
    _row(f"edit, {size} px, {steps} steps", "none", lambda: edit(pipe, size, steps))
    pipe.enable_cpu_offload(device)
    _row(f"edit, {size} px, {steps} steps", "CPU offload", lambda: edit(pipe, size, steps))


def _measure_autoencoder(model: LatentDiffusion, dtype: torch.dtype, device: torch.device) -> None:
    images = torch.rand(1, 3, LARGE, LARGE, dtype=dtype, device=device) * 2.0 - 1.0
    latents = model.encode_images(images)
    for lever, limit in (("none", None), ("tiling", 1024)):
        model.tile_above = limit
        _row(f"encode, {LARGE} px", lever, lambda: model.encode_images(images))
        _row(f"decode, {LARGE} px", lever, lambda: model.decode_latents(latents))


def _measure_attention(model: LatentDiffusion, dtype: torch.dtype, device: torch.device) -> None:
    pipe, side = PaintByExample(model), HALF_LARGE // model.autoencoder.downsampling
    latents = torch.randn(2, 4, side, side, dtype=dtype, device=device)
    condition, timesteps = model.null_condition(2), torch.full((2,), 500, device=device)
    for lever, queries, plain in (
        ("none (fused attention)", 0, False),
        ("fused attention turned off", 0, True),
        ("fused attention turned off, slices of 1024", 1024, True),
    ):
        if queries:
            pipe.enable_attention_slicing(queries=queries)
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            _row(
                f"UNet, {HALF_LARGE} px, batch 2",
                lever,
                lambda: model.predict(latents, timesteps, condition, latents, latents[:, :1]),
            )
    pipe.disable_attention_slicing()


def _row(what: str, lever: str, work: Callable[[], object]) -> None:
    """Run twice, since the first time loads kernels, and print a row of the second one."""
    for _ in range(2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - before
    print(f"| {what} | {lever} | {seconds:.2f} | {torch.cuda.max_memory_allocated() / GIB:.1f} |")


def run(arguments: list[str] | None) -> None:
    """Measure what the options ask for.

    Raises:
        UserError: an option cannot be used.
    """
    parser = argparse.ArgumentParser(description="Time and memory of the official size, with random weights.")
    parser.add_argument("--steps", type=int, default=4, help="steps of the solver")
    parser.add_argument("--size", type=int, default=512, help="height and width of the image, pixels")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="type of the weights")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, cuda:1, ...")
    parser.add_argument("--levers", action="store_true", help="measure what each lever saves (needs a GPU)")
    parser.add_argument("--int8", action="store_true", help="load the weights in 8 bits")
    parser.add_argument("--make", type=Path, help="only write the model, into this folder")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    if options.make:
        save_model(options.make, random_model(ModelConfig(), dtype, "cpu"))
        return
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA GPU that torch can use")
    if options.levers:
        if device.type != "cuda":
            raise UserError("--levers measures memory on a GPU: add --device cuda")
        measure_levers(dtype, device, options.size, options.steps)
        return
    with tempfile.TemporaryDirectory(prefix="full-size-") as folder:
        make_model(Path(folder), options.dtype)
        measure_edit(Path(folder), dtype, device, options.size, options.steps, options.int8)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
