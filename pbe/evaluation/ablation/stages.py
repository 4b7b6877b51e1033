"""A stage of an ablation: a command line with a folder of its own and a fingerprint of all it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pbe.checkpoints.native import shared_files
from pbe.config import Config, to_dict
from pbe.data.samples.sample import VERSION as SAMPLES
from pbe.errors import UserError
from pbe.files import make_folder, sha256_of, write_output
from pbe.training.latent_cache.settings import LOADING, shaping_settings as latent_settings

DONE = "done.json"
SETTINGS_FILE = "stage.yaml"
MARK = {"seconds": int | float, "units": int | float, "rate": str, "resumed": bool}  # what estimates read
# Sections and keys that say where a training runs, how it is watched or kept, not what comes out.
ASIDE = {
    "": ("output_dir", "autoencoder_from", "init_from", "logging", "cache"),
    "data": ("train_shards", "validation_shards", *(name for name in LOADING if name != "batch_size")),
    "trainer": (
        "resume", "progress", "threads", "profiler", "checkpoint_every", "checkpoint_minutes",
        "keep_checkpoints", "keep_every", "keep_best", "accelerator",
    ),
}  # fmt: skip
# Batches are those of one process: how many there are shapes a training where a configuration says it.
SHARED_OUT = {"devices": "auto", "num_nodes": 1, "strategy": "auto", "max_epochs": 0}


def project_command(name: str, *arguments: object) -> tuple[str, ...]:
    """Return a command line of the project for the Python interpreter."""
    return ("-m", "pbe.cli", *name.split(), *map(str, arguments))


@dataclass(frozen=True)
class Stage:
    """Work that one process does, once.

    Attributes:
        name: shown to people.
        kind: ``scenes``, ``benchmark``, ``own benchmark``, ``cache``, ``training``, ``edits`` or ``scores``.
        fingerprint: of everything that shapes the result; equal ones are the same stage.
        folder: what it makes, its log and its mark.
        command: arguments of the Python interpreter.
        units: how much work it is.
        rate: key of the seconds that a unit takes.
        needs: fingerprints of the stages that must be done before.
        makes: file or folder in ``folder`` that is there at the end.
        settings: written to ``stage.yaml`` of the folder, which the command reads.
        gpus: how many it uses where there are some.
    """

    name: str
    kind: str
    fingerprint: str
    folder: Path
    command: tuple[str, ...]
    units: float
    rate: str
    needs: tuple[str, ...] = ()
    makes: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    gpus: int = 0

    @property
    def log(self) -> Path:
        """What the process prints."""
        return self.folder / "log.txt"

    def prepare(self) -> None:
        """Make the folder, with the settings in it."""
        make_folder(self.folder)
        if self.settings:
            text = OmegaConf.to_yaml(OmegaConf.create(self.settings))
            write_output(self.folder / SETTINGS_FILE, text.encode("utf-8", "surrogateescape"))

    def mark(self) -> dict[str, Any] | None:
        """Return the mark of a finished stage, None while it is not finished."""
        try:
            content = json.loads((self.folder / DONE).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or content.get("fingerprint") != self.fingerprint:
            return None
        return content if all(isinstance(content.get(key), kind) for key, kind in MARK.items()) else None

    def finish(self, seconds: float, resumed: bool) -> None:
        """Mark the stage as finished."""
        content = {key: getattr(self, key) for key in ("name", "kind", "fingerprint", "units", "rate")}
        write_json(self.folder / DONE, content | {"seconds": round(seconds, 2), "resumed": resumed})


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    write_output(path, json.dumps(content, indent=2) + "\n")


def fingerprint_of(*parts: Any) -> str:
    """Return a hash of JSON-ready values, 24 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def model_hash(path: Path, sha256: Callable[[Path], str], only: str = "") -> str:
    """Return a hash of a model: a file, or the files of a folder (one of them with ``only``)."""
    if not path.exists():
        raise UserError(f"there is no model at '{path}'")
    if path.is_file():
        return sha256(path)
    names = [only, "config.json"] if only else sorted(str(file.relative_to(path)) for file in path.rglob("*"))
    shared = [name for name, file in shared_files(path).items() if only in ("", file.name)]
    names = [name for name in (*names, *shared) if (path / name).is_file()]
    if not names:
        raise UserError(f"'{path}' is not a model folder: it has no weights")
    return fingerprint_of([(name, sha256(path / name)) for name in names])


def without_aside(config: Config) -> dict[str, Any]:
    """Return the settings of a training without those that only say where it runs or how it is watched."""
    values = to_dict(config)
    for section, keys in ASIDE.items():
        for key in keys:
            (values[section] if section else values).pop(key, None)
    return values


def shaping_settings(config: Config) -> dict[str, Any]:
    """Return the settings of a training that shape its weights, with those of the cached samples."""
    values = without_aside(config)
    for key, usual in SHARED_OUT.items():
        if values["trainer"][key] == usual:
            del values["trainer"][key]
    if Path(pretrained := config.model.exemplar_encoder.pretrained).is_file():
        values["pretrained"] = sha256_of(pretrained)
    values["samples"] = SAMPLES
    values["cached"] = config.cache.variants if config.cache.folder else 0
    return values


def cache_settings(config: Config) -> dict[str, Any]:
    """Return the settings that a cache belongs to, which loading is not among."""
    shaping = latent_settings(config)
    encoder = dict(shaping.pop("exemplar_encoder"))
    layout_grid, grid = encoder.pop("layout_grid"), encoder.pop("token_grid")
    sizes = [encoder.pop(name) for name in ("tokens", "pooled_stages", "image_size")]
    pretrained = config.model.exemplar_encoder.pretrained
    tower = [encoder.pop("tower"), pretrained, *sizes, *([layout_grid] if layout_grid else []), grid]
    tower_file = {"pretrained_sha256": sha256_of(pretrained)} if Path(pretrained).is_file() else {}
    data = {key: value for key, value in shaping["data"].items() if key not in ASIDE["data"]}
    own = {"data": data, "variants": config.cache.variants, "tower": [*tower, *encoder.values()]}
    return tower_file | shaping | own
