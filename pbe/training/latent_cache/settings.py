"""What shapes the content of a latent cache: the settings, their hash, and how two of them differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from pbe.config import Config, fingerprint as fingerprint, flatten, to_dict
from pbe.data.samples.sample import VERSION as SAMPLES
from pbe.data.shards.archive import shard_state
from pbe.models import LatentDiffusion

# How samples are loaded, not which ones.
LOADING = ("batch_size", "num_workers", "max_bad_share", "verify", "remote_cache")
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


def settings_of(config: Config, model: LatentDiffusion) -> Settings:
    """Return all that the content of a cache depends on, by dotted names; weights and shards as hashes.

    Shards count by the names and sizes of their files, remote ones by the hashes of their indexes. The number
    of variants is not among them: variant k is epoch k of the stream, however many there are.
    """
    settings = dict(_counting(to_dict(config.data)))
    settings |= {"seed": config.seed, "encoded in": "bfloat16" if halved(config) else "float32"}
    settings["version of the samples"] = SAMPLES
    encoder = config.model.exemplar_encoder
    for name in ("tower", "tokens", "pooled_stages", "image_size", "mean", "std"):
        settings[f"exemplar_encoder.{name}"] = getattr(encoder, name)
    if encoder.tokens == "all" and encoder.token_grid:
        settings[GRID] = encoder.token_grid
    if encoder.layout_grid:
        settings["exemplar_encoder.layout_grid"] = encoder.layout_grid
    for name in ("train_shards", "validation_shards"):
        pattern = getattr(config.data, name)
        settings[f"files of data.{name}"] = fingerprint(shard_state(pattern)) if pattern else ""
    autoencoder = model.autoencoder
    parts = (autoencoder.encoder, autoencoder.quant_conv, autoencoder.patch_encoder)
    weights = (_weights(*parts), _weights(model.exemplar_encoder.tower))
    return settings | dict(zip(WEIGHTS, weights, strict=True))


def _counting(data: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the data settings that change what is encoded."""
    leaves = flatten(data, "data.")
    neutral = {key.rsplit(".", 1)[-1] for key, value in leaves.items() if _is_neutral(key, value)}
    for key, value in leaves.items():
        name = key.rsplit(".", 1)[-1]
        if name not in LOADING and name not in neutral and FOLLOWERS.get(name) not in neutral:
            yield key, value


def _is_neutral(key: str, value: Any) -> bool:
    name = key.rsplit(".", 1)[-1]
    return name in NEUTRAL and value == NEUTRAL[name]


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


def with_all_tokens(settings: Settings, grid: int) -> Settings | None:
    """Return the settings of a cache that holds more tokens and so serves too; None where there is none.

    Args:
        settings: of what is wanted.
        grid: positions along a side that all tokens would be averaged to; 0: the tower's own.
    """
    if settings[TOKENS] != "class":
        return None
    return settings | {TOKENS: "all"} | ({GRID: grid} if grid else {})


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
    last = name.rsplit(".", 1)[-1]
    return settings.get(name, NEUTRAL.get(last, "unset"))
