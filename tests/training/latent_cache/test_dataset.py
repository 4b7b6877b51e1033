"""The latent cache holds what encoding online gives, and training from it is what it was."""

from __future__ import annotations

import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

import pbe.training.latent_cache.builder as builder_module
from pbe.config import Config
from pbe.data.datamodule import TrainingData
from pbe.data.dataset import collate
from pbe.data.randomness import permutation
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.codec import Posterior
from pbe.training.latent_cache.builder import ensure_cache
from pbe.training.latent_cache.dataset import CachedDataModule, CachedSamples
from pbe.training.latent_cache.store import (
    LatentStore,
    Layout,
    from_records,
    to_records,
    write_shard,
)
from pbe.training.optimization.optimizer import make_optimizer
from pbe.training.tasks.diffusion import DiffusionTask
from pbe.training.tasks.encoding import EncodedBatch, draw, encode_batch
from tests.training.cached import BATCH, FIELDS, PICTURES, VARIANTS, online, prepare, settings, tensors
from tests.training.tiny import logged, run, tiny_config

HALF = 2.0**-11  # relative rounding of half precision
Built = tuple[LatentDiffusion, Config, LatentStore]


@pytest.fixture(scope="module")
def built(shards, autoencoder, tmp_path_factory) -> Built:
    """A model, a configuration and its cache."""
    model, config = prepare(shards, autoencoder, tmp_path_factory.mktemp("cache"))
    return model, config, ensure_cache(config, model)


def samples_of(built: Built, stream: str = "train", seed: int | None = None) -> CachedSamples:
    _, config, store = built
    variants = VARIANTS if stream == "train" else 1
    return CachedSamples(store, stream, variants, config.seed if seed is None else seed)


@pytest.mark.parametrize(("stream", "count"), [("train", PICTURES * VARIANTS), ("validation", 8)])
def test_rows_are_what_encoding_online_gives(built, stream: str, count: int):
    stored = samples_of(built, stream)
    assert len(stored) == count
    cached = tensors(stored.batch([(row, row) for row in range(count)]))
    fresh = tensors(online(built[0], built[1], list(range(count)), stream))
    for name, expected in fresh.items():
        assert cached[name].dtype == torch.float32
        # rounding to half, and a batch of another size, which adds up in another order
        error = (cached[name] - expected).abs() - HALF * expected.abs()
        assert float(error.max()) < 2e-5 * float(expected.abs().max()), name
    for name in ("keep_mask", "valid"):
        assert torch.equal(cached[name], fresh[name]), "masks are exact"


