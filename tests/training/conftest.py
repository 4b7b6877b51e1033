"""One set of shards and one trained autoencoder for all tests of training."""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.tiny import render_shards, run, tiny_config

# The tiny autoencoder of all tests: stage one as a whole, in seconds.
AUTOENCODER_STAGE = (
    "task=autoencoder",
    "data.batch_size=8",
    "autoencoder_loss.kl_weight=1e-6",
    "optimizer.learning_rate=4e-3",
    "optimizer.decay=cosine",
    "trainer.max_steps=200",
    "trainer.validate_every=100",
    "trainer.validation_samples=8",
    "trainer.checkpoint_every=100",
    "logging.every=20",
    "logging.grid_every=200",
)


@pytest.fixture(autouse=True)
def _contained(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep what training sets in the process (the global seed, warning filters) from other tests."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    with warnings.catch_warnings():
        yield


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``shards`` and the run ``autoencoder``, made once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "training-workshop"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            render_shards(folder / "shards")
            run(tiny_config(folder / "shards", folder / "autoencoder", *AUTOENCODER_STAGE))
            (folder / "ready").touch()
    return folder


@pytest.fixture(scope="session")
def shards(workshop: Path) -> Path:
    """Folder of ``train`` and ``validation`` shards."""
    return workshop / "shards"


@pytest.fixture(scope="session")
def finished(shards: Path, autoencoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the tiny configuration as it is; not to be changed."""
    return run(tiny_config(shards, tmp_path_factory.mktemp("finished"), autoencoder)).output_dir


@pytest.fixture(scope="session")
def autoencoder(workshop: Path) -> str:
    """The override that names the trained autoencoder."""
    return f"autoencoder_from={workshop / 'autoencoder' / 'model'}"
