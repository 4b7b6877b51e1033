"""What the page says while an edit runs, without a browser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.web.conftest import EXAMPLES, need_web

need_web()

import gradio as gr  # noqa: E402

from pbe.web.page import _Page  # noqa: E402


@pytest.fixture
def page(editor: Any) -> _Page:
    made = _Page(editor)
    with gr.Blocks():
        made.build()
    return made


def collected(page: _Page, run: str = "r") -> str:
    kinds = {}
    for kind in ("image", "mask", "exemplar"):
        kinds[kind] = page.editor.upload((EXAMPLES / f"0_{kind}.png").read_bytes(), kind).name
    exemplars = [
        {"name": kinds["exemplar"], "crop": None},
        {"name": kinds["exemplar"], "crop": [0, 0, 0.5, 1]},
    ]
    boards = {"run": run, "image": kinds["image"], "mask": f"file:{kinds['mask']}", "exemplars": exemplars}
    return json.dumps(boards)


def values(page: _Page, **chosen: Any) -> list[Any]:
    return [chosen.get(name, component.value) for name, component in page.fields.items()]


async def shown(page: _Page, boards: str, chosen: list[Any], at_second: Any = lambda: None) -> list[str]:
    texts = []
    async for panel, *_ in page.run(boards, *chosen):
        texts.append(panel)
        if len(texts) == 2:
            at_second()
    return texts


def finished(texts: Coroutine[Any, Any, list[str]]) -> list[str]:
    """Run it in a thread of its own: Playwright, in other tests of this process, leaves its loop running."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, texts).result()


def test_every_exemplar_gives_an_edit(page: _Page) -> None:
    last = finished(shown(page, collected(page), values(page, steps=2)))[-1]
    assert last.count("<figure") == 2
    assert last.count("data-show=") == 2
    assert "pbe edit --model toy" in last
    assert not page.running


def test_an_edit_is_cancelled_while_it_waits(page: _Page) -> None:
    async def in_a_queue_that_stands() -> list[str]:
        with page.editor.service._wake:
            return await shown(page, collected(page), values(page, steps=60), lambda: page.cancel("r"))

    texts = finished(in_a_queue_that_stands())
    assert "Cancelled." in texts[-1]
    assert not page.running


@pytest.mark.parametrize(
    ("change", "chosen", "said"),
    [
        ({"image": ""}, {}, "The image is missing"),
        ({"mask": ""}, {}, "The mask is missing"),
        ({"exemplars": []}, {}, "The exemplar is missing"),
        ({"image": "unknown"}, {}, "no longer on the server"),
        ({"mask": "data:image/png;base64,???"}, {}, "did not arrive whole"),
        ({"run": None, "exemplars": 3}, {}, "reload it"),
        ({}, {"height": "tall"}, "height is"),
        ({}, {"steps": 61}, "at most 60"),
        ({}, {"num_images": 5}, "10 edits; this server makes at most 8"),
    ],
)
def test_what_is_wrong_is_said(page: _Page, change: Any, chosen: Any, said: str) -> None:
    boards = json.dumps(json.loads(collected(page)) | change)
    last = finished(shown(page, boards, values(page, **chosen)))[-1]
    assert said in last
    assert 'role="alert"' in last
