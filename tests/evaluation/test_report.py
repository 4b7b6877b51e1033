from __future__ import annotations

import numpy as np
from PIL import Image

from pbe.evaluation.report import BAND_GAP, GAP, LABEL_WIDTH, Table, at_side, markdown, sheet


def test_small_images_are_enlarged_by_lanczos_and_large_ones_averaged():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize((40, 40), Image.Resampling.LANCZOS)
    assert np.array_equal(at_side(image, 40), np.asarray(expected))
    assert np.array_equal(at_side(image, 16), image)
    blocks = image.reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(at_side(image, 8) - blocks).max() <= 0.51


def test_sheet_places_its_images():
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


def test_markdown_by_hand():
    table = Table(["score", "a|b"], [["seam", "1 (0 to 2)"]], "A note.", "not shown")
    lines = ["| score | a\\|b |", "| --- | --- |", "| seam | 1 (0 to 2) |"]
    assert markdown(table) == "\n".join([*lines, "", "A note.", ""])
    assert markdown(Table(table.head, table.rows)) == "\n".join([*lines, ""])
