"""Scenes of the toy world as records for shards, rendered by several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import cv2

from pbe.data.randomness import generator
from pbe.data.shards.archive import ShardRecord
from pbe.data.toy.scenes import SceneConfig, ToyWorld, render_scene

JPEG_QUALITY = 95


class SceneRenderer:
    """Renders scene ``i`` as a pure function of (seed, split, i); one a process.

    Args:
        world: path of the toy world's archive.
        split: ``train`` or ``test``.
        seed: of all scenes.
        config: sizes and limits.
    """

    def __init__(self, world: Path, split: str, seed: int, config: SceneConfig) -> None:
        self.world = ToyWorld(world)
        self.split, self.seed, self.config = split, seed, config

    def record(self, index: int) -> ShardRecord:
        """Return scene ``index`` as a JPEG with its boxes."""
        scene = render_scene(self.world, self.split, generator(self.seed, self.split, index), self.config)
        image = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
        _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        height, width = scene.image.shape[:2]
        key = f"{self.split}-{index:07d}"
        return ShardRecord(key, encoded.tobytes(), "jpg", width, height, scene.boxes, scene.labels)


_renderer: SceneRenderer | None = None


def _start(*arguments: object) -> None:
    global _renderer
    cv2.setNumThreads(1)
    _renderer = SceneRenderer(*arguments)  # type: ignore[arg-type]


def _render(index: int) -> ShardRecord:
    assert _renderer is not None
    return _renderer.record(index)


def render_records(
    world: Path, split: str, seed: int, scenes: int, config: SceneConfig, workers: int
) -> Iterator[ShardRecord]:
    """Yield scenes 0 .. ``scenes`` - 1 in order, rendered by ``workers`` processes (0: in this one)."""
    arguments = (world, split, seed, config)
    if workers == 0:
        _start(*arguments)
        yield from map(_render, range(scenes))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=_start, initargs=arguments) as pool:
        yield from pool.imap(_render, range(scenes), chunksize=32)
