"""The command that builds a latent cache apart from training."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

import pbe.training.cache_builder as cache_module
from pbe.training.encoding import encode_batch
from scripts import cache_latents
from tests.training.conftest import _contained, autoencoder, shards, workshop  # noqa: F401 - fixtures
from tests.training.tiny import run, send, tiny_config, write_config


def test_it_builds_what_training_then_uses(shards, autoencoder, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "cache"
    settings = [autoencoder, f"cache.folder={folder}", "cache.variants=2"]
    config = tiny_config(shards, tmp_path / "run", *settings)
    file = write_config(tmp_path / "tiny.yaml", config)
    assert cache_latents.main([str(file), "--size"]) == 0
    assert not folder.exists()

    def stopping(*args: object) -> object:
        send(signal.SIGTERM)()
        return encode_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "encode_batch", stopping)
        assert cache_latents.main([str(file)]) == 128 + signal.SIGTERM
    assert cache_latents.main([str(file)]) == 0
    assert json.loads((folder / "train" / "cache.json").read_text())["count"] == 16
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(cache_module, "_build", None)
    assert run(config).steps == 3


@pytest.mark.parametrize("change", ["cache.folder=''", "task=autoencoder"])
def test_a_training_without_a_cache_is_one_clear_line(
    shards,  # noqa: F811
    autoencoder,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
):
    config = tiny_config(shards, tmp_path / "run", autoencoder, f"cache.folder={tmp_path / 'cache'}")
    assert cache_latents.main([str(write_config(tmp_path / "tiny.yaml", config)), change]) == 2
    assert "trains without a cache; name a folder" in capsys.readouterr().err
