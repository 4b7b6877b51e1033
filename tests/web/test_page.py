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


@pytest.mark.slow  # Playwright's loop stays in the process, where other tests send themselves signals
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


@pytest.mark.slow
@WIDTHS
def test_everything_a_person_does(tab: Tab, served: Served) -> None:
    page = tab.page
    tab.open(served.url)
    tab.paint()
    assert "The image is missing" in page.locator("[role=alert]").inner_text()
    tab.choose("image", EXAMPLES / "0_image.png")
    tab.paint()
    assert "The mask is missing" in page.locator("[role=alert]").inner_text()
    page.click("[data-tool=box]")
    tab.drag("image", (0.25, 0.25), (0.75, 0.75))
    assert "25.0 %" in page.locator("[data-kind=image] .pbe-said").inner_text()
    tab.paint()
    assert "The exemplar is missing" in page.locator("[role=alert]").inner_text()
    tab.choose("exemplar", EXAMPLES / "1_exemplar.png", EXAMPLES / "2_exemplar.png")
    tab.set("Steps", 2)
    tab.paint()
    assert page.locator("[data-show]").count() == 2
    first = edit_shown(tab)
    assert record_shown(tab)["repaints"] == 0.25
    page.click("[data-show='1']")
    assert not np.array_equal(edit_shown(tab), first)
    page.locator("[data-remove='1']").click()
    seed = record_shown(tab)["seed"]
    page.click("#pbe-dice")
    page.wait_for_function("document.querySelector('#pbe-seed input').value !== '0'")
    tab.paint()
    assert record_shown(tab)["seed"] != seed
    page.click("[data-use]")
    page.wait_for_selector("[data-kind=image] .pbe-said:has-text('64 × 64 pixels')")
    assert not page.locator(".pbe-problem").count()


@pytest.mark.slow
@WIDTHS
def test_settings_come_back_and_repeat_the_edit(tab: Tab, served: Served) -> None:
    tab.open(served.url)
    fill(tab, steps=3)
    tab.set("Seed", 77)
    tab.paint()
    made, told = edit_shown(tab), record_shown(tab)
    tab.set("Steps", 2)
    tab.set("Seed", 5)
    file = {"name": "settings.json", "mimeType": "application/json", "buffer": json.dumps(told).encode()}
    tab.page.get_by_role("button", name="Settings as JSON").click()
    with tab.page.expect_file_chooser() as chooser:
        tab.page.get_by_role("button", name="Open a settings file").click()
    chooser.value.set_files(file)
    tab.page.wait_for_function("document.querySelector('#pbe-read').innerText.includes('Read.')")
    tab.paint()
    assert record_shown(tab)["seed"] == 77
    assert np.array_equal(edit_shown(tab), made)
    tab.page.locator("#pbe-json textarea").fill("{broken")
    tab.page.click("#pbe-read-button")
    tab.page.wait_for_function("document.querySelector('#pbe-read').innerText.includes('not JSON')")


@pytest.mark.slow
@WIDTHS
def test_a_long_edit_is_cancelled_and_an_example_works(tab: Tab, served: Served) -> None:
    tab.open(served.url)
    fill(tab, steps=60)
    tab.set("Images", 8)
    tab.page.click("#pbe-run")
    tab.page.wait_for_selector("progress[max]")
    tab.page.click("#pbe-cancel")
    tab.page.wait_for_selector("text=Cancelled.")
    tab.set("Images", 1)
    tab.set("Steps", 2)
    tab.page.click("[data-example='2']")
    tab.page.wait_for_selector("figure")
    expected = np.asarray(Image.open(EXAMPLES / "2_image.png").convert("RGB"))
    mask = np.asarray(Image.open(EXAMPLES / "2_mask.png").convert("L")) > 127
    assert np.array_equal(edit_shown(tab)[~mask], expected[~mask])
    assert record_shown(tab)["repaints"] == round(float(mask.mean()), 6)


@pytest.mark.slow
def test_broken_and_huge_files_are_told(tab: Tab, served: Served, tmp_path: Any) -> None:
    broken, huge = tmp_path / "broken.png", tmp_path / "huge.png"
    broken.write_bytes((EXAMPLES / "0_image.png").read_bytes()[:200])
    Image.new("RGB", (3000, 2000)).save(huge)
    tab.open(served.url)
    said = tab.page.locator("[data-kind=image] .pbe-said")
    for file, words in ((broken, "damaged"), (huge, "too large")):
        tab.choose("image", file)
        assert words in said.inner_text()
    assert all("400 (Bad Request)" in each for each in tab.complaints)
    tab.complaints.clear()


@pytest.mark.slow
@WIDTHS
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_bars_the_way(tab: Tab, served: Served, theme: str) -> None:
    pytest.importorskip("axe_playwright_python")
    from axe_playwright_python.sync_playwright import Axe

    tab.open(f"{served.url}?__theme={theme}")
    fill(tab)
    tab.paint()
    found = Axe().run(tab.page).response["violations"]
    grave = [each for each in found if each["impact"] in ("serious", "critical")]
    told = [f"{each['id']}: {node['html'][:200]}" for each in grave for node in each["nodes"]]
    assert not told, "\n".join(told)
    width = tab.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert width <= 0, "the page is wider than the window"


@pytest.mark.slow
def test_the_keyboard_paints_undoes_and_compares(tab: Tab, served: Served) -> None:
    tab.open(served.url)
    tab.choose("image", EXAMPLES / "0_image.png")
    stage = tab.page.locator("[data-kind=image] .pbe-stage")
    said = tab.page.locator("[data-kind=image] .pbe-said")
    stage.focus()
    stage.press("x")
    stage.press("Space")
    for _ in range(8):
        stage.press("ArrowRight")
        stage.press("ArrowDown")
    stage.press("Space")
    assert "6.3 %" in said.inner_text()  # a quarter of each side
    stage.press("Control+z")
    assert said.inner_text() == "No mask."
    stage.press("Control+Shift+z")
    assert "6.3 %" in said.inner_text()
    before = tab.page.locator("[data-size]").input_value()
    stage.press("b")
    stage.press("]")
    assert tab.page.locator("[data-size]").input_value() > before
    tab.choose("exemplar", EXAMPLES / "1_exemplar.png")
    tab.set("Steps", 2)
    tab.paint()
    cut = "getComputedStyle(document.querySelector('.pbe-compare')).getPropertyValue('--cut')"
    tab.page.locator("#pbe-run").focus()
    tab.page.keyboard.down("c")
    assert tab.page.evaluate(cut) == "100%"
    tab.page.keyboard.up("c")
    assert tab.page.evaluate(cut) == "0%"
