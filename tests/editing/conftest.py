"""Fixtures of the editing tests: one tiny model a session, and images for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from pbe.editing.pipeline import PaintByExample
from pbe.models import LatentDiffusion
from tests.editing.tiny_model import make_tiny_model

# Solvers, and the classes of diffusers that do the same.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
}


@dataclass
class Scene:
    """An exemplar, an image and a mask with a box as its hole."""

    exemplar: Image.Image
    picture: Image.Image
    mask: Image.Image
    hole: np.ndarray


def make_scene(height: int, width: int, seed: int = 0) -> Scene:
    rng = np.random.default_rng(seed)
    hole = np.zeros((height, width), dtype=bool)
    hole[height // 4 : -(-height * 3 // 4), width // 4 : -(-width * 3 // 4)] = True
    return Scene(
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
        Image.fromarray(hole.astype(np.uint8) * 255),
        hole,
    )


@pytest.fixture(scope="session")
def tiny_model() -> LatentDiffusion:
    return make_tiny_model()


@pytest.fixture(scope="session")
def pipe(tiny_model: LatentDiffusion) -> PaintByExample:
    return PaintByExample(tiny_model)


@pytest.fixture
def scene() -> Scene:
    return make_scene(32, 40)
