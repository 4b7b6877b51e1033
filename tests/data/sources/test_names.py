"""Names of annotations and the files they mean, or do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbe.data.sources.names import AMBIGUOUS, NameMatcher, clean_name


def match(files: list[str], names: list[str], root: str = "/data/pics") -> dict[str, str | None]:
    """Return the file that each name is matched with; "?" where it is ambiguous."""
    rows = NameMatcher(files, Path(root)).match(names)
    return {
        name: None if row is None else "?" if row == AMBIGUOUS else files[row] for name, row in rows.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        "sub/ä b.jpg",
        "sub\\ä b.jpg",
        "./sub/ä b.jpg",
        "sub//x/../ä b.jpg",
        "/home/me/pics/sub/ä b.jpg",
        "C:\\Users\\me\\sub\\ä b.jpg",
        "https://host.org/bucket/sub/%C3%A4%20b.jpg?sig=1&x=y",
        "s3://bucket/sub/ä b.jpg",
        "/data/local-files/?d=up/sub/ä b.jpg",
        "sub/a\u0308 b.jpg",
        "sub/%C3%A4%20b.jpg",
        "ä b.jpg",
        "SUB/Ä B.JPG",
    ],
)
def test_one_file_by_many_names(name: str) -> None:
    files = ["other.jpg", "sub/ä b.jpg", "sub/c.jpg"]
    assert match(files, [name]) == {name: "sub/ä b.jpg"}


def test_names_as_they_stand_come_first() -> None:
    files = ["a.jpg", "A.jpg", "%41.jpg", "a\\b.jpg", "b.jpg"]
    assert match(files, files) == {name: name for name in files}


def test_two_files_for_one_name_are_ambiguous() -> None:
    files = ["camA/1.jpg", "camB/1.jpg", "x.JPG", "X.jpg"]
    assert match(files, ["1.jpg", "x.jpg"]) == {"1.jpg": "?", "x.jpg": "?"}
    assert match(files, ["cams/camB/1.jpg"]) == {"cams/camB/1.jpg": "camB/1.jpg"}


def test_another_folders_name_is_not_taken_for_this_ones() -> None:
    names = ["camA/1.jpg", "camB/1.jpg", "camA/2.jpg"]
    expected = {"camA/1.jpg": None, "camB/1.jpg": "1.jpg", "camA/2.jpg": None}
    assert match(["1.jpg", "2.jpg"], names, "/data/camB") == expected
    assert set(match(["1.jpg", "2.jpg"], names, "/data/pics").values()) == {"?"}
    assert match(["camB/1.jpg", "camB/2.jpg"], names) == {
        "camA/1.jpg": None,
        "camB/1.jpg": "camB/1.jpg",
        "camA/2.jpg": None,
    }


def test_folders_that_were_copied_into_one() -> None:
    assert match(["a.jpg", "b.jpg"], ["train/a.jpg", "val/b.jpg", "val/c.jpg"]) == {
        "train/a.jpg": "a.jpg",
        "val/b.jpg": "b.jpg",
        "val/c.jpg": None,
    }


def test_absolute_and_bare_names_together() -> None:
    names = ["/home/me/data/train/a.jpg", "b.jpg"]
    assert match(["a.jpg", "b.jpg"], names, "/x/train") == {names[0]: "a.jpg", "b.jpg": "b.jpg"}


@pytest.mark.parametrize("name", ["", ".", "..", "/", "C:", "https://host", "?", "%", "\x00"])
def test_names_of_nothing(name: str) -> None:
    assert match(["a.jpg"], [name]) == {name: None}
    assert "jpg" not in clean_name(name)


def test_a_mismatch_is_explained_in_a_line() -> None:
    matcher = NameMatcher(["sub/photo_1.jpg", "z.jpg"], Path("/data/pics"))
    line = matcher.explain(["old/photo-1.jpg", "b"], "boxes.json")
    assert line == (
        "'boxes.json' names 'old/photo-1.jpg' (and 1 more), which is not in '/data/pics';"
        " the nearest file is 'sub/photo_1.jpg'"
    )
    assert "no file there has a name like it" in matcher.explain(["qqqqqqq"], "boxes.json")
    assert "holds no images" in NameMatcher([], Path("p")).explain(["a\nb"], "boxes.json")


def test_the_nearest_file_is_first_one_of_the_same_name() -> None:
    assert NameMatcher(["b.jpg", "sub/c.jpg"], Path("/data")).nearest("x/y/z/c.jpg") == "sub/c.jpg"
