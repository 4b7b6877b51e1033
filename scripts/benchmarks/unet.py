"""Time one guided step of the UNet, both halves, beside diffusers' on the same weights.

python scripts/benchmarks/unet.py                              # the full size at 512 px, float32 and bfloat16
python scripts/benchmarks/unet.py --compile                    # and both compiled
python scripts/benchmarks/unet.py --channels 64 --size 256     # something small
python scripts/benchmarks/unet.py --clock cpu --repeats 3      # on a machine that others use too

The weights are random. All forms take turns in one process. Forms whose names start with "no" leave one
shortcut out; "two calls" runs the halves one after the other.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pbe.checkpoints.diffusers.format import write_unet
from pbe.checkpoints.diffusers.names import unet_name
from pbe.config import ModelConfig
from pbe.errors import UserError
from pbe.models import UNet, attention, convolution
from pbe.models.unet import DeepFeatures
from scripts.benchmarks.common import (
    DTYPES,
    add_channels,
    alone,
    command_line,
    drawn,
    machine,
    make_parser,
    matmul_peak,
    peak_memory,
    print_rows,
    read_options,
    summary,
    take_turns,
    write,
)

OURS, THEIRS, THEIRS_LAST = "prepared", "diffusers", "diffusers, channels last"
STEPS = 50
FAR = sys.maxsize

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


def make_forms(
    unet: UNet, theirs: nn.Module | None, inputs: dict[str, Tensor], *, compiled: bool = False
) -> dict[str, Form]:
    """Return every way to make the output of both halves, ``(2 b, z, h, w)``."""
    x_t, condition = inputs["x_t"], inputs["condition"]
    fixed = inputs["masked_latents"], inputs["keep_mask"]
    twice = tuple(torch.cat([part] * 2) for part in fixed)
    steps = torch.arange(1, 1000, 1000 // STEPS, device=x_t.device)
    timesteps, both = steps[STEPS // 2].expand(len(x_t)), x_t.repeat(2, 1, 1, 1)
    prepared = unet.prepare(condition, *fixed, steps)
    unshared = unet.prepare(condition, twice[0], twice[1], steps)
    halves = [unet.prepare(half, *fixed, steps) for half in condition.chunk(2)]
    doubled, deep = timesteps.repeat(2), DeepFeatures(FAR)

    def whole() -> Tensor:
        return torch.cat([x_t, *fixed], dim=1)

    def first() -> Tensor:
        return unet.conv_in(whole())

    def start() -> Tensor:
        conv = unet.conv_in
        return F.conv2d(x_t, conv.weight[:, : x_t.shape[1]], padding=1) + prepared.constant

    forms: dict[str, Form] = {
        OURS: lambda: unet(both, doubled, prepared),
        "plain": lambda: unet(whole().repeat(2, 1, 1, 1), doubled, condition),
        "two calls": lambda: torch.cat([unet(x_t, timesteps, half) for half in halves]),
        "no shared part": lambda: unet(both, doubled, unshared),
        "no kept condition": lambda: unet.after_input(start(), prepared.time(timesteps), condition),
        "no kept times": lambda: unet.after_input(
            start(), unet.embed_time(timesteps[:1]), prepared.condition
        ),
        "no folded input": lambda: unet.after_input(first(), prepared.time(timesteps), prepared.condition),
        "no sliced attention": lambda: _without(attention, "FEW", forms[OURS]),
        "no Winograd": lambda: _without(convolution, "ENOUGH_CHANNELS", forms[OURS]),
        "approximate: inner levels kept": lambda: unet(both, doubled, prepared, deep),
    }
    if theirs is not None:
        forms[THEIRS] = lambda: theirs(whole().repeat(2, 1, 1, 1), doubled, condition).sample
        forms[THEIRS_LAST] = lambda: _with_layout(theirs, forms[THEIRS])
    if compiled:
        forms |= _compiled_forms(unet, theirs, lambda: (both, doubled, prepared), forms)
    return forms


def _compiled_forms(
    unet: UNet, theirs: nn.Module | None, given: Callable[[], Any], forms: dict[str, Form]
) -> dict[str, Form]:
    ours = torch.compile(unet)
    made: dict[str, Form] = {f"{OURS}, compiled": lambda: ours(*given())}
    if theirs is not None:
        made[f"{THEIRS}, compiled"] = torch.compile(forms[THEIRS])
    return made


def _without(module: Any, limit: str, form: Form) -> Tensor:
    """Run a form with one of a module's limits out of reach."""
    kept = getattr(module, limit)
    setattr(module, limit, FAR)
    try:
        return form()
    finally:
        setattr(module, limit, kept)


def _with_layout(network: nn.Module, form: Form) -> Tensor:
    """Run a form with the weights of four dimensions channels last; laying them out is not to be timed."""
    with laid_out(network):
        return form()