def memory_maps(model: LatentDiffusion, config: Config) -> dict[str, np.ndarray]:
    """Return the arrays that the cache was before it had shards: half precision, in the stream's order."""
    dataset = TrainingData(config).dataset("train")
    parts = []
    for epoch in range(VARIANTS):
        for first in range(0, PICTURES, BATCH):
            counters = range(epoch * PICTURES + first, epoch * PICTURES + min(first + BATCH, PICTURES))
            encoded = tensors(encode_batch(model, collate([dataset[index] for index in counters])))
            parts.append({name: value.to(torch.float16).numpy() for name, value in encoded.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in FIELDS}


def test_losses_are_those_of_the_memory_maps_to_the_last_bit(built):
    model, config, store = built
    arrays, count = memory_maps(model, config), PICTURES * VARIANTS
    loader = CachedDataModule(config, store).train_dataloader()
    cached = [*loader, *loader]
    assert len(cached) == 2 * count // config.data.batch_size
    old = []
    for number in range(len(cached)):
        counters = [number * config.data.batch_size + i for i in range(config.data.batch_size)]
        rows = [
            int(permutation(count, config.seed, "cache", "order", c // count)[c % count]) for c in counters
        ]
        values = [torch.from_numpy(arrays[name][rows].astype(np.float32)) for name in FIELDS]
        posteriors = Posterior(*values[:2]), Posterior(*values[2:4])
        old.append(EncodedBatch(*posteriors, *values[4:], torch.tensor(counters)))
    for new, before in zip(cached, old, strict=True):
        assert torch.equal(new.sample_index, before.sample_index)
        for name, value in tensors(new).items():
            assert torch.equal(value, tensors(before)[name]), name
    state = {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    for batches in (cached, old):
        model.load_state_dict(state)
        results.append(losses_of(DiffusionTask(config, model), batches[:6]))
    model.load_state_dict(state)
    assert results[0] == results[1]


def test_variants_of_an_image_differ(built):
    count = PICTURES * VARIANTS
    features = samples_of(built).batch([(row, row) for row in range(count)]).features
    assert len(np.unique(features.reshape(count, -1).numpy(), axis=0)) == count


def test_each_epoch_is_a_permutation_of_its_own(built):
    count, samples = PICTURES * VARIANTS, samples_of(built)
    epochs = [[samples[epoch * count + i][1] for i in range(count)] for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(count))
    assert epochs[0] != epochs[1] != epochs[2]
    again = samples_of(built)
    assert [again[count + i][1] for i in (4, 0, 9)] == [epochs[1][i] for i in (4, 0, 9)]
    other = samples_of(built, seed=built[1].seed + 1)
    assert [other[i][1] for i in range(count)] != epochs[0]


def test_batches_carry_the_global_counter_not_the_row(built):
    _, config, store = built
    loader = CachedDataModule(config, store).train_dataloader()
    first, second = list(loader), list(loader)
    counters = torch.cat([batch.sample_index for batch in [*first, *second]])
    assert counters.tolist() == list(range(2 * PICTURES * VARIANTS))
    stored = samples_of(built)
    assert torch.equal(second[0].features, stored.batch([stored[24], stored[25]]).features)


def test_webdataset_reads_the_shards(built):
    store = built[2]
    tars = sorted(str(path) for path in store.folder.glob("train-*.tar"))
    assert len(tars) == 2 * VARIANTS
    found = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert len({sample["__key__"] for sample in found}) == PICTURES * VARIANTS
    assert found[PICTURES + 2]["__key__"] == "001-000000002"
    stored = samples_of(built).batch([(0, row) for row in range(len(found))])
    for row, sample in enumerate(found):
        record = sample["npy"]
        assert np.array_equal(record["image_mean"].astype(np.float32), stored.image.mean[row].numpy())
        assert np.array_equal(record["keep_mask"] / 252.0, stored.keep_mask[row].double().numpy())


def test_the_tar_is_a_tar_and_its_index_says_where_the_rows_are(built):
    store = built[2]
    tar, index_file = (store.folder / f"train-001-000001{end}" for end in (".tar", ".index.npz"))
    index, data = np.load(index_file), tar.read_bytes()
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
        values = [np.load(io.BytesIO(archive.extractfile(member).read())) for member in members]
    assert [member.name for member in members] == [f"001-{position:09d}.npy" for position in (5, 6, 7)]
    assert len(data) == tar.stat().st_size == store.layout.tar_size(3) == int(index["tar_size"])
    for value, offset, size in zip(values, index["row_offset"], index["row_size"], strict=True):
        assert data[offset : offset + size] == value.tobytes()


@pytest.mark.parametrize("rows", [1, 7, 30])
def test_tars_of_any_number_of_rows_are_whole(rows: int, tmp_path: Path):
    record = np.dtype([("image_mean", "<f2", (2, 3, 3)), ("valid", "|u1", (1, 3, 3))])
    values = np.random.default_rng(rows).integers(0, 255, (rows, record.itemsize), np.uint8)
    records = values.view(record)[:, 0]
    write_shard(tmp_path / "a.tar", records, 2, 11)
    assert (tmp_path / "a.tar").stat().st_size == Layout(record).tar_size(rows)
    with tarfile.open(tmp_path / "a.tar") as tar:
        read = [np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar]
    assert [value.tobytes() for value in read] == [value.tobytes() for value in records]


def test_records_keep_quarters_of_masks_exactly_and_one_token_of_many():
    quarters = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).view(1, 1, 1, 5)
    posterior = Posterior(torch.randn(1, 2, 1, 5), torch.rand(1, 2, 1, 5))
    batch = EncodedBatch(
        posterior, posterior, quarters, 1 - quarters, torch.randn(1, 4, 6), torch.tensor([3])
    )
    shapes = {name: value.shape[1:] for name, value in tensors(batch).items()}
    latent, mask = tuple(shapes["image.mean"]), tuple(shapes["valid"])
    fields = [(name, "<f2", latent) for name in ("image_mean", "image_std", "masked_mean", "masked_std")]
    fields += [(name, "|u1", mask) for name in ("keep_mask", "valid")]
    records = to_records(batch, np.dtype([*fields, ("features", "<f2", tuple(shapes["features"]))]))
    back = from_records(records, batch.sample_index)
    assert torch.equal(back.keep_mask, quarters)
    assert torch.equal(back.valid, 1 - quarters)
    assert torch.equal(back.features, batch.features.half().float())
    first = from_records(records, batch.sample_index, class_only=True).features
    assert torch.equal(first, back.features[:, :1])
    assert torch.equal(back.image.std, posterior.std.half().float())


def damaged(built: Built, tmp_path: Path) -> tuple[LatentStore, Path]:
    store = replace(built[2], folder=tmp_path / built[2].folder.name)
    shutil.copytree(built[2].folder, store.folder)
    return store, store.folder / "train-000-000001.tar"


def test_a_shard_that_is_gone_or_cut_short_is_one_clear_line(built, tmp_path):
    store, tar = damaged(built, tmp_path)
    stored = CachedSamples(store, "train", VARIANTS, 0)
    whole = tar.read_bytes()
    tar.write_bytes(whole[: store.layout.stride])
    with pytest.raises(UserError, match=r"cache cannot be read: .*train-000-000001.tar.* delete that shard"):
        stored.batch([(0, BATCH + 1)])
    tar.unlink()
    with pytest.raises(UserError, match=r"the latent cache cannot be read: .*No such file"):
        CachedSamples(store, "train", VARIANTS, 0).batch([(0, BATCH + 1)])


def test_a_changed_byte_is_found_where_rows_are_verified(built, tmp_path):
    store, tar = damaged(built, tmp_path)
    whole = bytearray(tar.read_bytes())
    whole[store.layout.offset(1) + 40] ^= 1
    tar.write_bytes(whole)
    CachedSamples(store, "train", VARIANTS, 0).batch([(0, BATCH + 1)])
    checking = CachedSamples(store, "train", VARIANTS, 0, verify=True)
    checking.batch([(0, BATCH), (1, BATCH + 2), (2, 0)])
    with pytest.raises(UserError, match=r"row 1 of .* is not what was written"):
        checking.batch([(0, BATCH + 1)])


def losses_of(task: DiffusionTask, batches: list[EncodedBatch]) -> list[float]:
    """Train on batches and return the loss of each."""
    optimizer, scheduler = make_optimizer(task, task.config.optimizer, 100)
    losses = []
    for batch in batches:
        draws = draw(task.config.seed, batch.sample_index, (8, 8, 8), task.schedule.timesteps)
        plain, weight = task.losses(batch, draws, draws.drop < 0.2)
        loss = (plain * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_on_the_cache_equals_training_online(built):
    model, config, store = built
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loader = CachedDataModule(config, store).train_dataloader()
    cached = [batch for _, batch in zip(range(6), loader, strict=False)]
    order = samples_of(built)
    fresh = []
    for batch in cached:
        rows = [order[index][1] for index in batch.sample_index.tolist()]
        encoded = online(model, config, rows, "train")
        fresh.append(replace(encoded, sample_index=batch.sample_index))
    results = []
    for batches in (cached, fresh):
        model.load_state_dict(state)
        results.append(losses_of(DiffusionTask(config, model), batches))
    model.load_state_dict(state)
    torch.testing.assert_close(*(torch.tensor(r) for r in results), rtol=1e-3, atol=0)
    assert results[0] != results[1], "the cache is rounded to half precision"


def test_train_builds_the_cache_and_uses_it_on_the_second_start(shards, autoencoder, tmp_path, monkeypatch):
    changes = [autoencoder, *settings(tmp_path / "cache", variants=2)]
    run(tiny_config(shards, tmp_path / "a", *changes))
    monkeypatch.setattr(builder_module, "_Builder", None)
    run(tiny_config(shards, tmp_path / "b", *changes))
    assert logged(tmp_path / "a", "train/") == logged(tmp_path / "b", "train/")
    assert logged(tmp_path / "a", "val/") == logged(tmp_path / "b", "val/")
    steps = {step for step, _, _ in logged(tmp_path / "a", "train/")}
    assert steps == {1, 2, 3}


def test_indices_stay_on_the_cpu_when_a_batch_moves():
    posterior = Posterior(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3))
    keep, index = torch.ones(1, 1, 3, 3), torch.tensor([5])
    moved = EncodedBatch(posterior, posterior, keep, keep, keep, index).to(torch.device("meta"))
    assert {value.device.type for value in tensors(moved).values()} == {"meta"}
    assert moved.sample_index.device.type == "cpu"
