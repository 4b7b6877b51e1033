"""Measures loaders: stages against bare JPEG decoding, workers, a plain peer, and the opening of an index."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import albumentations
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch.utils.data import DataLoader, Dataset

from pbe.config import DataConfig
from pbe.data import dataset as dataset_module
from pbe.data.datamodule import start_worker
from pbe.data.dataset import ExemplarDataset, collate
from pbe.data.randomness import generator
from pbe.data.samples import sample as sample_module
from pbe.data.samples.sample import ExemplarAugmentation
from pbe.data.shards.archive import ShardImages, ShardRecord, write_shards
from pbe.data.shards.format import HASH_BYTES, MANIFEST_FORMAT, MANIFEST_NAME, MANIFEST_VERSION
from pbe.data.shards.index import read_members

# Stage, and the function whose time it is; whatever none of them covers is "the rest".
STAGES: tuple[tuple[str, Any, str], ...] = (
    ("looking up the index", ShardImages, "row"),
    ("reading", ShardImages, "read"),
    ("decoding to RGB", dataset_module, "decode_image"),
    ("exemplar: resize, augment", ExemplarAugmentation, "__call__"),
    ("crop and mask", sample_module, "_find_crop"),
    ("cut and resize the image", sample_module, "cut"),
    ("valid mask", sample_module, "valid_mask"),
    ("stacking a batch", dataset_module, "_stack"),
)
REST = "the rest"


@dataclass(frozen=True)
class StageTimes:
    """Median milliseconds of CPU time a sample: bare decoding, the whole sample, and its stages."""

    decoding: float
    whole: float
    stages: dict[str, float]

    @property
    def ratio(self) -> float:
        """Return the rate of samples as a share of the rate of bare decoding."""
        return self.decoding / self.whole


@dataclass(frozen=True)
class LoaderTimes:
    """Samples a second of wall time, and milliseconds of CPU a sample in the main process and all workers.

    The CPU times are NaN where there is no ``/proc``.
    """

    rate: float
    main: float
    workers: float


def synthetic_image(number: int, width: int, height: int) -> np.ndarray:
    """Return an image with detail at every scale, as photographs have; uint8 ``h w 3``."""
    rng = generator("benchmark picture", number)
    image = rng.normal(128, 6, (height, width, 3)).astype(np.float32)
    for level in range(1, 9):
        coarse = rng.normal(0, 60 / 1.6**level, (2**level * 3 // 4 + 1, 2**level, 3)).astype(np.float32)
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image, 0, 255).astype(np.uint8)


def synthetic_shards(folder: Path, count: int, width: int, height: int, quality: int) -> list[Path]:
    """Write JPEGs with a box each, of 5 to 50 % of the image, as one shard without an index."""

    def records() -> Iterator[ShardRecord]:
        """Yield the images as they are encoded."""
        for number in range(count):
            encoded = cv2.imencode(
                ".jpg", synthetic_image(number, width, height), [cv2.IMWRITE_JPEG_QUALITY, quality]
            )[1].tobytes()
            sides = generator("benchmark box", number).uniform(0.23, 0.7, 4)
            x, y = sides[2] * (1 - sides[0]) * width, sides[3] * (1 - sides[1]) * height
            box = (x, y, x + sides[0] * width, y + sides[1] * height)
            yield ShardRecord(f"p{number:06d}", encoded, "jpg", width, height, [box])

    return write_shards(records(), folder, max_count=count)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let OpenCV and torch work on one thread while the context is open."""
    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])


