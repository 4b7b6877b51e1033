"""The latent cache holds what encoding online gives, and refuses to be used for anything else."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pbe.training.cache_builder as cache_module
from pbe.config import Config
from pbe.data.datamodule import ExemplarDataModule
from pbe.data.dataset import collate
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.autoencoder import Posterior
from pbe.training.cache_builder import ensure_cache
from pbe.training.diffusion_task import DiffusionTask
from pbe.training.draws import draw
from pbe.training.encoding import EncodedBatch, encode_batch
from pbe.training.latent_cache import CachedDataModule, CachedSamples, fingerprint
from pbe.training.optimizer import make_optimizer
from pbe.training.run import build_model
from pbe.training.stopping import StopSignals, TrainingStopped
from tests.training.tiny import logged, run, tiny_config

PICTURES, VARIANTS = 8, 3
HALF = 2.0**-11  # relative rounding of half precision
FIELDS = ("image.mean", "image.std", "masked.mean", "masked.std", "keep_mask", "valid", "features")


def build(shards: Path, autoencoder: str, folder: Path, *overrides: str) -> tuple[LatentDiffusion, Config]:
    settings = [f"cache.folder={folder}", f"cache.variants={VARIANTS}", "cache.batch_size=5", *overrides]
    return build_model(tiny_config(shards, folder / "run", autoencoder, *settings))


@pytest.fixture(scope="module")
def built(shards, autoencoder, tmp_path_factory) -> tuple[LatentDiffusion, Config]:
    """A model and a configuration whose cache exists."""
    model, config = build(shards, autoencoder, tmp_path_factory.mktemp("cache"))
    ensure_cache(config, model)
    return model, config


def tensors(batch: EncodedBatch) -> dict[str, torch.Tensor]:
    flat = (*batch.image, *batch.masked, batch.keep_mask, batch.valid, batch.features)
    return dict(zip(FIELDS, flat, strict=True))


def online(model: LatentDiffusion, config: Config, indices: list[int], stream: str) -> EncodedBatch:
    dataset = ExemplarDataModule(config.data, config.seed).dataset(stream)
    return encode_batch(model, collate([dataset[index] for index in indices]))


@pytest.mark.parametrize(("stream", "count"), [("train", PICTURES * VARIANTS), ("validation", 8)])
def test_rows_are_what_encoding_online_gives(built, stream: str, count: int):
    model, config = built
    stored = CachedSamples(Path(config.cache.folder) / stream, config.seed, shuffled=False)
    assert len(stored) == count
    cached = tensors(stored.batch([(row, row) for row in range(count)]))
    fresh = tensors(online(model, config, list(range(count)), stream))
    for name, expected in fresh.items():
        assert cached[name].dtype == torch.float32
        # rounding to half, and a batch of another size, which adds up in another order
        error = (cached[name] - expected).abs() - HALF * expected.abs()
        assert float(error.max()) < 2e-5 * float(expected.abs().max()), name


def test_variants_of_a_picture_differ(built):
    _, config = built
    stored = CachedSamples(Path(config.cache.folder) / "train", config.seed, shuffled=False)
    features = stored.arrays["features"].astype(np.float32).reshape(VARIANTS * PICTURES, -1)
    assert len(np.unique(features, axis=0)) == VARIANTS * PICTURES


def test_each_epoch_is_a_permutation_of_its_own(built):
    _, config = built
    folder, count = Path(config.cache.folder) / "train", PICTURES * VARIANTS
    samples = CachedSamples(folder, config.seed, shuffled=True)
    epochs = [[samples[epoch * count + i][1] for i in range(count)] for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(count))
    assert epochs[0] != epochs[1] != epochs[2]
    again = CachedSamples(folder, config.seed, shuffled=True)
    assert [again[count + i][1] for i in (4, 0, 9)] == [epochs[1][i] for i in (4, 0, 9)]
    other = CachedSamples(folder, config.seed + 1, shuffled=True)
    assert [other[i][1] for i in range(count)] != epochs[0]


def test_batches_carry_the_global_counter_not_the_row(built):
    _, config = built
    loader = CachedDataModule(config).train_dataloader()
    first, second = list(loader), list(loader)
    counters = torch.cat([batch.sample_index for batch in [*first, *second]])
    assert counters.tolist() == list(range(2 * PICTURES * VARIANTS))
    stored = CachedSamples(Path(config.cache.folder) / "train", config.seed, shuffled=True)
    expected = stored.batch([stored[24], stored[25]])
    assert torch.equal(second[0].features, expected.features)


def test_a_finished_cache_is_used_whatever_the_batches_and_the_mapper_are(built, monkeypatch):
    model, config = built

    def never(*_: object) -> None:
        raise AssertionError("the cache was built again")

    monkeypatch.setattr(cache_module, "_build", never)
    data = replace(config.data, batch_size=7, num_workers=3)
    encoder = replace(config.model.exemplar_encoder, mapper_layers=9)
    same = replace(config, data=data, model=replace(config.model, exemplar_encoder=encoder))
    assert ensure_cache(same, model) == Path(config.cache.folder)


def test_a_cache_of_other_settings_or_weights_is_refused(built):
    model, config = built
    sample = replace(config.data.sample, extend_fraction=0.1)
    others = [
        replace(config, seed=config.seed + 1),
        replace(config, cache=replace(config.cache, variants=2)),
        replace(config, data=replace(config.data, sample=sample)),
        replace(config, data=replace(config.data, min_box_area=0.1)),
        replace(config, data=replace(config.data, train_shards=config.data.validation_shards)),
        replace(config, trainer=replace(config.trainer, precision="bf16-mixed")),
    ]
    for other in others:
        with pytest.raises(
            UserError, match=r"^the latent cache '.*' was made with other .* delete it or name"
        ):
            ensure_cache(other, model)
    weight = model.autoencoder.encoder.conv_in.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0, 0, 0] += 1e-3
        with pytest.raises(UserError, match="other data settings or weights"):
            ensure_cache(config, model)
    finally:
        weight.data.copy_(kept)
    ensure_cache(config, model)


def test_the_fingerprint_covers_everything_that_encodes_and_nothing_else(shards, tmp_path):
    overrides = ["model.autoencoder.patch_shortcut=true", f"cache.folder={tmp_path}"]
    config = tiny_config(shards, tmp_path, *overrides)
    model = LatentDiffusion(config.model)
    mark = fingerprint(config, model)

    def changed_by(tensor: torch.Tensor) -> bool:
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[0] += 1.0
            changed = fingerprint(config, model) != mark
            tensor.copy_(kept)
        return changed

    autoencoder, encoder = model.autoencoder, model.exemplar_encoder
    assert changed_by(autoencoder.encoder.conv_in.bias)
    assert changed_by(autoencoder.quant_conv.bias)
    assert changed_by(autoencoder.patch_encoder.bias)
    assert changed_by(encoder.tower.trunk.conv_stem.weight)
    assert changed_by(encoder.tower.trunk.bn1.running_mean)
    assert not changed_by(autoencoder.decoder.conv_in.bias)
    assert not changed_by(encoder.proj.bias)
    assert not changed_by(model.unet.conv_in.bias)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*")}


class Encoder:
    """Counts the batches that are encoded, and does something before one of them."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, at: int = 0, action: Callable[[], None] = int
    ) -> None:
        self.calls = 0
        monkeypatch.setattr(cache_module, "encode_batch", self)
        self.at, self.action = at, action

    def __call__(self, *args: Any) -> EncodedBatch:
        self.calls += 1
        if self.calls == self.at:
            self.action()
        return encode_batch(*args)


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_build_that_breaks_off_goes_on_where_it_was(built, shards, autoencoder, tmp_path, monkeypatch):
    model, config = build(shards, autoencoder, tmp_path / "cache")
    # 8 pictures by 5: two batches for each of three variants, and two of the validation
    Encoder(monkeypatch, 4, full)
    with pytest.raises(UserError, match=r"cannot write the latent cache '.*': No space left .* goes on"):
        ensure_cache(config, model)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".lock", ".train.partial"}
    rest = Encoder(monkeypatch)
    ensure_cache(config, model)
    assert rest.calls == 8 - 3
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".lock", "train", "validation"}
    assert content(tmp_path / "cache") == content(Path(built[1].cache.folder))


