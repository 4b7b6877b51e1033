"""The order of samples, every draw and every pixel of existing runs: a hash that must not change.

Trained models, caches and resumed runs depend on them. A change that moves these hashes needs a switch whose
default leaves them alone, or, where the samples were wrong, a new ``VERSION`` of
``pbe.data.samples.sample``. Version 2 hides mirror images of the object in padding, and antialiases where one
axis shrinks and the other grows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from pbe.config import DataConfig, SampleConfig
from pbe.data.dataset import ExemplarDataset
from pbe.data.randomness import generator
from pbe.data.shards.archive import ShardImages, ShardRecord, write_shards

PICTURES, SAMPLES = 14, 42


def record(index: int) -> ShardRecord:
    """Smooth colours without any loss in the file, so that only the sample's own arithmetic counts."""
    rng = generator("pinned", index)
    width, height = (int(side) for side in rng.integers(60, 200, 2))
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = np.kron(coarse, np.ones((height // 5 + 1, width // 7 + 1, 1), np.uint8))[:height, :width]
    boxes = []
    for _ in range(int(rng.integers(1, 5))):
        box_width, box_height = rng.uniform(0.3, 0.9, 2) * (width, height)
        x, y = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
        boxes.append((x, y, x + box_width, y + box_height))
    encoded = cv2.imencode(".png", picture)[1].tobytes()
    return ShardRecord(f"p{index}", encoded, "png", width, height, boxes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pinned")
    write_shards((record(index) for index in range(PICTURES)), path, max_count=5)
    return path


def hashes(folder: Path, sample: SampleConfig) -> dict[str, str]:
    config = DataConfig(image_size=64, exemplar_size=48, sample=sample)
    dataset = ExemplarDataset(ShardImages(folder), config, 23)
    order, draws, pixels = (hashlib.sha256() for _ in range(3))
    for index in range(SAMPLES):
        item = dataset[index]
        made = item.sample
        assert made is not None
        order.update(f"{item.index} {item.key} ".encode())
        places = [*vars(made.box).values(), *vars(made.extended).values()]
        draws.update(repr([round(value, 6) for value in places]).encode())
        draws.update(f"{made.mask_kind} {made.events}".encode() + made.mask.tobytes() + made.valid.tobytes())
        pixels.update(made.image.tobytes() + made.exemplar.tobytes())
    return {"order": order.hexdigest(), "draws": draws.hexdigest(), "pixels": pixels.hexdigest()}


ORDER = "82e4fd1678077df8fa297cf5f51f9b2eec91406e4d11905c420f9151139cac9b"
PINNED = {
    "default": {
        "order": ORDER,
        "draws": "aadc1aa4a65fd99846b4e0ed6ed3578c59ee520c36e840977731cd538fdee691",
        "pixels": "cb7dad165a94e3d1a838371bf260a6689c2d4947016ce329368bc27e555ba16f",
    },
    "original": {
        "order": ORDER,
        "draws": "fe08454f77ade3d86faa2b3b52caccf1bebc16369b139c8defaaa1bca2b959c2",
        "pixels": "691d2e68bbb72ac7ff7c95dc602040bc3f955be72ebb36f0eb6abf1629291276",
    },
}
SETTINGS = {
    "default": SampleConfig(),
    "original": SampleConfig(squash=True, min_box_cover=0.0, min_keep_share=0.0),
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_samples_are_those_of_earlier_versions(folder, name):
    assert hashes(folder, SETTINGS[name]) == PINNED[name]
