"""CSVs as spreadsheets write them, and Open Images: CSVs of every version, folders, names, licences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pbe.data.sources.tables import read_csv, read_open_images
from pbe.errors import UserError

Save = Callable[..., Path]


@pytest.mark.parametrize(
    "content",
    [
        b"file,x1,y1,x2,y2,label\na.jpg,1.5,2,30,20,dog\n",
        b"\xef\xbb\xbffile,x1,y1,x2,y2,label\r\na.jpg,1.5,2,30,20,dog\r\n\r\n",
        b"file, x1, y1, x2, y2, label\na.jpg, 1.5, 2, 30, 20, dog\n",
        b"File,X1,Y1,X2,Y2,LABEL\n./a.jpg,1.5,2,30,20,dog\n",
        b"file;x1;y1;x2;y2;label\nC:\\x\\a.jpg;1,5;2;30;20;dog\n",
        b"label|file|x|y|width|height\ndog|A.JPG|1.5|2|28.5|18\n",
        b'"file","x1","y1","x2","y2","label"\n"a.jpg","1,5","2","30","20","dog"\n',
        b",file,x1,y1,x2,y2,label\n0,a.jpg,1.5,2,30,20,dog\n\n",
        b"file,x1,y1,x2,y2,label\ra.jpg,1.5,2,30,20,dog\r",
        b"file,x1,y1,x2,y2,label,,\na.jpg,1.5,2,30,20,dog,,\n",
        "file\tx1\ty1\tx2\ty2\tlabel\r\na.jpg\t1,5\t2\t30\t20\tdog\r\n".encode("utf-16"),
    ],
)
def test_spreadsheets(tmp_path: Path, save: Save, content: bytes) -> None:
    save("pics/a.jpg")
    (tmp_path / "boxes [1].csv").write_bytes(content)
    found = read_csv(tmp_path / "boxes [1].csv", tmp_path / "pics")
    (record,) = found.records()
    assert [(box.x1, box.y1, box.x2, box.y2, box.label) for box in record.boxes] == [(1.5, 2, 30, 20, "dog")]
    assert not found.dropped_boxes
    assert not found.dropped_images
    assert found.images["key"].to_list() == ["a"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"file,x1,y1,x2,y2\na.jpg,1,2,3,4\na.jpg,1,2,3,4,5\n", "line 3 has 6 fields where the header has 5"),
        ("file,x1,y1,x2,y2\nä.jpg,1,2,3,4\n".encode("latin-1"), "line 2 is not UTF-8"),
        (b"name,x1,y1,x2,y2\na.jpg,1,2,3,4\n", "lacks the column 'file'.* has the columns 'name, x1"),
        (b"file,left,top,right,bottom\na.jpg,1,2,3,4\n", "lacks the columns x1, y1, x2, y2, or x, y"),
        (b"file,x1,X1,y1,x2,y2\na.jpg,1,1,2,3,4\n", "two columns 'x1'"),
        (b"file,x1,y1,x2,y2,x1\na.jpg,1,2,3,4,5\n", "two columns 'x1'"),
        (b"a.jpg,20,20,70,60\n", "lacks the column 'file'.* has the columns 'a.jpg, 20, 20, 70, 60'"),
        (b"file,x1,y1,x2,y2\nb.jpg,1,2,3,4\n", "'b.jpg', which is not in .* the nearest file is 'a.jpg'"),
        (b"\x1f\x8b\x08", "compressed"),
        (b"", "not a CSV"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, save: Save, content: bytes, words: str) -> None:
    save("pics/a.jpg")
    (tmp_path / "boxes.csv").write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_csv(tmp_path / "boxes.csv", tmp_path / "pics")
    assert "boxes.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_lines_are_counted_by_what_is_wrong_with_them(tmp_path: Path, save: Save) -> None:
    save("pics/sub/a.jpg")
    save("pics/x/b.jpg")
    save("pics/y/b.jpg")
    (tmp_path / "boxes.csv").write_text(
        "file,x1,y1,x2,y2,is_group_of\nsub\\a.jpg,1,2,3,4,True\n./sub/a.jpg,1,2,3,4,0.0\nsub/a.jpg,1,2,3,4,maybe\n"
        "b.jpg,1,2,3,4,0\ngone.jpg,1,2,3,4,0\n"
    )
    found = read_csv(tmp_path / "boxes.csv", tmp_path / "pics")
    record = next(found.records())
    assert [len(box.flags) for box in record.boxes] in ([1, 0], [0, 1])
    assert found.dropped_boxes == {
        "flag that is neither yes nor no": 1,
        "ambiguous name": 1,
        "image missing": 1,
    }
    assert found.dropped_images == {"ambiguous name": 1, "image missing": 1}
    assert "'gone.jpg', which is not in" in found.notes[0]


V4 = """\
ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside
000002b66c9c498e,xclick,/m/01g317,1,0.25,0.5,0.1,0.9,0,1,0,0,0
000002b66c9c498e,activemil,/m/0284d,1,0,1,0,1,-1,-1,-1,-1,-1
000002b66c9c498e,xclick,/m/01g317,1,0.5,0.5,0.2,0.4,0,0,1,1,0
0fffffffffffffff,xclick,/m/01g317,1,0.1,0.2,0.1,0.2,0,0,0,0,0
"""
# Version 6 has the four clicks behind; here the columns stand in another order, with Windows line ends.
V6 = (
    "XMax,YMax,XMin,YMin,ImageID,LabelName,IsGroupOf,IsDepiction,XClick1X\r\n"
    "0.5,0.9,0.25,0.1,000002b66c9c498e,/m/01g317,0,1,0.3\r\n"
    "oops,0.9,0.25,0.1,000002b66c9c498e,/m/01g317,1,0,0.3\r\n"
)


def test_version_4(tmp_path: Path, save: Save) -> None:
    save("train_0/000002b66c9c498e.jpg", 400, 200)
    save("train_f/00000c4dcff36b24.jpg", 64, 48)
    (tmp_path / "train-annotations-bbox.csv").write_text(V4)
    (tmp_path / "class-descriptions-boxable.csv").write_text('/m/01g317,"Person, any"\n/m/0284d,Müsli\n')
    found = read_open_images(tmp_path)
    first, second = found.records()
    assert (first.name, first.width, first.height) == ("train_0/000002b66c9c498e.jpg", 400, 200)
    assert [(b.x1, b.y1, b.x2, b.y2) for b in first.boxes] == [
        (0, 0, 400, 200),
        (100, 20, 200, 180),
        (200, 40, 200, 80),
    ]
    assert [b.label for b in first.boxes] == ["Müsli", "Person, any", "Person, any"]
    assert [b.flags for b in first.boxes] == [set(), {"is_truncated"}, {"is_group_of", "is_depiction"}]
    assert second.boxes == ()
    assert found.dropped_images == {"image missing": 1}
    assert found.dropped_boxes == {"image missing": 1}


def test_version_6_columns_in_another_order_and_windows_line_ends(tmp_path: Path, save: Save) -> None:
    save("images/train/000002b66c9c498e.jpg", 40, 20)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "oidv6-train-annotations-bbox.csv").write_bytes(V6.encode())
    (tmp_path / "annotations" / "oidv6-train-images-with-labels-with-rotation.csv").write_text(
        "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,Rotation\n"
        "000002b66c9c498e,train,u,l,https://creativecommons.org/licenses/by/2.0/,p,Ann Ø,t,0.0\n"
    )
    (record,) = read_open_images(tmp_path).records()
    assert record.licence == "https://creativecommons.org/licenses/by/2.0/"
    assert record.author == "Ann Ø"
    assert record.boxes[0].label == "/m/01g317"
    assert record.boxes[0].flags == {"is_depiction"}
    assert record.boxes[1].x2 != record.boxes[1].x2, "what is no number is NaN"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_other_splits_flat(tmp_path: Path, save: Save, split: str) -> None:
    save("000002b66c9c498e.jpg")
    (tmp_path / f"{split}-annotations-bbox.csv").write_text(V4)
    assert read_open_images(tmp_path, split=split).boxes.height == 3


def test_an_image_that_lies_in_two_folders_counts_once(tmp_path: Path, save: Save) -> None:
    save("train_0/000002b66c9c498e.jpg")
    save("train_1/000002b66c9c498e.jpg")
    (tmp_path / "train-annotations-bbox.csv").write_text(V4)
    found = read_open_images(tmp_path)
    assert found.boxes.height == 3
    assert found.dropped_images["image found twice"] == 1


def test_complaints(tmp_path: Path, save: Save) -> None:
    with pytest.raises(UserError, match="no train-annotations-bbox"):
        read_open_images(tmp_path)
    (tmp_path / "train-annotations-bbox.csv").write_text("ImageID,XMin\na,1\n")
    with pytest.raises(UserError, match="no images of the train split"):
        read_open_images(tmp_path)
    save("train/a.jpg")
    with pytest.raises(UserError, match="lacks the columns LabelName, YMin, XMax, YMax"):
        read_open_images(tmp_path)
    with pytest.raises(UserError, match="split 'trian'"):
        read_open_images(tmp_path, split="trian")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train-annotations-bbox.csv", ""),
        ("train-annotations-bbox.csv", V4 + '000002b66c9c498e,"xclick"x,"/m/01g317"x,1,0,1,0,1,0,0,0,0,0\n'),
        ("train-annotations-bbox.csv", V4 + '"000002b66c9c498e,xclick,/m/01g317'),
        ("train-images.csv", ""),
    ],
)
def test_damaged_tables_are_one_line(tmp_path: Path, save: Save, name: str, text: str) -> None:
    save("train_0/000002b66c9c498e.jpg", 40, 20)
    (tmp_path / "train-annotations-bbox.csv").write_text(V4)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="CSV") as found:
        read_open_images(tmp_path)
    assert "\n" not in str(found.value)
