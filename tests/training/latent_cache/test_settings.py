"""What the content of a cache depends on, which caches serve whom, and why others do not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pbe.training.latent_cache.builder as builder_module
import pbe.training.latent_cache.settings as settings_module
from pbe.config import Config
from pbe.models import LatentDiffusion
from pbe.training.latent_cache.builder import describe_folder, ensure_cache
from pbe.training.latent_cache.dataset import CachedDataModule
from pbe.training.latent_cache.settings import differences, fingerprint, settings_of
from tests.training.cached import Encoder, prepare, tensors
from tests.training.tiny import tiny_config


@pytest.fixture(scope="module")
def tiny(shards, tmp_path_factory) -> tuple[LatentDiffusion, Config]:
    """A model with random weights and its configuration."""
    folder = tmp_path_factory.mktemp("settings")
    config = tiny_config(shards, folder, "model.autoencoder.patch_shortcut=true", f"cache.folder={folder}")
    return LatentDiffusion(config.model), config


def mark(config: Config, model: LatentDiffusion) -> str:
    return fingerprint(settings_of(config, model))


def test_all_that_shapes_the_content_counts(tiny, shards):
    model, config = tiny
    data, sample = config.data, config.data.sample
    encoder = config.model.exemplar_encoder
    others = [
        replace(config, seed=config.seed + 1),
        replace(config, data=replace(data, sample=replace(sample, extend_fraction=0.1))),
        replace(
            config, data=replace(data, sample=replace(sample, augment=replace(sample.augment, flip=0.4)))
        ),
        replace(config, data=replace(data, sample=replace(sample, antialias_above=2.0))),
        replace(config, data=replace(data, min_box_area=0.1)),
        replace(config, data=replace(data, boxes="every")),
        replace(config, data=replace(data, train_shards=data.validation_shards)),
        replace(config, trainer=replace(config.trainer, precision="bf16-mixed")),
        replace(config, model=replace(config.model, exemplar_encoder=replace(encoder, mean=[0.4, 0.4, 0.4]))),
    ]
    marks = [mark(other, model) for other in [config, *others]]
    assert len(set(marks)) == len(marks)


def test_what_only_loads_or_trains_does_not_count(tiny):
    model, config = tiny
    data = replace(config.data, batch_size=7, num_workers=3, max_bad_share=0.3, verify=True, remote_cache="x")
    data = replace(data, prior_shards=data.train_shards, prior_share=0.7)
    encoder = replace(config.model.exemplar_encoder, mapper_layers=9)
    same = [
        replace(config, data=data),
        replace(config, model=replace(config.model, exemplar_encoder=encoder)),
        replace(config, cache=replace(config.cache, variants=9, batch_size=3, shard_samples=7)),
        replace(config, trainer=replace(config.trainer, precision="16-mixed", max_steps=7)),
    ]
    assert {mark(other, model) for other in [config, *same]} == {mark(config, model)}


def test_a_new_setting_of_the_data_does_not_make_older_caches_useless():
    """Whoever adds one says in LOADING, MIXED_IN, NEUTRAL or here what it does to a cache."""
    counted = settings_module._counting(settings_module.shaping_settings(Config())["data"])
    sample = "arbitrary_mask_share bezier_jitter exemplar_padding extend_fraction min_box_cover"
    sample += " min_keep_share shrink_fraction squash"
    augment = "affine affine_jitter blur enabled flip rotate rotate_limit"
    names = {
        "exemplar_size",
        "image_size",
        "max_box_area",
        "min_box_area",
        "train_shards",
        "validation_shards",
    }
    names |= {f"sample.{name}" for name in sample.split()}
    names |= {f"sample.augment.{name}" for name in augment.split()}
    assert {name.removeprefix("data.") for name, _ in counted} == names


def test_the_weights_count_that_encode_and_no_others(tiny):
    model, config = tiny
    before = mark(config, model)

    def changed_by(tensor: torch.Tensor) -> bool:
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[0] += 1.0
            changed = mark(config, model) != before
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


def test_samples_that_are_made_otherwise_are_of_another_cache(tiny, monkeypatch):
    """An older cache holds samples whose padding shows the hidden object."""
    model, config = tiny
    ours = settings_of(config, model)
    monkeypatch.setattr(settings_module, "SAMPLES", 3)
    later = settings_of(config, model)
    assert fingerprint(ours) != fingerprint(later)
    older = {name: value for name, value in ours.items() if name != "version of the samples"}
    assert differences(older, ours) == ["version of the samples 1, not 2"]
    assert fingerprint(older) != fingerprint(ours)


def counting(values: dict[str, object]) -> dict[str, object]:
    return dict(settings_module._counting(values))


def test_newer_settings_count_where_they_change_something():
    older = {"min_box_area": 0.1, "sample": {"squash": True}}
    neutral = {"object_mask_share": 0.0, "object_mask_dilate": 9, "antialias_above": 1.0}
    newer = {**older, "boxes": "one", "reduced_decoding": False, "sample": {"squash": True, **neutral}}
    assert counting(newer) == counting(older)
    masks = {"object_mask_share": 0.5, "object_mask_dilate": 9}
    used = {"min_box_area": 0.1, "sample": {"squash": True, **masks}}
    assert counting(used).keys() - counting(older).keys() == {
        "data.sample.object_mask_share", "data.sample.object_mask_dilate"
    }  # fmt: skip
    assert counting({**older, "reduced_decoding": True})["data.reduced_decoding"] is True


def test_differences_are_told_in_words():
    ours = {"seed": 1, "files of data.train_shards": "aa", "data.x": 2, "tower's weights": "c"}
    theirs = {"seed": 2, "files of data.train_shards": "bb", "data.boxes": "every", "tower's weights": "c"}
    assert differences(theirs, ours) == [
        "data.boxes every, not one",
        "data.x unset, not 2",
        "other files of data.train_shards",
        "seed 2, not 1",
    ]
    assert differences(ours, ours) == []


@pytest.mark.parametrize("more", [(), ("pooled_stages=true", "token_grid=2")], ids=["plain", "stages"])
def test_a_cache_of_all_tokens_serves_the_class_token(shards, autoencoder, tmp_path, monkeypatch, more):
    shape = [f"model.exemplar_encoder.{setting}" for setting in more]
    tokens = "model.exemplar_encoder.tokens="
    everything, all_config = prepare(shards, autoencoder, tmp_path / "a", f"{tokens}all", *shape, variants=1)
    wide = ensure_cache(all_config, everything)
    model, config = prepare(shards, autoencoder, tmp_path / "a", f"{tokens}class", *shape, variants=1)
    never = Encoder(monkeypatch)
    served = ensure_cache(config, model)
    assert (served.folder, never.calls) == (wide.folder, 0)
    alone = replace(config, cache=replace(config.cache, folder=str(tmp_path / "b")))
    own = ensure_cache(alone, model)
    assert own.folder.name != wide.folder.name
    batches = [
        next(iter(CachedDataModule(c, store).train_dataloader()))
        for c, store in ((config, served), (alone, own), (all_config, wide))
    ]
    assert batches[2].features.shape[1] > batches[0].features.shape[1] == 1
    for name, value in tensors(batches[0]).items():
        assert torch.equal(value, tensors(batches[1])[name]), name
    # more variants than the wide store has: its own store, since this tower gives one token only
    more = replace(config, cache=replace(config.cache, variants=2))
    assert ensure_cache(more, model).folder.name == own.folder.name


def test_the_list_says_what_fits_and_why_the_others_do_not(shards, autoencoder, tmp_path, monkeypatch):
    model, config = prepare(shards, autoencoder, tmp_path / "a", variants=1)
    folder = Path(config.cache.folder)
    fitting = ensure_cache(config, model).folder.name
    other = ensure_cache(replace(config, seed=5, cache=replace(config.cache, variants=2)), model).folder.name
    (folder / "validation").mkdir()
    (folder / "0123456789ab").mkdir()
    lines = describe_folder(config, model)
    told = {line.split("  ")[0]: line.split("  ", 2)[2] for line in lines}
    assert told == {
        fitting: "train 8 x 1, validation 8 x 1  serves this configuration",
        other: "train 8 x 2, validation 8 x 1  does not fit: seed 5, not 23",
        "0123456789ab": "not a store of latents; it may be deleted",
        "validation": "made by an older version; delete it",
    }
    assert [line.split("  ")[1] for line in lines] == ["0.00 GiB"] * 4
    shutil.rmtree(folder / "validation")
    more = replace(config, cache=replace(config.cache, variants=3))
    assert any(
        line.endswith("fits, unfinished: 4 of 8 shards are missing") for line in describe_folder(more, model)
    )
    monkeypatch.setattr(builder_module, "_Builder", None)
    assert ensure_cache(config, model).folder.name == fitting