@contextmanager
def _stopwatch() -> Iterator[dict[str, float]]:
    """Add up the CPU time spent in each stage while the context is open."""
    spent: dict[str, float] = defaultdict(float)

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time added to that of a stage."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            """Call it; time that ends in an error counts too."""
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.thread_time() - start

        return timed

    originals = [getattr(owner, attribute) for _, owner, attribute in STAGES]
    try:
        for (name, owner, attribute), original in zip(STAGES, originals, strict=True):
            setattr(owner, attribute, wrapped(name, original))
        yield spent
    finally:
        for (_, owner, attribute), original in zip(STAGES, originals, strict=True):
            setattr(owner, attribute, original)


def _time_decoding(encoded: list[np.ndarray]) -> float:
    start = time.thread_time()
    for image in encoded:
        cv2.imdecode(image, cv2.IMREAD_COLOR)
    return (time.thread_time() - start) / len(encoded)


def measure_stages(data: DataConfig, *, seconds: float, images: int = 64) -> StageTimes:
    """Time samples and their stages on one core, in turns with bare OpenCV decoding of the same files.

    CPU time of the one thread counts, so other processes disturb little.

    Args:
        data: shards, sizes and settings.
        seconds: how long to go on, at least three rounds.
        images: how many of the first images make a round.
    """
    shards = ShardImages(data.train_shards)
    dataset = ExemplarDataset(shards, data, 1)
    count = min(images, len(shards))
    encoded = [np.frombuffer(shards.image(number), np.uint8) for number in range(count)]
    rounds: list[dict[str, float]] = []
    with _one_thread():
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(rounds) < 4:
            rounds.append({"bare": _time_decoding(encoded), **_time_round(dataset, count, len(rounds))})
    # The first round warms up.
    medians = {name: 1e3 * float(np.median([row[name] for row in rounds[1:]])) for name in rounds[0]}
    return StageTimes(medians.pop("bare"), medians.pop("whole"), medians)


def _time_round(dataset: ExemplarDataset, count: int, epoch: int) -> dict[str, float]:
    batch = dataset.config.batch_size
    with _stopwatch() as spent:
        start = time.thread_time()
        for first in range(0, count, batch):
            turns = range(first, min(first + batch, count))
            collate([dataset[epoch * len(dataset) + turn] for turn in turns])
        whole = time.thread_time() - start
    stages = {name: spent[name] / count for name, _, _ in STAGES}
    return {"whole": whole / count, **stages, REST: whole / count - sum(stages.values())}


def _cpu_seconds(processes: list[int]) -> float:
    """Return the CPU time, user's and system's, that processes have taken so far; NaN without ``/proc``."""
    if not Path("/proc/self/stat").exists():
        return math.nan
    rows = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in processes]
    return sum(int(row[11]) + int(row[12]) for row in rows) / os.sysconf("SC_CLK_TCK")


def measure_loader(loader: DataLoader[Any], *, seconds: float) -> LoaderTimes:
    """Return the rate and the CPU times of a loader once it runs; its batches have a ``sample_index``.

    While the machine has other work the CPU times are the ones to compare.
    """

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    with _one_thread():
        stream = batches()
        for _ in range(max(8 * loader.num_workers, 4)):  # starting up, and what was prefetched meanwhile
            next(stream)
        children = [process.pid for process in getattr(loader._iterator, "_workers", [])]
        before = [_cpu_seconds([os.getpid()]), _cpu_seconds(children)]
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < seconds:
            count += len(next(stream)["sample_index"])
        elapsed = time.perf_counter() - start
        spent = [_cpu_seconds([os.getpid()]) - before[0], _cpu_seconds(children) - before[1]]
    return LoaderTimes(count / elapsed, *(1e3 * value / count for value in spent))


class PlainFiles(Dataset[dict[str, Any]]):
    """What one would write with albumentations: files, crops that hold a box, an augmented exemplar, a mask.

    Steps, probabilities and sizes are those of ``config``; the exemplar's three-point map is a random affine
    map, and an arbitrary mask a polygon with jittered corners. ``folder`` has the files and ``boxes.pt``,
    the boxes ``x1 y1 x2 y2`` of each by its name.
    """

    def __init__(self, folder: Path, config: DataConfig) -> None:
        size, augment = config.image_size, config.sample.augment
        boxes: dict[str, list[list[float]]] = torch.load(folder / "boxes.pt")
        self.files = [(str(folder / name), found) for name, found in boxes.items()]
        self.arbitrary = config.sample.arbitrary_mask_share
        self.crop = albumentations.Compose(
            [albumentations.RandomSizedBBoxSafeCrop(size, size), ToTensorV2()],
            bbox_params=albumentations.BboxParams("pascal_voc", label_fields=[]),
        )
        self.exemplar = albumentations.Compose(
            [
                albumentations.Resize(config.exemplar_size, config.exemplar_size),
                albumentations.HorizontalFlip(p=augment.flip),
                albumentations.Rotate(augment.rotate_limit, p=augment.rotate),
                albumentations.Blur(p=augment.blur),
                albumentations.Affine(translate_percent=(-0.2, 0.2), shear=(-15, 15), p=augment.affine),
                ToTensorV2(),
            ]
        )

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample with a box that is drawn anew each time."""
        name, boxes = self.files[index]
        image = cv2.imread(name, cv2.IMREAD_COLOR_RGB)
        assert image is not None
        box = random.choice(boxes)
        left, top, right, bottom = (round(each) for each in box)
        exemplar = self.exemplar(image=image[top:bottom, left:right])["image"]
        cropped = self.crop(image=image, bboxes=np.array([box]))
        mask = self._mask(cropped["image"].shape[-1], cropped["bboxes"][0])
        return {"image": cropped["image"], "mask": mask, "exemplar": exemplar, "sample_index": index}

    def _mask(self, size: int, box: np.ndarray) -> torch.Tensor:
        mask = np.zeros((1, size, size), np.uint8)
        left, top, right, bottom = (int(each) for each in box[:4])
        if random.random() < self.arbitrary:
            around = np.linspace(0.0, 2.0 * np.pi, 20, endpoint=False)
            reach = np.array([right - left, bottom - top]) * np.random.uniform(0.6, 0.9, (20, 1))
            points = (
                np.array([left + right, top + bottom]) / 2 + reach * np.c_[np.cos(around), np.sin(around)]
            )
            cv2.fillPoly(mask[0], [points.astype(np.int32)], 255)
        else:
            mask[0, top:bottom, left:right] = 255
        return torch.from_numpy(mask)


