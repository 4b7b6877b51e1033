"""Time and weigh a training step of all weights beside one of low-rank adapters, in the official sizes.

python scripts/benchmarks/finetune.py                            # 256 px, batch 1: needs 24 GB
python scripts/benchmarks/finetune.py --channels 160 --repeats 1 # half as wide

Every turn is a process of its own, so that its peak memory is its own; the kinds take turns.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from pbe.config import Config, load_config
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.training.setup import apply_performance_options
from scripts.benchmarks.common import (
    ROOT,
    add_channels,
    alone,
    command_line,
    machine,
    make_parser,
    peak_memory,
    print_rows,
    ratio,
    read_options,
    write,
)
from scripts.benchmarks.train import Clock, encoded_batches, train_ours

KINDS = {
    "all weights, bf16-mixed": ("trainer.precision=bf16-mixed",),
    "adapters, base in bfloat16": ("lora.rank=16", "lora.base=bf16"),
    "adapters, base in 8 bits": ("lora.rank=16", "lora.base=int8"),
}


def make_config(options: argparse.Namespace, kind: str) -> Config:
    """Return the configuration of one kind of training."""
    settings = [
        *("init_from=random", "data.batch_size=1", "optimizer.fused=true", "optimizer.ema_decay=0.99"),
        *("optimizer.warmup_steps=1", "trainer.devices=1", "trainer.strategy=auto", "trainer.progress=false"),
        *("trainer.resume=never", "trainer.gradient_checkpointing=false", "trainer.precision=32-true"),
        *("logging.loggers=[]", "logging.grid_every=0", "autoencoder_from="),
        f"model.unet.model_channels={options.channels}",
        f"trainer.max_steps={options.steps + 1}",
        f"trainer.accelerator={'gpu' if options.device == 'cuda' else 'cpu'}",
    ]
    return load_config(ROOT / "configs" / "paper.yaml", [*settings, *KINDS[kind]])


def measure(options: argparse.Namespace) -> None:
    """Train one kind, and print the seconds of a step and the process's peak memory as JSON."""
    config = make_config(options, options.only)
    torch.manual_seed(0)
    model = LatentDiffusion(config.model)
    batches = encoded_batches(config, model, 1, options.size)
    apply_performance_options(model, config.trainer)
    seconds = train_ours(config, model, batches, 1, Clock(options.clock))
    print(json.dumps({"seconds": seconds, "peak": peak_memory(options.device)}))


def compare(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Let all kinds take turns; returns the table."""
    common: list[object] = ["--channels", options.channels, "--size", options.size, "--steps", options.steps]
    common += ["--threads", options.threads, "--device", options.device, "--clock", options.clock]
    turns: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(options.repeats):
        for kind, found in turns.items():
            found.append(alone(__file__, *common, "--only", kind))
    whole = next(iter(turns.values()))
    rows = {
        kind: {
            "a step, s": median(each["seconds"] for each in found),
            "speed": ratio([each["seconds"] for each in whole], [each["seconds"] for each in found]),
            "peak GiB": median(each["peak"] for each in found),
            "share": ratio([each["peak"] for each in found], [each["peak"] for each in whole]),
        }
        for kind, found in turns.items()
    }
    title = f"a training step, {options.channels} channels, {options.size} px, batch 1"
    print_rows(title, rows)
    return {title: rows}


def run(arguments: list[str] | None) -> None:
    """Measure what the options ask for.

    Raises:
        UserError: an option cannot be used.
    """
    parser = make_parser(__doc__, "finetune", repeats=2)
    add_channels(parser)
    parser.add_argument("--size", type=int, default=256, help="side of the images, px (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="measured in each turn (%(default)s)")
    parser.add_argument("--only", choices=list(KINDS), help="measure this kind, in this process")
    options = read_options(parser, arguments)
    if options.steps < 1:
        raise UserError("--steps must be at least 1")
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if options.only:
        measure(options)
        return
    print(machine(options.device))
    write(options, compare(options))


main = command_line(run)

if __name__ == "__main__":
    sys.exit(main())
