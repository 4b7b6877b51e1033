"""COCO files as tools write them: odd ids, flags, sizes and names, and joins that are ambiguous."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pbe.data.sources.annotations import Annotations
from pbe.data.sources.coco import read_coco
from pbe.errors import UserError

Save = Callable[..., Path]
NAMES = {"categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]}


def image(number: Any, name: Any, **fields: Any) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": 40, "height": 30} | fields


def box(number: Any, corner: float = 5, **fields: Any) -> dict[str, Any]:
    return {"image_id": number, "category_id": 1, "bbox": [corner, 5, 10, 10], "iscrowd": 0} | fields


def read(folder: Path, images: list[Any], boxes: list[Any], within: str = "pics", **more: Any) -> Annotations:
    path = folder / "a.json"
    path.write_text(json.dumps(NAMES | {"images": images, "annotations": boxes} | more))
    return read_coco(path, folder / within)


def left_sides(found: Annotations) -> dict[str, list[float]]:
    return {record.name: [box.x1 for box in record.boxes] for record in found.records()}


def test_several_entries_for_one_file_are_one_image(tmp_path: Path, save: Save) -> None:
    save("pics/a.jpg")
    entries = [image(1, "a.jpg"), image(2, "./a.jpg", width=None), image(3, "a.jpg", license=7)]
    found = read(tmp_path, entries, [box(1, 1), box(2, 2), box(3, 3)], licenses=[{"id": "7", "name": "by"}])
    assert left_sides(found) == {"a.jpg": [1, 2, 3]}
    assert found.images.select("width", "height", "licence").rows() == [(40, 30, "by")]
    assert not found.dropped_boxes
    assert not found.dropped_images


def test_entries_that_contradict_each_other_are_left_out(tmp_path: Path, save: Save) -> None:
    for name in ("a", "b", "c", "d"):
        save(f"pics/{name}.jpg")
    images = [image(1, "a.jpg"), image(2, "a.jpg", width=80), image(3, "b.jpg"), image(3.0, "c.jpg")]
    found = read(tmp_path, [*images, image(4, "d.jpg")], [box(1), box(2), box("3"), box(4)])
    assert left_sides(found) == {"b.jpg": [], "c.jpg": [], "d.jpg": [5]}
    assert found.dropped_boxes == {"annotated with several sizes": 2, "id of several images": 1}
    assert found.dropped_images == {"annotated with several sizes": 1, "id of several images": 2}


def test_the_same_name_in_two_folders(tmp_path: Path, save: Save) -> None:
    save("pics/camA/1.jpg")
    save("pics/camB/1.jpg")
    images, boxes = [image(1, "camA/1.jpg"), image(2, "camB/1.jpg")], [box(1, 1), box(2, 2)]
    assert left_sides(read(tmp_path, images, boxes)) == {"camA/1.jpg": [1], "camB/1.jpg": [2]}
    found = read(tmp_path, images, boxes, "pics/camB")
    assert left_sides(found) == {"1.jpg": [2]}
    assert found.dropped_boxes == found.dropped_images == {"image missing": 1}
    assert "'camA/1.jpg', which is not in" in found.notes[0]
    found = read(tmp_path, [image(1, "1.jpg"), *images], [box(1, 9)])
    assert left_sides(found) == {"camA/1.jpg": [], "camB/1.jpg": []}, "id 1 has two names"
    found = read(tmp_path, [image(7, "1.jpg"), image(8, "camB/1.jpg")], [box(7, 9), box(8, 8)])
    assert left_sides(found) == {"camA/1.jpg": [], "camB/1.jpg": [8]}
    assert found.dropped_boxes == {"ambiguous name": 1}


def test_a_name_of_the_folder_above(tmp_path: Path, save: Save) -> None:
    """``1.jpg`` beside ``camB/1.jpg`` is an image of another folder, or the same: it is not guessed."""
    save("pics/camB/1.jpg")
    save("pics/camB/2.jpg")
    images = [image(1, "1.jpg"), image(2, "camB/1.jpg"), image(3, "camB/2.jpg")]
    found = read(tmp_path, images, [box(1, 1), box(2, 2), box(3, 3)], "pics/camB")
    assert left_sides(found) == {"1.jpg": [], "2.jpg": [3]}
    assert found.dropped_boxes == found.dropped_images == {"ambiguous name": 2}


@pytest.mark.parametrize(("own", "named"), [("img_a", "img_a"), (1, "1"), ("1", 1.0), (2**70, str(2**70))])
def test_ids_of_every_type(tmp_path: Path, save: Save, own: Any, named: Any) -> None:
    save("pics/a.jpg")
    kinds = [{"id": own, "name": "dog"}, {"id": "b", "name": "cat"}]
    entries = [box(named, category_id=named), box(named, category_id="b"), box(named, category_id=None)]
    found = read(tmp_path, [image(own, "a.jpg")], entries, categories=kinds)
    (record,) = found.records()
    assert [entry.label for entry in record.boxes] == ["dog", "cat", ""]


def test_hexadecimal_ids_are_no_numbers(tmp_path: Path, save: Save) -> None:
    names = ["00000000000e5000", "0000000000e10000", "1234567890123e45", "1234567890123e46"]
    for name in names:
        save(f"pics/{name}.jpg")
    found = read(tmp_path, [image(name, f"{name}.jpg") for name in names], [box(name) for name in names])
    assert left_sides(found) == {f"{name}.jpg": [5] for name in names}


def test_flags_of_every_type(tmp_path: Path, save: Save) -> None:
    save("pics/a.jpg")
    crowds = ["0", 0.0, False, None, "false", "1", 1.0, True, "maybe", [1]]
    found = read(tmp_path, [image(1, "a.jpg")], [box(1, iscrowd=crowd) for crowd in crowds])
    (record,) = found.records()
    assert [bool(entry.flags) for entry in record.boxes] == [False] * 5 + [True] * 3
    assert found.dropped_boxes == {"flag that is neither yes nor no": 2}


def test_sizes_of_every_type(tmp_path: Path, save: Save) -> None:
    sizes = [(40, 30), ("40", "30.0"), (40.0, 30.0), (None, None), (0, 0), (40, None), ("", "")]
    bad = [(-40, 30), ("wide", 30), (2**40, 30), (40.5, 30), ([], 30), (float("nan"), 30)]
    names = [f"{number}.jpg" for number in range(len(sizes) + len(bad))]
    for name in names:
        save(f"pics/{name}")
    pairs = enumerate(zip(names, sizes + bad, strict=True))
    images = [image(number, name, width=width, height=height) for number, (name, (width, height)) in pairs]
    found = read(tmp_path, images, [box(number) for number in range(len(names))])
    known = dict(found.images.select("name", pl_size()).rows())
    assert [known[name] for name in names[: len(sizes)]] == [True, True, True, False, False, False, False]
    assert found.dropped_images == {"width or height that no image has": len(bad)}
    assert found.dropped_boxes == found.dropped_images, "their boxes are not said to lack an image"
    assert found.images.height == len(sizes), "what is dropped is not counted without boxes as well"


def pl_size() -> Any:
    import polars as pl

    return (pl.col("width").eq(40) & pl.col("height").eq(30)).fill_null(False).alias("known")


def test_entries_that_are_none_are_counted(tmp_path: Path, save: Save) -> None:
    save("pics/a.jpg")
    entries = [None, 3, [], {}, image(None, "a.jpg"), image(True, "a.jpg"), image(2, 5), image(2, "\ud800")]
    boxes = [None, {}, box([]), box(1, bbox=[1, 2]), box(1, bbox="1,2,3,4"), box(1, bbox={}), box(1)]
    found = read(tmp_path, [*entries, image(1, "a.jpg")], boxes)
    assert left_sides(found) == {"a.jpg": [5]}
    assert found.dropped_images == {"entry without id, file name or box": len(entries)}
    assert found.dropped_boxes == {"entry without id, file name or box": len(boxes) - 1}


@pytest.mark.parametrize("masks", [False, True])
def test_images_without_any_box(tmp_path: Path, save: Save, masks: bool) -> None:
    save("pics/a.jpg")
    read(tmp_path, [image(1, "a.jpg")], [])
    found = read_coco(tmp_path / "a.json", tmp_path / "pics", masks)
    assert left_sides(found) == {"a.jpg": []}


def test_numbers_of_boxes(tmp_path: Path, save: Save) -> None:
    save("pics/a.jpg")
    bad = [None, "x", True, float("nan"), float("inf"), 10**400, "1e400", [1]]
    boxes = [box(1, bbox=["1", 2.0, " 3 ", "4e0"]), *(box(1, bbox=[1, 2, 3, value]) for value in bad)]
    found = read(tmp_path, [image(1, "a.jpg")], boxes)
    (record,) = found.records()
    assert [(entry.x1, entry.y1, entry.x2, entry.y2) for entry in record.boxes] == [(1, 2, 4, 6)]
    assert found.dropped_boxes == {"not a number": len(bad)}


def test_a_category_with_two_names(tmp_path: Path, save: Save) -> None:
    save("pics/a.jpg")
    kinds = [*NAMES["categories"], {"id": "1", "name": "wolf"}, {"id": 2.0, "name": "cat"}, 3, {}]
    found = read(tmp_path, [image(1, "a.jpg")], [box(1), box(1, 7, category_id=2)], categories=kinds)
    assert left_sides(found) == {"a.jpg": [7]}
    assert found.dropped_boxes == {"category with several names": 1}


def test_nothing_that_fits_says_what_was_looked_for_and_where(tmp_path: Path, save: Save) -> None:
    save("pics/photo_1.jpg")
    with pytest.raises(UserError) as error:
        read(tmp_path, [image(1, "set/photo-1.jpg")], [box(1)])
    assert "'set/photo-1.jpg', which is not in" in str(error.value)
    assert "the nearest file is 'photo_1.jpg'" in str(error.value)
    with pytest.raises(UserError, match=r"no entry of 'images' in .* can be used: 1 entry without id"):
        read(tmp_path, [image(None, "photo_1.jpg")], [box(1)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"images": [\n {"id": 1,}]}', r"line 2, column 1[01]\)"),
        ('{"images": [1 2]}', r"line 1, column 15\): '2' stands where ',' or '\]' belongs"),
        ('{"images": []} {}', "text goes on behind"),
        ("[]", "a.json' holds a list"),
        ("", "the end of the file stands where"),
        ('{"images": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_damaged_json_names_the_place(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_coco(tmp_path / "a.json", tmp_path)
    assert "a.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_json_of_other_encodings(tmp_path: Path, save: Save, encoding: str) -> None:
    save("pics/ä.jpg")
    text = json.dumps({"images": [image(1, "ä.jpg")], "annotations": [box(1)]}, ensure_ascii=False)
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    assert left_sides(read_coco(tmp_path / "a.json", tmp_path / "pics")) == {"ä.jpg": [5]}


def test_files_that_systems_leave_are_no_images(tmp_path: Path, save: Save) -> None:
    save("pics/a.jpg")
    for name in ("._a.jpg", ".DS_Store", "Thumbs.db", "__MACOSX/b.jpg", "__MACOSX/._a.jpg"):
        (tmp_path / "pics" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "pics" / name).write_bytes(b"\x00\x05\x16\x07")
    assert left_sides(read(tmp_path, [image(1, "a.jpg")], [box(1)])) == {"a.jpg": [5]}
