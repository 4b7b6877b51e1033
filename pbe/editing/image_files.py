"""Image files, decoded and turned upright. Damage in what surrounds the pixels is no damage of the pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from pbe.editing.problems import EditValueError

PNG_START = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
ORIENTATION = 0x0112
TURNS: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(content: bytes) -> Image.Image:
    """Return the first frame of an image file, decoded and upright.

    Of a PNG whose other chunks are damaged only those with a right checksum are read, and if that does not
    help, only those that hold the pixels.

    Raises:
        EditValueError: it cannot be decoded, or has too many pixels; the text completes "image 'x.png' ".
    """
    if not content:
        raise EditValueError("is an empty file")
    failure: Exception | None = None
    for attempt in _attempts(content):
        try:
            image = Image.open(io.BytesIO(attempt))
            image.load()
            return upright(image)
        except Image.DecompressionBombError as error:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise EditValueError(
                f"is too large: images of more than {most:,} pixels are not read; reduce it first"
            ) from error
        except Exception as error:  # decoders raise nearly anything on damaged files
            failure = error
    if isinstance(failure, UnidentifiedImageError):
        raise EditValueError("is not a picture of a known format") from failure
    raise EditValueError(f"is damaged or cannot be decoded: {first_line(failure)}") from failure


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says; without a readable one it stays as it is."""
    turn = needed_turn(image)
    return image if turn is None else image.transpose(turn)


def needed_turn(image: Image.Image) -> Image.Transpose | None:
    """Return what turns an image upright by its EXIF orientation; None where it is or says nothing."""
    try:
        image.load()  # Pillow turns a TIFF by itself here
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # any damage of the metadata, which Pillow reports in as many ways
        return None


def first_line(error: object) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _attempts(content: bytes) -> Iterator[bytes]:
    yield content
    if content.startswith(PNG_START):
        chunks = list(_chunks(content))
        yield PNG_START + b"".join(chunk for name, chunk, sound in chunks if sound or name in PIXEL_CHUNKS)
        yield PNG_START + b"".join(chunk for name, chunk, _ in chunks if name in PIXEL_CHUNKS)


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Yield name, bytes and whether the checksum is right of every chunk of a PNG, the last perhaps cut."""
    start = len(PNG_START)
    while start + 8 <= len(content):
        length, name = struct.unpack(">I4s", content[start : start + 8])
        end = start + 12 + length
        checksum = struct.pack(">I", zlib.crc32(content[start + 4 : end - 4]))
        yield name, content[start:end], content[end - 4 : end] == checksum
        start = end
