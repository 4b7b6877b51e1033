"""Shards and an autoencoder, as the tests of training have them."""

from __future__ import annotations

from tests.training.conftest import _contained, autoencoder, shards, workshop  # noqa: F401 - fixtures
