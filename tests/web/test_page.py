"""The page in a real browser."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.web.conftest import EXAMPLES, Served, Tab

WIDTHS = pytest.mark.parametrize("tab", [(1280, 900), (390, 844)], indirect=True, ids=["1280", "390"])


def edit_shown(tab: Tab) -> np.ndarray:
    """The edit on the page, as the server sent it."""
    bytes_of = """async () => {
      const response = await fetch(document.querySelector('figure:not([hidden]) .pbe-after').src);
      const bytes = new Uint8Array(await response.arrayBuffer());
      return btoa(String.fromCharCode(...bytes));
    }"""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(tab.page.evaluate(bytes_of)))))


def record_shown(tab: Tab) -> dict[str, Any]:
    return json.loads(tab.page.locator("figure:not([hidden]) .pbe-json").text_content())


def fill(tab: Tab, steps: int = 2) -> None:
    """Open an image and an exemplar, paint a stroke, crop, and take few steps."""
    tab.choose("image", EXAMPLES / "0_image.png")
    tab.drag("image", (0.3, 0.4), (0.5, 0.5), (0.6, 0.7))
    tab.choose("exemplar", EXAMPLES / "1_exemplar.png")
    tab.drag("exemplar", (0.2, 0.2), (0.8, 0.9))
    tab.set("Steps", steps)


def test_a_stroke_and_an_exemplar_become_an_edit(tab: Tab, served: Served) -> None:
    tab.open(served.url)
    fill(tab)
    tab.paint()
    source = np.asarray(Image.open(EXAMPLES / "0_image.png").convert("RGB"))
    changed = (edit_shown(tab) != source).any(axis=2)
    assert changed[25:32, 24:30].any()  # under the stroke
    assert not changed[:16].any()
    assert not changed[:, 48:].any()
    told = record_shown(tab)
    assert told["steps"] == 2
    assert told["feather"] is None
    assert told["height"] is None
    assert 0.02 < told["repaints"] < 0.3
