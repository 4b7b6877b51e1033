"""Tars that others write: every image is read, or the one line says which is not, and why."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.config import DataConfig
from pbe.data.dataset import read_image
from pbe.data.samples.decode import UnusableImageError
from pbe.data.shards.archive import ShardImages
from pbe.data.shards.index import read_members
from pbe.errors import UserError
from tests.data.packing.support import noise

NOTE = json.dumps(
    {"width": 100, "height": 80, "boxes": [{"xyxy": [10, 10, 60, 60], "label": "dog"}]}
).encode()


def picture(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    noise(seed=seed).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form, encoding="utf-8") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


A, B = picture(1), picture(2)
PAIRS = [("a.jpg", A), ("a.json", NOTE), ("b.jpg", B), ("b.json", NOTE)]
LONG, HAN = "k" * 180, "狗" * 60
READ = {
    "dot": [(f"./{name}", data) for name, data in PAIRS],
    "images first": [PAIRS[0], PAIRS[2], PAIRS[1], PAIRS[3]],
    "json first": [PAIRS[1], PAIRS[0], PAIRS[3], PAIRS[2]],
    "upper": [("a.JPG", A), ("a.JSON", NOTE), ("b.JPEG", B), ("b.json", NOTE)],
    "extra": [*PAIRS, ("a.txt", b"a dog"), ("a.cls", b"3"), ("a.mask.png", b"x"), ("b.meta.json", b"{}")],
    "macos": [("._a.jpg", b"Mac"), ("._a.json", b"Mac"), ("./._b.jpg", b"Mac"), (".DS_Store", b""), *PAIRS],
}


@pytest.mark.parametrize("kind", READ)
def test_what_users_write_is_read(kind: str, tmp_path: Path) -> None:
    pictures = ShardImages(write(tmp_path / "x.tar", READ[kind]))
    assert {entry.key: pictures.image(n) for n, entry in enumerate(pictures)} == {"a": A, "b": B}
    assert read_image(pictures, 0, DataConfig()).image.shape == (80, 100, 3)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(form: int, tmp_path: Path) -> None:
    names = [LONG, HAN, "v1.2", "x/a", "y/a"]
    members = [m for n, key in enumerate(names) for m in ((f"{key}.jpg", picture(n)), (f"{key}.json", NOTE))]
    pictures = ShardImages(write(tmp_path / "x.tar", members, form))
    assert [entry.key for entry in pictures] == names
    assert [pictures.image(n) for n in range(5)] == [picture(n) for n in range(5)]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9".decode(errors="surrogateescape")
    pictures = ShardImages(write(tmp_path / "x.tar", [(f"{name}.jpg", A), (f"{name}.json", NOTE)]))
    assert pictures[0].key == "caf\ufffd"
    assert pictures.image(0) == A


def test_hard_links_and_folders(tmp_path: Path) -> None:
    """``tar cf x.tar folder`` of a folder in which one file stands under two names."""
    folder = tmp_path / "set.jpg"
    folder.mkdir()
    for name, data in PAIRS[:2]:
        (folder / name).write_bytes(data)
        (folder / name.replace("a", "z")).hardlink_to(folder / name)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(folder, "set.jpg")
    pictures = ShardImages(tmp_path / "x.tar")
    assert [pictures.image(n) for n in range(len(pictures))] == [A, A]


REFUSED = {
    "no json": ([("a.jpg", A), ("b.jpg", B)], r"'a\.jpg' has no 'a\.json' with its boxes \(and 1 more"),
    "no image": ([PAIRS[1], *PAIRS[2:]], r"'a\.json' has no image 'a\.jpg'"),
    "other format": ([("a.bmp", A), *PAIRS[1:]], r"'a\.bmp' is of a format that shards do not hold"),
    "two formats": ([("a.png", A), *PAIRS], r"holds 'a' twice \('a\.png' and 'a\.jpg'\)"),
    "twice": ([*PAIRS, PAIRS[0]], r"holds 'a' twice \('a\.jpg'\)"),
    "dotted twice": ([("./a.jpg", A), *PAIRS], r"holds 'a' twice"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_told_apart_is_named(kind: str, tmp_path: Path) -> None:
    members, message = REFUSED[kind]
    with pytest.raises(UserError, match=message):
        read_members(write(tmp_path / "x.tar", members))


@pytest.mark.parametrize(
    ("kind", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)]
)
def test_compressed_tars(kind: str, pack: object, tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", PAIRS)
    path.write_bytes(pack(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(UserError, match=rf"is compressed \({kind}\).*unpack it"):
        read_members(path)


def test_nothing_is_lost_behind_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", PAIRS)
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="goes on behind its end"):
        read_members(path)
    third = whole.index(b"b.jpg")
    path.write_bytes(whole[: third + 150] + b"X" + whole[third + 151 :])  # of the header's checksum
    with pytest.raises(UserError, match=f"is damaged at byte {third}"):
        read_members(path)


def test_json_without_boxes_is_called_so(tmp_path: Path) -> None:
    note = json.dumps({"url": "x", "caption": "a dog", "width": 100, "height": 80}).encode()
    pictures = ShardImages(write(tmp_path / "x.tar", [("a.jpg", A), ("a.json", note), ("a.txt", b"a dog")]))
    with pytest.raises(UnusableImageError, match="annotation without 'boxes'"):
        read_image(pictures, 0, DataConfig())


def test_the_image_is_the_one_of_its_name(tmp_path: Path) -> None:
    white = Image.fromarray(np.full((80, 100, 3), 255, np.uint8))
    buffer = io.BytesIO()
    white.save(buffer, "PNG")
    pictures = ShardImages(
        write(tmp_path / "x.tar", [*PAIRS, ("c.png", buffer.getvalue()), ("c.json", NOTE)])
    )
    assert (read_image(pictures, 2, DataConfig()).image == 255).all()
