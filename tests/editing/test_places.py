"""Paths of models: the home folder, and names that no system can have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pbe.editing import hub
from pbe.editing.hub import Hub, require_place
from pbe.errors import EditValueError


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert require_place("~/model") == tmp_path / "model"
    assert require_place(Path("~/model")) == tmp_path / "model"
    with pytest.raises(EditValueError, match="/none' does not exist; give a model's folder"):
        require_place("~/none")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **settings: asked.update(settings) or "there")
    assert Hub(cache_dir="~/cache", local_files_only=True).find("owner/name") == Path("there")
    assert asked["cache_dir"] == str(tmp_path / "cache")


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000, "a\0b", "C:\\models\\pbe", "http://x/y", ""])
def test_names_that_lead_nowhere(name: str):
    with pytest.raises(EditValueError, match=r"--model .* does not exist"):
        require_place(name, "--model")


def test_what_may_be_a_repository():
    assert require_place("owner/name") is None
