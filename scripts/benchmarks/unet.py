"""Time one guided step of the UNet, both halves, beside diffusers' on the same weights.

python scripts/benchmarks/unet.py                              # the full size at 512 px, float32 and bfloat16
python scripts/benchmarks/unet.py --channels 64 --size 256     # something small
python scripts/benchmarks/unet.py --clock cpu --repeats 3      # on a machine that others use too

The weights are random. All forms take turns in one process, so that what slows the machine slows them all.
Forms whose names start with "no" leave one shortcut out; "two calls" runs the halves one after the other.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.checkpoints.diffusers.format import write_unet
from pbe.checkpoints.diffusers.names import unet_name
from pbe.cli.main import run_command
from pbe.config import ModelConfig
from pbe.errors import UserError
from pbe.models import UNet, attention
from scripts.edit_full_size import drawn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OURS, THEIRS = "prepared", "diffusers"
STEPS = 50
GIB = 2**30

Form = Callable[[], Tensor]


def same_weights(unet: UNet, config: ModelConfig) -> nn.Module | None:
    """Return diffusers' UNet on the very tensors of ours; None where diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    with torch.device("meta"):
        theirs = importlib.import_module("diffusers").UNet2DConditionModel.from_config(write_unet(config))
    state = {unet_name(key): value for key, value in unet.state_dict().items()}
    theirs.load_state_dict(state, assign=True)
    return theirs.eval().requires_grad_(False)


def make_inputs(config: ModelConfig, size: int, batch: int) -> dict[str, Tensor]:
    """Draw the inputs of a guided step in float32: ``batch`` edits of ``size`` x ``size`` pixels."""
    generator = torch.Generator().manual_seed(1)
    latents, side = config.autoencoder.latent_channels, size // 8
    drawn_maps = torch.randn(batch, 2 * latents + 1, side, side, generator=generator)
    x_t, masked, keep = drawn_maps.split([latents, latents, 1], dim=1)
    condition = torch.randn(2 * batch, 1, config.unet.context_dim, generator=generator)
    return {"x_t": x_t, "masked_latents": masked, "keep_mask": keep, "condition": condition}


