"""Building a latent cache: in parts, by many, killed at any moment, always the same bytes."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import pbe.files as files_module
import pbe.training.latent_cache.builder as builder_module
from pbe.config import Config
from pbe.data.shards.archive import ShardRecord, write_shards
from pbe.errors import UserError
from pbe.files import try_lock
from pbe.models import LatentDiffusion
from pbe.training.latent_cache.builder import ensure_cache, find_cache, size_on_disk
from pbe.training.latent_cache.settings import settings_of
from pbe.training.latent_cache.store import LatentStore, store_folder
from pbe.training.resume.signals import StopSignals, TrainingStopped
from pbe.training.tasks.encoding import EncodedBatch, encode_batch
from tests.training.cached import BATCH, SHARDS, VARIANTS, Encoder, content, full, prepare, settings
from tests.training.tiny import run, tiny_config

Built = tuple[LatentDiffusion, Config, LatentStore]


@pytest.fixture(scope="module")
def built(shards, autoencoder, tmp_path_factory) -> Built:
    """A model, a configuration and its cache, made by one process in one go."""
    model, config = prepare(shards, autoencoder, tmp_path_factory.mktemp("cache"))
    return model, config, ensure_cache(config, model)


def moved(config: Config, folder: Path, variants: int = VARIANTS) -> Config:
    """Return a configuration with a cache elsewhere."""
    return replace(config, cache=replace(config.cache, folder=str(folder), variants=variants))


def tars(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.tar")}


def test_a_section_holds_what_its_list_says(built):
    _, config, store = built
    present = {path.name: path.stat().st_size for path in store.folder.glob("*.tar")}
    assert len(present) == SHARDS
    assert {entry["name"]: entry["bytes"] for entry in store.listed} == present
    assert (store.samples, store.variants()) == (
        {"train": 8, "validation": 8},
        {"train": 3, "validation": 1},
    )
    names = set(os.listdir(store.folder))
    assert names == {"shards.json", *present, *(name[:-4] + ".index.npz" for name in present)}
    assert os.listdir(config.cache.folder) == [store.folder.name]


def test_a_build_that_breaks_off_goes_on_where_it_was(built, tmp_path, monkeypatch):
    config = moved(built[1], tmp_path)
    Encoder(monkeypatch, 4, full)
    with pytest.raises(UserError, match=r"cannot write the latent cache '.*': No space left .* resumes"):
        ensure_cache(config, built[0])
    assert tars(tmp_path) == {f"train-00{v}-00000{n}.tar" for v, n in ((0, 0), (0, 1), (1, 0))}
    assert not list(tmp_path.rglob("*.tmp"))
    rest = Encoder(monkeypatch)
    ensure_cache(config, built[0])
    assert rest.calls == SHARDS - 3
    assert content(tmp_path) == content(Path(built[1].cache.folder))


@pytest.mark.parametrize("at", range(1, 2 * SHARDS + 2))
def test_a_death_at_any_write_leaves_nothing_half(built, tmp_path, monkeypatch, at: int):
    """The last write is of the list; before each shard comes its index."""
    reference = content(Path(built[1].cache.folder))
    replace_file, writes = os.replace, []

    def dying(temporary: Path, path: Path) -> None:
        writes.append(path)
        if len(writes) == at:
            data = temporary.read_bytes()
            path.with_name(f".{path.name}.123.tmp").write_bytes(data[: len(data) // 2])
            raise TrainingStopped
        replace_file(temporary, path)

    config = moved(built[1], tmp_path)
    # what is encoded is known; only the order of writing matters here
    rows = {name: value for name, value in reference.items() if name.endswith((".tar", ".npz"))}

    def copying(path: Path, *_: Any) -> None:
        for copy in (path.with_suffix(".index.npz"), path):
            files_module.atomic_write(copy, rows[f"{path.parent.name}/{copy.name}"])

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        patch.setattr(builder_module, "write_shard", copying)
        patch.setattr(
            builder_module, "to_records", lambda batch, record: np.empty(len(batch["sample_index"]), record)
        )
        patch.setattr(builder_module, "encode", lambda config, model, batch: batch)
        with pytest.raises(TrainingStopped):
            ensure_cache(config, built[0])
        for name, data in content(tmp_path).items():
            assert name.endswith((".tmp", "shards.json")) or data == reference[name]
        patch.setattr(os, "replace", replace_file)
        ensure_cache(config, built[0])
    assert content(tmp_path) == reference


def test_a_stop_in_a_build_is_clean(built, tmp_path, monkeypatch):
    stop = StopSignals()
    encoder = Encoder(monkeypatch, 3, lambda: setattr(stop, "received", signal.SIGTERM))
    with pytest.raises(TrainingStopped):
        ensure_cache(moved(built[1], tmp_path), built[0], check=stop.check)
    assert encoder.calls == 3
    assert len(tars(tmp_path)) == 3
    assert not list(tmp_path.rglob("*.lock"))


def test_a_signal_in_a_build_ends_the_run_cleanly(shards, autoencoder, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run", autoencoder, *settings(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        Encoder(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = run(config)
    assert (result.steps, result.stopped_by) == (0, signal.SIGTERM)
    rest = Encoder(monkeypatch)
    assert run(config).steps == 3
    assert rest.calls == SHARDS - 2


def build_apart(config: Config, model: LatentDiffusion, log: Path, killed_at: int) -> None:
    """Build in a process of its own; note every batch, and die without a word before one of them."""

    def noting(*args: Any) -> EncodedBatch:
        nonlocal killed_at
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        killed_at -= 1
        if killed_at == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return encode_batch(*args)

    builder_module.encode_batch = noting
    builder_module.POLL_SECONDS = files_module.POLL_SECONDS = 0.01
    ensure_cache(config, model)


def test_builders_share_the_work_and_outlive_each_other(built, tmp_path):
    config, log = moved(built[1], tmp_path / "cache"), tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=build_apart, args=(config, built[0], log, at), daemon=True) for at in (2, 0, 0)
    ]
    processes[0].start()
    while not log.exists():
        time.sleep(0.01)
    for process in processes[1:]:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0]
    batches = Counter(log.read_text().split())
    assert len(batches) > 1
    assert batches.total() == SHARDS + 1, "nothing is made twice but what the dead one was at"
    ensure_cache(config, built[0])
    assert content(tmp_path / "cache") == content(Path(built[1].cache.folder))


def test_loading_processes_change_nothing(built, tmp_path):
    config = moved(built[1], tmp_path)
    ensure_cache(replace(config, data=replace(config.data, num_workers=1)), built[0])
    assert content(tmp_path) == content(Path(built[1].cache.folder))


def test_parts_of_an_array_add_up_to_the_whole(built, tmp_path, monkeypatch):
    config = moved(built[1], tmp_path)
    encoder = Encoder(monkeypatch)
    ensure_cache(config, built[0], share=(1, 3))
    assert tars(tmp_path) == {
        f"{name}.tar" for name in ("train-000-000001", "train-002-000000", "validation-000-000001")
    }
    assert find_cache(config, built[0]) is None
    for part in (0, 2):
        ensure_cache(config, built[0], share=(part, 3))
    assert encoder.calls == SHARDS
    assert content(tmp_path) == content(Path(built[1].cache.folder))
    assert find_cache(config, built[0]) is not None


def test_more_variants_are_added_and_fewer_are_served(built, tmp_path, monkeypatch):
    model, config = built[0], built[1]
    first = Encoder(monkeypatch)
    ensure_cache(moved(config, tmp_path, 1), model)
    assert first.calls == 4
    more = Encoder(monkeypatch)
    ensure_cache(moved(config, tmp_path, VARIANTS), model)
    assert more.calls == SHARDS - 4
    assert content(tmp_path) == content(Path(config.cache.folder))
    monkeypatch.setattr(builder_module, "_Builder", None)
    for variants in (1, 2, VARIANTS):
        ensure_cache(moved(config, tmp_path, variants), model)
    assert find_cache(moved(config, tmp_path, VARIANTS + 1), model) is None


def test_other_settings_get_a_section_of_their_own_beside_it(built, tmp_path, monkeypatch):
    model, config = built[0], moved(built[1], tmp_path, 1)
    other = replace(config, seed=config.seed + 1)
    stores = [ensure_cache(c, model) for c in (config, other)]
    assert len({store.folder for store in stores}) == 2
    never = Encoder(monkeypatch)
    assert [ensure_cache(c, model).folder for c in (config, other)] == [s.folder for s in stores]
    assert never.calls == 0


def test_what_the_nearest_store_differs_in_is_told(built, tmp_path, caplog):
    """A path spelled in another way costs a new store; nobody should have to guess why."""
    config = moved(built[1], tmp_path, 1)
    ensure_cache(config, built[0])
    damaged = tmp_path / ("d" * 12)
    damaged.mkdir()
    (damaged / "shards.json").write_text("{")
    assert "fit" not in caplog.text, "there was none before it"
    other = replace(config, data=replace(config.data, train_shards=f"{config.data.train_shards}/"))
    ensure_cache(other, built[0])
    name, spelled = (
        store_folder(config.cache.folder, settings_of(config, built[0])).name,
        other.data.train_shards,
    )
    told = f"the nearest, {name}, has data.train_shards {config.data.train_shards}, not {spelled}"
    assert told in caplog.text


def test_who_waits_for_others_can_be_stopped_and_takes_over_from_the_dead(built, tmp_path, monkeypatch):
    monkeypatch.setattr(builder_module, "POLL_SECONDS", 0.01)
    model, config = built[0], moved(built[1], tmp_path, 1)
    store = ensure_cache(config, model, share=(1, 4))
    shard = store.missing({"train": 1})[0]
    claim = try_lock(store.folder / f".{shard.name.removesuffix('.tar')}.lock")
    polls: list[int] = []

    def check() -> None:
        polls.append(1)
        if len(polls) == 20:
            raise TrainingStopped

    with pytest.raises(TrainingStopped):
        ensure_cache(config, model, check=check)
    assert shard.name not in tars(tmp_path)
    assert tars(tmp_path) == {"train-000-000001.tar", "validation-000-000001.tar"}
    claim._file.close()  # as when a process dies: the lock file stays, the lock does not
    ensure_cache(config, model)
    assert not list(tmp_path.rglob("*.lock"))


def test_what_the_killed_left_is_swept_up_and_the_living_are_left_alone(built, tmp_path):
    model, config = built[0], moved(built[1], tmp_path, 1)
    store = ensure_cache(config, model, share=(0, 4))
    dead = store.folder / ".train-000-000001.tar.77.tmp"
    alive = store.folder / ".validation-000-000000.tar.78.tmp"
    lists = store.folder / ".shards.json.79.tmp"
    for path in (dead, alive, lists):
        path.touch()
    claim = try_lock(store.folder / ".validation-000-000000.lock")
    ensure_cache(config, model, share=(0, 4))
    assert [path.exists() for path in (dead, alive, lists)] == [False, True, False]
    claim.release()


def test_a_file_system_without_locks_is_no_obstacle(built, tmp_path, monkeypatch, caplog):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    ensure_cache(moved(built[1], tmp_path), built[0])
    assert content(tmp_path) == content(Path(built[1].cache.folder))
    assert "has no file locks: give every builder its own part by --shard" in caplog.text


def test_a_disk_too_small_is_told_before_anything_is_encoded(built, tmp_path, monkeypatch):
    config = moved(built[1], tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    encoder = Encoder(monkeypatch)
    with pytest.raises(UserError, match=r"needs 0.00 GiB more, but the disk has 0.00; make room"):
        ensure_cache(config, built[0])
    assert encoder.calls == 0


def test_the_size_is_told_beforehand(built):
    model, config, store = built
    size = size_on_disk(config, model)
    assert size.total == sum(path.stat().st_size for path in store.folder.glob("*.tar"))
    assert size.sample == store.layout.stride
    assert size.samples == {"train": (VARIANTS, 8), "validation": (1, 8)}


def test_a_deleted_shard_is_built_again_with_the_same_bytes(built, tmp_path, monkeypatch):
    shutil.copytree(built[1].cache.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    config = moved(built[1], tmp_path / "copy")
    (tmp_path / "copy" / built[2].folder.name / "train-001-000000.tar").unlink()
    again = Encoder(monkeypatch)
    ensure_cache(config, built[0])
    assert again.calls == 1
    assert content(tmp_path / "copy") == content(Path(built[1].cache.folder))


def test_damage_is_one_clear_line(built, tmp_path):
    shutil.copytree(built[1].cache.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    config, folder = moved(built[1], tmp_path / "copy"), tmp_path / "copy" / built[2].folder.name
    tar = folder / "train-001-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"'.*train-001-000000.tar' is damaged; delete it"):
        ensure_cache(config, built[0])
    whole = (folder / "shards.json").read_bytes()
    for text in (whole[:-30], b"[]", b"{}", whole.replace(b'"rows"', b'"crows"')):
        (folder / "shards.json").write_bytes(text)
        with pytest.raises(UserError, match=r"'.*shards.json' is damaged \(.*\); delete '.*' to have it"):
            ensure_cache(config, built[0])
    (folder / "shards.json").write_bytes(whole.replace(b'"version": 1', b'"version": 9'))
    with pytest.raises(UserError, match="is of version 9, not 1; delete"):
        ensure_cache(config, built[0])
    (folder / "shards.json").write_bytes(whole.replace(b'"seed": 23', b'"seed": 24'))
    with pytest.raises(UserError, match="is not what its name says"):
        ensure_cache(config, built[0])


def test_a_cache_of_before_is_named_as_what_it_is(built, tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"'.*' was made by an older version; delete '.*train'"):
        ensure_cache(moved(built[1], tmp_path), built[0])


def test_a_url_is_refused_before_anything_is_made(built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = replace(built[1].cache, folder="s3://bucket/cache")
    with pytest.raises(UserError, match=r"on a local or shared disk; cache.folder 's3://.*' is a URL"):
        ensure_cache(replace(built[1], cache=cache), built[0])
    assert not list(tmp_path.iterdir())


def test_too_many_unusable_images_end_the_build(built, tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    good = cv2.imencode(".png", picture)[1].tobytes()
    records = [
        ShardRecord(str(number), good if number else good[:60], "png", 40, 40, [(8, 8, 32, 32)])
        for number in range(8)
    ]
    write_shards(records, tmp_path / "shards")
    config = moved(built[1], tmp_path / "cache", 1)
    data = replace(config.data, train_shards=str(tmp_path / "shards"), validation_shards="")
    with pytest.raises(UserError, match=r"too many train images cannot be used \(.*: 1\)"):
        ensure_cache(replace(config, data=data), built[0])
    patient = replace(config, data=replace(data, max_bad_share=0.2))
    store = ensure_cache(patient, built[0])
    counts, samples = store.counts("train")
    assert (sum(counts.values()) >= 1, samples) == (True, 8)
    assert store.folder == store_folder(config.cache.folder, settings_of(patient, built[0]))


def test_shards_are_whole_batches_of_about_64_mebibytes(built, tmp_path):
    config = moved(built[1], tmp_path)
    config = replace(config, cache=replace(config.cache, shard_samples=0))
    store = ensure_cache(replace(config, cache=replace(config.cache, variants=1)), built[0])
    assert store.rows % BATCH == 0
    assert 0.99 * 2**26 < store.layout.tar_size(store.rows) <= 2**26 + 2**14
