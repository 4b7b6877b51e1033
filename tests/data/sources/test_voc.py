"""Pascal VOC as tools write it: XMLs whose names are not their images'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pbe.data.sources.voc import read_voc
from pbe.errors import UserError

Save = Callable[..., Path]
XML = """<annotation><filename>{name}</filename><size><width>{width}</width><height>30</height></size>
<object><name>dog</name><truncated>{flag}</truncated>
<bndbox><xmin>{x}</xmin><ymin>3</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>"""


def write(path: Path, name: str, x: object = 2, width: object = 40, flag: str = "0") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(XML.format(name=name, x=x, width=width, flag=flag))


def left_sides(folder: Path, **options: object) -> dict[str, list[float]]:
    records = read_voc(folder, **options).records()  # type: ignore[arg-type]
    return {record.name: [box.x1 for box in record.boxes] for record in records}


def test_the_filename_counts_where_no_image_has_the_xmls_name(tmp_path: Path, save: Save) -> None:
    for name in ("IMG_1.jpg", "2.jpg", "other.jpg", "3.jpg"):
        save(f"JPEGImages/{name}")
    write(tmp_path / "Annotations/0001.xml", "C:\\set\\IMG_1.jpg", 11)
    write(tmp_path / "Annotations/2.xml", "gone.jpg", 21)
    write(tmp_path / "Annotations/3.xml", "2.jpg", 31)
    assert left_sides(tmp_path) == {"IMG_1.jpg": [10], "2.jpg": [20], "3.jpg": [30], "other.jpg": []}
    write(tmp_path / "Annotations/3.xml", "other.jpg", 31)
    found = read_voc(tmp_path)
    assert found.dropped_images == {"annotation whose name and <filename> are two images": 1}
    assert found.dropped_boxes == {"annotation whose name and <filename> are two images": 1}
    assert found.boxes.height == 2


def test_two_images_of_one_stem(tmp_path: Path, save: Save) -> None:
    save("JPEGImages/a.jpg")
    save("JPEGImages/a.png")
    write(tmp_path / "Annotations/a.xml", "a.png")
    assert left_sides(tmp_path) == {"a.jpg": [], "a.png": [1]}
    write(tmp_path / "Annotations/a.xml", "")
    assert read_voc(tmp_path).dropped_boxes == {"ambiguous name": 1}


def test_xmls_beside_their_images(tmp_path: Path, save: Save) -> None:
    save("a.jpg")
    write(tmp_path / "a.xml", "a.jpg")
    (tmp_path / "._a.xml").write_bytes(b"\x00\x05")
    assert left_sides(tmp_path) == {"a.jpg": [1]}


def test_values_of_every_form(tmp_path: Path, save: Save) -> None:
    for number, (x, width, flag) in enumerate(
        [("2.0", "40.0", "True"), (2, "", "Unspecified"), ("nan", 40, "0"), (2, -3, "0"), (2, 40, "")]
    ):
        save(f"JPEGImages/{number}.jpg")
        write(tmp_path / f"Annotations/{number}.xml", "", x, width, flag)
    found = read_voc(tmp_path)
    records = {record.name: record for record in found.records()}
    assert records["0.jpg"].boxes[0].flags == {"is_truncated"}
    assert records["4.jpg"].boxes[0].flags == set()
    assert found.dropped_boxes == {
        "not a number": 1,
        "flag that is neither yes nor no": 1,
        "width or height that no image has": 1,
    }
    assert "3.jpg" not in records, "what is dropped is not counted without boxes as well"
    write(tmp_path / "Annotations/x.xml", "3.jpg")
    assert "names 'x.jpg', which is not in" in read_voc(tmp_path).notes[0], "3.jpg has its own XML"
    (tmp_path / "Annotations/3.xml").rename(tmp_path / "Annotations/y.xml")
    write(tmp_path / "Annotations/y.xml", "3.jpg", width=-3)
    assert read_voc(tmp_path).dropped_boxes["width or height that no image has"] == 2


def test_what_cannot_be_read_is_named(tmp_path: Path, save: Save) -> None:
    save("JPEGImages/a.jpg")
    write(tmp_path / "Annotations/a.xml", "a.jpg")
    (tmp_path / "Annotations/b.xml").write_text("<annotation>")
    (tmp_path / "Annotations/c.xml").write_text("<html/>")
    found = read_voc(tmp_path)
    assert found.dropped_images == {"unreadable annotation": 2}
    assert "b.xml' cannot be read: no element found: line 1, column 12" in found.notes[0]
    (tmp_path / "JPEGImages/a.jpg").rename(tmp_path / "JPEGImages/a_1.jpg")
    with pytest.raises(UserError, match=r"'a\.jpg', which is not in .* the nearest file is 'a_1\.jpg'"):
        read_voc(tmp_path)
