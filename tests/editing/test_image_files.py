"""Image files, and what surrounds their pixels: turns, damage, colour profiles, resolutions."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from pbe.editing.image_files import (
    ORIENTATION,
    PNG_START,
    carried,
    decode_image,
    needed_turn,
    profile_of,
    upright,
)
from pbe.editing.images import as_image, read_image
from pbe.editing.inputs import match_inputs
from pbe.editing.output import as_output
from pbe.errors import EditValueError, warn_once

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
HEAD = len(PNG_START) + 25  # signature and IHDR


def encoded(kind: str = "PNG", orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes, checksum: int | None = None) -> bytes:
    right = zlib.crc32(name + data)
    return (
        struct.pack(">I4s", len(data), name)
        + data
        + struct.pack(">I", right if checksum is None else checksum)
    )


@pytest.mark.parametrize("orientation", range(10))
def test_orientations_are_those_of_pillow(orientation: int):
    image = Image.open(io.BytesIO(encoded("PNG", orientation)))
    expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(np.asarray(decode_image(encoded("PNG", orientation))), expected)


def test_a_tiff_that_pillow_turns_by_itself_is_turned_once():
    content = encoded("TIFF", 6)
    np.testing.assert_array_equal(np.asarray(decode_image(content)), np.rot90(PIXELS, -1))
    assert needed_turn(Image.open(io.BytesIO(content))) is None
    assert needed_turn(Image.open(io.BytesIO(encoded("PNG", 6)))) is not None


DAMAGED = {
    "wrong checksum of a text": chunk(b"tEXt", b"k\0text", 1),
    "text that is no zlib": chunk(b"zTXt", b"k\0\0nonsense"),
    "unknown compression of a text": chunk(b"zTXt", b"k\0\x07nonsense"),
    "profile that is no zlib": chunk(b"iCCP", b"p\0\0nonsense"),
    "unknown compression of the profile": chunk(b"iCCP", b"p\0\x07nonsense"),
    "profile of a huge size": chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3_000_000))),
    "text of a huge size": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(90_000_000))),
    "gamma too short": chunk(b"gAMA", b"\0"),
    "white point too short": chunk(b"cHRM", b"\0\0\0"),
    "resolution too short": chunk(b"pHYs", b"\0"),
    "rendering intent of no length": chunk(b"sRGB", b""),
    "EXIF of nonsense": chunk(b"eXIf", b"nonsense that is no TIFF"),
    "chunk with a name of no letters": chunk(b"\1\2\3\4", b"x"),
    "animation of no frames": chunk(b"acTL", struct.pack(">II", 0, 0)),
    "animation too short": chunk(b"acTL", b"\0"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_png_with_damaged_metadata_gives_its_pixels(damage: str):
    content = encoded()
    image = decode_image(content[:HEAD] + DAMAGED[damage] + content[HEAD:])
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), PIXELS)


def test_sound_metadata_beside_damaged_ones_still_counts():
    content = encoded(orientation=6, icc_profile=PROFILE, dpi=(300, 300))
    image = decode_image(content[:HEAD] + DAMAGED["wrong checksum of a text"] + content[HEAD:])
    np.testing.assert_array_equal(np.asarray(image), np.rot90(PIXELS, -1))
    assert image.info["icc_profile"] == PROFILE
    assert round(image.info["dpi"][0]) == 300


def test_damaged_pixels_are_damage():
    content = encoded()
    at = content.index(b"IDAT")
    for broken in (content[: at + 10], content[: at + 6] + b"xx" + content[at + 8 :]):
        with pytest.raises(EditValueError, match=r"^(is damaged or cannot be decoded|is not an image)"):
            decode_image(broken)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_leaves_the_image_as_it_is(kind: str):
    sound = np.asarray(decode_image(encoded(kind, lossless=True)))
    content = encoded(kind, 6, lossless=True)
    at = content.index(b"MM\0*") if b"MM\0*" in content else content.index(b"II*\0")
    for offset in range(24):
        broken = bytearray(content)
        broken[at + offset] ^= 0x55
        found = np.asarray(decode_image(bytes(broken)).convert("RGB"))
        turned = found.shape[:2] == PIXELS.shape[1::-1]
        np.testing.assert_array_equal(np.rot90(found) if turned else found, sound)


@pytest.mark.parametrize("value", ["six", b"\6", (6, 6), 6.5, None, 99])
def test_an_orientation_of_no_meaning_is_none(value: object, monkeypatch: pytest.MonkeyPatch):
    image = Image.fromarray(PIXELS)
    monkeypatch.setattr(image, "getexif", lambda: {ORIENTATION: value})
    assert upright(image) is image


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)


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
    image = Image.fromarray(COLOURS).convert(mode)
    image.info["icc_profile"] = profile
    return image


def test_numbers_of_the_image_stay_and_its_profile_goes_along(tmp_path: Path):
    tagged(wide()).save(tmp_path / "a.png", icc_profile=wide(), dpi=(300, 300))
    loaded = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(loaded.pixels, COLOURS)
    assert loaded.carried["icc_profile"] == wide()
    assert [round(side) for side in loaded.carried["dpi"]] == [300, 300]


def test_an_exemplar_is_brought_to_srgb(tmp_path: Path):
    tagged(wide()).save(tmp_path / "e.png", icc_profile=wide())
    loaded = read_image(tmp_path / "e.png", "exemplar")
    assert loaded.carried == {}
    assert np.abs(loaded.pixels.astype(int) - COLOURS[:, :, ::-1]).max() <= 2, "red and blue are swapped"
    np.testing.assert_array_equal(as_image(tagged(SRGB)), COLOURS)


def test_a_grey_profile_is_applied(tmp_path: Path):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    ramp.save(tmp_path / "a.png", icc_profile=grey_profile())
    loaded = read_image(tmp_path / "a.png")
    linear = np.arange(256) / 255
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    change = np.abs(loaded.pixels[0, :, 1] - expected)
    assert change[32:].max() <= 2
    assert change.max() <= 10, "in the dark, where the curve is steep, littlecms interpolates"
    assert loaded.carried == {}, "the edit is sRGB"


def test_profiles_that_cannot_be_used_are_told_and_left_out(caplog: pytest.LogCaptureFixture):
    warn_once.cache_clear()
    np.testing.assert_array_equal(as_image(tagged(b"no profile at all")), COLOURS)
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
    plain, colourful = Image.fromarray(COLOURS), tagged(wide())
    colourful.info["dpi"] = (300, 300)
    batch = match_inputs(plain, [plain, colourful], Image.new("L", plain.size, 255), copies=2)
    edits = as_output([np.zeros((8, 6, 3), np.float32)] * 4, "pil", batch.carried)
    assert [edit.info.get("icc_profile") for edit in edits] == [None, None, wide(), wide()]
    assert [edit.info.get("dpi") for edit in edits] == [None, None, (300, 300), (300, 300)]
    saved = io.BytesIO()
    edits[3].save(saved, "PNG")
    assert Image.open(saved).info["icc_profile"] == wide()