def make_forms(unet: UNet, theirs: nn.Module | None, inputs: dict[str, Tensor]) -> dict[str, Form]:
    """Return every way to make the output of both halves, ``(2 b, z, h, w)``."""
    x_t, condition = inputs["x_t"], inputs["condition"]
    fixed = inputs["masked_latents"], inputs["keep_mask"]
    twice, steps = tuple(torch.cat([part] * 2) for part in fixed), torch.arange(1, 1000, 1000 // STEPS)
    timesteps = steps[STEPS // 2].expand(len(x_t))
    prepared = unet.prepare(condition, *fixed, steps)
    unshared = unet.prepare(condition, twice[0], twice[1], steps)
    halves = [unet.prepare(half, *fixed, steps) for half in condition.chunk(2)]

    def whole() -> Tensor:
        return torch.cat([x_t, *fixed], dim=1)

    def first() -> Tensor:
        return unet.conv_in(torch.cat([x_t, *fixed], dim=1))

    def start() -> Tensor:
        conv = unet.conv_in
        return F.conv2d(x_t, conv.weight[:, : x_t.shape[1]], padding=1) + prepared.constant

    def with_times_of_now() -> Tensor:
        return unet.after_input(start(), unet.embed_time(timesteps[:1]), prepared.condition)

    doubled = timesteps.repeat(2)
    forms: dict[str, Form] = {
        OURS: lambda: unet(x_t.repeat(2, 1, 1, 1), doubled, prepared),
        "plain": lambda: unet(whole().repeat(2, 1, 1, 1), doubled, condition),
        "two calls": lambda: torch.cat([unet(x_t, timesteps, half) for half in halves]),
        "no shared part": lambda: unet(x_t.repeat(2, 1, 1, 1), doubled, unshared),
        "no kept condition": lambda: unet.after_input(start(), prepared.time(timesteps), condition),
        "no kept times": lambda: unet.after_input(
            start(), unet.embed_time(timesteps[:1]), prepared.condition
        ),
        "no folded input": lambda: unet.after_input(first(), prepared.time(timesteps), prepared.condition),
        "no slices": lambda: _with_fused_attention(forms[OURS]),
    }
    if theirs is not None:
        forms[THEIRS] = lambda: theirs(whole().repeat(2, 1, 1, 1), doubled, condition).sample
    return forms


def _with_fused_attention(form: Form) -> Tensor:
    kept, attention.FEW = attention.FEW, sys.maxsize
    try:
        return form()
    finally:
        attention.FEW = kept


def take_turns(forms: dict[str, Form], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Time all forms in turns; seconds."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            started = clock()
            form()
            times[name].append(clock() - started)
    return times


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all types, print a table of each and return the numbers."""
    config, found = ModelConfig(), {}
    config.unet.model_channels = options.channels
    with torch.device("meta"):
        unet = UNet(config.unet, config.autoencoder.latent_channels)
    inputs, alone = make_inputs(config, options.size, options.batch), options.alone
    unet = drawn(unet, DTYPES[options.dtypes[0]] if alone else torch.float32, "cpu")
    # one form alone is run for its memory, which no other weights and no reference may add to
    reference = None if alone else make_forms(unet, None, inputs)["plain"]()
    for name in options.dtypes:
        dtype = DTYPES[name]
        unet, cast = unet.to(dtype), {key: value.to(dtype) for key, value in inputs.items()}
        forms = make_forms(unet, same_weights(unet, config), cast)
        chosen = {key: form for key, form in forms.items() if key in (options.forms or forms)}
        distances = {key: _distance(form(), reference) for key, form in chosen.items()}
        times = take_turns(chosen, options.repeats, CLOCKS[options.clock])
        found[name] = {key: {"seconds": times[key], "distance": distances[key]} for key in times}
        if not options.alone:
            print_times(f"{name}, {options.clock} seconds", found[name])
    return found


def _distance(output: Tensor, reference: Tensor | None) -> float | None:
    if reference is None:
        return None
    return float((output - reference).abs().max() / reference.abs().max())


def print_times(title: str, found: dict[str, dict[str, Any]]) -> None:
    """Print median, spread, the ratio to diffusers (or the first form), and the distance to float32."""
    base = found[THEIRS if THEIRS in found else next(iter(found))]["seconds"]
    print(f"\n{title:<32}  median  least   most  ratio  to float32")
    for name, values in found.items():
        times = values["seconds"]
        ratio = median(mine / other for mine, other in zip(times, base, strict=True))
        spread = f"{median(times):8.3f} {min(times):6.3f} {max(times):6.3f}"
        print(f"{name:<30} {spread} {ratio:6.3f}  {values['distance']:.2g}")


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """Return the peak of a process of its own for our form and for diffusers', GiB, weights included."""
    common = ["--channels", options.channels, "--size", options.size, "--batch", options.batch]
    peaks = {}
    for name in options.dtypes:
        for form in (OURS, THEIRS):
            command = [
                sys.executable,
                __file__,
                *map(str, common),
                "--dtypes",
                name,
                "--alone",
                "--forms",
                form,
            ]
            done = subprocess.run([*command, "--repeats", "1"], check=True, capture_output=True, text=True)
            peaks[f"{form}, {name}"] = float(done.stdout.split()[-1])
            print(f"peak memory of {form} in {name}: {peaks[f'{form}, {name}']:.2f} GiB")
    return peaks


def run(arguments: list[str] | None) -> None:
    """Measure what the options ask for.

    Raises:
        UserError: an option cannot be used.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--channels", type=int, default=320, help="model.unet.model_channels")
    parser.add_argument("--size", type=int, default=512, help="height and width of the image, pixels")
    parser.add_argument("--batch", type=int, default=1, help="edits at once")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=7, help="turns that are timed")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: this process's time")
    parser.add_argument("--memory", action="store_true", help="also peak memory, in processes of their own")
    parser.add_argument("--forms", nargs="+", help="only these of the table's")
    parser.add_argument(
        "--alone", action="store_true", help="print nothing but the process's peak memory, GiB"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    if (
        min(options.channels, options.batch, options.repeats) < 1
        or options.channels % 32
        or options.size < 64
    ):
        raise UserError(
            "--channels must be a multiple of 32, --size 64 or more, --batch and --repeats 1 or more"
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, {options.channels} channels, {options.size} px")
    numbers: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "times": measure(options)}
    if options.alone:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB)
    elif options.memory:
        numbers["peak_gib"] = measure_memory(options)
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
