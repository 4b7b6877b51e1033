"""Small worlds and shards for the tests of the data side."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from pbe.data.randomness import generator
from pbe.data.shards.archive import ShardRecord, write_shards
from pbe.data.toy.scenes import Scene, ToyWorld, render_scene


def encode(image: np.ndarray, extension: str = "jpg") -> bytes:
    """Encode an RGB image."""
    return cv2.imencode(f".{extension}", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def scene_record(scene: Scene, key: str) -> ShardRecord:
    height, width = scene.image.shape[:2]
    return ShardRecord(key, encode(scene.image), "jpg", width, height, scene.boxes, scene.labels)


@pytest.fixture(scope="session")
def world() -> ToyWorld:
    return ToyWorld()


@pytest.fixture(scope="session")
def scenes(world: ToyWorld) -> list[Scene]:
    return [render_scene(world, "train", generator(5, "train", index)) for index in range(60)]


@pytest.fixture(scope="session")
def shards(scenes: list[Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 rendered scenes in three shards."""
    folder = tmp_path_factory.mktemp("shards")
    records = (scene_record(scene, f"scene-{index}") for index, scene in enumerate(scenes))
    write_shards(records, folder, max_count=25)
    return folder
