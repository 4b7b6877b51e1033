"""What a start that fails leaves behind: the folder as it was, or a report that says why nothing is left."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from pbe.errors import UserError
from tests.commands import prepare as prepare_data
from tests.data.packing.support import contents, make_plain, noise, pack, request_of, run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain(tmp_path_factory.mktemp("plain"))


def everything(folder: Path) -> dict[str, bytes]:
    """All files and folders below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in folder.rglob("*")
    }


def command(source: str, out: Path, *options: str) -> int:
    return prepare_data.main([source, "--out", str(out), "--workers", "0", "--no-perceptual", *options])


MISTAKES = {
    "no file": ("typo.csv", ()),
    "no image": ("boxes.csv@nowhere", ()),
    "no column": ("text.csv", ()),
    "no setting": ("boxes.csv", ("--min-area", "0.9", "--max-area", "0.1")),
    "no flag": ("boxes.csv", ("--drop-flag", "is_grup_of")),
    "for another kind": ("boxes.csv", ("--masks",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_corrected_command_goes_on(
    plain: Path, tmp_path: Path, mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, options = MISTAKES[mistake]
    (plain / "text.csv").write_text("this is no table\n")
    source = f"csv:{plain / name}".replace("@", f"@{plain}/")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    before = everything(tmp_path)
    for out in (tmp_path / "new" / "deep", tmp_path / "used"):
        assert command(source, out, *options) == 2
        assert everything(tmp_path) == before
    assert capsys.readouterr().err.count("error:") == 2
    for out in (tmp_path / "new" / "deep", tmp_path / "used"):
        assert command(f"csv:{plain / 'boxes.csv'}", out) == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--label", "unicorn"), r"30 boxes label not wanted (--label, --drop-label)"),
        (("--min-side", "90"), r"30 boxes side too short (--min-side)"),
    ],
    ids=["before images are opened", "after"],
)
def test_nothing_left_says_why_and_leaves_a_report(
    plain: Path, tmp_path: Path, options: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, source = tmp_path / "out", f"csv:{plain / 'boxes.csv'}"
    assert command(source, out, *options) == 2
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert why in error
    assert "30 images no box left" in error
    report = json.loads((out / "report.json").read_bytes())
    assert (report["boxes"]["seen"], report["boxes"]["kept"], report["shards"]) == (30, 0, 0)
    texts = next(iter(texts for reason, texts in report["examples"].items() if reason in why))
    assert texts[0] == "a b.jpg: 10 10 60 30 dog"
    assert "a b.jpg: 10 10 60 30 dog" in (out / "report.html").read_text()
    assert not (out / ".packing").exists()
    assert command(source, out) == 0


def test_a_home_folder_is_one(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "here")
    assert command(f"csv:{plain / 'boxes.csv'}", Path("~/out")) == 0
    assert (tmp_path / "out" / "shards.json").exists()
    assert not list((tmp_path / "here").iterdir())


def test_numbers_that_are_none_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise().save(tmp_path / "a.jpg")
    (tmp_path / "b.csv").write_text("file,x1,y1,x2,y2\na.jpg,1,two,60,40\na.jpg,1,,60,40\n")
    assert command(f"csv:{tmp_path / 'b.csv'}", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "no image is left to pack" in error
    assert "2 boxes not a number" in error


def test_flags_name_their_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise().save(tmp_path / "a.jpg")
    (tmp_path / "b.csv").write_text("file,x1,y1,x2,y2,is_depiction\na.jpg,1,1,60,40,1\n")
    assert command(f"csv:{tmp_path / 'b.csv'}", tmp_path / "out", "--drop-flag", "is_depiction") == 2
    assert "1 box is_depiction (--drop-flag)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["typo.csv", "boxes.csv"])
def test_a_failed_overwrite_keeps_the_finished_set(plain: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    assert command(f"csv:{plain / 'boxes.csv'}", out) == 0
    before = everything(out)
    assert command(f"csv:{plain / name}", out, "--overwrite", "--label", "unicorn") == 2
    assert everything(out) == before


def test_overwriting_leaves_shards_of_others(plain: Path, tmp_path: Path) -> None:
    request = request_of(plain, tmp_path / "out", perceptual=False)
    run(request)
    (request.out / "mine.tar").write_bytes(b"precious")
    before = contents(request.out)
    with pytest.raises(UserError, match="not packed here"):
        pack(request, workers=0, overwrite=True)
    assert contents(request.out) == before


def test_a_part_may_not_overwrite(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--overwrite goes without --part"):
        pack(request_of(plain, tmp_path / "out"), workers=0, part=(0, 2), overwrite=True)


@pytest.mark.parametrize(
    "name",
    ["request.json", "plan/plan.json", "plan/part-000000.json", "plan/000001.boxes.arrow", "times.json"],
)
@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b'{"tally": 3, "shard": {}}', b"\xff\xfe{"])
def test_damaged_records_are_one_line(plain: Path, tmp_path: Path, name: str, content: bytes) -> None:
    request = request_of(plain, tmp_path / "out", shard_pictures=7, perceptual=False)
    assert pack(request, workers=0, part=(0, 2)) is None
    (request.work / name).write_bytes(content)
    if name == "times.json" and content.startswith(b"{}"):
        return  # no times are no damage
    with pytest.raises(UserError, match=r"damaged|other sources") as caught:
        pack(request, workers=0)
    assert "\n" not in str(caught.value)
    assert pack(request, workers=0, overwrite=True) is not None


def test_the_plan_of_an_older_version_is_made_again(plain: Path, tmp_path: Path) -> None:
    request = request_of(plain, tmp_path / "out", shard_pictures=7, perceptual=False)
    assert pack(request, workers=0, part=(0, 2)) is None
    marker = request.work / "request.json"
    marker.write_text(json.dumps({"fingerprint": request.fingerprint}))
    run(request)
    other = request_of(plain, tmp_path / "other", shard_pictures=7, perceptual=False)
    run(other)
    assert contents(request.out) == contents(other.out)


def test_a_run_that_waited_for_one_that_failed(plain: Path, tmp_path: Path) -> None:
    """The first makes the folder and removes it again; the second has waited at its lock, and packs."""
    request = request_of(plain, tmp_path / "out", perceptual=False)
    reached, go_on = threading.Event(), threading.Event()

    def fail() -> None:
        with request.planning():
            reached.set()
            go_on.wait(30)
            raise UserError("a mistake")

    def first() -> None:
        with pytest.raises(UserError, match="a mistake"):
            fail()

    threads = [threading.Thread(target=first), threading.Thread(target=run, args=(request,))]
    threads[0].start()
    assert reached.wait(30)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(240)
    assert (request.out / "shards.json").exists()
