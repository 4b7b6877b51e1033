"""Which shards a name means: what exists is taken literally, and what is not found comes with a hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbe.data.shards.archive import find_shards
from pbe.errors import UserError


@pytest.mark.parametrize("name", ["my[1]", "a{b,c}", "x@y", "what?", "a*", "{", "sp ace"])
def test_names_that_exist_are_literal(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    paths = [folder / f"train-{number:03d}.tar" for number in range(3)]
    odd = folder / f"{name}.tar"
    for path in (*paths, odd):
        path.touch()
    assert find_shards(folder) == sorted([*paths, odd])
    assert find_shards(odd) == [odd]
    assert find_shards(f"{folder}/train-*.tar") == paths
    assert find_shards(f"{folder}/train-{{001..002}}.tar") == paths[1:]
    assert find_shards(f"{folder}/train-00[02].tar") == [paths[0], paths[2]]


def test_patterns_may_name_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.tar").touch()
    assert find_shards(f"{tmp_path}/{{a,b}}/x.tar") == [tmp_path / "a" / "x.tar", tmp_path / "b" / "x.tar"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_shards("?/x.tar") == [Path("a/x.tar"), Path("b/x.tar")]
    assert find_shards("~/a") == [tmp_path / "a" / "x.tar"]


def test_companions_of_macos_are_no_shards(tmp_path: Path) -> None:
    for name in ("x.tar", "._x.tar"):
        (tmp_path / name).touch()
    assert find_shards(tmp_path) == [tmp_path / "x.tar"]


def test_hints(tmp_path: Path) -> None:
    (tmp_path / "set" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="the folder holds none"):
        find_shards(tmp_path / "set" / "train")
    (tmp_path / "set" / "train" / "x.tar").touch()
    with pytest.raises(UserError, match=r"did you mean '.*set/train'\?"):
        find_shards(tmp_path / "set")
    (tmp_path / "set" / "y.tar.gz").touch()
    with pytest.raises(UserError, match=r"'y\.tar\.gz' is compressed"):
        find_shards(tmp_path / "set")
    with pytest.raises(UserError, match=r"cannot be read|no shards"):
        find_shards(f"{tmp_path}/{{1..")
