from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.errors import UserError
from pbe.evaluation.metrics import pixels, scoring
from pbe.evaluation.metrics.base import Case, Metric, NotRunError, Score, short_number
from pbe.evaluation.metrics.bootstrap import Bootstrap
from pbe.evaluation.metrics.scoring import METRICS, ScoreSettings, score
from pbe.evaluation.metrics.sets import ImageFolder

PIXELS = ("psnr-outside", "ssim-outside", "seam", "colour-inside", "colour-outside")


def make(count: int, size: int = 24, seed: int = 0) -> tuple[list[Case], list[np.ndarray]]:
    """Random cases, and edits that change the hole only."""
    rng = np.random.default_rng(seed)
    cases, edits = [], []
    for index in range(count):
        image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        mask = np.zeros((size, size), np.uint8)
        mask[6:18, 5:15] = 255
        exemplar = rng.integers(0, 256, (16, 12, 3), dtype=np.uint8)
        edit = np.where(mask[..., None] > 0, rng.integers(0, 256, image.shape, dtype=np.uint8), image)
        cases.append(Case(f"{index:03d}", image, mask, exemplar))
        edits.append(edit)
    return cases, edits


def by_name(scores: list[Score]) -> dict[str, Score]:
    return {one.name: one for one in scores}


def test_kept_background_is_exactly_perfect_and_printed_so():
    cases, edits = make(5)
    found = by_name(score(cases, edits, ScoreSettings(PIXELS)))
    assert found["psnr-outside"].value == math.inf
    assert found["psnr-outside"].text() == "exact"
    assert found["ssim-outside"].text() == "1 (exact)"
    assert found["colour-outside"].text() == "0 (exact)"
    assert not found["seam"].exact
    assert found["colour-outside"].value == 0.0
    assert found["colour-inside"].value > 0.0
    assert json.loads(json.dumps(found["psnr-outside"].to_dict()))["value"] == "inf"


def test_one_changed_pixel_outside_is_seen():
    cases, edits = make(4)
    edits[2][0, 0, 1] ^= 1
    found = by_name(score(cases, edits, ScoreSettings(PIXELS)))
    outside = int(np.sum(cases[2].mask <= 127)) * 3
    assert found["psnr-outside"].value == pytest.approx(10 * math.log10(255**2 * 4 * outside))
    assert np.isinf(found["psnr-outside"].per_case).tolist() == [True, True, False, True]
    assert found["ssim-outside"].value < 1.0
    assert found["colour-outside"].value > 0.0
    assert not any(one.exact or "exact" in one.text() for one in found.values())


def test_batch_size_changes_no_score_and_order_is_that_of_the_settings():
    cases, edits = make(7)
    whole = score(cases, edits, ScoreSettings(PIXELS, batch_size=7))
    parts = score(cases, edits, ScoreSettings(PIXELS[::-1], batch_size=2))
    assert [one.name for one in parts] == list(PIXELS[::-1])
    assert [one.to_dict() for one in whole] == [one.to_dict() for one in parts[::-1]]


def test_only_one_batch_is_held():
    cases, edits = make(6)
    read = []

    class Lazy:
        def __len__(self):
            return len(edits)

        def __getitem__(self, index):
            read.append(index)
            return edits[index]

    seen = []
    score(
        cases, Lazy(), ScoreSettings(("seam",), batch_size=2), None, lambda *at: seen.append((*at, len(read)))
    )
    assert seen == [(2, 6, 2), (4, 6, 4), (6, 6, 6)]


