from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pbe.errors import UserError
from pbe.evaluation.benchmark.sheets import BAND_GAP, GAP, LABEL_WIDTH, sheet
from pbe.evaluation.demo.charts import Line, line_chart, smooth, ticks
from pbe.evaluation.report.html import (
    Figure,
    Report,
    Stage,
    Table,
    Tile,
    data_uri,
    machine_facts,
    render,
    small_uri,
    write_page,
)

NASTY = '<script>alert("x")</script> & "quotes"'
PICTURE = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
VOID = {"meta", "img", "br", "hr", "link", "input", "line", "circle", "polyline"}


def full_report() -> Report:
    chart = line_chart([Line(NASTY, [(0, 1.0), (10, 0.5)])], title=NASTY, x_label=NASTY, y_label=NASTY)
    return Report(
        title=NASTY,
        lead=NASTY,
        figures=[Figure(NASTY, NASTY)],
        edits=[[Tile(NASTY, PICTURE)]],
        edits_note=NASTY,
        outside=[[Tile(NASTY, PICTURE)]],
        outside_note=NASTY,
        curve=chart,
        losses=Table([NASTY], [[NASTY]], NASTY),
        grids=[Tile(NASTY, PICTURE)],
        scores=Table([NASTY], [[NASTY]], NASTY),
        stages=[Stage(NASTY, 1.5, NASTY)],
        machine=[(NASTY, NASTY)],
        steps=[(NASTY, NASTY)],
    )


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
    page = render(full_report())
    parser = parse(page)
    assert parser.addresses
    assert all(re.match("data:image/(png|webp);base64,", address) for address in parser.addresses)
    text = re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)


def test_texts_are_escaped():
    page = render(full_report())
    assert "script" not in parse(page).names
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 15


def test_an_empty_report_is_a_page_too():
    assert "img" not in parse(render(Report("title", "lead"))).names


def test_pictures_survive_the_data_address():
    content = base64.b64decode(data_uri(PICTURE).split(",", 1)[1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), PICTURE)


def test_enlarged_images_survive_nearly_and_are_small():
    noise = np.random.default_rng(0).normal(128.0, 50.0, (8, 8, 3)).clip(0, 255).astype(np.uint8)
    image = np.asarray(Image.fromarray(noise).resize((256, 256), Image.Resampling.LANCZOS))
    shown = small_uri(image)
    content = io.BytesIO(base64.b64decode(shown.removeprefix("data:image/webp;base64,")))
    assert np.abs(np.asarray(Image.open(content), int) - image).mean() < 3.0  # grey levels of 255
    assert len(shown) < len(data_uri(image)) / 3


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "deep" / "index.html"
    write_page(Report("one", "lead"), target)
    assert "<title>one</title>" in target.read_text()
    monkeypatch.setattr("pbe.evaluation.report.html.render", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(Report("two", "lead"), target)
    assert "<title>one</title>" in target.read_text()
    assert [path.name for path in target.parent.iterdir()] == ["index.html"]


def test_machine_facts_name_versions():
    facts = dict(machine_facts())
    assert facts["torch"].startswith("2.")
    assert facts["Processor"]


def test_chart_scales_to_its_data():
    svg = line_chart([Line("a", [(0, 2.0), (100, 1.0)], marks=True)], title="t", x_label="x", y_label="y")
    points = re.search(r'points="([^"]+)"', svg)
    assert points is not None
    (x0, y0), (x1, y1) = (tuple(map(float, pair.split(","))) for pair in points.group(1).split())
    assert x1 > x0
    assert y1 > y0  # downwards on the page: the loss falls
    assert svg.count("<circle") == 2


@pytest.mark.parametrize("points", [[], [(0, float("nan"))], [(0, 1.0), (1, float("inf"))]])
def test_chart_without_numbers_is_refused(points):
    with pytest.raises(UserError, match="no points"):
        line_chart([Line("a", points)], title="t", x_label="x", y_label="y")


def test_ticks_and_smoothing_by_hand():
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3.0, 47.0) == pytest.approx([10.0, 20.0, 30.0, 40.0])
    assert ticks(1.0, 1.0) == [1.0]
    points = [(float(i), float(v)) for i, v in enumerate([4, 2, 0, 6])]
    assert smooth(points, share=0.5) == [(0.0, 4.0), (1.0, 3.0), (2.0, 1.0), (3.0, 3.0)]


def test_sheet_places_its_pictures():
    rows = {
        "red": [np.full((4, 4, 3), (255, 0, 0), np.uint8)] * 3,
        "blue": [np.full((4, 4, 3), (0, 0, 255), np.uint8)] * 3,
    }
    page = sheet(rows, tile=8, columns=2)
    assert page.shape == (2 * (2 * (8 + GAP) + BAND_GAP), LABEL_WIDTH + 2 * (8 + GAP), 3)
    assert page[3, LABEL_WIDTH + 3].tolist() == [255, 0, 0]
    assert page[8 + GAP + 3, LABEL_WIDTH + 8 + GAP + 3].tolist() == [0, 0, 255]
    second_band = 2 * (8 + GAP) + BAND_GAP
    assert page[second_band + 3, LABEL_WIDTH + 3].tolist() == [255, 0, 0]
    assert page[second_band + 3, LABEL_WIDTH + 8 + GAP + 3].tolist() == [255, 255, 255]  # no fourth case
