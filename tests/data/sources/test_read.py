"""How a source is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbe.data.sources import parse_source
from pbe.errors import UserError


def test_an_at_sign_may_belong_to_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a@b.json", "c.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "pics@2").mkdir()
    (tmp_path / "[x] {y}@z").mkdir()
    home = str(tmp_path)
    assert parse_source(f"coco:{home}/a@b.json") == ("coco", tmp_path / "a@b.json", None)
    assert parse_source(f"coco:{home}/a@b.json@{home}/pics@2")[1:] == (
        tmp_path / "a@b.json",
        tmp_path / "pics@2",
    )
    assert parse_source(f"coco:{home}/c.json@{home}/pics@2")[1:] == (tmp_path / "c.json", tmp_path / "pics@2")
    assert parse_source("yolo:~/[x] {y}@z")[1:] == (tmp_path / "[x] {y}@z", None)
    assert parse_source("coco:~/c.json@~/pics@2")[1:] == (tmp_path / "c.json", tmp_path / "pics@2")
    assert parse_source("coco:gone.json@pics")[1:] == (Path("gone.json"), Path("pics"))
    for text in ("", "coco", "coco:", "jpeg:a", ":a"):
        with pytest.raises(UserError, match="is not KIND:PATH"):
            parse_source(text)
