"""Measure the way from shards to the UNet's inputs, beside a plain data set of files with albumentations.

python scripts/benchmarks/data.py                                # JPEGs of 1024 x 768, some minutes
python scripts/benchmarks/data.py --open 1900000 16000000        # and the opening of an index of that size
python scripts/benchmarks/data.py --shards data/mine/train       # your own shards
python scripts/benchmarks/data.py --images 8 --sizes 64 --seconds 1 --repeats 1   # something small

First the stages of a sample in CPU time of one thread; then samples a second of both loaders, in turns, over
sizes and workers; then the toy model's inputs online, with its tower and autoencoder, and from a cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.utils.data import DataLoader

from pbe.config import Config, DataConfig, SampleConfig
from pbe.data.datamodule import TrainingData
from pbe.data.dataset import read_image
from pbe.data.shards.archive import ShardImages
from pbe.errors import UserError
from pbe.files import make_folder
from pbe.models.latent_diffusion import masked_image
from pbe.training.latent_cache.builder import ensure_cache
from pbe.training.latent_cache.dataset import CachedDataModule
from pbe.training.tasks.encoding import encode_batch, to_keep_mask, to_pixels
from scripts.benchmarks.cache import local_config, random_or_built, render_scenes
from scripts.benchmarks.common import (
    command_line,
    machine,
    make_parser,
    plot,
    print_rows,
    ratio,
    read_options,
    take_turns,
    write,
)
from scripts.benchmarks.loading import (
    LoaderTimes,
    measure_loader,
    measure_opening,
    measure_stages,
    plain_loader,
    synthetic_index,
    synthetic_shards,
)

Rows = dict[str, dict[str, float]]
SCENES, TOY_BATCH = 96, 32  # of the toy world, for what the frozen networks take
OPENING_ROWS = ("samples", "open_s", "first_batch_s")


def stage_rows(data: DataConfig, options: argparse.Namespace) -> Rows:
    """Return the CPU milliseconds of a sample's stages at every size, and their shares of the whole."""
    rows: Rows = {}
    for size in options.sizes:
        found = measure_stages(replace(data, image_size=size), seconds=options.seconds, images=options.images)
        stages = {"bare decoding": found.decoding, "whole sample": found.whole, **found.stages}
        for name, spent in stages.items():
            rows.setdefault(name, {})[f"{size} px"] = spent
            rows[name][f"share of {size} px"] = spent / found.whole
    return rows


def loader_rows(data: DataConfig, files: Path, options: argparse.Namespace) -> dict[int, Rows]:
    """Return samples a second of both loaders over the workers, for every size; each measures in its turn."""
    tables = {}
    for size in options.sizes:
        sized = replace(data, image_size=size)
        makers: dict[str, Callable[[], DataLoader[Any]]] = {}
        for workers in options.workers:
            config = Config(seed=1, data=replace(sized, num_workers=workers))
            makers[f"ours, {workers} workers"] = TrainingData(config).train_dataloader
            makers[f"plain, {workers} workers"] = partial(plain_loader, files, config.data)
        found: dict[str, list[LoaderTimes]] = {name: [] for name in makers}
        for _ in range(options.repeats):
            for name, make in makers.items():
                found[name].append(measure_loader(make(), seconds=options.seconds))
        tables[size] = {name: _rates(times) for name, times in found.items()}
        for workers in options.workers:
            ours, plain = (
                [times.rate for times in found[f"{name}, {workers} workers"]] for name in ("ours", "plain")
            )
            tables[size][f"ours, {workers} workers"]["speed"] = ratio(ours, plain)
    return tables


def _rates(times: list[LoaderTimes]) -> dict[str, float]:
    rates = [each.rate for each in times]
    spent = median(each.main + each.workers for each in times)
    return {"a second": median(rates), "least": min(rates), "most": max(rates), "CPU ms a sample": spent}


@torch.no_grad()
def input_rows(repeats: int) -> Rows:
    """Return milliseconds a sample of the toy model's inputs: encoded online, and from the cache."""
    with tempfile.TemporaryDirectory(prefix="pbe-inputs-") as folder:
        render_scenes(Path(folder) / "shards", SCENES, 96)
        settings = f"data.batch_size={TOY_BATCH}", "data.num_workers=0"
        model, config = random_or_built(local_config(Path(folder), "toy", *settings))
        online = TrainingData(config).train_dataloader()
        cached = CachedDataModule(config, ensure_cache(config, model, quiet=True)).train_dataloader()
        batch = next(iter(online))
        images, keep = to_pixels(batch["image"]), to_keep_mask(batch["mask"])
        pixels = torch.cat([images, masked_image(images, keep)]).to(model.frozen_dtype)
        exemplars = model.normalise_exemplar(batch["exemplar"])
        forms = {
            "online": lambda: [encode_batch(model, each) for each in online],
            "of it: loading": lambda: list(online),
            "of it: autoencoder": lambda: model.autoencoder.encode(pixels),
            "of it: exemplar's tower": lambda: model.exemplar_encoder.features(exemplars),
            "from the cache": lambda: list(cached),
        }
        times = take_turns(forms, repeats + 1)
    samples = {name: len(online) * TOY_BATCH for name in forms}
    samples |= {"of it: autoencoder": TOY_BATCH, "of it: exemplar's tower": TOY_BATCH}
    spent = {
        name: 1e3 * median(each[1:]) / samples[name] for name, each in times.items()
    }  # first: warming up
    return {
        name: {"ms": each, "a second": 1e3 / each, "of online": each / spent["online"]}
        for name, each in spent.items()
    }


