"""What packing does with a picture's pixels: a check that it decodes, a perceptual hash, a smaller copy."""

from __future__ import annotations

import io
import warnings

import cv2
import numpy as np
from PIL import Image

from pbe.data.samples.colour import convert_profile
from pbe.data.samples.crops import resize_area
from pbe.data.samples.decode import UnusableImageError, decode, decode_image
from pbe.data.sources.pictures import PictureHeader, UnreadablePictureError

HASH_SIDE, HASH_BITS = 32, 8
MIN_CONTRAST = 2.0
REDUCED = ((512, cv2.IMREAD_REDUCED_GRAYSCALE_8), (256, cv2.IMREAD_REDUCED_GRAYSCALE_4))
CANNOT_DECODE = "cannot be decoded"
NO_RANGE = "values beyond 16 bits, which are no colours"


def _decode(encoded: bytes, flag: int) -> np.ndarray:
    try:
        return decode(encoded, flag)
    except UnusableImageError as error:
        raise UnreadablePictureError(CANNOT_DECODE) from error


def _decode_colours(encoded: bytes) -> np.ndarray:
    try:
        return decode_image(encoded)
    except UnusableImageError as error:
        raise UnreadablePictureError(CANNOT_DECODE) from error


def perceptual_hash(grey: np.ndarray) -> int:
    """Return a 64-bit hash that survives scaling and recompression; 0 for a picture without structure.

    Signs, against their median, of the 64 lowest frequencies (without the constant) of a 32 x 32 picture.

    Args:
        grey: uint8 ``h w``.
    """
    small = resize_area(grey, HASH_SIDE, HASH_SIDE).astype(np.float32)
    if small.std() < MIN_CONTRAST:
        return 0
    spectrum = cv2.dct(small)[: HASH_BITS + 1, : HASH_BITS + 1]
    values = np.concatenate([spectrum[:HASH_BITS, :HASH_BITS].ravel()[1:], spectrum[:1, HASH_BITS]])
    bits = values > np.median(values)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def check_and_hash(encoded: bytes, header: PictureHeader) -> int:
    """Decode a picture, small where the format allows it, and return its perceptual hash.

    Raises:
        UnreadablePictureError: it cannot be decoded.
    """
    if not header.extension or header.frames > 1:
        return perceptual_hash(cv2.cvtColor(first_frame(encoded), cv2.COLOR_RGB2GRAY))
    short = min(header.stored_size)
    flag = next((flag for side, flag in REDUCED if short >= side), cv2.IMREAD_GRAYSCALE)
    return perceptual_hash(_decode(encoded, flag))


def first_frame(encoded: bytes) -> np.ndarray:
    """Decode the first frame of any format that Pillow knows to uint8 ``h w 3``, RGB, as stored.

    Colours become sRGB, and transparent parts are laid on white, as in :mod:`pbe.data.samples.colour`.

    Raises:
        UnreadablePictureError: it cannot be decoded, or its numbers have no meaning as colours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd tags and large pictures; what matters is an error
            with Image.open(io.BytesIO(encoded)) as picture:
                if picture.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
                    deep = np.asarray(picture).astype(np.int64)
                    _check_range(deep)
                    return cv2.cvtColor((deep >> 8).astype(np.uint8), cv2.COLOR_GRAY2RGB)
                if picture.mode == "F":
                    raise UnreadablePictureError(NO_RANGE)
                profile = picture.info.get("icc_profile")
                if not picture.has_transparency_data:
                    image = np.array(picture.convert("RGB"))
                    return convert_profile(image, profile) if profile else image
                white = Image.new("RGBA", picture.size, "white")
                return np.array(Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB"))
    except UnreadablePictureError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise UnreadablePictureError(CANNOT_DECODE) from error


def _check_range(values: np.ndarray) -> None:
    if values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
        raise UnreadablePictureError(NO_RANGE)


def needs_encoding(header: PictureHeader, max_side: int) -> bool:
    """Whether a picture has to be encoded again: a format that shards do not hold, an animation, too long."""
    return not header.extension or header.frames > 1 or bool(max_side and max(header.stored_size) > max_side)


def encode_again(encoded: bytes, header: PictureHeader, max_side: int, quality: int) -> tuple[bytes, str]:
    """Return a picture that fits, upright, and its extension: PNG for what was lossless, else JPEG.

    Args:
        encoded: the file.
        header: its header.
        max_side: longest side of the result, pixels; 0 for no limit. Shrinking averages areas.
        quality: of a JPEG.

    Raises:
        UnreadablePictureError: it cannot be decoded.
    """
    image = _decode_colours(encoded) if header.extension and header.frames == 1 else first_frame(encoded)
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    height, width = image.shape[:2]
    scale = max_side / max(width, height) if max_side else 1.0
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = resize_area(image, *size)
    extension = "jpg" if header.extension in ("jpg", "webp") else "png"
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if extension == "jpg" else []
    return cv2.imencode(f".{extension}", image, options)[1].tobytes(), extension