@contextmanager
def laid_out(network: nn.Module) -> Iterator[None]:
    """Give a network's kernels a channels-last copy for a while; the tensors of others stay as they are."""
    keeper: Any = network
    if not hasattr(keeper, "kept_layouts"):
        kernels = [each for each in network.parameters() if each.ndim == 4]
        copies = [each.data.contiguous(memory_format=torch.channels_last) for each in kernels]
        keeper.kept_layouts = (kernels, [each.data for each in kernels], copies)
    kernels, plain, copies = keeper.kept_layouts
    for kernel, copy in zip(kernels, copies, strict=True):
        kernel.data = copy
    try:
        yield
    finally:
        for kernel, own in zip(kernels, plain, strict=True):
            kernel.data = own


def arithmetic(config: ModelConfig, inputs: dict[str, Tensor]) -> float:
    """Return the GFLOP of the plain form, two for each product that is added."""
    with torch.device("meta"):
        unet = UNet(config.unet, config.autoencoder.latent_channels).requires_grad_(False)
    on_meta = {name: value.to("meta") for name, value in inputs.items()}
    whole = torch.cat([on_meta[name] for name in ("x_t", "masked_latents", "keep_mask")], dim=1)
    doubled = torch.zeros(2 * len(whole), device="meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        unet(whole.repeat(2, 1, 1, 1), doubled, on_meta["condition"])
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Measure all types; returns a table of each."""
    config, tables = _config(options), {}
    with torch.device("meta"):
        unet = UNet(config.unet, config.autoencoder.latent_channels)
    unet = drawn(unet, torch.float32, options.device)
    inputs = {
        key: value.to(options.device)
        for key, value in make_inputs(config, options.size, options.batch).items()
    }
    reference, work = make_forms(unet, None, inputs)["plain"](), arithmetic(config, inputs)
    for name in options.dtypes:
        dtype = DTYPES[name]
        unet, cast = unet.to(dtype), {key: value.to(dtype) for key, value in inputs.items()}
        forms = make_forms(unet, same_weights(unet, config), cast, compiled=options.compile)
        chosen = {key: form for key, form in forms.items() if key in (options.forms or forms)}
        distances = {key: _distance(form(), reference) for key, form in chosen.items()}
        peak = matmul_peak(dtype, options.device)
        times = take_turns(chosen, options.repeats, options.clock, options.device)
        best = [key for key in (THEIRS, THEIRS_LAST) if key in times]
        base = times[min(best, key=lambda key: median(times[key])) if best else next(iter(times))]
        rows = {key: summary(each, base) | {"to float32": distances[key]} for key, each in times.items()}
        rows["the arithmetic of the plain form alone"] = {"median": work / peak}
        title = f"{name}, {options.clock} seconds ({work:.0f} GFLOP, matrix products at {peak:.0f} GFLOP/s)"
        tables[title] = rows
        print_rows(title, rows)
    return tables


def _config(options: argparse.Namespace) -> ModelConfig:
    config = ModelConfig()
    config.unet.model_channels = options.channels
    return config


def _distance(output: Tensor, reference: Tensor) -> float:
    return float((output - reference).abs().max() / reference.abs().max())


@torch.no_grad()
def measure_alone(options: argparse.Namespace) -> None:
    """Run one form once and print the process's peak memory, weights included."""
    config, dtype = _config(options), DTYPES[options.dtypes[0]]
    with torch.device("meta"):
        unet = UNet(config.unet, config.autoencoder.latent_channels)
    unet = drawn(unet, dtype, options.device)
    inputs = make_inputs(config, options.size, options.batch)
    cast = {key: value.to(options.device, dtype) for key, value in inputs.items()}
    theirs = same_weights(unet, config) if options.forms[0] == THEIRS else None
    make_forms(unet, theirs, cast)[options.forms[0]]()
    print(json.dumps({"gib": peak_memory(options.device)}))


def measure_memory(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the peak of a process of its own for our form and for diffusers', GiB."""
    rows: dict[str, dict[str, float]] = {}
    for name in options.dtypes:
        for form in (OURS, THEIRS) if importlib.util.find_spec("diffusers") else (OURS,):
            sizes = ["--channels", options.channels, "--size", options.size, "--batch", options.batch]
            more = ["--dtypes", name, "--forms", form, "--device", options.device, "--alone"]
            rows[f"{form}, {name}"] = alone(__file__, *sizes, *more)
    print_rows("peak memory of a process, GiB", rows)
    return rows


def run(arguments: list[str] | None) -> None:
    """Measure what the options ask for.

    Raises:
        UserError: an option cannot be used.
    """
    parser = make_parser(__doc__, "unet", repeats=7)
    add_channels(parser)
    parser.add_argument("--size", type=int, default=512, help="height and width of the image, pixels")
    parser.add_argument("--batch", type=int, default=1, help="edits at once")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--compile", action="store_true", help="also both compiled")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes for peak memory")
    parser.add_argument("--forms", nargs="+", help="only these of the table's")
    parser.add_argument("--alone", action="store_true", help="one form, and only its process's peak memory")
    options = read_options(parser, arguments)
    if options.batch < 1:
        raise UserError("--batch must be 1 or more")
    if options.alone:
        measure_alone(options)
        return
    print(machine(options.device))
    tables = measure(options)
    if not options.no_memory:
        tables["peak memory of a process, GiB"] = measure_memory(options)
    write(options, tables)


main = command_line(run)

if __name__ == "__main__":
    sys.exit(main())