def test_a_stop_in_a_build_is_clean_and_other_settings_start_anew(shards, autoencoder, tmp_path, monkeypatch):
    model, config = build(shards, autoencoder, tmp_path / "cache")
    stop = StopSignals()
    encoder = Encoder(monkeypatch, 3, lambda: setattr(stop, "received", signal.SIGTERM))
    with pytest.raises(TrainingStopped):
        ensure_cache(config, model, check=stop.check)
    assert encoder.calls == 3
    other = replace(config, seed=config.seed + 1)
    again = Encoder(monkeypatch)
    ensure_cache(other, model)
    assert again.calls == 8


def test_a_signal_in_a_build_ends_the_run_cleanly(shards, autoencoder, tmp_path, monkeypatch):
    settings = [autoencoder, f"cache.folder={tmp_path / 'cache'}", "cache.variants=3", "cache.batch_size=5"]
    config = tiny_config(shards, tmp_path / "run", *settings)
    with monkeypatch.context() as patch:
        Encoder(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = run(config)
    assert (result.steps, result.stopped_by) == (0, signal.SIGTERM)
    rest = Encoder(monkeypatch)
    assert run(config).steps == 3
    assert rest.calls == 8 - 2


def test_two_processes_that_want_the_same_cache_build_it_once(shards, autoencoder, tmp_path, monkeypatch):
    model, config = build(shards, autoencoder, tmp_path / "cache")
    encoder = Encoder(monkeypatch, 1, lambda: time.sleep(0.2))
    monkeypatch.setattr(cache_module, "POLL_SECONDS", 0.01)
    # a lock belongs to an open file, so two threads stand for two processes; the third may not build
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(ensure_cache, config, model, builds=builds) for builds in (True, True, False)]
        assert {job.result(timeout=120) for job in jobs} == {tmp_path / "cache"}
    assert encoder.calls == 8


