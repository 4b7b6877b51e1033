"""Headers of image files: damage in the metadata is none in the pixels."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from pbe.data.sources.image_files import UnreadableImageError, inspect_image

VALUES = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)


def encoded(form: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(VALUES).save(file, form, **options)  # type: ignore[arg-type]
    return file.getvalue()


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """Return a PNG with a chunk more, behind its header."""
    crc = zlib.crc32(kind + content)
    chunk = len(content).to_bytes(4, "big") + kind + content + crc.to_bytes(4, "big")
    return png[:33] + chunk + png[33:]


DAMAGED = {
    "JPEG": encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "JPEG, garbage": encoded("JPEG", exif=b"Exif\0\0" + bytes(range(256))),
    "PNG": with_chunk(encoded("PNG"), b"eXIf", b"garbage"),
    "PNG, offset": with_chunk(encoded("PNG"), b"eXIf", b"II*\0\xff\xff\xff\x7f"),
    "PNG, text": with_chunk(encoded("PNG"), b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2**21)),
    "PNG, profile": with_chunk(encoded("PNG"), b"iCCP", b"a\0\0junk"),
    "PNG, more behind its end": encoded("PNG") + b"\0" * 5000,
    "WebP": encoded("WEBP", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_metadata_harm_no_pixel(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    header = inspect_image(DAMAGED[kind])
    assert (*header.stored_size, header.orientation, header.frames) == (40, 30, 1, 1)
    assert header.extension == {"J": "jpg", "P": "png", "W": "webp"}[kind[0]]
    assert not recwarn.list


@pytest.mark.parametrize(("orientation", "expected"), [(6, 6), (0, 1), (9, 1), (99, 1), (65535, 1)])
def test_orientations(orientation: int, expected: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert inspect_image(encoded("JPEG", exif=exif)).orientation == expected


@pytest.mark.parametrize(
    "content", [b"", b"text", encoded("PNG")[:200], encoded("JPEG")[:200], b"\xff\xd8\xff\xd9" * 9]
)
def test_damaged_pixels_are_refused(content: bytes) -> None:
    with pytest.raises(UnreadableImageError):
        inspect_image(content)
