"""COCO, VOC, YOLO, CSV and folders of masks, each on annotations written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from pbe.data.sources import parsing
from pbe.data.sources.annotations import DroppedError, ImageRecord
from pbe.data.sources.coco import read_coco
from pbe.data.sources.masks import load_mask, mask_box, read_mask_folder
from pbe.data.sources.tables import read_csv
from pbe.data.sources.voc import read_voc
from pbe.data.sources.yolo import read_yolo
from pbe.errors import UserError

Save = Callable[..., Path]

COCO = """\
{"info": {"year": 2017, "nested": [1, {"a": []}]},
 "licenses": [{"id": 4, "name": "Attribution License", "url": "u"}],
 "images": [
  {"id": 9, "file_name": "ünï code 1.jpg", "width": 40, "height": 30, "license": 4},
  {"id": 10, "file_name": "gone.jpg", "width": 40, "height": 30},
  {"id": 11, "file_name": "empty.png", "width": 40, "height": 30}, {"id": 12}],
 "annotations": [
  {"id": 1, "image_id": 9, "category_id": 18, "bbox": [5, 6, 10, 12.5], "iscrowd": 0,
   "segmentation": [[5, 6, 15, 6, 15, 18, 5, 18]]},
  {"id": 2, "image_id": 9, "category_id": 1, "bbox": [-3, 0, 50, 30], "iscrowd": 1,
   "segmentation": {"size": [30, 40], "counts": [0, 1200]}},
  {"id": 3, "image_id": 10, "category_id": 1, "bbox": [1, 1, 2, 2]},
  {"id": 4, "image_id": 9, "category_id": 99, "bbox": [1, 1, 0, 2]},
  {"id": 5, "image_id": 9, "category_id": 1, "bbox": [1, 2]}],
 "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]}
"""

VOC = """\
<annotation><folder>VOC2012</folder><filename>a b.jpg</filename>
<size><width>{width}</width><height>30</height><depth>3</depth></size>
<object><name>dog</name><truncated>1</truncated><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>3</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>
<part><name>head</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>4</xmax><ymax>5</ymax></bndbox></part></object>
<object><name>cat</name><difficult>1</difficult>
<bndbox><ymax>9.5</ymax><xmin>11</xmin><ymin>5</ymin><xmax>20</xmax></bndbox></object>
<object><name>bad</name><bndbox><xmin>x</xmin><ymin>5</ymin><xmax>20</xmax><ymax>9</ymax></bndbox></object>
</annotation>
"""


def corners(record: ImageRecord) -> list[tuple[float, float, float, float]]:
    return [(box.x1, box.y1, box.x2, box.y2) for box in record.boxes]


@pytest.fixture
def coco(tmp_path: Path, save: Save) -> Path:
    save("val/ünï code 1.jpg")
    save("val/empty.png")
    save("val/unknown.jpg")
    path = tmp_path / "instances.json"
    path.write_text(COCO, encoding="utf-8")
    return path


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_coco(coco: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "CHUNK", chunk)
    found = read_coco(coco, coco.parent / "val")
    records = {record.name: record for record in found.records()}
    dog = records["ünï code 1.jpg"]
    assert corners(dog) == [(5, 6, 15, 18.5), (-3, 0, 47, 30), (1, 1, 1, 3)]
    assert [box.label for box in dog.boxes] == ["dog", "person", ""]
    assert dog.boxes[1].flags == {"is_group_of"}
    assert dog.licence == "Attribution License"
    assert records["empty.png"].boxes == records["unknown.jpg"].boxes == ()
    assert found.dropped_images == {"image missing": 1, "entry without id, file name or box": 1}
    assert found.dropped_boxes == {"image missing": 1, "entry without id, file name or box": 1}


def test_coco_masks(coco: Path) -> None:
    found = read_coco(coco, coco.parent / "val", masks=True)
    dog = next(record for record in found.records() if record.boxes)
    assert mask_box(load_mask(dog.boxes[0].mask, 40, 30)[0]) == (5, 6, 15, 18)
    assert load_mask(dog.boxes[0].mask, 40, 30)[0].sum() == 10 * 12
    assert load_mask(dog.boxes[1].mask, 40, 30)[0].all()
    assert dog.boxes[2].mask == "", "without a mask the box stays"
    assert dog.boxes[2].x2 == 1
    with pytest.raises(DroppedError, match="another size"):
        load_mask(dog.boxes[1].mask, 30, 40)


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"images": [1 2]}', '{"images": [', "{", '{"images": 3', '{"a":}']
)
def test_json_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.json' (is not valid JSON|holds a list)"):
        list(parsing.stream_arrays(path))


def test_json_without_images(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"annotations": []}')
    with pytest.raises(UserError, match="no 'images'"):
        read_coco(tmp_path / "a.json", tmp_path)


def test_voc(tmp_path: Path, save: Save) -> None:
    save("JPEGImages/a b.jpg")
    save("JPEGImages/c.jpg")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a b.xml").write_text(VOC.format(width=40))
    (tmp_path / "Annotations" / "c.xml").write_text(VOC.format(width=0).replace("\n", "\r\n"))
    (tmp_path / "Annotations" / "d.xml").write_text(VOC.format(width=40))
    (tmp_path / "Annotations" / "e.xml").write_text("<annotation>")
    found = read_voc(tmp_path)
    first, second = found.records()
    assert corners(first) == [(0, 2, 40, 30), (10, 4, 20, 9.5)]
    assert [(box.label, box.flags) for box in first.boxes] == [
        ("dog", {"is_truncated"}),
        ("cat", {"is_difficult"}),
    ]
    assert (second.width, second.height) == (40, 30), "a size of zero is read from the image"
    assert found.dropped_images == {"image missing": 1, "unreadable annotation": 1}
    assert found.dropped_boxes == {"not a number": 2, "image missing": 3}
    first = next(read_voc(tmp_path, one_based=False).records())
    assert corners(first)[0] == (1, 3, 40, 30)


def test_yolo(tmp_path: Path, save: Save) -> None:
    for name in ("images/train/a.jpg", "images/train/b.png", "images/train/c.jpg"):
        save(name, 100, 50)
    folder = tmp_path / "labels" / "train"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_bytes(
        b"0 0.5 0.5 0.5 0.2\r\n1 0.1 0.1 0.4 0.4\r\n\r\n2 0 0 0.5 0 0.5 1 0 1\r\nx 1 1 1 1\r\n1 0.5\r\n"
    )
    (folder / "b.txt").write_text("")
    (folder / "gone.txt").write_text("0 0.5 0.5 0.5 0.2\n")
    (tmp_path / "data.yaml").write_text("path: .\nnames:\n  0: a dog\n  1: cat\n")
    found = read_yolo(tmp_path)
    first, second, third = found.records()
    assert np.allclose(corners(first), [(25, 20, 75, 30), (-10, -5, 30, 15), (0, 0, 50, 50)])
    assert [box.label for box in first.boxes] == ["a dog", "cat", "2"]
    assert second.boxes == third.boxes == ()
    assert found.dropped_images == {"image missing": 1}
    assert found.dropped_boxes == {"not a number": 2, "image missing": 1}
    (tmp_path / "labels" / "classes.txt").write_text("Hund\nKatze\n")
    (tmp_path / "data.yaml").unlink()
    assert next(read_yolo(tmp_path).records()).boxes[0].label == "Hund"


def test_csv(tmp_path: Path, save: Save) -> None:
    save("images/sub/a b.jpg")
    (tmp_path / "boxes.csv").write_bytes(
        b"label,y2,file,x1,y1,x2,is_group_of\r\ncat,20,sub\\a b.jpg,1,2,10.5,1\r\n"
        b'"dog, big",NaN,sub/a b.jpg,1,2,10,0\r\nowl,20,gone.jpg,1,2,10,0\r\n'
    )
    found = read_csv(tmp_path / "boxes.csv", tmp_path / "images")
    (record,) = found.records()
    big, cat = record.boxes
    assert corners(record)[1] == (1, 2, 10.5, 20)
    assert (cat.label, big.label) == ("cat", "dog, big")
    assert (cat.flags, big.flags) == ({"is_group_of"}, set())
    assert big.y2 != big.y2
    assert found.dropped_boxes == {"image missing": 1}
    (tmp_path / "boxes.csv").write_text("file,x,y,width,height\nsub/a b.jpg,0.1,0.2,0.5,0.5\n")
    (record,) = read_csv(tmp_path / "boxes.csv", tmp_path / "images", relative=True).records()
    assert np.allclose(corners(record), [(4, 6, 24, 21)])
    (tmp_path / "boxes.csv").write_text("file,x1\na,1\n")
    with pytest.raises(UserError, match="lacks the columns x1, y1, x2, y2"):
        read_csv(tmp_path / "boxes.csv", tmp_path / "images")
    (tmp_path / "boxes.csv").write_text("")
    with pytest.raises(UserError, match="is not a CSV"):
        read_csv(tmp_path / "boxes.csv", tmp_path / "images")


def test_mask_folder(tmp_path: Path, save: Save) -> None:
    for name in ("images/a.jpg", "images/a_1.jpg", "images/b.jpg"):
        save(name)
    mask = np.zeros((30, 40), np.uint8)
    mask[4:10, 8:20] = 255
    (tmp_path / "masks" / "b").mkdir(parents=True)
    for name in ("a.png", "a_1.png", "a_2_x.png", "b/0.png", "b/1.png", "stray.png"):
        cv2.imwrite(str(tmp_path / "masks" / name), mask)
    found = read_mask_folder(tmp_path)
    assert [len(record.boxes) for record in found.records()] == [2, 1, 2]
    assert found.dropped_boxes == {"mask without an image": 1}
    text = next(found.records()).boxes[0].mask
    assert mask_box(load_mask(text, 40, 30)[0]) == (8, 4, 20, 10)
    for values, reason in (
        (mask // 85, "not black and white"),
        (mask[:5], "another size"),
        (mask // 255, ""),
    ):
        cv2.imwrite(str(tmp_path / "masks" / "a.png"), values)
        if reason:
            with pytest.raises(DroppedError, match=reason):
                load_mask(text, 40, 30)
        else:
            assert load_mask(text, 40, 30)[0].sum() == 6 * 12
    (tmp_path / "masks" / "a.png").write_bytes(b"junk")
    with pytest.raises(DroppedError, match="unreadable"):
        load_mask(text, 40, 30)
    with pytest.raises(DroppedError, match="empty"):
        mask_box(np.zeros((3, 3), np.uint8))