def opening_rows(folder: Path, tar: Path, images: int, boxes: int) -> Rows:
    """Return seconds and memory of opening an index of that size, with one box an image and with all."""
    synthetic_index(folder, tar, images, boxes)
    rows: Rows = {}
    for mode in ("one", "every"):
        found = measure_opening(folder, boxes=mode, workers=2)
        numbers = {name: found[name] for name in OPENING_ROWS}
        for kind, text in {"resident": "resident", "private": "of it private"}.items():
            numbers |= {f"MiB {text}: {place}": sizes[kind] for place, sizes in found["mib"].items()}
        for name, value in numbers.items():
            rows.setdefault(name, {})[f"boxes={mode}"] = value
    return rows


def write_files(shards: ShardImages, data: DataConfig, count: int, folder: Path) -> Path:
    """Write the first images of shards as files with a table of their boxes, as a plain data set has them."""
    make_folder(folder)
    boxes = {}
    for number in range(min(count, len(shards))):
        name = f"{number:06d}.jpg"
        (folder / name).write_bytes(shards.image(number))
        boxes[name] = [[box.x1, box.y1, box.x2, box.y2] for box in read_image(shards, number, data).boxes]
    torch.save(boxes, folder / "boxes.pt")
    return folder


def measure(options: argparse.Namespace) -> Mapping[str, Rows]:
    """Measure everything, print it, draw the rates and return the tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = options.width, options.height, options.quality
        tars = [] if options.shards else synthetic_shards(folder / "shards", options.images, *sizes)
        data = DataConfig(
            train_shards=options.shards or str(folder / "shards"),
            exemplar_size=options.exemplar_size,
            batch_size=options.batch_size,
            sample=SampleConfig(antialias_above=options.antialias_above),
        )
        files = write_files(ShardImages(data.train_shards), data, options.images, folder / "files")
        tables = {"stages of a sample, CPU milliseconds": stage_rows(data, options)}
        loaders = loader_rows(data, files, options) if options.workers else {}
        tables |= {f"samples a second, {size} px": rows for size, rows in loaders.items()}
        if options.open:
            tar = tars[0] if tars else synthetic_shards(folder / "small", 8, 640, 480, 90)[0]
            tables["opening an index"] = opening_rows(folder / "index", tar, *options.open)
    if not options.no_inputs:
        tables["inputs of the toy model, a sample"] = input_rows(options.repeats)
    for title, rows in tables.items():
        print_rows(title, rows)
    lines: dict[str, dict[float, float]] = {}
    for size, rows in loaders.items():
        for loader, row in rows.items():
            lines.setdefault(loader, {})[size] = row["a second"]
    if lines:
        plot(options.json.with_suffix(".png"), lines, x="side of the image, pixels", y="samples a second")
    return tables


def run(arguments: list[str] | None) -> None:
    """Measure what the options ask for.

    Raises:
        UserError: an option makes no sense, or the shards cannot be opened.
    """
    parser = make_parser(__doc__, "data", repeats=3, takes=("--threads",))
    parser.add_argument("--shards", help="measure these shards instead of synthetic images")
    parser.add_argument("--images", type=int, default=64, help="number of (synthetic) images")
    parser.add_argument("--width", type=int, default=1024, help="of the synthetic images")
    parser.add_argument("--height", type=int, default=768, help="of the synthetic images")
    parser.add_argument("--quality", type=int, default=90, help="of their JPEG encoding")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides of training images")
    parser.add_argument("--exemplar-size", type=int, default=224, help="sides of the exemplar")
    parser.add_argument("--antialias-above", type=float, default=1.5, help="data.sample.antialias_above")
    parser.add_argument("--batch-size", type=int, default=4, help="data.batch_size")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement (%(default)s)")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="loader processes")
    parser.add_argument("--no-inputs", action="store_true", help="leave out the toy model's inputs")
    parser.add_argument(
        "--open", type=int, nargs=2, metavar=("IMAGES", "BOXES"), help="also open an index of that size"
    )
    options = read_options(parser, arguments)
    if min(options.images, options.batch_size, options.exemplar_size, *options.sizes) < 1:
        raise UserError("--images, --batch-size, --sizes and --exemplar-size must be at least 1")
    print(machine())
    write(options, measure(options))


main = command_line(run)

if __name__ == "__main__":
    sys.exit(main())
