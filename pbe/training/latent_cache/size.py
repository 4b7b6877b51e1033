"""How large a latent cache will be, told from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from pbe.config import Config
from pbe.data.datamodule import ExemplarDataModule
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.training.latent_cache.record import LATENTS, MASKS, Layout, record_of
from pbe.training.latent_cache.section import rows_of_shard, variants_of


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
    data, samples, total = ExemplarDataModule(config.data, config.seed), {}, 0
    rows = rows_of_shard(config, layout)
    for stream, variants in variants_of(config).items():
        try:
            count = len(data.dataset(stream))
        except UserError:
            continue
        samples[stream] = (variants, count)
        whole, rest = divmod(count, rows)
        total += variants * (whole * layout.tar_size(rows) + (layout.tar_size(rest) if rest else 0))
    return CacheSize(layout.stride, _parts(layout), samples, total)


def _parts(layout: Layout) -> dict[str, int]:
    fields = {name: layout.record[name].itemsize for name in layout.record.names or ()}
    parts = {
        "latents": sum(fields[name] for name in LATENTS),
        "masks": sum(fields[name] for name in MASKS),
        "features": fields["features"],
    }
    return parts | {"headers and filling": layout.stride - sum(parts.values())}
