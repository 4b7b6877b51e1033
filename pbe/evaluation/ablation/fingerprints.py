"""What the fingerprints of an ablation's stages are made of: settings that shape results, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pbe.config import Config, to_dict
from pbe.data.samples.sample import VERSION as SAMPLES
from pbe.errors import UserError
from pbe.evaluation.ablation.stages import fingerprint_of
from pbe.files import sha256_of
from pbe.training.latent_cache.settings import shaping_settings as latent_settings

# Sections and keys that say where a training runs, how it is watched or kept, not what comes out.
ASIDE = {
    "": ("output_dir", "autoencoder_from", "init_from", "logging", "cache"),
    "data": ("train_shards", "validation_shards", "num_workers", "verify", "remote_cache", "max_bad_share"),
    "trainer": (
        "resume", "progress", "threads", "profiler", "checkpoint_every", "checkpoint_minutes",
        "keep_checkpoints", "keep_every", "keep_best", "accelerator",
    ),
}  # fmt: skip
# Batches are those of one process: how many there are shapes a training where a configuration says it.
SHARED_OUT = {"devices": "auto", "num_nodes": 1, "strategy": "auto", "max_epochs": 0}


class FileHashes:
    """Hashes of files, each read once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of_model(self, path: Path, only: str = "") -> str:
        """Return a hash of a model: a file, or the files of a folder (one of them with ``only``).

        Raises:
            UserError: there is no such model.
        """
        if not path.exists():
            raise UserError(f"there is no model at '{path}'")
        if path.is_file():
            return self.of(path)
        names = (
            [only, "config.json"] if only else sorted(str(file.relative_to(path)) for file in path.rglob("*"))
        )
        files = [path / name for name in names if (path / name).is_file()]
        if not files:
            raise UserError(f"'{path}' is not a model folder: it has no weights")
        return fingerprint_of([(str(file.relative_to(path)), self.of(file)) for file in files])

    def of(self, path: Path) -> str:
        """Return the SHA-256 of a file."""
        if path not in self._known:
            self._known[path] = sha256_of(path)
        return self._known[path]


def shaping_settings(config: Config) -> dict[str, Any]:
    """Return the settings of a training that shape its weights, with those of the cached samples."""
    values = to_dict(config)
    for section, keys in ASIDE.items():
        for key in keys:
            (values[section] if section else values).pop(key, None)
    for key, usual in SHARED_OUT.items():
        if values["trainer"][key] == usual:
            del values["trainer"][key]
    if Path(pretrained := config.model.exemplar_encoder.pretrained).is_file():
        values["pretrained"] = sha256_of(pretrained)
    values["samples"] = SAMPLES
    values["cached"] = config.cache.variants if config.cache.folder else 0
    return values


def cache_settings(config: Config) -> dict[str, Any]:
    """Return the settings that a cache belongs to; batch sizes and the like are none of them."""
    shaping = latent_settings(config)
    shards = ("train_shards", "validation_shards")
    encoder = dict(shaping.pop("exemplar_encoder"))
    layout_grid, grid = encoder.pop("layout_grid"), encoder.pop("token_grid")
    before = [encoder.pop(name) for name in ("tokens", "pooled_stages", "image_size")]
    pretrained = config.model.exemplar_encoder.pretrained
    tower = [encoder.pop("tower"), pretrained, *before, *([layout_grid] if layout_grid else []), grid]
    tower_file = {"pretrained_sha256": sha256_of(pretrained)} if Path(pretrained).is_file() else {}
    data = {key: value for key, value in shaping["data"].items() if key not in shards}
    return tower_file | shaping | {
        "data": data, "variants": config.cache.variants, "tower": [*tower, *encoder.values()],
    }  # fmt: skip