def test_who_waits_for_a_cache_can_be_stopped(shards, autoencoder, tmp_path):
    model, config = build(shards, autoencoder, tmp_path / "cache")
    stop = StopSignals()
    stop.received = signal.SIGINT
    with pytest.raises(TrainingStopped):
        ensure_cache(config, model, check=stop.check, builds=False)
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TrainingStopped):
            ensure_cache(config, model, check=stop.check)


def test_a_damaged_description_is_one_clear_line(shards, autoencoder, tmp_path):
    model, config = build(shards, autoencoder, tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cache.json").write_text('{"fingerprint": ')
    with pytest.raises(UserError, match=r"'.*train' is not a latent cache \(.*\); delete it"):
        ensure_cache(config, model)


def test_the_description_says_what_is_inside(built):
    _, config = built
    meta = json.loads((Path(config.cache.folder) / "train" / "cache.json").read_text())
    assert (meta["count"], meta["pictures"], meta["stream"]) == (PICTURES * VARIANTS, PICTURES, "train")


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
    model, config = built
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loader = CachedDataModule(config).train_dataloader()
    cached = [batch for _, batch in zip(range(6), loader, strict=False)]
    order = CachedSamples(Path(config.cache.folder) / "train", config.seed, shuffled=True)
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
    settings = [autoencoder, f"cache.folder={tmp_path / 'cache'}", "cache.variants=2"]
    run(tiny_config(shards, tmp_path / "a", *settings))
    monkeypatch.setattr(cache_module, "_build", None)
    run(tiny_config(shards, tmp_path / "b", *settings))
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
