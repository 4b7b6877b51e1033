"""Damage of every kind in lists, indexes, tars, annotations and images: one clear line, or a count.

The same seeds always; the long run (marked slow) goes through many more of them.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from pbe.config import DataConfig
from pbe.data.dataset import read_image
from pbe.data.packing.pack import read_summary
from pbe.data.packing.worker import load_index
from pbe.data.samples.decode import UnusableImageError
from pbe.data.shards.archive import ShardImages
from pbe.errors import UserError
from tests.data.indexed import index_bytes, shard_columns
from tests.data.packing.support import noise, pack, request_of, run

T = TypeVar("T")
ODD = (
    None, True, -1, 0, 3, 2**31, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "x", "\0", "../x", "7",
    [], [1], {}, {"a": 1}, [[[[]]]],
)  # fmt: skip
ROUNDS = [pytest.param(40, id="short"), pytest.param(600, id="long", marks=pytest.mark.slow)]
CONFIG = DataConfig(boxes="every", image_size=32, exemplar_size=32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with index, list and report."""
    folder = tmp_path_factory.mktemp("whole")
    lines = ["file,x1,y1,x2,y2,label"]
    for number in range(8):
        noise(40, 32, seed=number).save(folder / f"p{number}.{('jpg', 'png', 'webp')[number % 3]}")
    lines += [f"{path.name},4,4,24,2{n},cat" for n, path in enumerate(sorted(folder.glob("p*")))]
    (folder / "boxes.csv").write_text("\n".join(lines))
    run(request_of(folder, folder / "out", shard_pictures=4))
    return folder / "out"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip bytes, cut, repeat, fill or insert."""
    start, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 40))
    kind = rng.integers(5)
    if kind == 0:
        changed = bytearray(data)
        for place in rng.integers(0, len(data), length):
            changed[place] = rng.integers(256)
        return bytes(changed)
    if kind == 1:
        return data[:start]
    if kind == 2:
        return data[:start] + data[start // 2 :]
    filling = bytes(length) if kind == 3 else rng.bytes(length)
    return data[:start] + filling + data[start + (length if kind == 3 else 0) :]


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything within JSON."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [(tree, key) for key, _ in items]
    return found + [place for container, key in found for place in places(container[key])]


def twisted(tree: Any, rng: np.random.Generator) -> Any:
    """Return a copy of JSON of which one value is odd, or missing."""
    tree = copy.deepcopy(tree)
    known = places(tree)
    container, key = known[int(rng.integers(len(known)))]
    if rng.integers(6) == 0:
        del container[key]
    else:
        container[key] = ODD[int(rng.integers(len(ODD)))]
    return tree


def one_line(read: Callable[[], T]) -> T | None:
    """Return what a call returns, or None after an error for the user, which has to be one line."""
    try:
        return read()
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    return None


def read_all(folder: Path) -> None:
    """Open shards and read every image and box as the loader does; only what it counts may be raised."""
    pictures = one_line(lambda: ShardImages(folder, count_boxes=True))
    if pictures is None:
        return
    for position in range(min(len(pictures), 12)):
        try:
            read_image(pictures, position, CONFIG)
        except UnusableImageError:
            continue


def each_round(
    rounds: int, seed: int, change: Callable[[np.random.Generator], None], then: Callable[[], None]
) -> None:
    for number in range(rounds):
        change(np.random.default_rng([seed, number]))
        then()


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("kind", ["bytes", "values"])
def test_lists_of_shards(folder: Path, rounds: int, kind: str) -> None:
    path = folder / "shards.json"
    data = path.read_bytes()

    def change(rng: np.random.Generator) -> None:
        path.write_bytes(
            damaged(data, rng) if kind == "bytes" else json.dumps(twisted(json.loads(data), rng)).encode()
        )

    def then() -> None:
        read_all(folder)
        one_line(lambda: read_summary(folder))

    each_round(rounds, 1, change, then)


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("kind", ["bytes", "values"])
def test_indexes(folder: Path, rounds: int, kind: str) -> None:
    path = folder / "shard-000001.index.npz"
    data, columns = path.read_bytes(), shard_columns(folder / "shard-000001.tar")

    def change(rng: np.random.Generator) -> None:
        if kind == "bytes":
            path.write_bytes(damaged(data, rng))
            return
        name = sorted(columns)[int(rng.integers(len(columns)))]
        values = columns[name]
        kinds: list[Any] = [
            values[:-1], values[None], values.astype(np.float32), values.astype(">i8"), np.float64(7),
            values.astype("S3"), np.full(values.shape, 2**31 - 1).astype(values.dtype), values[::-1],
            np.full(values.shape, -1).astype(values.dtype), np.zeros((0, 4)),
        ]  # fmt: skip
        path.write_bytes(index_bytes(columns | {name: kinds[int(rng.integers(len(kinds)))]}))

    def then() -> None:
        read_all(folder)
        one_line(lambda: load_index(path))

    each_round(rounds, 2, change, then)


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("indexed", [True, False])
def test_tars(folder: Path, rounds: int, indexed: bool) -> None:
    if not indexed:
        (folder / "shards.json").unlink()
    path = folder / "shard-000000.tar"
    data = path.read_bytes()
    each_round(rounds, 3, lambda rng: path.write_bytes(damaged(data, rng)) and None, lambda: read_all(folder))


@pytest.mark.parametrize("rounds", ROUNDS)
def test_annotations(folder: Path, rounds: int) -> None:
    """In a tar without an index, where the JSON is read: each is made longer by spaces, so that all fit."""
    (folder / "shards.json").unlink()
    path = folder / "shard-000000.tar"
    data = path.read_bytes()
    start = data.index(b'{"width"')
    size = data.index(b"\0", start) - start
    note = json.loads(data[start : start + size])

    def change(rng: np.random.Generator) -> None:
        text = json.dumps(twisted(note, rng)).encode()[:size].ljust(size)
        path.write_bytes(data[:start] + text + data[start + size :])

    each_round(rounds, 4, change, lambda: read_all(folder))


def encoded(kind: str, seed: int) -> bytes:
    buffer = io.BytesIO()
    frames = [noise(40, 32, seed=seed + n) for n in range(2)]
    options: dict[str, Any] = (
        {"save_all": True, "append_images": frames[1:]} if kind in ("GIF", "WEBP") else {}
    )
    frames[0].save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "rounds", [pytest.param(60, id="short"), pytest.param(900, id="long", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("max_side", [0, 16])
def test_images_that_are_packed(
    tmp_path: Path, rounds: int, max_side: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is kept loads; what is not is counted; nobody's warning reaches the screen."""
    source = tmp_path / "source"
    source.mkdir()
    lines = ["file,x1,y1,x2,y2", "whole.png,4,4,30,30"]
    noise(40, 32).save(source / "whole.png")
    for number in range(rounds):
        kind = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")[number % 6]
        name = f"p{number}.{kind.lower()}"
        rng = np.random.default_rng([5, number])
        (source / name).write_bytes(damaged(encoded(kind, number), rng))
        lines.append(f"{name},4,4,30,30")
    (source / "boxes.csv").write_text("\n".join(lines))
    result = pack(request_of(source, tmp_path / "out", max_side=max_side, min_side=0.0), workers=0)
    assert result is not None
    assert result.tally.pictures + result.tally.dropped_pictures.total() == rounds + 1
    pictures = ShardImages(tmp_path / "out")
    read = [read_image(pictures, position, CONFIG).key for position in range(len(pictures))]
    assert len(set(read)) == result.tally.pictures
    assert "Warning" not in capfd.readouterr().err
