"""The names of the official model's weights in every layout, on the meta device."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pbe.checkpoints.compvis import names as compvis_names
from pbe.checkpoints.compvis.format import derived_buffers, original_weights
from pbe.checkpoints.diffusers import names as diffusers_names
from pbe.checkpoints.key_map import PARTS, Entry, native_shapes, to_foreign, to_native
from pbe.checkpoints.tensors import Lazies
from pbe.config import ModelConfig
from tests.checkpoints.small import OFFICIAL_HASH, small_config

CONFIGS = {"official": ModelConfig(), "small": small_config()}


@pytest.fixture(scope="module")
def official() -> Lazies:
    return native_shapes(ModelConfig())


def shapes(tensors: Lazies) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def diffusers_entries(config: ModelConfig, native: Lazies) -> list[Entry]:
    return [
        entry
        for part in PARTS
        for entry in diffusers_names.entries(
            part, config.exemplar_encoder, [key for key in native if key.startswith(f"{part}.")]
        )
    ]


def test_the_original_layout_has_the_official_files_keys_and_shapes(official: Lazies) -> None:
    """All 1,403 of them; the hash is that of the published list, sorted, a line a key."""
    config = ModelConfig()
    state = original_weights(config, official) | derived_buffers(config, official)
    assert len(state) == 1403
    lines = "\n".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(state.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == OFFICIAL_HASH
    assert sum(tensor.count for tensor in state.values()) == 1_310_140_139 + 12 * 1000 + 257


def test_the_published_list(official: Lazies, golden: Path) -> None:
    path = golden.parent / "reference" / "checkpoint_manifest.json"
    if not path.is_file():
        pytest.skip("the list of the official file's keys is not there")
    config = ModelConfig()
    state = original_weights(config, official) | derived_buffers(config, official)
    wanted = json.loads(path.read_text())["keys"]
    assert shapes(state) == {key: tuple(shape) for key, shape in wanted.items()}


def test_pairs_of_names_with_diffusers(official: Lazies, golden: Path) -> None:
    """Every row of the published table: the original's key and the key (or the three keys) of diffusers."""
    rows = [line.split("\t") for line in (golden / "diffusers" / "key_map_full.tsv").read_text().splitlines()]
    config = ModelConfig()
    original = {e.native: e for e in compvis_names.entries(config, list(official))}
    pairs = set()
    for entry in diffusers_entries(config, official):
        names = original[entry.native].foreign
        pairs |= set(
            zip(names if len(names) == 3 else names * len(entry.foreign), entry.foreign, strict=True)
        )
    assert pairs == {(row[1], row[2]) for row in rows[1:]}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_there_and_back(name: str) -> None:
    config = CONFIGS[name]
    native = native_shapes(config)
    for entries in (compvis_names.entries(config, list(native)), diffusers_entries(config, native)):
        foreign = to_foreign(entries, native)
        keys = [key for entry in entries for key in entry.foreign]
        assert len(keys) == len(set(keys)) == len(foreign)
        assert shapes(to_native(entries, foreign, native, "here")) == shapes(native)
        # the shapes are said without reading; reading has to agree
        assert all(tuple(tensor.read().shape) == tensor.shape for tensor in foreign.values())


def test_native_keys_of_the_official_model(official: Lazies) -> None:
    assert sum(tensor.count for tensor in official.values()) == 1_310_140_139
    counts = {part: sum(key.startswith(f"{part}.") for key in official) for part in PARTS}
    assert counts["unet"] == 686
    assert counts["autoencoder"] == 248
