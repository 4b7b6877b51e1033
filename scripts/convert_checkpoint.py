"""Convert a model: ``python scripts/convert_checkpoint.py IN OUT --to native --dtype fp16``."""

from __future__ import annotations

import sys

from pbe.checkpoints.native import load_model, save_model
from pbe.checkpoints.precision import DTYPES, torch_dtype
from pbe.cli import Parser, run_command


def run(arguments: list[str] | None) -> None:
    """Load a model folder, write it in another precision.

    Raises:
        UserError: an option or the model cannot be used, or OUT cannot be written to.
    """
    parser = Parser(description="Convert a model to another layout or precision.")
    parser.add_argument("source", metavar="IN", help="model folder")
    parser.add_argument("target", metavar="OUT", help="folder to write")
    parser.add_argument("--to", choices=["native"], default="native", help="layout of OUT")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="type of the weights in OUT")
    options = parser.parse_args(arguments)
    model = load_model(options.source)
    save_model(options.target, model, torch_dtype(options.dtype))
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters as {options.dtype} in {options.target}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