def test_bad_edits_are_left_out_and_counted():
    cases, edits = make(8)
    good = by_name(score(cases[5:], edits[5:], ScoreSettings(PIXELS)))
    edits[0] = None
    edits[1] = edits[1][:-1]
    edits[2] = edits[2].astype(np.float32) * np.nan
    edits[3] = edits[3][..., 0]
    cases[4] = replace(cases[4], mask=np.zeros_like(cases[4].mask))
    found = by_name(score(cases, edits, ScoreSettings(PIXELS, batch_size=3)))
    for name, one in found.items():
        assert one.card.pictures == 3
        assert one.card.excluded == {
            "missing": 1,
            "of another size than its case": 1,
            "not an 8-bit RGB image": 2,
            "with an empty mask": 1,
        }
        assert np.isnan(one.per_case).tolist() == [True] * 5 + [False] * 3
        assert one.value == good[name].value
        assert one.card.reference_sha256 == good[name].card.reference_sha256
    assert json.loads(json.dumps(found["seam"].to_dict()))["per_case"][0] is None


def test_a_case_that_a_score_cannot_see_is_left_out_of_it_alone():
    cases, edits = make(3)
    cases[1] = replace(cases[1], mask=np.full_like(cases[1].mask, 255))
    found = by_name(score(cases, edits, ScoreSettings(PIXELS)))
    assert found["seam"].card.excluded == {"not a finite number": 1}
    assert found["psnr-outside"].card.pictures == 2
    assert found["colour-inside"].card.pictures == 3
    assert found["colour-inside"].card.excluded == {}


def test_nothing_left_to_score():
    cases, edits = make(2)
    with pytest.raises(UserError, match="no edit can be scored: 2 missing"):
        score(cases, [None, None], ScoreSettings(PIXELS))
    with pytest.raises(UserError, match="the benchmark is empty"):
        score([], [], ScoreSettings(PIXELS))
    with pytest.raises(UserError, match="1 edits for 2 cases"):
        score(cases, edits[:1], ScoreSettings(PIXELS))


def test_one_image_has_no_interval():
    cases, edits = make(3)
    (one,) = score(cases, [None, edits[1], None], ScoreSettings(("colour-inside",)))
    assert one.value == one.per_case[1]
    assert np.isnan([one.low, one.high]).all()
    assert "to" not in one.text()
    assert one.card.interval.startswith("none")
    (two,) = score(cases, [None, *edits[1:]], ScoreSettings(("colour-inside",)))
    assert two.low < two.value < two.high


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.000_123_41, "0.0001234"),
        (1.5e-7, "1.500e-07"),
        (0.3705, "0.3705"),
        (77.8, "77.80"),
        (999.99, "1000"),
        (-715.26, "-715.3"),
        (12345.6, "12346"),
        (0.0, "0"),
        (-0.0, "0"),
        (math.inf, "inf"),
    ],
)
def test_small_numbers_are_not_rounded_to_nothing(number, text):
    assert short_number(number) == text


def test_a_reference_that_pillow_deems_too_large_is_one_line(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    batch = next(ImageFolder(tmp_path).batches(1))
    assert batch.edits[0].flags.writeable
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"a\.png' cannot be read as an image: .*exceeds limit"):
        next(ImageFolder(tmp_path).batches(1))


def test_settings_refuse_what_is_not_there():
    with pytest.raises(UserError, match=r"no metric 'nothing'; there are: .*seam"):
        ScoreSettings(("seam", "nothing"))
    with pytest.raises(UserError, match="name every metric only once"):
        ScoreSettings(("seam", "seam"))
    with pytest.raises(UserError, match="batch size is 0"):
        ScoreSettings(batch_size=0)


def test_a_score_that_lacks_its_weights_says_so(monkeypatch):
    def lacking(settings):
        raise NotRunError("needs the weights of a tower")

    monkeypatch.setitem(METRICS, "two", Metric("two", "paper", "lower", lacking, ("one", "other")))
    cases, edits = make(2)
    first, second, seam = score(cases, edits, ScoreSettings(("two", "seam")))
    assert (first.name, second.name, seam.name) == ("one", "other", "seam")
    assert (first.run, first.why_not, first.text()) == (
        False,
        "not run: needs the weights of a tower",
        "not run",
    )
    assert first.to_dict()["value"] is None
    assert seam.run


