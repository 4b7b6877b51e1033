"""The report: its numbers, its page, and duplicates against a plain comparison of all pairs."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from pbe.data.packing.pack import PackRequest, PackResult
from pbe.data.packing.plan import PackSettings
from pbe.data.packing.report import (
    as_void,
    exact_pairs,
    make_report,
    near_duplicates,
    near_pairs,
    write_report,
)
from pbe.data.packing.worker import EDGES
from pbe.data.sources.image_files import perceptual_hash
from pbe.data.sources.tables import read_csv
from tests.data.packing.support import pack


def scene(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(values, (320, 240), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackRequest, PackResult, Path]:
    """Six images: a, a copy of its file, a smaller copy, and three of their own; and a benchmark folder."""
    folder = tmp_path_factory.mktemp("report")
    bench = folder / "bench"
    bench.mkdir()
    images = {
        "a": scene(1),
        "b": scene(2),
        "c<script>": scene(3),
        "flat": np.full((240, 320, 3), 90, np.uint8),
    }
    images["small"] = cv2.resize(images["a"], (160, 120), interpolation=cv2.INTER_AREA)
    for name, image in images.items():
        cv2.imwrite(str(folder / f"{name}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    (folder / "copy.jpg").write_bytes((folder / "a.jpg").read_bytes())
    (bench / "same.jpg").write_bytes((folder / "b.jpg").read_bytes())
    cv2.imwrite(str(bench / "similar.png"), cv2.resize(images["c<script>"], (512, 384)))
    cv2.imwrite(str(bench / "other.png"), scene(9))
    (bench / "junk.png").write_bytes(b"junk")
    lines = ["file,x1,y1,x2,y2,label"]
    for name in images:
        lines.append(f"{name}.jpg,10,10,110,70,<b>cat</b>")
    lines += ["copy.jpg,10,10,110,70,dog", "copy.jpg,10,10,70,110,dog", "copy.jpg,10,10,11,11,dog"]
    (folder / "boxes.csv").write_text("\n".join(lines))
    settings = PackSettings(shard_pictures=4)
    request = PackRequest(
        lambda: [read_csv(folder / "boxes.csv", folder)], ["csv:x"], settings, folder / "out"
    )
    result = pack(request, workers=0)
    assert result is not None
    return request, result, bench


def test_numbers_against_a_hand_count(packed: tuple[PackRequest, PackResult, Path]) -> None:
    report = make_report(*packed)
    # The benchmark's images lie below the folder too, and have no boxes.
    assert report["pictures"] == {"seen": 10, "kept": 6, "dropped": {"without boxes": 4}}
    assert report["boxes"] == {"seen": 8, "kept": 7, "dropped": {"area too small": 1}}
    assert report["labels"] == {"<b>cat</b>": 5, "dog": 2}
    area = dict(zip(EDGES["area"], report["histograms"]["area"]["counts"], strict=True))
    assert {edge: count for edge, count in area.items() if count} == {0.05: 6, 0.3: 1}
    aspect = dict(zip(EDGES["aspect"], report["histograms"]["aspect"]["counts"], strict=True))
    assert {edge: count for edge, count in aspect.items() if count} == {0.5: 1, 2**0.5: 6}
    counts = dict(
        zip(EDGES["boxes_per_picture"], report["histograms"]["boxes_per_picture"]["counts"], strict=True)
    )
    assert {edge: count for edge, count in counts.items() if count} == {1: 5, 2: 1}
    assert report["duplicates"]["exact"] == 1
    assert report["duplicates"]["near"] == 1
    assert report["duplicates"]["examples"] == [
        ["a", "copy", "exact"],
        ["a", "small", "near"],
    ]
    leak = report["check_against"]
    assert (leak["pictures"], leak["unreadable"], leak["exact"], leak["near"]) == (3, 1, 1, 1)
    assert leak["matches"] == [["b", "same.jpg", "exact"], ["c_script_", "similar.png", "near"]]
    assert set(report["seconds"]) >= {"read annotations", "plan", "read", "hash and write"}


class Addresses(HTMLParser):
    """Collects what a page would load, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_page_is_self_contained_and_escaped(
    packed: tuple[PackRequest, PackResult, Path], tmp_path: Path
) -> None:
    report = make_report(*packed)
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    page = (tmp_path / "report.html").read_text()
    parser = Addresses()
    parser.feed(page)
    assert parser.found == []
    assert not parser.tags & {"script", "link", "b>cat"}
    assert "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "same.jpg" in page
    write_report(make_report(*packed[:2]), tmp_path)
    assert "benchmark" not in (tmp_path / "report.html").read_text().lower()


def test_near_pairs_against_all_pairs() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 2**63, 300, dtype=np.uint64)
    for row in range(150):
        flips = np.uint64(0)
        for bit in rng.choice(64, rng.integers(0, 6), replace=False):
            flips |= np.uint64(1) << np.uint64(bit)
        hashes[row + 150] = hashes[row] ^ flips
    hashes[[3, 4]] = 0
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None]).astype(int)
    distance[(hashes == 0), :] = distance[:, (hashes == 0)] = 64
    wanted = np.argwhere(np.triu(distance <= 3, 1))
    assert len(wanted) > 50
    assert np.array_equal(near_pairs(hashes), wanted)
    assert near_pairs(np.zeros(5, np.uint64)).shape == (0, 2)


def test_many_equal_hashes_stay_in_bounds() -> None:
    assert len(near_pairs(np.full(200, 7, np.uint64))) == 200 * 199 // 2
    assert near_duplicates(np.full(4, 7, np.uint64)).tolist() == [[0, 1], [0, 2], [0, 3]]
    assert near_duplicates(np.array([0, 15, 0, 7, 15], np.uint64)).tolist() == [[1, 3], [1, 4]]


def test_exact_pairs() -> None:
    rows = np.repeat(np.array([[1], [2], [1], [1]], np.uint8), 16, axis=1)
    assert exact_pairs(as_void(rows)).tolist() == [[0, 2], [0, 3]]


def test_perceptual_hash_survives_what_it_should() -> None:
    grey = cv2.cvtColor(scene(4), cv2.COLOR_BGR2GRAY)
    damaged = cv2.imdecode(cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], 0)
    small = cv2.resize(grey, (100, 75), interpolation=cv2.INTER_AREA)
    first = perceptual_hash(grey)
    assert first != 0
    for other in (damaged, small):
        assert (first ^ perceptual_hash(other)).bit_count() <= 3
    assert (first ^ perceptual_hash(cv2.cvtColor(scene(5), cv2.COLOR_BGR2GRAY))).bit_count() > 10
    assert perceptual_hash(np.full((64, 64), 200, np.uint8)) == 0
