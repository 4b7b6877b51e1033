"""What shapes the content of a latent cache: the settings, their hash, and how two of them differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from pbe.config import Config, fingerprint as fingerprint, flatten, to_dict
from pbe.data.samples.sample import VERSION as SAMPLES
from pbe.data.shards.archive import shard_state, shards_of
from pbe.models import LatentDiffusion

# How samples are loaded, not which ones.
LOADING = ("batch_size", "num_workers", "max_bad_share", "verify", "remote_cache")
# What is mixed in online and never cached.
MIXED_IN = ("prior_shards", "prior_share")
# Of the exemplar encoder; its grids count only where they are set.
ENCODER = ("tower", "tokens", "pooled_stages", "image_size", "mean", "std")
# Settings that change nothing at these values: they count elsewhere only, so that older caches stay good.
NEUTRAL: dict[str, Any] = {
    "version of the samples": 1,
    "boxes": "one",
    "antialias_above": 1.0,
    "object_mask_share": 0.0,
    "reduced_decoding": False,
}
# Settings that say something only where another one is not neutral.
FOLLOWERS = {"object_mask_dilate": "object_mask_share"}
TOKENS, GRID = "exemplar_encoder.tokens", "exemplar_encoder.token_grid"
WEIGHTS = ("autoencoder's weights", "tower's weights")
Settings = dict[str, Any]


def shaping_settings(config: Config) -> dict[str, Any]:
    """Return what a configuration says of the content of a cache; the one list of it.

    The fingerprints of caches (:func:`settings_of`) and of an ablation's stages are both made of it, in the
    layouts that they have had since older versions.
    """
    encoder = config.model.exemplar_encoder
    sizes = {"token_grid": encoder.token_grid if encoder.tokens == "all" else 0}
    return {
        "data": {key: value for key, value in to_dict(config.data).items() if key not in LOADING + MIXED_IN},
        "seed": config.seed,
        "halved": halved(config),
        "samples": SAMPLES,
        "exemplar_encoder": {name: getattr(encoder, name) for name in ENCODER}
        | sizes
        | {"layout_grid": encoder.layout_grid},
    }


def settings_of(config: Config, model: LatentDiffusion) -> Settings:
    """Return all that the content of a cache depends on, by dotted names; weights and shards as hashes.

    Shards count by the names and sizes of their files, remote ones by the hashes of their indexes. The number
    of variants is not among them: variant k is epoch k of the stream, however many there are.
    """
    shaping = shaping_settings(config)
    settings = dict(_counting(shaping["data"]))
    settings |= {
        "seed": shaping["seed"],
        "encoded in": "bfloat16" if shaping["halved"] else "float32",
        "version of the samples": shaping["samples"],
    }
    for name, value in shaping["exemplar_encoder"].items():
        if value or name in ENCODER:  # grids of 0 are left out, so that older caches stay good
            settings[f"exemplar_encoder.{name}"] = value
    for name in ("train_shards", "validation_shards"):
        pattern = getattr(config.data, name)
        with shards_of(f"data.{name}"):
            settings[f"files of data.{name}"] = fingerprint(shard_state(pattern)) if pattern else ""
    autoencoder = model.autoencoder
    parts = (autoencoder.encoder, autoencoder.quant_conv, autoencoder.patch_encoder)
    weights = (_weights(*parts), _weights(model.exemplar_encoder.tower))
    return settings | dict(zip(WEIGHTS, weights, strict=True))


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _counting(data: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the data settings that change what is encoded."""
    leaves = flatten(data, "data.")
    named = {_last(key): value for key, value in leaves.items()}
    neutral = {name for name, value in NEUTRAL.items() if name in named and named[name] == value}
    for key, value in leaves.items():
        if _last(key) not in neutral and FOLLOWERS.get(_last(key)) not in neutral:
            yield key, value


def _weights(*modules: nn.Module | None) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()) if module is not None else []:
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def halved(config: Config) -> bool:
    """Say whether the frozen networks run in bfloat16."""
    return "bf16" in config.trainer.precision


def serving_settings(settings: Settings, config: Config) -> list[Settings]:
    """Return the settings of the caches that serve: for the class token one with all tokens does too."""
    if settings[TOKENS] != "class":
        return [settings]
    grid = config.model.exemplar_encoder.token_grid
    return [settings, settings | {TOKENS: "all"} | ({GRID: grid} if grid else {})]


def differences(theirs: Settings, ours: Settings) -> list[str]:
    """Say in words in which settings a cache differs from what a configuration asks for."""
    found = []
    for name in sorted(theirs.keys() | ours.keys()):
        there, here = (_value(settings, name) for settings in (theirs, ours))
        if there != here:
            hashed = name in WEIGHTS or name.startswith("files of ")
            found.append(f"other {name}" if hashed else f"{name} {there}, not {here}")
    return found


def _value(settings: Settings, name: str) -> Any:
    return settings.get(name, NEUTRAL.get(_last(name), "unset"))
