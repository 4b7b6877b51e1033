"""Make the screenshot of the web page in the README: serve a model, paint an example, take the picture.

python scripts/web_screenshot.py --model toy --out docs/images/web_page.png
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

PATIENCE = 300  # seconds that a server or an edit may take


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 where there is no browser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--example", type=int, default=1, help="number of the example that is painted")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=960)
    parser.add_argument("--theme", choices=["light", "dark"], default="light")
    parser.add_argument("--out", type=Path, default=Path("docs/images/web_page.png"))
    options = parser.parse_args(arguments)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("error: no chromium on PATH; apt-get install chromium", file=sys.stderr)
        return 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pbe.cli", "serve", "--model", options.model, "--port", str(port)]
    server = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_for(url, server)
        take(browser, url, options)
    finally:
        server.terminate()
        server.wait(60)
    return 0


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}openapi.json").close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server does not answer")


def take(browser: str, url: str, options: argparse.Namespace) -> None:
    """Paint an example and write the picture of the page."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": options.width, "height": options.height})
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(f"{url}?__theme={options.theme}")
        page.wait_for_function("window.pbe && window.pbe.ready()")
        page.click(f'[data-example="{options.example}"]')
        page.wait_for_selector("figure")
        page.wait_for_timeout(500)
        page.evaluate("window.scrollTo(0, 0)")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=options.out)
        chromium.close()


if __name__ == "__main__":
    sys.exit(main())
