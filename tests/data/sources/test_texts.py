"""Text files of every encoding, and YAML that is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbe.data.sources.texts import read_text, read_yaml
from pbe.errors import UserError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_that_tell_themselves(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Müsli\r\n狗\r".encode(encoding))
    assert read_text(path) == "Müsli\n狗\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a\nMüsli".encode("latin-1"), "line 2 is not UTF-8; save it"),
        (b"\x1f\x8b\x08\x00", r"compressed \(gzip\)"),
        (b"PK\x03\x04....", r"compressed \(zip\)"),
        (b"\xff\xfea", "damaged text"),
    ],
)
def test_what_is_no_text_says_why(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_text(tmp_path / "a.txt")
    assert "a.txt" in str(error.value)
    with pytest.raises(UserError, match="cannot read"):
        read_text(tmp_path / "gone.txt")


def test_yaml_scalars_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("names: [no, 3.0, ~, 2020-13-45, '${x}', !!python/object:os.system x]\nnc: 010\n")
    names = ["no", "3.0", "~", "2020-13-45", "${x}", "x"]
    assert read_yaml(path) == {"names": names, "nc": "010"}
    path.write_text("")
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("names: [a: b, c]\npath: C: x", "line 2: mapping values"),
        ("names:\n\t0: dog", "line 2: found character"),
        ('path: "D:\\set"', "line 1: found unknown escape"),
        ("a: 1\na: 2", "line 2: the key 'a' stands twice"),
        ("x: {a: 1, a: 2}", "line 1: the key 'a' stands twice"),
        ("- a\n- b", "holds no 'key: value' lines"),
        ("a word", "holds no 'key: value' lines"),
        ("a: *b", "line 1: found undefined alias"),
        ("a: &b [*b", "data.yaml"),
        ("[" * 3000, "data.yaml"),
        ("? [a]\n: b", "data.yaml"),
        ("a: \x00", "data.yaml"),
        ("a: b\n---\nc: d", "data.yaml"),
    ],
)
def test_damaged_yaml_names_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_yaml(tmp_path / "data.yaml")
    assert len(str(error.value).splitlines()) == 1
