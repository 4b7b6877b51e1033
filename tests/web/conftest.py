"""A served toy model, and a browser to look at it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="pbe-test-"))
EXAMPLES = Path(__file__).resolve().parents[2] / "data/examples"


def need_web() -> None:
    """Skip where the extra is not installed."""
    for package in ("gradio", "fastapi_offline"):
        pytest.importorskip(package, reason="the page needs the extra: pip install 'pbe[web]'")


@dataclass
class Served:
    """A running server."""

    url: str
    editor: Any


@pytest.fixture(scope="session")
def editor() -> Iterator[Any]:
    need_web()
    from pbe.web.serving import load_editor
    from pbe.web.settings import ServeSettings

    made = load_editor(ServeSettings(device="cpu", max_steps=60, max_megabytes=2, max_megapixels=4))
    yield made
    made.service.close(5.0)


@pytest.fixture(scope="session")
def app(editor: Any) -> Any:
    from pbe.web.serving import make_app

    return make_app(editor)


@pytest.fixture(scope="session")
def served(editor: Any, app: Any) -> Iterator[Served]:
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive(), "the server does not start"
        assert time.monotonic() < deadline, "the server does not start in a minute"
        time.sleep(0.05)
    yield Served(f"http://127.0.0.1:{port}/", editor)
    server.should_exit = True
    thread.join(10)


@dataclass
class Tab:
    """A tab of the browser, with what went wrong in it."""

    page: Any
    complaints: list[str] = field(default_factory=list)

    def open(self, url: str) -> None:
        """Load the page, and wait until its boards live."""
        self.page.goto(url)
        self.page.wait_for_selector("[data-kind=exemplar] canvas")
        self.page.wait_for_function("window.pbe && window.pbe.ready()")

    def choose(self, kind: str, *files: Path) -> None:
        """Open files on a board, and wait until they are there."""
        said = self.page.locator(f"[data-kind={'exemplar' if kind == 'exemplar' else 'image'}] .pbe-said")
        self.page.set_input_files(f"[data-file={kind}]", [str(file) for file in files])
        self.page.wait_for_function(
            "said => said.textContent && !said.textContent.startsWith('Loading')", arg=said.element_handle()
        )

    def drag(self, kind: str, *points: tuple[float, float]) -> None:
        """Drag over a board through points in shares of its sides."""
        stage = self.page.locator(f"[data-kind={kind}] .pbe-stage")
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        for index, (x, y) in enumerate(points):
            self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=3)
            if index == 0:
                self.page.mouse.down()
        self.page.mouse.up()

    def set(self, label: str, value: Any) -> None:
        """Set a control by its label."""
        numbers = self.page.get_by_label(f"number input for {label}", exact=True)
        texts = self.page.get_by_role("textbox", name=re.compile(f"^{label}"))  # their help is in the name
        control = numbers.or_(self.page.get_by_label(label, exact=True)).or_(texts).first
        control.fill(str(value))
        control.press("Tab")

    def paint(self) -> None:
        """Press Paint, and wait for the edit or a message."""
        self.page.evaluate("document.querySelectorAll('.pbe-results').forEach(each => each.dataset.old = 1)")
        self.page.click("#pbe-run")
        self.page.wait_for_selector(
            ".pbe-results:not([data-old]) figure, .pbe-results:not([data-old]) [role=alert]"
        )
        self.page.wait_for_selector("#pbe-run:not([disabled])")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900)], ids=["1280"])
def tab(request: pytest.FixtureRequest, chromium: Any) -> Iterator[Tab]:
    """A tab that fails the test for console errors and for requests that leave the machine."""
    width, height = request.param
    page = chromium.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(90_000)
    found = Tab(page)
    page.on("pageerror", lambda error: found.complaints.append(f"error: {error}"))
    page.on("console", lambda said: said.type == "error" and found.complaints.append(said.text))
    page.on("request", lambda sent: _local(sent.url) or found.complaints.append(f"request: {sent.url}"))
    yield found
    page.close()
    assert not found.complaints


def _local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:"))
