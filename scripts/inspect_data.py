"""Write an HTML page of what the model will see: python scripts/inspect_data.py configs/toy.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

from pbe.cli.parser import Parser, run_command
from pbe.config import Config, load_config
from pbe.data.datamodule import TrainingData
from pbe.data.preview import make_row, sheet_html
from pbe.errors import UserError
from pbe.files import check_file, write_output
from pbe.models.autoencoder import downsampling_of


def page(config: Config, stream: str, epoch: int, start: int, count: int) -> tuple[str, int]:
    """Return the page of some consecutive samples, and how many there are: an epoch's at most.

    Args:
        config: of the experiment.
        stream: ``train`` or ``validation``.
        epoch: whose draws to show.
        start: position of the first sample in the epoch.
        count: number of samples.

    Raises:
        UserError: the shards cannot be opened.
    """
    dataset = TrainingData(config).dataset(stream)
    factor = downsampling_of(config.model.autoencoder)
    first = epoch * len(dataset) + start
    rows = [make_row(dataset, index, factor) for index in range(first, first + min(count, len(dataset)))]
    data = config.data
    facts = [
        f"{stream} stream, seed {config.seed}, epoch {epoch}, {len(dataset)} samples an epoch "
        f"({'every box' if data.boxes == 'every' else 'one box'} of each picture)",
        f"image {data.image_size} px, exemplar {data.exemplar_size} px, one latent is {factor} px; "
        "on green is the mask that was drawn; white is the hole in masks, and what stays in the latent mask",
    ]
    return sheet_html("Training samples", facts, rows), len(rows)


def run(arguments: list[str] | None) -> None:
    """Write the page.

    Raises:
        UserError: the configuration, an option or the shards cannot be used.
    """
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", help="key=value, as for train.py")
    parser.add_argument("--out", type=Path, default=Path("outputs/data.html"), help="page to write")
    parser.add_argument("--stream", choices=("train", "validation"), default="train", help="which shards")
    parser.add_argument("--count", type=int, default=24, help="number of samples")
    parser.add_argument("--epoch", type=int, default=0, help="whose draws to show")
    parser.add_argument("--start", type=int, default=0, help="position of the first sample in the epoch")
    options = parser.parse_intermixed_args(arguments)
    if options.count < 1 or options.epoch < 0 or options.start < 0:
        raise UserError("--count must be at least 1, --epoch and --start at least 0")
    config = load_config(options.config, options.overrides)
    text, count = page(config, options.stream, options.epoch, options.start, options.count)
    write_output(check_file(options.out), text)
    print(f"{count} samples in {options.out}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
