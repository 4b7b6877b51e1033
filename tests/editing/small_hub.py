"""A Hugging Face Hub of one repository, served on loopback, with the few addresses that downloads ask for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class SmallHub(ThreadingHTTPServer):
    """Serves the files of a folder as the repository ``name``; remembers what was asked for."""

    daemon_threads = True

    def __init__(self, name: str, folder: Path, revisions: tuple[str, ...], token: str | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.folder, self.token = name, folder, token
        self.revisions = (*revisions, COMMIT)
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())


class Handler(BaseHTTPRequestHandler):
    server: SmallHub

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append(path)
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.refuse(401, "RepoNotFound")
        for start, kind in (
            (f"/api/models/{hub.name}/revision/", "info"),
            (f"/api/models/{hub.name}/tree/", "tree"),
        ):
            if path.startswith(start):
                return self.about(kind, path.removeprefix(start), body)
        start = f"/{hub.name}/resolve/"
        if not path.startswith(start):
            return self.refuse(404, "RepoNotFound")
        revision, _, name = path.removeprefix(start).partition("/")
        if revision not in hub.revisions:
            return self.refuse(404, "RevisionNotFound")
        if name not in hub.files():
            return self.refuse(404, "EntryNotFound")
        return self.send((hub.folder / name).read_bytes(), "application/octet-stream", body)

    def about(self, kind: str, revision: str, body: bool) -> None:
        hub = self.server
        if revision not in hub.revisions:
            return self.refuse(404, "RevisionNotFound")
        if kind == "info":
            content = {
                "id": hub.name,
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in hub.files()],
            }
        else:
            sizes = {name: (hub.folder / name).stat().st_size for name in hub.files()}
            content = [
                {"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in sizes.items()
            ]
        self.send(json.dumps(content).encode(), "application/json", body)

    def send(self, content: bytes, kind: str, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def small_hub(
    name: str, folder: Path, revisions: tuple[str, ...] = ("main",), token: str | None = None
) -> Iterator[SmallHub]:
    """Serve a folder as a repository while the context lasts."""
    with SmallHub(name, folder, revisions, token) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
