"""Damage in what surrounds the pixels of a file is no damage of the pixels."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from pbe.editing.image_files import ORIENTATION, PNG_START, decode_image, needed_turn, upright
from pbe.errors import EditValueError

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
        with pytest.raises(EditValueError, match=r"^(is damaged or cannot be decoded|is not a picture)"):
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
