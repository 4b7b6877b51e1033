"""How time and memory grow: of an edit with side and batch, of training with batch, accumulation and workers.

python scripts/benchmarks/scaling.py                                          # the official size, in bfloat16
python scripts/benchmarks/scaling.py --channels 32 --sides 64 128 --batches 1 2   # something small

The time of an edit is that of one guided call of the UNet; each point has a process of its own. Exponents are
fitted over the points of a line. Training is that of the toy sizes, online.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from pbe.config import ModelConfig
from pbe.errors import UserError
from pbe.models import UNet
from scripts.benchmarks.cache import local_config, random_or_built, render_scenes, time_steps
from scripts.benchmarks.common import (
    DTYPES,
    add_channels,
    alone,
    command_line,
    drawn,
    machine,
    make_parser,
    peak_memory,
    plot,
    print_rows,
    read_options,
    take_turns,
    write,
)
from scripts.benchmarks.unet import OURS, make_forms, make_inputs

Line = dict[str, dict[str, float]]


@torch.no_grad()
def measure_call(options: argparse.Namespace) -> None:
    """Time guided calls of one size and batch, and print time and peak memory."""
    config, dtype = ModelConfig(), DTYPES[options.dtype]
    config.unet.model_channels = options.channels
    with torch.device("meta"):
        unet = UNet(config.unet, config.autoencoder.latent_channels)
    unet = drawn(unet, dtype, options.device)
    inputs = make_inputs(config, options.sides[0], options.batches[0])
    forms = make_forms(unet, None, {name: each.to(options.device, dtype) for name, each in inputs.items()})
    forms[OURS]()
    times = take_turns({OURS: forms[OURS]}, options.repeats, options.clock, options.device)[OURS]
    print(json.dumps({"seconds": min(times), "GiB": peak_memory(options.device)}))


def edit_lines(options: argparse.Namespace) -> dict[str, dict[int, dict[str, float]]]:
    """Return time and memory over sides, and over batches."""
    common = ["--alone", "--channels", options.channels, "--dtype", options.dtype, "--device", options.device]
    common += ["--repeats", options.repeats, "--clock", options.clock, "--threads", options.threads]
    small = min(options.sides)

    def point(side: int, batch: int) -> dict[str, float]:
        return alone(__file__, *common, "--sides", side, "--batches", batch)

    return {
        "side of the image, pixels": {side: point(side, 1) for side in options.sides},
        f"edits at once, {small} px": {batch: point(small, batch) for batch in options.batches},
    }


def training_lines(options: argparse.Namespace) -> dict[str, dict[int, dict[str, float]]]:
    """Return samples a second of online toy training over batch, accumulation and workers."""
    with tempfile.TemporaryDirectory(prefix="pbe-scaling-") as folder:
        scenes = max(options.training) * (1 + options.steps)  # no step waits for another epoch to begin
        render_scenes(Path(folder) / "shards", scenes, 96)

        def point(batch: int, accumulate: int, workers: int) -> dict[str, float]:
            settings = (
                f"data.batch_size={batch}",
                f"data.num_workers={workers}",
                f"trainer.accumulate={accumulate}",
            )
            model, config = random_or_built(local_config(Path(folder), "toy", *settings))
            speed = time_steps(config, model, 1, options.steps, cached=False)
            return {"seconds": speed["a step, s"], "samples a second": speed["a second"]}

        return {
            "batch of training": {batch: point(batch, 1, 0) for batch in options.training},
            "accumulation, batch 16": {count: point(16, count, 0) for count in (1, 2, 4)},
            "processes with the workers, batch 32": {1 + count: point(32, 1, count) for count in (0, 1, 2)},
        }


def measure(options: argparse.Namespace) -> dict[str, Line]:
    """Measure all lines, plot each and return the tables with exponents."""
    lines: dict[str, dict[int, dict[str, float]]] = edit_lines(options)
    if options.training:
        lines |= training_lines(options)
    tables: dict[str, Line] = {}
    for name, points in lines.items():
        image = options.json.parent / f"scaling_{len(tables)}.png"
        quantities = list(next(iter(points.values())))
        drawn_lines: Any = {each: {x: row[each] for x, row in points.items()} for each in quantities}
        exponents = plot(image, drawn_lines, x=name, y="")
        tables[name] = {str(x): row for x, row in points.items()} | {"exponent": exponents}
        print_rows(name, tables[name])
    return tables


def run(arguments: list[str] | None) -> None:
    """Measure what the options ask for.

    Raises:
        UserError: an option cannot be used.
    """
    parser = make_parser(__doc__, "scaling", repeats=2)
    add_channels(parser)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 384, 512, 768, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--training", type=int, nargs="*", default=[16, 32, 64, 128], help="batches of training"
    )
    parser.add_argument("--steps", type=int, default=6, help="of training, measured (%(default)s)")
    parser.add_argument("--alone", action="store_true", help="one guided call in this process")
    options = read_options(parser, arguments)
    if min(options.sides) < 64 or min(options.batches) < 1:
        raise UserError("--sides must be 64 or more, --batches 1 or more")
    if options.alone:
        measure_call(options)
        return
    print(machine(options.device))
    write(options, measure(options))


main = command_line(run)

if __name__ == "__main__":
    sys.exit(main())
