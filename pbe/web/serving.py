"""Runs the server: loads the model, guards the door, and ends without leaving anybody waiting."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import os
import platform
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pbe.editing.batch.runner import load_pipeline, pick_device
from pbe.editing.settings import EditCommand
from pbe.errors import UserError
from pbe.web.app import Editor, make_api
from pbe.web.settings import ServeSettings

GRACE = 20.0  # seconds that a running batch gets to finish
FILES_A_REQUEST = 12


class _TooLargeError(Exception):
    """The body is longer than it may be."""


class Guard:
    """Lets in who has the password and comes from this very page, with a body that is not too large."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app = app
        self.most = settings.max_megabytes * 2**20 * FILES_A_REQUEST
        pair = f"{settings.user}:{settings.password}"
        self.key = b"Basic " + base64.b64encode(pair.encode()) if settings.user else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on to the application."""
        if scope["type"] == "http":
            refusal = self._refusal(dict(scope["headers"]))
            if refusal is not None:
                return await refusal(scope, receive, send)
            return await self._limited(scope, receive, send)
        return await self.app(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> Response | None:
        if self.key is not None and not secrets.compare_digest(headers.get(b"authorization", b""), self.key):
            ask = {"WWW-Authenticate": 'Basic realm="Paint by Example", charset="UTF-8"'}
            return JSONResponse({"detail": "user and password are needed"}, 401, ask)
        origin = headers.get(b"origin")
        host = headers.get(b"x-forwarded-host", headers.get(b"host", b""))
        if origin is not None and urlsplit(origin).netloc != host:
            return JSONResponse({"detail": "requests from other sites are refused"}, 403)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most:
            return self._too_large()
        return None

    def _too_large(self) -> Response:
        return JSONResponse({"detail": f"a request may have {self.most // 2**20} MB at most"}, 413)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken, started = 0, False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most:
                raise _TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            if taken <= self.most or started:  # else it tells of an error that this one led to
                started = True
                await send(message)

        with contextlib.suppress(_TooLargeError):
            await self.app(scope, counted, noted)
        if taken > self.most and not started:
            await self._too_large()(scope, receive, send)


def load_editor(settings: ServeSettings) -> Editor:
    """Load the model."""
    command = EditCommand(model=settings.model, dtype=settings.dtype)
    pipe, _ = load_pipeline(command, pick_device(settings.device))
    return Editor(pipe, settings)


def make_app(editor: Editor) -> ASGIApp:
    """Return the whole application: API, page and guard."""
    from pbe.web.page import mount_page

    api = make_api(editor)
    api.router.lifespan_context = _sweeping(editor)
    return Guard(mount_page(api, editor), editor.settings)


def _sweeping(editor: Editor) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    async def sweep() -> None:
        while True:
            await asyncio.sleep(30.0)
            editor.store.sweep()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(sweep())
        yield
        task.cancel()

    return lifespan


class Server(uvicorn.Server):
    """uvicorn that, told to stop, refuses what waits and finishes what runs before it closes the door."""

    editor: Editor

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where the page is, once it is there."""
        await super().startup(sockets)
        if self.started:
            settings = self.editor.settings
            shown = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
            print(
                f"serving {settings.model_name} at http://{shown}:{settings.port} (Ctrl-C stops)", flush=True
            )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGINT and SIGTERM, without the signal's own death afterwards."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, lambda: loop.create_task(self._stop()))
        yield

    async def _stop(self) -> None:
        if self.should_exit:
            self.force_exit = True
            return
        await asyncio.to_thread(self.editor.service.close, GRACE)
        await asyncio.sleep(0.3)  # answers are on their way
        self.should_exit = True


def _share_memory() -> None:
    """Give all threads two pools of memory together: one each would keep what its largest batch took."""
    if platform.libc_ver()[0] == "glibc":
        most_pools = -8  # M_ARENA_MAX of malloc.h
        ctypes.CDLL(None).mallopt(most_pools, 2)


def serve(settings: ServeSettings) -> None:
    """Serve until a signal comes; a port that cannot be had is told before the model is loaded."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        door = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise UserError(f"{error.strerror or error}; give another --port or --host") from error
    folder = tempfile.mkdtemp(prefix="pbe-")
    os.environ["GRADIO_TEMP_DIR"] = folder  # what Gradio itself stores, removed at the end
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)  # else each event sums up all before it
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    _share_memory()
    try:
        editor = load_editor(settings)
        app = make_app(editor)
        server = Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3, server_header=False)
        )
        server.editor = editor
        server.run(sockets=[door])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
