"""Colours stay what they are: a profile goes along with the edit, or is applied."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from pbe.editing.image_files import carried, profile_of
from pbe.editing.images import as_picture, read_picture
from pbe.editing.inputs import matched
from pbe.editing.output import as_output
from pbe.errors import warn_once

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)


def wide() -> bytes:
    """Return an RGB profile whose red and blue are swapped: sRGB with two of its primaries exchanged."""
    content = bytearray(SRGB)
    count = int.from_bytes(content[128:132], "big")
    tags = {bytes(content[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    content[red : red + 4], content[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(content)


def grey_profile() -> bytes:
    """Return a grey profile with gamma 1, written out by hand after ICC.1:2001, section 6."""
    white = b"XYZ \0\0\0\0" + b"".join(round(v * 65536).to_bytes(4, "big") for v in (0.9642, 1.0, 0.8249))
    curve = b"curv\0\0\0\0\0\0\0\0"  # no entries: identity
    text = b"desc\0\0\0\0\0\0\0\2g\0" + bytes(78)
    start = 128 + 4 + 3 * 12
    table, body = (3).to_bytes(4, "big"), b""
    for name, data in ((b"wtpt", white), (b"kTRC", curve), (b"desc", text)):
        table += name + (start + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data + bytes(-len(data) % 4)
    head = bytearray(128)
    head[0:4] = (start + len(body)).to_bytes(4, "big")
    head[8:12], head[12:24], head[36:40] = b"\2\x10\0\0", b"mntrGRAYXYZ ", b"acsp"
    head[68:80] = white[8:]
    return bytes(head) + table + body


def tagged(profile: bytes, mode: str = "RGB") -> Image.Image:
    image = Image.fromarray(PIXELS).convert(mode)
    image.info["icc_profile"] = profile
    return image


def test_numbers_of_the_image_stay_and_its_profile_goes_along(tmp_path: Path):
    tagged(wide()).save(tmp_path / "a.png", icc_profile=wide(), dpi=(300, 300))
    loaded = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(loaded.pixels, PIXELS)
    assert loaded.carried["icc_profile"] == wide()
    assert [round(side) for side in loaded.carried["dpi"]] == [300, 300]


def test_an_exemplar_is_brought_to_srgb(tmp_path: Path):
    tagged(wide()).save(tmp_path / "e.png", icc_profile=wide())
    loaded = read_picture(tmp_path / "e.png", "exemplar")
    assert loaded.carried == {}
    assert np.abs(loaded.pixels.astype(int) - PIXELS[:, :, ::-1]).max() <= 2, "red and blue are swapped"
    np.testing.assert_array_equal(as_picture(tagged(SRGB)), PIXELS)


def test_a_grey_profile_is_applied(tmp_path: Path):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    ramp.save(tmp_path / "a.png", icc_profile=grey_profile())
    loaded = read_picture(tmp_path / "a.png")
    linear = np.arange(256) / 255
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    change = np.abs(loaded.pixels[0, :, 1] - expected)
    assert change[32:].max() <= 2
    assert change.max() <= 10, "in the dark, where the curve is steep, littlecms interpolates"
    assert loaded.carried == {}, "the edit is sRGB"


def test_profiles_that_cannot_be_used_are_told_and_left_out(caplog: pytest.LogCaptureFixture):
    warn_once.cache_clear()
    np.testing.assert_array_equal(as_picture(tagged(b"no profile at all")), PIXELS)
    assert "image: its colour profile is damaged and left out" in caplog.text
    assert profile_of(tagged(SRGB, "CMYK"), "cmyk") is None
    assert "cmyk: its colour profile, of RGB colours, does not fit and is left out" in caplog.text
    assert profile_of(tagged(grey_profile())) is None
    assert profile_of(tagged(SRGB, "L")) is not None, "equal numbers of red, green and blue are grey in it"


@pytest.mark.parametrize("dpi", [None, 300, ("x", 1), (0, 0), (float("nan"), 1.0), (1, 1), (1e9, 1e9), (1,)])
def test_a_resolution_of_no_meaning_is_left_out(dpi: object):
    image = tagged(SRGB)
    image.info["dpi"] = dpi
    assert set(carried(image)) == {"icc_profile"}


def test_the_pipeline_hands_profile_and_resolution_on():
    plain, colourful = Image.fromarray(PIXELS), tagged(wide())
    colourful.info["dpi"] = (300, 300)
    batch = matched(plain, [plain, colourful], Image.new("L", plain.size, 255), copies=2)
    edits = as_output([np.zeros((8, 6, 3), np.float32)] * 4, "pil", batch.carried)
    assert [edit.info.get("icc_profile") for edit in edits] == [None, None, wide(), wide()]
    assert [edit.info.get("dpi") for edit in edits] == [None, None, (300, 300), (300, 300)]
    saved = io.BytesIO()
    edits[3].save(saved, "PNG")
    assert Image.open(saved).info["icc_profile"] == wide()
