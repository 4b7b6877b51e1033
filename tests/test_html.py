"""Pages hold everything themselves, escape every text and are written whole, as the demo's page does."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from pbe import files
from pbe.evaluation.demo.page import TEMPLATE, training_chart
from pbe.evaluation.report import Table
from pbe.html import Tile, data_uri, render_page, small_uri, write_html

NASTY = '<script>alert("x")</script> & "quotes"'
IMAGE = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
VOID = {"meta", "img", "br", "hr", "link", "input"}


def nasty_page() -> dict[str, Any]:
    table = Table([NASTY], [[NASTY]], NASTY)
    return {
        "title": NASTY,
        "figures": [(NASTY, NASTY)],
        "edits": [[Tile(NASTY, IMAGE)]],
        "outside": [[Tile(NASTY, IMAGE)]],
        "curve": training_chart([(0, 1.0), (10, 0.5)], [(0, 1.0), (10, 0.5)]),
        "losses": table,
        "grids": [Tile(NASTY, IMAGE)],
        "scores": table,
        "stages": [(NASTY, 1.5, NASTY)],
        "machine": [(NASTY, NASTY)],
        "steps": [(NASTY, NASTY)],
    }


class Balance(HTMLParser):
    """Checks that tags close in order and collects addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    assert not parser.open
    return parser


def test_the_page_holds_everything_itself():
    page = render_page(TEMPLATE, **nasty_page())
    parser = parse(page)
    assert parser.addresses
    kinds = r"data:image/(png|webp|svg\+xml);base64,"
    assert all(re.match(kinds, address) for address in parser.addresses)
    text = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)


def test_texts_are_escaped():
    page = render_page(TEMPLATE, **nasty_page())
    assert "script" not in parse(page).names
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 15


def test_what_a_page_lacks_is_an_error_and_not_a_gap():
    values = nasty_page()
    del values["title"]
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        render_page(TEMPLATE, **values)


def test_images_survive_the_data_address():
    content = base64.b64decode(data_uri(IMAGE).split(",", 1)[1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), IMAGE)


def test_enlarged_images_survive_nearly_and_are_small():
    noise = np.random.default_rng(0).normal(128.0, 50.0, (8, 8, 3)).clip(0, 255).astype(np.uint8)
    image = np.asarray(Image.fromarray(noise).resize((256, 256), Image.Resampling.LANCZOS))
    shown = small_uri(image)
    content = io.BytesIO(base64.b64decode(shown.removeprefix("data:image/webp;base64,")))
    assert np.abs(np.asarray(Image.open(content), int) - image).mean() < 3.0  # grey levels of 255
    assert len(shown) < len(data_uri(image)) / 3


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "deep" / "index.html"
    write_html("one", target)
    assert target.read_text() == "one"
    monkeypatch.setattr(files.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_html("two", target)
    assert target.read_text() == "one"
    assert [path.name for path in target.parent.iterdir()] == ["index.html"]