def test_a_score_comes_back_from_its_dictionary():
    cases, edits = make(4)
    for one in score(cases, [None, *edits[1:]], ScoreSettings((*PIXELS, "fid"))):
        again = Score.from_dict(json.loads(json.dumps(one.to_dict())))
        assert again.to_dict() == one.to_dict()
        assert (again.card, again.text()) == (one.card, one.text())
        assert one.per_case is None or np.array_equal(again.per_case, one.per_case, equal_nan=True)


def test_intervals_come_from_the_settings():
    cases, edits = make(12)
    (wide,) = score(cases, edits, ScoreSettings(("seam",), bootstrap=Bootstrap(level=0.99, resamples=500)))
    (narrow,) = score(cases, edits, ScoreSettings(("seam",), bootstrap=Bootstrap(level=0.5, resamples=500)))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert "99%" in wide.card.interval
    assert "500" in wide.card.interval


def test_every_metric_is_of_a_known_family():
    assert {row.family for row in METRICS.values()} <= {"paper", "clean", "toy"}
    assert scoring.METRICS is METRICS


@pytest.mark.parametrize("role", ["lite2", "inception", "lpips"])
def test_towers_of_one_architecture_take_no_other(role):
    with pytest.raises(UserError, match=f"the tower '{role}' has one architecture"):
        ScoreSettings(architectures={role: "timm/resnet50"})


@pytest.mark.parametrize(
    "change",
    [
        lambda case: {"id": "other"},
        lambda case: {"image": case.image ^ 1},
        lambda case: {"mask": np.roll(case.mask, 1, axis=1)},
        lambda case: {"exemplar": 255 - case.exemplar},
        lambda case: {"exemplar": case.exemplar.reshape(12, 16, 3)},
    ],
    ids=["id", "image", "mask", "exemplar", "shape"],
)
def test_the_references_hash_is_of_all_that_edits_are_compared_with(change):
    cases, edits = make(3)
    names = ("psnr-outside", "seam", "layout-copy", "layout-true")
    first, again = (score(cases, edits, ScoreSettings(names, batch_size=size)) for size in (2, 3))
    hashes = {one.card.reference_sha256 for one in (*first, *again)}
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64
    cases[1] = replace(cases[1], **change(cases[1]))
    changed = score(cases, edits, ScoreSettings(names))
    assert not {one.card.reference_sha256 for one in first} & {one.card.reference_sha256 for one in changed}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resamples": 0}, "not 0 and 50"),
        ({"set_resamples": 1}, "not 2000 and 1"),
        ({"level": 1.0}, "between 0 and 1, not 1.0"),
    ],
)
def test_bootstraps_that_give_no_interval_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Bootstrap(**settings)


class Shrinking(torch.nn.Module):
    """The sizes that AlexNet's convolutions and poolings make of an image, without its features."""

    def __init__(self) -> None:
        super().__init__()
        first, last = torch.nn.Conv2d(3, 1, 11, 4, 2), torch.nn.MaxPool2d(3, 2)
        self.layers = torch.nn.Sequential(first, torch.nn.MaxPool2d(3, 2), last)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (self.layers(a) - self.layers(b)).abs().mean()


def test_images_too_small_for_lpips_are_left_out_of_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "load_lpips", lambda *_: Shrinking())
    (tmp_path / "any.pth").write_bytes(b"any")
    settings = ScoreSettings(("lpips-outside", "seam"), weights={"lpips": str(tmp_path / "any.pth")})
    small, large = make(2, size=30), make(2, size=31)
    for edit in (*small[1], *large[1]):
        edit[0] ^= 64
    lpips, seam = score(small[0] + large[0], small[1] + large[1], settings)
    assert lpips.card.excluded == {"smaller than 31 pixels": 2}
    assert np.isfinite(lpips.per_case).tolist() == [False, False, True, True]
    assert seam.card.pictures == 4
    lpips, seam = score(*small, settings)
    assert (lpips.run, seam.run) == (False, True)
    assert lpips.why_not == "not run: no case is left to score (2 smaller than 31 pixels)"
