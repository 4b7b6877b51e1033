"""Packing that is interrupted, goes on, meets others or a full disk: the same bytes, never half a shard."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pbe.data.shards.format import ShardWriter
from pbe.errors import UserError
from tests.commands import prepare as prepare_data
from tests.data.packing.support import contents, make_plain, pack, pack_straight, request_of, run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def straight(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return pack_straight(plain, tmp_path_factory.mktemp("straight") / "out")


def whole_shards_only(out: Path, straight: dict[str, bytes]) -> None:
    for path in out.glob("*.*"):
        if not path.name.startswith("."):
            assert path.read_bytes() == straight[path.name], f"{path.name} is not whole"


class KilledError(BaseException):
    """Stands for the end of the process."""


STOPS = (
    "000001.boxes.arrow",
    "plan.json",
    "times.json",
    "shard-000000.index.npz",
    "shard-000000.tar",
    "part-000000.json",
    "shard-000003.tar",
    "part-000004.json",
    "shards.json",
)


def test_interrupted_at_every_kind_of_rename(
    plain: Path, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file appears by a rename; killed before one of each kind in turn, the bytes stay the same."""
    request = request_of(plain, tmp_path / "out", shard_pictures=7, perceptual=False)
    replace = os.replace
    for stop in STOPS:

        def fragile(source: str, target: Path, stop: str = stop) -> None:
            if target.name == stop:
                raise KilledError
            replace(source, target)

        monkeypatch.setattr(os, "replace", fragile)
        with pytest.raises(KilledError):
            pack(request, workers=0)
        assert not (request.out / "shards.json").exists()
        whole_shards_only(request.out, straight)
    monkeypatch.undo()
    run(request)
    assert contents(request.out) == straight
    assert not (request.out / ".packing").exists()


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from pbe.cli.main import main
if __name__ == "__main__":
    sys.exit(main(["prepare", *{arguments!r}]))
"""


def test_killed_by_a_signal(plain: Path, tmp_path: Path, project_root: Path) -> None:
    """The command line with two processes, killed (with them) while it packs, then once more to the end."""
    arguments = [f"csv:{plain / 'boxes.csv'}", "--out", str(tmp_path / "out"), "--shard-images", "4"]
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(root=str(project_root), arguments=[*arguments, "--workers", "2"]))
    process = subprocess.Popen(
        [sys.executable, str(script)], start_new_session=True, stderr=subprocess.DEVNULL, cwd=project_root
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("shard-*.tar")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "shards.json").exists()
    (tmp_path / "out" / ".shard-000003.tar.99.tmp").write_bytes(b"left by a kill")
    assert prepare_data.main([*arguments, "--workers", "0"]) == 0
    other = [*arguments[:2], str(tmp_path / "other"), *arguments[3:], "--workers", "0"]
    assert prepare_data.main(other) == 0
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "other")
    for name in ("report.json", "report.html"):  # they hold times
        del ours[name], theirs[name]
    assert ours == theirs
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert [p.name for p in (tmp_path / "out").iterdir() if "shard" in p.name and p.suffix == ".tmp"] == []


def test_killed_when_only_the_list_is_missing(
    plain: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    """All shards are there, nothing is left to pack: processes or not, the list follows."""
    request = request_of(plain, tmp_path / "out", shard_pictures=7, perceptual=False)
    assert pack(request, workers=0, part=(0, 2)) is None
    assert pack(request, workers=0, part=(1, 2)) is None
    assert pack(request, workers=2) is not None
    assert contents(request.out) == straight


def test_parts_then_the_rest(plain: Path, straight: dict[str, bytes], tmp_path: Path) -> None:
    """As in a job array: parts pack their shards, in any order; the run without a part completes the set."""
    request = request_of(plain, tmp_path / "out", shard_pictures=7, perceptual=False)
    for number in (2, 0):
        assert pack(request, workers=0, part=(number, 3)) is None
    assert sorted(p.name for p in request.out.glob("*.tar")) == [f"shard-00000{n}.tar" for n in (0, 2, 3)]
    assert not (request.out / "shards.json").exists()
    seen: list[int] = []
    run(request, progress=lambda total: seen.append(-total) or seen.append)
    assert contents(request.out) == straight
    assert seen[0] == -30
    assert sum(seen[1:]) == 30


def test_done_is_done_and_other_settings_are_refused(plain: Path, tmp_path: Path) -> None:
    request = request_of(plain, tmp_path / "out", perceptual=False)
    run(request)
    before = contents(request.out)
    assert pack(request, workers=0) is None
    other = request_of(plain, tmp_path / "out", perceptual=False, shard_pictures=4)
    with pytest.raises(UserError, match="other sources or settings"):
        pack(other, workers=0)
    assert contents(request.out) == before
    run(other, overwrite=True)
    assert len(list(request.out.glob("*.tar"))) == 8


def test_foreign_shards_are_not_touched(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="not packed here"):
        pack(request_of(plain, tmp_path), workers=0)
    assert (tmp_path / "mine.tar").read_bytes() == b"precious"


def test_two_runs_at_once(plain: Path, tmp_path: Path) -> None:
    request = request_of(plain, tmp_path)
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is packing"):
            pack(request, workers=0)
    run(request)


def test_a_full_disk(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(plain, tmp_path / "out", shard_pictures=7, perceptual=False)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full)
        with pytest.raises(UserError, match="No space left on device; afterwards the same command resumes"):
            pack(request, workers=0)
    assert not list(request.out.glob("*.tar"))
    assert not list(request.out.glob(".*.tmp"))
    run(request)