def plain_loader(folder: Path, config: DataConfig) -> DataLoader[dict[str, Any]]:
    """Return torch's own loader over :class:`PlainFiles`, with the workers and the batch of ``config``."""
    return DataLoader(
        PlainFiles(folder, config),
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        worker_init_fn=start_worker,
    )


def synthetic_index(folder: Path, tar: Path, images: int, boxes: int, a_shard: int = 2000) -> Path:
    """Write the index of a large data set whose shards all are one small tar; return its folder.

    Args:
        folder: to write, on the tar's file system.
        tar: its images are named again and again.
        images: of the data set.
        boxes: of the data set, spread evenly.
        a_shard: images a shard. The shards' index files are hard links to two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.link(tar, folder / "shard.tar")
    shards: list[dict[str, Any]] = []
    files: dict[tuple[int, int], tuple[Path, str]] = {}
    for number, first in enumerate(range(0, images, a_shard)):
        count = min(a_shard, images - first)
        owned = boxes * (first + count) // images - boxes * first // images
        path = folder / f"shard-{number:06d}.index.npz"
        if (count, owned) not in files:
            path.write_bytes(_tiled_index(tar, count, owned))
            files[count, owned] = path, hashlib.blake2b(path.read_bytes(), digest_size=HASH_BYTES).hexdigest()
        else:
            os.link(files[count, owned][0], path)
        shards.append(
            {"name": "shard.tar", "pictures": count, "boxes": owned, "index": path.name,
             "index_blake2b": files[count, owned][1]}
        )  # fmt: skip
    manifest = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, "labels": [""], "shards": shards}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


def _tiled_index(tar: Path, count: int, boxes: int) -> bytes:
    """Return the index of a shard that holds a tar's images over and over."""
    data, members = tar.read_bytes(), read_members(tar)
    places = np.array(list(members.values()), np.int64).reshape(-1, 4)
    notes = [json.loads(data[start : start + size]) for start, size in places[:, 2:].tolist()]
    which = np.arange(count) % len(places)
    ends = boxes * np.arange(1, count + 1) // count
    owner = np.searchsorted(ends, np.arange(boxes), side="right")
    first_boxes = np.array([note["boxes"][0]["xyxy"] for note in notes], np.float64)
    keys = [f"p{number:08d}".encode() for number in range(count)]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        picture_offset=places[which, 0], picture_size=places[which, 1],
        json_offset=places[which, 2], json_size=places[which, 3],
        width=np.array([note["width"] for note in notes], np.int32)[which],
        height=np.array([note["height"] for note in notes], np.int32)[which],
        key_bytes=np.frombuffer(b"".join(keys), np.uint8), key_end=np.cumsum([len(key) for key in keys]),
        box_end=ends, boxes=first_boxes[which[owner]], picture_hash=np.zeros((count, HASH_BYTES), np.uint8),
    )  # fmt: skip
    return buffer.getvalue()


OPENING = """
import json, sys, time

def memory():  # resident, and what of it no other process can share: not the libraries' files
    rows = (line.split(":") for line in open("/proc/self/status"))
    sizes = {name: int(text.split()[0]) / 2**10 for name, text in rows if name in ("VmRSS", "RssAnon")}
    return {"resident": sizes["VmRSS"], "private": sizes["RssAnon"]}

import torch
mib = {"torch": memory()}
from pbe.config import Config, DataConfig
from pbe.data.datamodule import TrainingData
mib["imports"] = memory()
start = time.perf_counter()
module = TrainingData(Config(seed=1, data=DataConfig(**json.loads(sys.argv[1]))))
dataset = module.dataset("train")
opened = time.perf_counter() - start
mib["opened"] = memory()
batch = next(iter(module.train_dataloader()))
first = time.perf_counter() - start
mib["first batch"] = memory()
print(json.dumps({
    "images": len(dataset.images), "samples": len(dataset), "open_s": opened, "first_batch_s": first,
    "mib": mib,
}))
"""


def measure_opening(folder: Path, *, boxes: str, workers: int) -> dict[str, Any]:
    """Open a data set in a fresh process and take a batch (Linux only).

    Args:
        folder: shards with an index.
        boxes: ``one`` or ``every``, as ``data.boxes``.
        workers: processes that load.

    Returns:
        ``images`` and ``samples``; ``open_s`` and ``first_batch_s``, seconds from the start of opening;
        ``mib``, the main process's memory, ``resident`` and ``private``, after importing torch alone, after
        all ``imports``, when ``opened``, and with the ``first batch``.
    """
    settings = {"train_shards": str(folder), "boxes": boxes, "num_workers": workers}
    command = [sys.executable, "-c", OPENING, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))
