"""What holds for every sample, whatever the image, the box and the draws, as far as hypothesis finds."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pbe.config import SampleConfig
from pbe.data.randomness import generator
from pbe.data.samples.crops import Box
from pbe.data.samples.masks import rectangle_mask
from pbe.data.samples.sample import make_sample
from scripts import check_samples
from scripts.sample_properties import check_sample

SIZE, EXEMPLAR = 48, 24


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, Box]:
    """An image of any shape, and a box in it of any shape down to two pixels, or of the whole short side."""
    width, height = draw(st.integers(2, 300)), draw(st.integers(2, 300))
    if draw(st.booleans()):  # drawn apart: very long and thin
        width, height = (
            (draw(st.integers(2, 8)), height) if width < height else (width, draw(st.integers(2, 8)))
        )
    starts, sides = [], []
    for length in (width, height):
        side = draw(st.one_of(st.floats(2.0, float(length)), st.just(float(length))))
        starts.append(draw(st.floats(0.0, 1.0)) * (length - side))
        sides.append(side)
    picture = generator("property", width, height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ends = [min(starts[0] + sides[0], float(width)), min(starts[1] + sides[1], float(height))]
    return picture, Box(starts[0], starts[1], ends[0], ends[1])


@st.composite
def settings_of_samples(draw: st.DrawFn) -> SampleConfig:
    return SampleConfig(
        arbitrary_mask_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        extend_fraction=draw(st.floats(0.0, 1.0)),
        bezier_jitter=draw(st.floats(0.0, 20.0)),
        exemplar_padding=draw(st.integers(0, 40)),
        shrink_fraction=draw(st.floats(0.0, 1.0)),
        squash=draw(st.booleans()),
        antialias_above=draw(st.sampled_from([1.0, 1.5, 1000.0])),
    )


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), config=settings_of_samples(), seed=st.integers(0, 2**32))
def test_every_sample(case, config, seed):
    picture, box = case
    sample = make_sample(picture, box, generator(seed), config, SIZE, EXEMPLAR)
    again = make_sample(picture, box, generator(seed), config, SIZE, EXEMPLAR)
    assert sample.image.tobytes() == again.image.tobytes()
    assert sample.mask.tobytes() == again.mask.tobytes()
    assert check_sample(sample, config, SIZE, EXEMPLAR) == []


def test_faults_are_found():
    """The checks see what they are for."""
    picture, config = np.zeros((60, 80, 3), np.uint8), SampleConfig()
    sample = make_sample(picture, Box(20, 20, 50, 40), generator(1), config, SIZE, EXEMPLAR)
    for name, value, message in (
        ("mask", np.zeros_like(sample.mask), "the mask is empty"),
        ("mask", np.full_like(sample.mask, 255), "nothing is kept"),
        ("mask", sample.mask // 2, "other values than 0 and 255"),
        ("mask", 255 - sample.mask, "covers"),
        ("image", sample.image.astype(np.float32), "image"),
        ("exemplar", sample.exemplar[:-1], "exemplar"),
        ("valid", np.zeros_like(sample.valid), "nothing counts"),
        ("box", Box(math.nan, 0, 1, 1), "box"),
    ):
        broken = type(sample)(**{**vars(sample), name: value})
        assert any(message in fault for fault in check_sample(broken, config, SIZE, EXEMPLAR)), message


@pytest.mark.parametrize("kind", [0.0, 1.0])
def test_exemplar_and_hole_share_the_box(kind):
    """The only red thing is the object: the exemplar is red in the middle, and the mask covers the red."""
    config = SampleConfig(arbitrary_mask_share=kind, exemplar_padding=0)
    for index in range(40):
        rng = generator("share", index)
        width, height = (int(side) for side in rng.integers(60, 160, 2))
        x, y = int(rng.integers(0, width - 40)), int(rng.integers(0, height - 40))
        box = Box(x, y, x + int(rng.integers(16, 40)), y + int(rng.integers(16, 40)))
        picture = np.zeros((height, width, 3), np.uint8)
        picture[rectangle_mask(box, width, height) > 0] = (255, 0, 0)
        sample = make_sample(picture, box, rng, config, SIZE, EXEMPLAR)
        assert sample.exemplar[12, 12, 0] > 200
        red = sample.image[..., 0] > 128
        inside = sample.valid > 0
        assert red[inside].any()
        assert (sample.mask[red & inside] > 0).mean() > 0.85


def test_the_larger_run_at_a_small_size(capsys, monkeypatch):
    monkeypatch.setattr(check_samples, "A_TASK", 40)
    printed = []
    for workers in ("1", "2"):
        assert check_samples.main(["--count", "150", "--workers", workers]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0].startswith("150 samples are good; the mask covers at least 9")
    kinds = dict(re.findall(r"^  ([a-z ]+): (\d+) ", printed[0], re.MULTILINE))
    assert int(kinds["arbitrary"]) + int(kinds["rectangle"]) == 150
    assert int(kinds["padded"]) >= 15
    assert printed[0] == printed[1]
    assert check_samples.main(["--count", "0"]) == 2
    assert check_samples.main(["--workers", "0"]) == 2


def test_a_bad_sample_ends_the_larger_run_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(check_samples, "A_TASK", 10)
    monkeypatch.setattr(
        check_samples, "check_sample", lambda sample, *_: [] if sample.events else ["odd", "bad"]
    )
    first = next(
        number
        for number in range(30)
        if not make_sample(*check_samples.random_case(0, number), SampleConfig(), 64, 32).events
    )
    assert check_samples.main(["--count", "30", "--workers", "2"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: sample {first} of seed 0: odd; bad"
