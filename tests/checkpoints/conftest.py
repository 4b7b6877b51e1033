"""The small model of these tests, built once."""

from __future__ import annotations

import pytest

from pbe.models import LatentDiffusion
from tests.checkpoints.small import small_model


@pytest.fixture(scope="session")
def small() -> LatentDiffusion:
    return small_model()
