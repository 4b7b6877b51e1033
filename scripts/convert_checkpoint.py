"""Convert a model: ``python scripts/convert_checkpoint.py IN OUT --to diffusers --dtype fp16 --verify``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from pbe.checkpoints.conversion import FILE_SUFFIXES, convert, table
from pbe.checkpoints.key_map import OpenedModel
from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.precision import DTYPES, torch_dtype
from pbe.checkpoints.saving import LAYOUTS
from pbe.checkpoints.warm_start import open_stable_diffusion
from pbe.cli.parser import Parser, run_command
from pbe.config import ModelConfig, load_config
from pbe.errors import UserError
from pbe.files import expand_home


def make_parser() -> Parser:
    """Return the options."""
    parser = Parser(
        description="Convert a model between the native layout, the original's and diffusers'.",
        usage="%(prog)s IN OUT --to LAYOUT [options]\n       %(prog)s --from-sd SD OUT [options]",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=expand_home,
        metavar="IN OUT",
        help="model to read (any layout), and what to write",
    )
    parser.add_argument("--to", choices=LAYOUTS, default="native", help="layout of OUT (native)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="type of the weights in OUT; as in IN if not given"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare tensors and outputs; keep OUT only if equal"
    )
    parser.add_argument(
        "--raw-weights",
        action="store_true",
        help="the plain weights of a training, not the average",
    )
    parser.add_argument(
        "--config",
        type=expand_home,
        metavar="YAML",
        help="sizes, for a checkpoint that does not give its own",
    )
    parser.add_argument(
        "--from-sd",
        type=expand_home,
        metavar="SD",
        help="make the start of a training from Stable Diffusion v1 (file or folder)",
    )
    parser.add_argument(
        "--tower",
        type=expand_home,
        default="",
        metavar="NAME",
        help="with --from-sd: the tower's weights (open_clip tag or file)",
    )
    parser.add_argument("--seed", type=int, default=0, help="with --from-sd: of the new weights")
    return parser


def run(arguments: list[str] | None) -> None:
    """Read a model, print what was found, and write it in another layout or precision.

    Raises:
        UserError: an option or the model cannot be used, or OUT cannot be written to.
    """
    options = make_parser().parse_args(arguments)
    if len(options.paths) != (1 if options.from_sd else 2):
        raise UserError("name OUT alone with --from-sd, and IN and OUT without it (--help lists the options)")
    if options.tower and not options.from_sd:
        raise UserError("--tower goes with --from-sd only")
    target = Path(options.paths[-1])
    if options.from_sd:
        opened = _start(options)
    else:
        opened = open_checkpoint(options.paths[0], options.config, raw_weights=options.raw_weights)
    print(table(opened))
    if opened.safety_checker is not None and target.suffix in FILE_SUFFIXES:
        print(f"  note: a single file holds no safety checker; '{opened.safety_checker}' stays behind")
    dtype = torch_dtype(options.dtype) if options.dtype else None
    convert(opened, target, options.to, dtype, verify=options.verify)
    count = sum(tensor.count for tensor in opened.tensors.values())
    kind = options.dtype or "they were"
    print(f"{count:,} parameters as {kind} in {target}{', verified' if options.verify else ''}")


def _start(options: argparse.Namespace) -> OpenedModel:
    sizes = load_config(options.config).model if options.config else ModelConfig()
    encoder = replace(sizes.exemplar_encoder, pretrained=options.tower or sizes.exemplar_encoder.pretrained)
    sizes = replace(sizes, exemplar_encoder=encoder)
    return open_stable_diffusion(options.from_sd, sizes, options.seed, raw_weights=options.raw_weights)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
