"""CSVs as spreadsheets write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pbe.data.sources.tables import read_csv
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
