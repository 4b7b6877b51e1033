"""YOLO sets: what data.yaml says of lines and folders, and texts that are no labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pbe.data.sources.annotations import Annotations
from pbe.data.sources.yolo import read_yolo
from pbe.errors import UserError

Save = Callable[..., Path]
BOX = (8, 7.5, 28, 22.5)  # of 40 x 30 pixels
LINE = "0 0.45 0.5 0.5 0.5"
RECTANGLE = "0 0.2 0.25 0.7 0.25 0.7 0.75 0.2 0.75"


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def boxes(found: Annotations) -> list[tuple[float, ...]]:
    return [(box.x1, box.y1, box.x2, box.y2) for record in found.records() for box in record.boxes]


@pytest.fixture
def folder(tmp_path: Path, save: Save) -> Path:
    save("images/a.jpg")
    return tmp_path


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ("", LINE),
        ("", f"{LINE} 0.93"),
        ("", f"\t0.0{LINE[1:]}  "),
        ("", RECTANGLE),
        ("", "0 0.2 0.25 0.7 0.25 0.7 0.75"),
        ("kpt_shape: [3, 2]", f"{LINE} 0.3 0.3 0.6 0.7 0.5 0.5"),
        ("kpt_shape: [4, 3]", f"{LINE} 0.3 0.3 2 0.6 0.7 1 0.5 0.5 2 0.0 0.0 0"),
        ("kpt_shape: ['1', 2.0]", f"{LINE} 0.3 0.3 0.97"),
        ("kpt_shape: [3, 2]", LINE),
        ("task: pose", f"{LINE} 0.3 0.3 0.6 0.7"),
        ("task: obb", RECTANGLE),
        ("task: obb", f"{RECTANGLE} 0.9"),
        ("task: segment", "0 0.2 0.25 0.2 0.25 0.7 0.75 0.4 0.5"),
        ("task: segment\nkpt_shape: [2, 2]", RECTANGLE),
        ("task: detect", RECTANGLE),
        ("task: null\nkpt_shape:", RECTANGLE),
    ],
)
def test_what_data_yaml_says_decides(folder: Path, metadata: str, line: str) -> None:
    write(folder / "data.yaml", f"names: [dog]\n{metadata}\n")
    write(folder / "labels/a.txt", line + "\n")
    found = read_yolo(folder)
    assert np.allclose(boxes(found), [BOX])
    assert found.boxes["label"].to_list() == ["dog"]
    assert not found.dropped_boxes


@pytest.mark.parametrize(
    ("metadata", "line", "reason"),
    [
        ("kpt_shape: [3, 2]", RECTANGLE, "line of another form than data.yaml says"),
        ("task: obb", f"{RECTANGLE} 0.5 0.5", "line of another form than data.yaml says"),
        ("", "0 20 25 70 25 70 75", "polygon beyond 0 to 1"),
        ("", "0 0.2 0.25 0.7 0.25 0.7 0.75 0.2", "polygon with an odd number of coordinates"),
        ("", "0.5 0.45 0.5 0.5 0.5", "not a number"),
        ("", "dog 0.45 0.5 0.5 0.5", "not a number"),
        ("", "0 nan 0.5 0.5 0.5", "not a number"),
        ("", "0 1e400 0.5 0.5 0.5", "not a number"),
        ("", "0 0.45 0.5 0.5", "not a number"),
        ("", f"{LINE} 0.3 0.3 0.6 0.7 0.5 0.5", "polygon or keypoints, which data.yaml does not say"),
        ("", f"{LINE} 0.3 0.3 2 0.6 0.7 1 0 0 0", "polygon or keypoints, which data.yaml does not say"),
    ],
)
def test_lines_that_cannot_be_read_are_counted(folder: Path, metadata: str, line: str, reason: str) -> None:
    write(folder / "data.yaml", f"names: [dog]\n{metadata}\n")
    write(folder / "labels/a.txt", line)
    found = read_yolo(folder)
    assert not boxes(found)
    assert found.dropped_boxes == {reason: 1}


def test_polygons_among_which_one_could_be_a_pose(folder: Path) -> None:
    write(folder / "labels/a.txt", f"0 0.5 0.5 0.6 0.5 0.6 0.6\n{RECTANGLE}\n")
    assert np.allclose(sorted(boxes(read_yolo(folder))), [BOX, (20, 15, 24, 18)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nc: 1", "data.yaml' holds no readable list 'names'"),
        ("names: dog", "no readable list 'names'"),
        ("names: [[dog]]", r"'names' holds '0: \['dog'\]'"),
        ("names: {a: dog}", "'names' holds 'a: dog'"),
        ("names: [a: b, c]\npath: C: x", "line 2: mapping values"),
        ("names: [dog]\nkpt_shape: 17", r"kpt_shape is '17'; it must be \[keypoints, 2\]"),
        ("names: [dog]\nkpt_shape: [17, 4]", "it must be"),
        ("names: [dog]\ntask: classify", "task is 'classify'; it must be one of detect, segment"),
    ],
)
def test_a_damaged_data_yaml_is_one_line(folder: Path, text: str, words: str) -> None:
    write(folder / "labels/a.txt", LINE)
    write(folder / "data.yaml", text)
    write(folder / "._data.yaml", b"\x00\x05\x16")
    with pytest.raises(UserError, match=words) as error:
        read_yolo(folder)
    assert "\n" not in str(error.value)


def test_class_names_are_texts_as_written(folder: Path) -> None:
    write(folder / "labels/a.txt", f"{LINE}\n1{LINE[1:]}\n7{LINE[1:]}\n")
    write(folder / "data.yaml", "# 🚀\nnames:\n  0: no\n  '1': ${x}\n")
    assert sorted(read_yolo(folder).boxes["label"].to_list()) == ["${x}", "7", "no"]
    write(folder / "classes.txt", "Hund\r\nKätzchen\r\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"class 0 is 'Hund' in '.*classes.txt' and 'no' in '.*data.yaml'"):
        read_yolo(folder)
    write(folder / "data.yaml", "names: [Hund]\n")
    assert sorted(read_yolo(folder).boxes["label"].to_list()) == ["7", "Hund", "Kätzchen"]
    write(folder / "classes.txt", "Kätzchen".encode("latin-1"))
    with pytest.raises(UserError, match=r"classes.txt': line 1 is not UTF-8"):
        read_yolo(folder)


@pytest.mark.parametrize("train", ["../train/images", "train/images", "./train", "/content/set/train/images"])
def test_splits(tmp_path: Path, save: Save, train: str) -> None:
    for split in ("train", "valid"):
        save(f"train/images/{split}.jpg".replace("train/", f"{split}/", 1))
        write(tmp_path / split / "labels" / f"{split}.txt", LINE)
        write(tmp_path / split / "labels" / "README.txt", "a set\n")
    write(tmp_path / "README.roboflow.txt", "a set")
    write(tmp_path / "data.yaml", f"train: {train}\nval: valid/images\nnames: [dog]\n")
    found = read_yolo(tmp_path)
    assert found.images["name"].to_list() == ["train.jpg"]
    assert found.boxes["label"].to_list() == ["dog"]
    assert not found.dropped_images
    assert "the split train of" in found.notes[0]
    assert read_yolo(tmp_path, split="validation").images["name"].to_list() == ["valid.jpg"]
    found = read_yolo(tmp_path / "train")
    assert (found.boxes["label"].to_list(), +found.dropped_images) == (["dog"], {})
    (tmp_path / "data.yaml").unlink()
    assert read_yolo(tmp_path).images["name"].to_list() == ["train.jpg"]
    with pytest.raises(UserError, match="holds train, valid; name one: yolo:"):
        read_yolo(tmp_path, split="test")


def test_splits_within_images_and_labels(tmp_path: Path, save: Save) -> None:
    for split in ("train", "val"):
        save(f"images/{split}/{split}.jpg")
        write(tmp_path / "labels" / split / f"{split}.txt", LINE)
    assert len(boxes(read_yolo(tmp_path))) == 2, "nothing names a split"
    metadata = "path: ../datasets/x\ntrain: images/train\nval: images/val\nnames: [dog]\n"
    write(tmp_path / "data.yaml", metadata)
    found = read_yolo(tmp_path)
    assert (found.images["name"].to_list(), found.boxes["label"].to_list()) == (["train.jpg"], ["dog"])
    assert "the split train of" in found.notes[0]
    assert read_yolo(tmp_path, split="validation").images["name"].to_list() == ["val.jpg"]
    assert "all of images/ is read, not a split test" in read_yolo(tmp_path, split="test").notes[0]
    found = read_yolo(tmp_path / "labels/train", tmp_path / "images/train")
    assert found.boxes["label"].to_list() == ["dog"], "data.yaml is above the folder of labels"
    write(tmp_path / "data.yaml", "train: train.txt\nnames: [dog]\n")
    found = read_yolo(tmp_path)
    assert len(boxes(found)) == 2
    assert "all of images/ is read" in found.notes[0]


def test_a_split_that_is_not_there(tmp_path: Path, save: Save) -> None:
    save("one/images/a.jpg")
    write(tmp_path / "one/labels/a.txt", LINE)
    write(tmp_path / "data.yaml", "train: /content/other\nnames: [dog]\n")
    with pytest.raises(UserError, match=r"names '/content/other' for train, which is not there; name .*/one"):
        read_yolo(tmp_path)
    write(tmp_path / "data.yaml", "train: train.txt\nnames: [dog]\n")
    with pytest.raises(UserError, match=r"is a list of images, 'train.txt'; name their folder"):
        read_yolo(tmp_path)


def test_an_older_export_of_cvat(tmp_path: Path, save: Save) -> None:
    save("obj_train_data/a.jpg")
    write(tmp_path / "obj_train_data/a.txt", LINE)
    write(tmp_path / "train.txt", "data/obj_train_data/a.jpg\n")
    write(tmp_path / "obj.names", "dog\n")
    write(tmp_path / "obj.data", "classes = 1\n")
    found = read_yolo(tmp_path)
    assert (found.boxes["label"].to_list(), +found.dropped_images) == (["dog"], {})


def test_texts_and_images_that_do_not_fit(tmp_path: Path, save: Save) -> None:
    for name in ("a.jpg", "b.jpg", "b.png", "C.JPG"):
        save(f"images/{name}")
    for name in ("a", "b", "c", "gone"):
        write(tmp_path / f"labels/{name}.txt", LINE)
    found = read_yolo(tmp_path)
    assert [len(record.boxes) for record in found.records()] == [1, 1, 0, 0]
    assert found.dropped_boxes == found.dropped_images
    assert found.dropped_boxes == {"ambiguous name": 1, "image missing": 1}
    assert "'gone', which is not in" in found.notes[0]
    for name in ("a", "b", "c"):
        (tmp_path / f"labels/{name}.txt").unlink()
    with pytest.raises(UserError, match="no image of the labels is there"):
        read_yolo(tmp_path)
