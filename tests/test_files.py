"""Folders of outputs, and every command that makes one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pbe.checkpoints.native import save_model
from pbe.data.shards.archive import write_shards
from pbe.errors import UserError
from pbe.evaluation.benchmark import toy
from pbe.evaluation.demo import stages
from pbe.files import (
    atomic_file,
    atomic_write,
    check_file,
    lock,
    make_folder,
    new_folder,
    sha256_of,
    try_lock,
    write_output,
)
from scripts import make_examples
from tests.commands import convert, demo, evaluate, render
from tests.editing.tiny_model import make_tiny_model


def test_output_folders(tmp_path: Path):
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert make_folder(str(tmp_path / "a" / "b")).is_dir()
    (tmp_path / "file").touch()
    for place, reason in (("file", "a file has that name"), ("file/below", "Not a directory")):
        with pytest.raises(UserError, match=f"cannot make the folder .*: {reason}"):
            make_folder(tmp_path / place)


def test_a_folder_of_a_failed_start_is_taken_away_where_it_is_empty(tmp_path: Path):
    def fail(folder: Path, name: str = "") -> None:
        with suppress(KeyboardInterrupt), new_folder(folder):
            if name:
                (folder / name).touch()
            raise KeyboardInterrupt

    fail(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    fail(tmp_path)
    assert tmp_path.is_dir(), "it was there before"
    fail(tmp_path / "a" / "b", "file")
    assert (tmp_path / "a" / "b" / "file").is_file()
    with new_folder(tmp_path / "c"):
        pass
    assert (tmp_path / "c").is_dir()


def test_folders_that_another_run_removes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it goes after it was made, or after it was found."""
    folder, made, found = tmp_path / "a", Path.mkdir, []

    def removed_after(path: Path, *args: Any, **kwargs: Any) -> None:
        made(path, *args, **kwargs)
        found.append(path)
        if len(found) == 1:
            path.rmdir()
        if len(found) == 2:
            path.rmdir()
            raise FileExistsError(17, "File exists")

    monkeypatch.setattr(Path, "mkdir", removed_after)
    assert make_folder(folder).is_dir()
    assert len(found) == 3


def test_a_folder_under_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot make the folder"):
        make_folder(tmp_path / "link" / "a")


def test_output_files(tmp_path: Path):
    assert check_file(tmp_path / "a" / "b.txt") == tmp_path / "a" / "b.txt"
    assert list((tmp_path / "a").iterdir()) == []
    for place in ("a", "n" * 300):
        with pytest.raises(UserError, match="cannot write"):
            check_file(tmp_path / place)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to"):
        make_folder(tmp_path)


def test_a_file_in_the_way_is_one_line(tmp_path: Path, capsys, monkeypatch):
    model, way = tmp_path / "model", tmp_path / "way"
    save_model(model, make_tiny_model())
    way.touch()
    monkeypatch.setattr(stages, "check", lambda options: None)
    monkeypatch.setattr(toy, "make_edits", lambda *_: pytest.fail("edited before --out was checked"))
    calls = (
        (convert, [str(model), str(way)]),
        (demo, ["--out", str(way)]),
        (evaluate, ["--model", str(model), "--out", str(way)]),
        (make_examples, ["--out", str(way)]),
        (render, ["--out", str(way), "--scenes", "1", "--workers", "0"]),
    )
    for script, call in calls:
        assert script.main(call) == 2, call
        error = capsys.readouterr().err.splitlines()[-1]
        refusals = (f"error: cannot make the folder '{way}': ", f"error: '{way}' is a file; ")
        assert error.startswith(refusals), call
    with pytest.raises(UserError, match="cannot make the folder"):
        write_shards([], way)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / ("n" * 251 + ".txt")  # the longest name there is
    atomic_write(path, "früher")
    assert path.read_text(encoding="utf-8") == "früher"
    for sole_writer in (False, True):
        with suppress(KeyboardInterrupt), atomic_file(path, sole_writer=sole_writer) as file:
            file.write(b"half a fi")
            file.flush()
            assert len(list(tmp_path.iterdir())) == 2
            raise KeyboardInterrupt
        assert [path] == list(tmp_path.iterdir())
    atomic_write(path, b"later", sync=True)
    assert path.read_bytes() == b"later"
    assert sha256_of(path) == hashlib.sha256(b"later").hexdigest()


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path):
    for place in (tmp_path, tmp_path / "none" / "a.txt", Path("/dev/full")):
        with pytest.raises(UserError, match="cannot write"):
            write_output(place, "a")
    write_output(Path("/dev/null"), "a")
    assert not Path("/dev/null").is_file(), "a device stays one"


def test_a_lock_is_held_once_unless_it_is_shared(tmp_path: Path):
    path = tmp_path / "a" / ".lock"
    with lock(path, busy="busy"):
        assert try_lock(path) is None
        with pytest.raises(UserError, match="busy"), lock(path, busy="busy"):
            pass
        with pytest.raises(ZeroDivisionError), lock(path, check=lambda: 1 / 0):
            pass
    assert not path.exists()
    with lock(path, shared=True, keep=True), lock(path, shared=True, keep=True):
        assert try_lock(path) is None
    assert path.exists()
    with lock(path, busy="busy"):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch, caplog):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"cannot lock '.*': No locks available"), lock(tmp_path / ".lock"):
        pass
    with lock(tmp_path / ".lock", without_locks="make one at a time"):
        assert "has no file locks: make one at a time" in caplog.text
