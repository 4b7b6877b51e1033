"""Convert a model: ``python scripts/convert_checkpoint.py IN OUT --to native --dtype fp16``."""

from __future__ import annotations

import argparse
import sys

import torch

from pbe.checkpoints.native import load_model, save_model
from pbe.errors import UserError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    """Load a model folder, write it in another precision. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Convert a model to another layout or precision.")
    parser.add_argument("source", metavar="IN", help="model folder")
    parser.add_argument("target", metavar="OUT", help="folder to write")
    parser.add_argument("--to", choices=["native"], default="native", help="layout of OUT")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="type of the weights in OUT")
    arguments = parser.parse_args(argv)
    try:
        model = load_model(arguments.source)
        save_model(arguments.target, model, DTYPES[arguments.dtype])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters as {arguments.dtype} in {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
