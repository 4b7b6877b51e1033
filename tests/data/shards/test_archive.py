"""Shards: written atomically, indexed by their headers, read at random."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset

from pbe.data.shards.archive import ShardImages, ShardRecord, find_shards, write_shards
from pbe.errors import UserError


def records(count: int, size: int = 1000):
    for index in range(count):
        boxes = [(1.0, 2.0, 3.5, 4.0 + index)]
        yield ShardRecord(f"k{index}", bytes([index % 256]) * size, "png", 10, 20, boxes, ["cup"])


def test_round_trip(tmp_path):
    paths = write_shards(records(7), tmp_path, max_count=3)
    assert [path.name for path in paths] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert sorted(tmp_path.iterdir()) == paths
    pictures = ShardImages(tmp_path)
    assert len(pictures) == 7
    assert [entry.key for entry in pictures] == [f"k{index}" for index in range(7)]
    for index in (6, 0, 3):
        assert pictures.image(index) == bytes([index]) * 1000
        assert pictures.annotation(index) == {
            "width": 10,
            "height": 20,
            "boxes": [{"xyxy": [1.0, 2.0, 3.5, 4.0 + index], "label": "cup"}],
        }


def test_webdataset_reads_them(tmp_path):
    paths = write_shards(records(4), tmp_path)
    read = list(webdataset.WebDataset(str(paths[0]), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == ["k0", "k1", "k2", "k3"]
    assert json.loads(read[1]["json"])["boxes"][0]["xyxy"] == [1.0, 2.0, 3.5, 5.0]


def test_same_images_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shards(records(5), tmp_path / name)
    assert (tmp_path / "a/shard-000000.tar").read_bytes() == (tmp_path / "b/shard-000000.tar").read_bytes()


def test_size_limit_closes_a_shard(tmp_path):
    assert len(write_shards(records(6, 5000), tmp_path, max_bytes=9000)) == 3


def test_nothing_half_written_is_left(tmp_path):
    def broken():
        yield from records(4)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_shards(broken(), tmp_path, max_count=3)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]


def test_a_shorter_run_leaves_no_stale_shards(tmp_path):
    write_shards(records(9), tmp_path, max_count=3)
    (tmp_path / "other-000000.tar").write_bytes(b"mine")
    paths = write_shards(records(3), tmp_path, max_count=3)
    assert {path.name for path in tmp_path.iterdir()} == {"shard-000000.tar", "other-000000.tar"}
    assert len(ShardImages(paths[0])) == 3


def test_patterns(tmp_path):
    paths = write_shards(records(8), tmp_path, max_count=2)
    assert find_shards(tmp_path) == paths
    assert find_shards(tmp_path / "*-00000[12].tar") == paths[1:3]
    assert find_shards(f"{tmp_path}/shard-{{000000..000002}}.tar") == paths[:3]
    assert find_shards(paths[3]) == [paths[3]]


@pytest.mark.parametrize("pattern", ["", "nowhere", "nowhere/shard-{000..003}.tar", "."])
def test_nothing_found_is_one_clear_line(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no shards") as caught:
        ShardImages(pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", ["inside data", "inside header", "between members", "none", "text"])
def test_truncated_and_foreign_files(tmp_path, keep):
    path = write_shards(records(3, 3000), tmp_path)[0]
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    cuts = {
        "inside data": whole[: members[2].offset_data + 100],
        "inside header": whole[: members[2].offset + 100],
        "between members": whole[: members[2].offset],
        "none": b"",
        "text": b"this is not a tar\n" * 100,
    }
    path.write_bytes(cuts[keep])
    with pytest.raises(UserError, match=r"truncated|not a tar") as caught:
        ShardImages(path)
    assert "\n" not in str(caught.value)


def test_lonely_members(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("x.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(UserError, match=r"'x\.jpg' has no 'x\.json' with its boxes"):
        ShardImages(path)


@pytest.mark.parametrize("doubled", ["x.jpg", "x.png", "x.json"])
def test_keys_that_appear_twice_are_named(tmp_path, doubled):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x.jpg", "x.json", doubled):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match="holds 'x' twice"):
        ShardImages(tmp_path)


def test_a_shard_without_images(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(UserError, match="hold no images"):
        ShardImages(tmp_path)


def test_keys_that_webdataset_would_split(tmp_path):
    with pytest.raises(UserError, match="dot or a slash"):
        write_shards([ShardRecord("a.b", b"", "jpg", 1, 1, [])], tmp_path)


def test_can_be_sent_to_workers(tmp_path):
    write_shards(records(3), tmp_path)
    pictures = ShardImages(tmp_path)
    pictures.image(0)
    assert pickle.loads(pickle.dumps(pictures)).image(2) == pictures.image(2)


def test_a_shard_cut_while_in_use_is_an_os_error(tmp_path):
    path: Path = write_shards(records(3, 5000), tmp_path)[0]
    pictures = ShardImages(tmp_path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(OSError, match="cut short"):
        pictures.image(2)


def test_what_exists_by_its_name_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "my data [v2] {a,b} (1)" / "{open"
    folder.mkdir(parents=True)
    files = [folder / f"shard-{number}.tar" for number in range(3)]
    for file in (*files, folder / "one [x].tar"):
        file.touch()
    assert find_shards(folder / "one [x].tar") == [folder / "one [x].tar"]
    assert find_shards(folder / "shard-*.tar") == files
    assert find_shards(f"{folder}/shard-{{2,0}}.tar") == [files[2], files[0]]
    assert find_shards(f"{tmp_path}/my*/*/shard-[01].tar") == files[:2]
    assert len(find_shards(folder)) == 4
    with pytest.raises(UserError, match="Unbalanced braces"):
        find_shards(f"{folder}/{{none")
