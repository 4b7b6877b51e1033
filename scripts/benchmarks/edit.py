"""Time whole edits of the full size with random weights, beside diffusers' networks and scheduler on them.

python scripts/benchmarks/edit.py                               # 512 px in bfloat16: 50 PLMS steps, presets
python scripts/benchmarks/edit.py --dtype float32 --measured 3  # fewer steps measured
python scripts/benchmarks/edit.py --channels 64 --size 128      # something small

Steps cost all the same, so some are measured, and the whole is put together from them and from what comes
before and after. Both sides encode the masked image, solve and decode; both leave out the exemplar's tower.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from pbe.checkpoints.diffusers.format import write_autoencoder
from pbe.checkpoints.diffusers.names import autoencoder_name
from pbe.config import ModelConfig
from pbe.diffusion.schedule import make_schedule
from pbe.diffusion.solvers import SolverChoice
from pbe.editing.engine import merge_choice, network_timesteps
from pbe.editing.pipeline import PaintByExample
from pbe.editing.settings import PRESETS, EditSettings
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from scripts.benchmarks.common import (
    DTYPES,
    add_channels,
    command_line,
    machine,
    make_parser,
    print_rows,
    random_model,
    ratio,
    read_options,
    wait_for,
    write,
)
from scripts.benchmarks.unet import same_weights

GUIDANCE, STEPS, FEW = 5.0, 50, 4
Edit = Callable[[Callable[[], None]], None]


def image_and_mask(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a noisy image of ``size`` x ``size`` pixels and a mask of its middle."""
    rng = np.random.default_rng(0)
    masked = np.zeros((size, size), dtype=bool)
    masked[size // 4 : -size // 4, size // 4 : -size // 4] = True
    return rng.integers(0, 256, (size, size, 3), dtype=np.uint8), masked


def our_edit(pipe: PaintByExample, options: argparse.Namespace, guidance: float = GUIDANCE) -> Edit:
    """Return an edit by the pipeline, which tells of each step.

    Without guidance, at scale 1, a step costs what a step of a student of few steps does.
    """
    image, masked = image_and_mask(options.size)
    embeds = torch.zeros(1, 1, pipe.model.config.unet.context_dim)

    def edit(step: Callable[[], None]) -> None:
        pipe(
            None,
            image,
            masked,
            exemplar_embeds=embeds,
            num_inference_steps=options.measured,
            guidance_scale=guidance,
            solver="ddim",  # one call a step
            callback=lambda *_: step(),
            generator=torch.Generator().manual_seed(0),
        )

    return edit


def their_edit(model: LatentDiffusion, options: argparse.Namespace) -> Edit | None:
    """Return the same by diffusers' networks on the same tensors; None where diffusers is missing."""
    unet = same_weights(model.unet, model.config)
    if unet is None:
        return None
    diffusers: Any = importlib.import_module("diffusers")
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL.from_config(write_autoencoder(model.config))
    state = {autoencoder_name(key): value for key, value in model.autoencoder.state_dict().items()}
    shapes = {key: value.shape for key, value in vae.state_dict().items()}  # ours have 1x1 convolutions
    vae.load_state_dict({key: value.view(shapes[key]) for key, value in state.items()}, assign=True)
    image, masked = image_and_mask(options.size)
    device, dtype, scale = model.device, model.dtype, model.config.autoencoder.scale_factor
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(device, dtype) / 127.5 - 1.0
    keep = torch.from_numpy(~masked)[None, None].to(device, dtype)
    condition = torch.zeros(2, 1, model.config.unet.context_dim, device=device, dtype=dtype)

    def edit(step: Callable[[], None]) -> None:
        scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
        scheduler.set_timesteps(options.measured)
        fixed = vae.encode(pixels * keep).latent_dist.sample() * scale
        small = torch.nn.functional.interpolate(keep, fixed.shape[-2:])
        x_t = torch.randn(fixed.shape, device=device)
        for timestep in scheduler.timesteps:
            inputs = torch.cat([x_t.to(dtype), fixed, small], dim=1).repeat(2, 1, 1, 1)
            null, conditional = unet(inputs, timestep, condition).sample.float().chunk(2)
            x_t = scheduler.step(null + GUIDANCE * (conditional - null), timestep, x_t).prev_sample
            step()
        vae.decode(x_t.to(dtype) / scale)

    return edit


@torch.no_grad()
def time_edit(edit: Edit, device: str) -> tuple[float, list[float]]:
    """Return the seconds before and after the steps, and those of each step but the first."""
    wait_for(device)
    ends = [started := time.perf_counter()]

    def step() -> None:
        wait_for(device)
        ends.append(time.perf_counter())

    edit(step)
    wait_for(device)
    steps = [later - earlier for earlier, later in pairwise(ends[1:])]
    return time.perf_counter() - started - (ends[-1] - ends[1]) - median(steps), steps


def calls_of(settings: EditSettings) -> int:
    """Return the network calls of a whole edit with these settings."""
    settings = settings.checked()
    schedule = make_schedule(ModelConfig().schedule)
    return len(network_timesteps(merge_choice(SolverChoice("plms"), settings), settings, schedule))


def measure(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Measure both sides in turns; returns the tables."""
    config = ModelConfig()
    config.unet.model_channels = options.channels
    config.exemplar_encoder.tower = "timm/test_vit"  # small: no edit here uses it
    model = random_model(config, DTYPES[options.dtype], options.device)
    pipe = PaintByExample(model)
    edits: dict[str, Edit | None] = {"ours": our_edit(pipe, options), "student": our_edit(pipe, options, 1.0)}
    edits["diffusers"] = their_edit(model, options)
    found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in edits}
    for _ in range(options.repeats):
        for name, edit in edits.items():
            if edit is not None:
                found[name].append(time_edit(edit, options.device))
    found = {name: each for name, each in found.items() if each}
    student = found.pop("student")
    plms = calls_of(EditSettings(steps=STEPS, solver="plms"))
    wholes = {name: [around + plms * median(steps) for around, steps in each] for name, each in found.items()}
    rows = {}
    for name, each in found.items():
        rows[f"{name}, {STEPS} PLMS steps"] = {
            "seconds": median(wholes[name]),
            "calls": plms,
            "a call": median(second for _, steps in each for second in steps),
            "around": median(around for around, _ in each),
        }
    if "diffusers" in wholes:
        rows[f"ours, {STEPS} PLMS steps"]["ratio"] = ratio(wholes["ours"], wholes["diffusers"])
    first = rows[f"ours, {STEPS} PLMS steps"]
    for preset in PRESETS:
        calls = calls_of(EditSettings(preset=preset))
        seconds = first["around"] + calls * first["a call"]
        share = {"ratio": seconds / first["seconds"]}
        rows[f"ours, preset {preset}"] = {"seconds": seconds, "calls": calls, **share}
    few = [around + FEW * median(steps) for around, steps in student]
    rows[f"ours, {FEW} steps of a student"] = {
        "seconds": median(few),
        "calls": FEW,
        "a call": median(second for _, steps in student for second in steps),
        "around": median(around for around, _ in student),
        "ratio": ratio(few, wholes["ours"]),
    }
    title = (
        f"one edit, {options.size} px, {options.dtype}; ratio to diffusers', of presets and students to ours"
    )
    print_rows(title, rows)
    return {title: rows}


def run(arguments: list[str] | None) -> None:
    """Measure what the options ask for.

    Raises:
        UserError: an option cannot be used.
    """
    parser = make_parser(__doc__, "edit", repeats=3)
    add_channels(parser)
    parser.add_argument("--size", type=int, default=512, help="height and width of the image, pixels")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--measured", type=int, default=6, help="steps that are measured (%(default)s)")
    options = read_options(parser, arguments)
    if options.measured < 3:
        raise UserError("--measured must be 3 or more")
    print(machine(options.device))
    write(options, measure(options))


main = command_line(run)

if __name__ == "__main__":
    sys.exit(main())
