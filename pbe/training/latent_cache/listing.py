"""What lies in the folder of a latent cache, in words: sizes, and why a section does not fit."""

from __future__ import annotations

from pathlib import Path

from pbe.config import Config
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.training.latent_cache.section import (
    OLD_NAMES,
    Section,
    folder_bytes,
    read_section,
    sections_in,
    variants_of,
)
from pbe.training.latent_cache.settings import Settings, differences, settings_of, with_all_tokens


def describe_folder(config: Config, model: LatentDiffusion) -> list[str]:
    """Return a line for each section of a cache's folder, and for what older versions made there.

    A line holds name, size, variants of each stream, and what a training with this configuration would do
    with it, or in which settings it differs.

    Args:
        config: ``cache.folder`` and the settings to compare with.
        model: with its frozen parts loaded.
    """
    folder, settings = Path(config.cache.folder), settings_of(config, model)
    lines = []
    for path in sections_in(folder):
        try:
            section = read_section(path)
            told = _describe(section, config, settings) if section else "not a section; it may be deleted"
        except UserError as error:
            told = str(error)
        lines.append(f"{path.name}  {_size(path)}  {told}")
    older = [folder / name for name in OLD_NAMES if (folder / name).is_dir()]
    return [*lines, *(f"{path.name}  {_size(path)}  made by an older version; delete it" for path in older)]


def _size(folder: Path) -> str:
    return f"{folder_bytes(folder) / 2**30:.2f} GiB"


def _describe(section: Section, config: Config, settings: Settings) -> str:
    whole = section.variants()
    holds = ", ".join(
        f"{stream} {count:,} x {whole[stream]}" for stream, count in sorted(section.samples.items())
    )
    return f"{holds}  {_verdict(section, config, settings)}"


def _verdict(section: Section, config: Config, settings: Settings) -> str:
    grid = config.model.exemplar_encoder.token_grid
    for candidate in (settings, with_all_tokens(settings, grid)):
        if candidate is not None and not differences(section.settings, candidate):
            wanted = variants_of(config)
            if section.is_ready(wanted):
                return "serves this configuration"
            missing = len(section.missing(wanted))
            return f"fits, unfinished: {missing} of {len(list(section.plan(wanted)))} shards are missing"
    return f"does not fit: {'; '.join(differences(section.settings, settings))}"
