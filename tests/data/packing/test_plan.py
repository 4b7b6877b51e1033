"""Several sources over one folder of images, and one source as two sets."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pbe.data.packing.pack import PackRequest, PackResult
from pbe.data.packing.plan import PackSettings, held_out
from pbe.data.shards.archive import ShardImages
from pbe.data.sources.coco import read_coco
from pbe.data.sources.tables import read_csv
from tests.commands import prepare as prepare_data
from tests.data.packing.support import contents, noise, run


def make_images(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        noise(seed=number).save(folder / name)
    return folder


def write_csv(path: Path, rows: list[tuple[str, tuple[int, ...], str]]) -> Path:
    lines = [f"{name},{','.join(map(str, box))},{label}" for name, box, label in rows]
    path.write_text("\n".join(["file,x1,y1,x2,y2,label", *lines]))
    return path


def packed(
    tmp_path: Path, *tables: Path, images: Path
) -> tuple[PackResult, dict[str, list[tuple[float, ...]]]]:
    """Pack CSVs over one folder; returns the result, and the boxes by image."""
    request = PackRequest(
        lambda: [read_csv(table, images) for table in tables],
        [],
        PackSettings(perceptual=False),
        tmp_path / "out",
    )
    result = run(request)
    images = ShardImages(request.out)
    notes = [images.annotation(number) for number in range(len(images))]
    return result, {note["source"]: [tuple(box["xyxy"]) for box in note["boxes"]] for note in notes}


CAT, DOG, OWL = (10, 10, 60, 60), (20, 10, 70, 50), (0, 0, 50, 40)


def test_disjoint_sources_over_one_folder(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    first = write_csv(tmp_path / "1.csv", [("a.jpg", CAT, "cat"), ("b.jpg", DOG, "dog")])
    second = write_csv(tmp_path / "2.csv", [("c.jpg", OWL, "owl")])
    result, boxes = packed(tmp_path, first, second, images=images)
    assert boxes == {"a.jpg": [CAT], "b.jpg": [DOG], "c.jpg": [OWL]}
    assert result.plan["pictures_seen"] == 4  # files, not files times sources
    assert result.tally.dropped_pictures == {"without boxes": 1}
    assert not result.tally.dropped_boxes


def test_sources_that_overlap_are_merged(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    first = write_csv(
        tmp_path / "1.csv", [("a.jpg", CAT, "cat"), ("a.jpg", CAT, "cat"), ("b.jpg", OWL, "owl")]
    )
    second = write_csv(
        tmp_path / "2.csv", [("b.jpg", OWL, "owl"), ("b.jpg", DOG, "dog"), ("b.jpg", OWL, "cat")]
    )
    result, boxes = packed(tmp_path, first, second, images=images)
    # a.jpg is in one source only, where a box that stands twice stays twice, as ever.
    assert boxes["a.jpg"] == [CAT, CAT]
    assert Counter(boxes["b.jpg"]) == {OWL: 2, DOG: 1}  # two labels of one box are two boxes
    assert result.tally.dropped_boxes == {"the same box from two sources": 1}
    assert result.plan["boxes_seen"] == 6 == result.tally.boxes + 1


def test_one_file_under_two_names_is_one_image(tmp_path: Path) -> None:
    images = make_images(tmp_path / "set" / "images", ["a.jpg"])
    (tmp_path / "link").symlink_to(images)
    table = write_csv(tmp_path / "1.csv", [("a.jpg", CAT, "cat")])
    within = write_csv(tmp_path / "2.csv", [("images/a.jpg", DOG, "dog")])
    request = PackRequest(
        lambda: [
            read_csv(table, images),
            read_csv(table, tmp_path / "link"),
            read_csv(within, tmp_path / "set" / ".." / "set"),
        ],
        [],
        PackSettings(perceptual=False),
        tmp_path / "out",
    )
    result = run(request)
    assert (result.plan["pictures_seen"], result.tally.pictures, result.tally.boxes) == (1, 1, 2)


def test_shares_and_pixels_of_one_image(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", ["a.jpg"])
    pixels = write_csv(tmp_path / "1.csv", [("a.jpg", CAT, "cat")])
    shares = tmp_path / "2.csv"
    shares.write_text("file,x1,y1,x2,y2,label\na.jpg,0.2,0.25,0.7,0.75,dog\na.jpg,0.1,0.1,0.12,0.12,speck\n")
    request = PackRequest(
        lambda: [read_csv(pixels, images), read_csv(shares, images, relative=True)],
        [],
        PackSettings(perceptual=False),
        tmp_path / "out",
    )
    result = run(request)
    boxes = ShardImages(request.out).annotation(0)["boxes"]
    assert [(box["label"], box["xyxy"]) for box in boxes] == [
        ("cat", [10, 10, 60, 60]),
        ("dog", [20, 20, 70, 60]),
    ]
    assert result.tally.dropped_boxes == {"area too small": 1}


def coco(path: Path, names: list[str], width: int) -> Path:
    images = [{"id": n, "file_name": name, "width": width, "height": 80} for n, name in enumerate(names)]
    boxes = [{"image_id": n, "category_id": 1, "bbox": [10, 10, 50, 50]} for n in range(len(names))]
    path.write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]})
    )
    return path


def test_sources_that_disagree_on_a_size(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    tables = [coco(tmp_path / "1.json", ["a.jpg", "b.jpg"], 100), coco(tmp_path / "2.json", ["a.jpg"], 200)]
    request = PackRequest(
        lambda: [read_coco(table, images) for table in tables],
        [],
        PackSettings(perceptual=False),
        tmp_path / "out",
    )
    result = run(request)
    reason = "annotated with two sizes by two sources"
    assert result.tally.dropped_pictures == {reason: 1}
    assert result.tally.dropped_boxes == {reason: 2}
    assert (result.plan["pictures_seen"], result.plan["boxes_seen"], result.tally.pictures) == (2, 3, 1)


NAMES = [f"{folder}/p{number}.jpg" for folder in ("a", "b") for number in range(3000)]


def test_the_split_is_the_hash_of_the_name() -> None:
    """By exact fractions: whoever has the name can tell its side, with b2sum and nothing of this project."""
    share = Fraction(1, 20)
    for name, held in zip(NAMES[:300], held_out(NAMES[:300], 0.05), strict=True):
        digest = hashlib.blake2b(name[:-4].encode()).copy()
        assert digest.digest_size == 64  # eight bytes are a hash of their own, not the first of these
        value = int(hashlib.blake2b(name[:-4].encode(), digest_size=8).hexdigest(), 16)
        assert held == (Fraction(value, 2**64) < share)


def test_the_split_does_not_depend_on_other_images() -> None:
    sides = held_out(NAMES, 0.05)
    assert 0.04 < sides.mean() < 0.06
    order = np.random.default_rng(0).permutation(len(NAMES))
    assert np.array_equal(held_out([NAMES[number] for number in order], 0.05), sides[order])
    assert np.array_equal(held_out(NAMES[:50], 0.05), sides[:50])
    assert (held_out(NAMES, 0.1) >= sides).all()  # a larger share takes more, and drops none
    assert np.array_equal(held_out([name.replace(".jpg", ".png") for name in NAMES], 0.05), sides)
    assert held_out([], 0.05).shape == (0,)


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forty")
    names = [f"p{number}.jpg" for number in range(40)]
    make_images(folder, names)
    return write_csv(folder / "boxes.csv", [(name, CAT, "cat") for name in names])


def split(table: Path, out: Path, *options: str) -> dict[str, set[str]]:
    arguments = [f"csv:{table}", "--out", str(out), "--validation-share", "0.2", "--workers", "0"]
    assert prepare_data.main([*arguments, *options]) == 0
    found = {}
    for side in ("train", "validation"):
        images = ShardImages(out / side)
        found[side] = {images.annotation(number)["source"] for number in range(len(images))}
    return found


def test_one_command_writes_both_sets(
    forty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = split(forty, tmp_path / "a")
    held = {name for name in (f"p{n}.jpg" for n in range(40)) if held_out([name], 0.2)[0]}
    assert sides["validation"] == held
    assert sides["train"] == {f"p{n}.jpg" for n in range(40)} - held
    report = json.loads((tmp_path / "a" / "validation" / "report.json").read_bytes())
    assert report["pictures"]["dropped"] == {"in the training set": 40 - len(held)}
    assert report["pictures"]["seen"] == 40
    assert report["also_in_train"] == {"exact": 0, "near": 0, "examples": []}
    shuffled = split(forty, tmp_path / "b", "--shuffle", "3", "--shard-images", "4")
    assert shuffled == sides
    assert capsys.readouterr().out.count("shards; report:") == 4
    before = {side: contents(tmp_path / "a" / side) for side in sides}
    assert split(forty, tmp_path / "a") == sides
    assert {side: contents(tmp_path / "a" / side) for side in sides} == before


def test_copies_on_the_other_side_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"p{number}.jpg" for number in range(20)]
    sides = held_out(names, 0.2)
    inside, outside = (names[int(np.flatnonzero(sides == side)[0])] for side in (True, False))
    make_images(tmp_path, names)
    (tmp_path / inside).write_bytes((tmp_path / outside).read_bytes())
    split(write_csv(tmp_path / "b.csv", [(name, CAT, "cat") for name in names]), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "validation" / "report.json").read_bytes())
    pair = [[inside.replace(".jpg", ""), outside.replace(".jpg", ""), "exact"]]
    assert report["also_in_train"] == {"exact": 1, "near": 0, "examples": pair}
    assert "1 images of the validation set are copies of training images" in capsys.readouterr().out
    assert "Also in the training set" in (tmp_path / "out" / "validation" / "report.html").read_text()


@pytest.mark.parametrize(
    ("share", "complaint"), [("0", "between 0 and 1"), ("1", "between 0 and 1"), ("nan", "between 0 and 1"),
                             ("1e-12", "40 images in the training set")]
)  # fmt: skip
def test_shares_that_leave_nothing(
    forty: Path, tmp_path: Path, share: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"csv:{forty}", "--out", str(tmp_path / "out"), "--workers", "0", "--validation-share"]
    assert prepare_data.main([*arguments, share]) == 2
    assert complaint in capsys.readouterr().err
    assert prepare_data.main([*arguments, "0.5"]) == 0
