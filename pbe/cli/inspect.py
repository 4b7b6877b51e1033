"""``pbe inspect``: a page of what a model will be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pbe.cli.arguments import Count, Natural, Place, options

if TYPE_CHECKING:
    from pbe.config import Config


@options
class InspectSettings:
    """Options of ``pbe inspect``."""

    out: Path = Path("outputs/data.html")
    """page to write"""
    stream: Literal["train", "validation"] = "train"
    """which shards to show"""
    count: Count = 24
    """number of samples"""
    epoch: Natural = 0
    """epoch whose random draws to show"""
    start: Natural = 0
    """position of the first sample in the epoch"""


def inspect(config: Place, /, *overrides: str, settings: InspectSettings = InspectSettings()) -> None:
    """Write an HTML page of training samples: what the model will see.

    pbe inspect toy data.train_shards=data/mine/train --out outputs/samples.html

    Args:
        config: YAML file of the training, or the name of one that ships
        overrides: key=value, as for pbe train
    """
    from pbe.config import load_config
    from pbe.files import check_file, write_output

    text, count = page(load_config(config, list(overrides)), settings)
    write_output(check_file(settings.out), text)
    print(f"{count} samples in {settings.out}")


def page(config: Config, settings: InspectSettings) -> tuple[str, int]:
    """Return the page of some consecutive samples, and how many there are: an epoch's at most."""
    from pbe.data.datamodule import TrainingData
    from pbe.data.preview import make_row, sheet_html
    from pbe.models.autoencoder import downsampling_of

    data, stream, epoch = config.data, settings.stream, settings.epoch
    dataset = TrainingData(config).dataset(stream)
    factor = downsampling_of(config.model.autoencoder)
    first = epoch * len(dataset) + settings.start
    indices = range(first, first + min(settings.count, len(dataset)))
    rows = [make_row(dataset, index, factor) for index in indices]
    facts = [
        f"{stream} stream, seed {config.seed}, epoch {epoch}, {len(dataset)} samples an epoch "
        f"({'every box' if data.boxes == 'every' else 'one box'} of each image)",
        f"image {data.image_size} px, exemplar {data.exemplar_size} px, one latent is {factor} px; on green "
        "is the mask that was drawn; white is the masked region in masks, and what stays in the latent mask",
    ]
    return sheet_html("Training samples", facts, rows), len(rows)
