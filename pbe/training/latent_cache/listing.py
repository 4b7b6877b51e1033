"""What a latent cache takes on the disk, and what lies in its folder, in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pbe.config import Config
from pbe.data.datamodule import TrainingData
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.training.latent_cache.record import LATENTS, MASKS, Layout, record_of
from pbe.training.latent_cache.settings import Settings, differences, settings_of, with_all_tokens
from pbe.training.latent_cache.store import (
    OLD_NAMES,
    LatentStore,
    read_store,
    rows_of_shard,
    stores_in,
    variants_of,
)

NO_STORE = "not a store of latents; it may be deleted"


@dataclass(frozen=True)
class CacheSize:
    """What a cache takes.

    Attributes:
        sample: bytes of one variant of one sample in its shard.
        parts: the same by what they hold.
        samples: variants and samples of an epoch, by stream; without the streams that have no shards yet.
        total: bytes of all shards without their indexes, which add less than a hundredth.
    """

    sample: int
    parts: dict[str, int]
    samples: dict[str, tuple[int, int]]
    total: int


def size_on_disk(config: Config, model: LatentDiffusion) -> CacheSize:
    """Return what the cache of a configuration takes when it is built.

    Args:
        config: the experiment; streams whose shards cannot be found count as nothing.
        model: of the right sizes; it may be on the meta device.
    """
    layout = Layout(record_of(config, model))
    data, samples, total = TrainingData(config), {}, 0
    rows = rows_of_shard(config, layout)
    for stream, variants in variants_of(config).items():
        try:
            count = len(data.dataset(stream))
        except UserError:
            continue
        samples[stream] = (variants, count)
        whole, rest = divmod(count, rows)
        total += variants * (whole * layout.tar_size(rows) + (layout.tar_size(rest) if rest else 0))
    fields = {name: layout.record[name].itemsize for name in layout.record.names or ()}
    parts = {
        "latents": sum(fields[name] for name in LATENTS),
        "masks": sum(fields[name] for name in MASKS),
        "features": fields["features"],
    }
    parts["headers and filling"] = layout.stride - sum(parts.values())
    return CacheSize(layout.stride, parts, samples, total)


def describe_folder(config: Config, model: LatentDiffusion) -> list[str]:
    """Return a line for each store of a cache's folder, and for what older versions made there.

    A line holds name, size, variants of each stream, and what a training with this configuration would do
    with it, or in which settings it differs.

    Args:
        config: ``cache.folder`` and the settings to compare with.
        model: with its frozen parts loaded.
    """
    folder, settings = Path(config.cache.folder), settings_of(config, model)
    lines = []
    for path in stores_in(folder):
        try:
            store = read_store(path)
            text = _describe(store, config, settings) if store else NO_STORE
        except UserError as error:
            text = str(error)
        lines.append(f"{path.name}  {_size(path)}  {text}")
    older = [folder / name for name in OLD_NAMES if (folder / name).is_dir()]
    return [*lines, *(f"{path.name}  {_size(path)}  made by an older version; delete it" for path in older)]


def _size(folder: Path) -> str:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{total / 2**30:.2f} GiB"


def _describe(store: LatentStore, config: Config, settings: Settings) -> str:
    whole = store.variants()
    holds = ", ".join(
        f"{stream} {count:,} x {whole[stream]}" for stream, count in sorted(store.samples.items())
    )
    return f"{holds}  {_verdict(store, config, settings)}"


def _verdict(store: LatentStore, config: Config, settings: Settings) -> str:
    grid = config.model.exemplar_encoder.token_grid
    for candidate in (settings, with_all_tokens(settings, grid)):
        if candidate is not None and not differences(store.settings, candidate):
            wanted = variants_of(config)
            if store.is_ready(wanted):
                return "serves this configuration"
            missing = len(store.missing(wanted))
            return f"fits, unfinished: {missing} of {len(list(store.plan(wanted)))} shards are missing"
    return f"does not fit: {'; '.join(differences(store.settings, settings))}"
