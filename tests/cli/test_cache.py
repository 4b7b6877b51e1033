"""The command that builds a latent cache apart from training."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

import pbe.training.latent_cache.builder as builder_module
from pbe.training.tasks.encoding import encode_batch
from tests.commands import cache
from tests.training.conftest import _contained, autoencoder, shards, workshop  # noqa: F401 - fixtures
from tests.training.test_finetuning import make_base
from tests.training.tiny import run, send, tiny_config, write_config


def test_it_builds_what_training_then_uses(shards, autoencoder, tmp_path, monkeypatch, capsys):  # noqa: F811
    folder = tmp_path / "cache"
    settings = [autoencoder, f"cache.folder={folder}", "cache.variants=2", "cache.shard_samples=3"]
    config = tiny_config(shards, tmp_path / "run", *settings)
    file = write_config(tmp_path / "tiny.yaml", config)
    assert cache.main([str(file), "--size"]) == 0
    assert not folder.exists()
    said = capsys.readouterr().out
    assert "bytes for each variant of a sample" in said
    assert "train: 8 samples x 2 = 0.00 GiB" in said
    assert f"0.00 GiB in {folder}" in said

    def stopping(*args: object) -> object:
        send(signal.SIGTERM)()
        return encode_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(builder_module, "encode_batch", stopping)
        assert cache.main([str(file)]) == 128 + signal.SIGTERM
    assert cache.main([str(file), "--shard", "1/2"]) == 0
    (section,) = folder.iterdir()
    assert {path.name for path in section.glob("*-000-*.tar")} == {
        # the first is what the stopped build had finished
        "train-000-000000.tar", "train-000-000001.tar", "validation-000-000001.tar",
    }  # fmt: skip
    assert cache.main([str(file), "--shard", "0/2"]) == 0
    assert len(json.loads((section / "shards.json").read_text())["shards"]) == 9
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    assert cache.main([str(file), "--list"]) == 0
    assert "train 8 x 2, validation 8 x 1  serves this configuration" in capsys.readouterr().out
    assert cache.main([str(file), "seed=7", "--list"]) == 0
    assert "does not fit: seed 23, not 7" in capsys.readouterr().out
    monkeypatch.setattr(builder_module, "_Builder", None)
    assert run(config).steps == 3


def test_the_size_of_a_sample_needs_neither_data_nor_weights(tmp_path, capsys):
    config = tiny_config(tmp_path / "nowhere", tmp_path / "run", f"cache.folder={tmp_path / 'cache'}")
    assert cache.main([str(write_config(tmp_path / "tiny.yaml", config)), "--size"]) == 0
    said = capsys.readouterr().out
    # 4 x 8 x 8 x 8 halves, two masks of 64 bytes, 256 halves: 4736, behind two headers, in blocks of 512
    assert said.startswith(
        "5,632 bytes for each variant of a sample: "
        "latents 4,096, masks 128, features 512, headers and filling 896\n"
    )
    assert "the shards are not there yet" in said


def test_a_distillation_has_a_cache_of_the_models_sizes(workshop, tmp_path, capsys):  # noqa: F811
    settings = [make_base(workshop, tmp_path / "base", 0), "model_from_init=true", "task=distillation"]
    settings += [
        f"cache.folder={tmp_path / 'cache'}",
        "data.image_size=0",
        "model.autoencoder.latent_channels=4",
    ]
    config = tiny_config(tmp_path / "nowhere", tmp_path / "run", *settings)
    assert cache.main([str(write_config(tmp_path / "tiny.yaml", config)), "--size"]) == 0
    assert "latents 4,096, masks 128, features 512" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["2/2", "x", "1/0", "-1/2", "1"])
def test_a_share_that_is_none_is_one_clear_line(tmp_path, capsys, text: str):
    assert cache.main([str(tmp_path / "none.yaml"), f"--shard={text}"]) == 2
    assert f"error: --shard is '{text}'; it must be I/N" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["cache.folder=''", "task=autoencoder"])
def test_a_training_without_a_cache_is_one_clear_line(
    shards,  # noqa: F811
    autoencoder,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
):
    config = tiny_config(shards, tmp_path / "run", autoencoder, f"cache.folder={tmp_path / 'cache'}")
    assert cache.main([str(write_config(tmp_path / "tiny.yaml", config)), change]) == 2
    assert "trains without a cache; name a folder" in capsys.readouterr().err
