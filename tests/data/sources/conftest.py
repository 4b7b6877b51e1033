"""Images for the fixtures of annotation sources; the annotations themselves are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save an image of noise: ``save(name, width, height, mode, **options of Pillow)``."""

    def write(name: str, width: int = 40, height: int = 30, mode: str = "RGB", **options: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(len(name)).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).convert(mode).save(path, **options)  # type: ignore[arg-type]
        return path

    return write
