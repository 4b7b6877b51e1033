"""Tiny experiments that train in seconds, shared by the tests of training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

import pbe.training.setup as setup_module
from pbe.config import Config
from pbe.data.shards.archive import ShardRecord, write_shards
from pbe.data.toy.render import render_records
from pbe.data.toy.scenes import DEFAULT_WORLD, SceneConfig, ToyWorld, perspective_view
from pbe.training.monitoring.loggers import read_rows
from pbe.training.run import TrainResult, train

IMAGE_SIZE = 32
PICTURE_SIZE, OBJECT_BOX = 40, (8, 8, 32, 32)
OBJECTS = (7, 207, 407, 607)

TINY: dict[str, Any] = {
    "model": {
        "image_size": IMAGE_SIZE,
        "prediction": "v",
        "unet": {
            "model_channels": 32,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_factors": [2],
            "num_heads": 2,
            "context_dim": 32,
            "norm_groups": 8,
        },
        "autoencoder": {
            "channels": 16,
            "channel_mult": [1, 2, 2],
            "num_res_blocks": 1,
            "latent_channels": 8,
            "norm_groups": 8,
            "mid_attention": False,
        },
        "exemplar_encoder": {
            "tower": "timm/test_efficientnet",
            "pretrained": "random",
            "image_size": IMAGE_SIZE,
            "mean": [0.498039, 0.498039, 0.498039],
            "std": [0.501961, 0.501961, 0.501961],
            "mapper_width": 32,
            "mapper_layers": 2,
            "mapper_mlp_ratio": 2,
        },
    },
    "data": {"image_size": IMAGE_SIZE, "exemplar_size": IMAGE_SIZE, "batch_size": 2, "num_workers": 0},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "ema_decay": 0.9},
    "trainer": {
        "max_steps": 3,
        "accelerator": "cpu",
        "devices": "1",
        "threads": 1,
        "validate_every": 1000,
        "validation_samples": 2,
        "checkpoint_every": 1000,
        "progress": False,
    },
    "logging": {"loggers": ["csv"], "every": 1, "grid_every": 0, "grid_samples": 3, "grid_steps": 4},
}

# For what needs features that tell images apart. It is ten times as large as all else of the tiny model.
PRETRAINED_TOWER = (
    "model.exemplar_encoder.tower=timm/tf_efficientnet_lite0",
    "model.exemplar_encoder.pretrained=pypi",
)


@cache
def _tiny() -> DictConfig:
    """The tiny configuration as OmegaConf has it, which takes a while to make."""
    made = OmegaConf.merge(OmegaConf.structured(Config), TINY)
    assert isinstance(made, DictConfig)
    return made


def tiny_config(shards: Path, output_dir: Path, *overrides: str) -> Config:
    """Return the tiny configuration with ``key=value`` overrides."""
    places = {
        "output_dir": str(output_dir),
        "data": {"train_shards": str(shards / "train"), "validation_shards": str(shards / "validation")},
    }
    changed = OmegaConf.from_dotlist(list(overrides))
    merged = OmegaConf.to_object(OmegaConf.merge(_tiny(), places, changed))
    assert isinstance(merged, Config)
    return merged


def write_config(path: Path, config: Config) -> Path:
    """Write a configuration as a YAML file for train.py."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return path


def render_shards(folder: Path) -> None:
    """Write eight training images, four objects in each of two scenes, and eight scenes to validate on.

    The object stands in the same place of every training image, so that nothing but the exemplar says
    which one was taken out.
    """
    write_shards(_paired_images(), folder / "train", max_count=8)
    scenes = SceneConfig(short_side=PICTURE_SIZE, max_long_side=PICTURE_SIZE, max_objects=1)
    write_shards(render_records(DEFAULT_WORLD, "test", 3, 8, scenes, 0), folder / "validation", max_count=8)


def _paired_images() -> Iterator[ShardRecord]:
    world = ToyWorld()
    x1, y1, x2, y2 = OBJECT_BOX
    for scene, panorama in enumerate(world.panoramas("train")[:2]):
        view = perspective_view(world.panorama(panorama), PICTURE_SIZE, PICTURE_SIZE, 40.0, -5.0, 60.0)
        for number in OBJECTS:
            rgba = world.object_rgba(world.objects("train")[number])
            toy = cv2.resize(rgba, (x2 - x1, y2 - y1), interpolation=cv2.INTER_AREA).astype(np.float32)
            picture, alpha = view.astype(np.float32), toy[..., 3:] / 255.0
            picture[y1:y2, x1:x2] = picture[y1:y2, x1:x2] * (1.0 - alpha) + toy[..., :3] * alpha
            encoded = cv2.imencode(".png", picture.round().astype(np.uint8)[..., ::-1])[1].tobytes()
            yield ShardRecord(
                f"{scene}-{number:03d}", encoded, "png", PICTURE_SIZE, PICTURE_SIZE, [OBJECT_BOX]
            )


class CrashError(Exception):
    """Stands for a process that dies."""


def crash() -> None:
    raise CrashError


def send(number: int) -> Callable[[], None]:
    """Return a function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


class Watch(pl.Callback):
    """Notes what happens in a run, and does something once, at an optimizer step.

    Args:
        step: when.
        action: what.
        hook: ``on_train_batch_end`` or another one that has no batch index.
    """

    def __init__(
        self, step: int = -1, action: Callable[[], None] | None = None, hook: str = "on_train_batch_end"
    ) -> None:
        self.step, self.action, self.hook = step, action, hook
        self.losses: list[float] = []

    def _visit(self, trainer: pl.Trainer, hook: str) -> None:
        if self.action is not None and trainer.global_step == self.step and hook == self.hook:
            action, self.action = self.action, None
            action()

    def on_fit_start(self, trainer, pl_module):
        self._visit(trainer, "on_fit_start")

    def on_validation_start(self, trainer, pl_module):
        self._visit(trainer, "on_validation_start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self._visit(trainer, "on_train_batch_end")


def watched(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> None:
    """Add a callback to every training of this test."""
    original = setup_module._callbacks
    monkeypatch.setattr(setup_module, "_callbacks", lambda *args: [watch, *original(*args)])


def run(config: Config, watch: Watch | None = None) -> TrainResult | None:
    """Train; returns None when the watch made it crash."""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(CrashError):
        if watch is not None:
            watched(patch, watch)
        return train(config)
    return None


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a model folder."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {f"{file.stem}.{name}": value for file in files for name, value in load_file(file).items()}


def checkpoint(output_dir: str | Path) -> dict[str, Any]:
    """Return the content of a run's last checkpoint."""
    return torch.load(Path(output_dir) / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=False)


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not bit-identical."""
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


def logged(output_dir: str | Path, prefix: str = "") -> list[tuple[int, str, str]]:
    """Return (step, name, value as written) of the rows of ``metrics.csv``, in the file's order.

    Without those that depend on the machine and its mood, ``system/``, unless they are asked for.
    """
    rows = read_rows(Path(output_dir) / "metrics.csv")
    return [
        (int(row[0]), row[2], row[3])
        for row in rows
        if row[2].startswith(prefix) and (prefix.startswith("system/") or not row[2].startswith("system/"))
    ]
