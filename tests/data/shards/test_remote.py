"""Shards behind URLs: byte ranges, copies of indexes, faults of servers."""

from __future__ import annotations

import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pbe.config import Config, DataConfig
from pbe.data.datamodule import TrainingData
from pbe.data.samples import decode as reasons
from pbe.data.shards import remote
from pbe.data.shards.archive import ShardImages, shard_state
from pbe.errors import UserError
from tests.data.indexed import index_folder


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; ``failures`` requests fail first, ``ranges`` may be switched off."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.failures, self.ranges = folder, 0, True
        self.sent: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if self.server.failures:
            self.server.failures -= 1
            return self.send_error(503)
        if not path.is_file():
            return self.send_error(404)
        data, found = path.read_bytes(), re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        partial = found is not None and self.server.ranges
        if found is not None and partial:
            data = data[int(found[1]) : int(found[2]) + 1]
        self.server.sent.append((path.name, len(data)))
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(shards: Path, tmp_path: Path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    made = Server(index_folder(Path(shutil.copytree(shards, tmp_path / "served"))))
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def keys(url: str, tmp_path: Path, workers: int = 0, **changes: Any) -> tuple[list, dict[str, int]]:
    config = DataConfig(
        train_shards=url, image_size=32, exemplar_size=24, batch_size=10, num_workers=workers,
        remote_cache=str(tmp_path / "cache"), **changes,
    )  # fmt: skip
    module = TrainingData(Config(seed=3, data=config))
    rows = [
        (key, image.numpy().tobytes())
        for batch in module.train_dataloader()
        for key, image in zip(batch["key"], batch["image"], strict=True)
    ]
    return rows, dict(module.counts("train"))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_samples_as_from_a_folder_by_ranges(server, shards, tmp_path, workers):
    assert keys(server.url, tmp_path, workers) == keys(str(shards), tmp_path)
    tars = [size for name, size in server.sent if name.endswith(".tar")]
    assert len(tars) == 61  # one an image, and one that asks whether ranges are served
    assert max(tars) < 30_000
    assert len(list((tmp_path / "cache").iterdir())) == 3
    server.sent.clear()
    keys(f"{server.url}/shards.json", tmp_path)
    assert not [name for name, _ in server.sent if name.endswith(".npz")]


def test_object_stores_go_the_same_way(server, shards, tmp_path):
    store = fsspec.filesystem("memory")
    for path in server.folder.iterdir():
        store.pipe_file(f"memory://bucket/{path.name}", path.read_bytes())
    assert keys("memory://bucket", tmp_path) == keys(str(shards), tmp_path)


def test_a_server_that_stumbles_is_asked_again(server, tmp_path):
    server.failures = 2
    assert len(ShardImages(server.url)) == 60
    server.failures = 3
    with pytest.raises(UserError, match="cannot be read") as caught:
        ShardImages(server.url)
    assert "\n" not in str(caught.value)


def test_a_server_without_ranges_is_refused(server):
    server.ranges = False
    with pytest.raises(UserError, match="must serve byte ranges"):
        ShardImages(server.url)


def test_no_index_no_loading(server):
    (server.folder / "shards.json").unlink()
    with pytest.raises(UserError, match=r"no 'http.*shards\.json'"):
        ShardImages(server.url)


def test_vanished_and_damaged_remote_shards_are_counted(server, tmp_path):
    (server.folder / "shard-000002.tar").unlink()
    _, counts = keys(server.url, tmp_path, max_bad_share=0.9)
    assert counts[reasons.MISSING_SHARD] == 10
    shutil.rmtree(tmp_path / "cache")
    (server.folder / "shard-000001.index.npz").write_bytes(b"nothing")
    _, counts = keys(server.url, tmp_path, max_bad_share=0.9)
    assert counts[reasons.BAD_INDEX] == 25
    assert counts[reasons.MISSING_SHARD] == 10


def test_pipes_are_copied_once(shards, tmp_path):
    pattern = f"pipe:cat {shards}/shard-{{000000..000002}}.tar"
    assert keys(pattern, tmp_path) == keys(str(shards), tmp_path)
    copies = sorted((tmp_path / "cache").iterdir())
    assert [path.suffix for path in copies] == [".tar"] * 3
    before = [path.stat().st_mtime_ns for path in copies]
    keys(pattern, tmp_path)
    assert [path.stat().st_mtime_ns for path in copies] == before


def test_a_pipe_that_fails_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="failed") as caught:
        keys("pipe:cat nowhere.tar", tmp_path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_state_tells_shards_apart(server, shards):
    remote_state = shard_state(server.url)
    assert [name.rsplit("/", 1)[1] for name, _ in remote_state] == [
        path.name for path in sorted(shards.iterdir())
    ]
    assert len({digest for _, digest in remote_state}) == 3
    assert shard_state(str(shards)) == [(path.name, path.stat().st_size) for path in sorted(shards.iterdir())]
    assert shard_state("pipe:cat a.tar") == [("pipe:cat a.tar", 0)]
