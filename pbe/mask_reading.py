"""The one reader of mask images, for masks that are packed and masks that are edited with.

A mask is drawn in many ways: black and white of any bit depth, 0 and 1, one colour on black, strokes on a
transparent layer, or the object itself cut out. :func:`read_mask_image` decides by what the file says:

- Alpha speaks where some of it is less than half of its largest value. Any other alpha is a layer's opacity
  and says nothing.
- Where alpha speaks and the visible pixels are a black-and-white drawing, the mask is luminance times alpha;
  where they are anything else (an object in its colours, strokes of one colour), it is alpha.
- An image in its colours that is whole along its border, with a part inside erased, is no cut-out: the mask
  is that part.
- Where alpha says nothing, luminance decides; a drawing of one colour on black counts as white on black.
- Numbers of classes or instances are refused, since a threshold would mix them up; so are coloured scenes.
  What is mostly grey is cut at half, with a remark: it may be a photograph instead of a mask.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

MASK_FROM = 128  # of 255: this and above is the masked region, the original's rounding of value / 255 >= 0.5
BY_LUMINANCE, BY_ALPHA, BY_BOTH = "luminance", "alpha", "luminance times alpha"
BY_ERASED = "the erased part"
BY_COLOUR, BY_ONES = "one colour on black", "the values 0 and 1"
BY_GREYS = "its greys, cut at 128 of 255"

DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
DEEP_MAX, DEEP_STEP = 65535, 257
OPAQUE_FROM = 16  # where no pixel is more opaque than this, of 255, nothing is to be seen
END = 8  # distance from 0 or 255, within which a grey counts as black or white
COLOURED = 64  # difference of two channels, from which a pixel is no grey
BRIGHT_COLOUR, OTHER_HUES = (
    192,
    0.02,
)  # how bright one colour on black has to be, and how many pixels may differ
DARK = 32  # a drawing's greys are this near to black or white, most of a photograph's are not
AREA_SHARE = 0.002  # of the pixels: an even area of this size is no noise
LOSSY = frozenset({"AVIF", "JPEG", "MPO", "WEBP"})
SOFT_LEVELS = 8  # a soft edge passes through more greys than this


class UnclearMaskError(ValueError):
    """The image is no mask; the text says why and completes "mask 'x.png': ..."."""


def read_mask_image(image: Image.Image) -> tuple[np.ndarray, str]:
    """Return the mask that a decoded image shows, and what decided.

    Args:
        image: of any mode, bit depth and palette. Its EXIF orientation is left to the caller, and of an
            animation the present frame counts.

    Returns:
        uint8 ``h w``, 255 in the masked region and 0 elsewhere (which may be all of it), and a few words to
        tell: ``luminance``, ``alpha``, ``luminance times alpha``, ``the erased part``,
        ``one colour on black``, ``the values 0 and 1`` or ``its greys, cut at 128 of 255``.

    Raises:
        UnclearMaskError: the image has no pixels, its colours are no mask, or its values have no meaning.
    """
    if min(image.size) < 1:
        raise UnclearMaskError("it has no pixels")
    if image.mode in DEEP_MODES or image.mode == "F":
        return _from_grey(_eight_bits(np.asarray(image)))
    try:
        colours, alpha = _channels(image)
    except (ValueError, OSError) as error:
        raise UnclearMaskError(f"its colour mode {image.mode} has no meaning as a mask") from error
    lossy = image.format in LOSSY
    if alpha is None:
        return _from_colours(colours, lossy)
    top = int(alpha.max())
    if top < OPAQUE_FROM:
        raise UnclearMaskError("it is transparent everywhere")
    if 2 * int(alpha.min()) >= top:
        return _from_colours(colours, lossy)
    visible = 2 * alpha.astype(np.int32) >= top
    if not _is_drawing(colours[visible]):
        border = (visible[0], visible[-1], visible[:, 0], visible[:, -1])
        if all(line.all() for line in border):  # no object reaches all round an image
            return _binary(~visible), BY_ERASED
        return _binary(visible), BY_ALPHA
    return _binary(_luminance(colours) * (alpha / top) >= MASK_FROM), BY_BOTH


def _binary(mask: np.ndarray) -> np.ndarray:
    return np.where(mask, np.uint8(255), np.uint8(0))


def _channels(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Return colours, uint8 ``h w 3``, and alpha, uint8 ``h w``, where there is one."""
    if image.mode in ("La", "RGBa"):  # multiplied by alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.has_transparency_data:
        both = np.asarray(image.convert("RGBA"))
        return both[:, :, :3], both[:, :, 3]
    return np.asarray(image.convert("RGB")), None


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Bring greys of 16 or 32 bits or floating point to uint8: by their format's range, or by 0 and 1 or 255.

    Raises:
        UnclearMaskError: the largest value is none of these.
    """
    lowest, top = float(values.min()), float(values.max())
    if not lowest >= 0 or not top <= DEEP_MAX:  # NaN too
        raise UnclearMaskError("its grey values lie outside 0 to 65535; save it with 8 bits, black and white")
    if values.dtype.kind == "f" and top <= 1:
        values = values * 255.0
    elif top > 255:
        values = np.asarray(values, np.float64) / DEEP_STEP
        if top / DEEP_STEP < MASK_FROM:
            raise UnclearMaskError(_dark(f"{top:g} of {DEEP_MAX}"))
    return np.rint(values).astype(np.uint8)


def _dark(brightest: str) -> str:
    return f"it is not black and white: its brightest grey is {brightest}"


def _luminance(colours: np.ndarray) -> np.ndarray:
    """Return the grey, uint8, of colours, uint8 ``... 3``, by ITU-R BT.601, the weights of Pillow's "L"."""
    weighed = colours.astype(np.int32) @ np.array([19595, 38470, 7471], np.int32)
    return ((weighed + 0x8000) >> 16).astype(np.uint8)


def _spread(colours: np.ndarray) -> np.ndarray:
    return colours.max(axis=-1).astype(np.int32) - colours.min(axis=-1)


def _is_drawing(colours: np.ndarray) -> bool:
    """Whether pixels, uint8 ``n 3``, draw in black and white: both occur, and they are a quarter at least."""
    if (_spread(colours) > COLOURED).any():
        return False
    grey = _luminance(colours)
    black, white = int((grey <= END).sum()), int((grey >= 255 - END).sum())
    return black > 0 and white > 0 and 4 * (black + white) >= grey.size


def _from_colours(colours: np.ndarray, lossy: bool) -> tuple[np.ndarray, str]:
    coloured = _spread(colours) > COLOURED
    if not coloured.any():
        return _from_grey(_luminance(colours), lossy)
    value = colours.max(axis=2)
    bright = value >= BRIGHT_COLOUR // 2  # darker ones lie on soft edges, and their hue says little
    hues = colours[bright] * (255.0 / value[bright])[:, None]
    scene = value.max() < BRIGHT_COLOUR or _mostly_between(value, BRIGHT_COLOUR)
    if scene or _share_of_other_hues(hues) > OTHER_HUES:
        raise UnclearMaskError("it is not black and white: its colours show a scene, or classes or instances")
    return _binary(value >= MASK_FROM), BY_COLOUR


def _mostly_between(values: np.ndarray, high: int) -> bool:
    """Whether most values, uint8, are neither dark nor at least ``high``, as in a scene of one hue."""
    return 2 * int(((values > DARK) & (values < high)).sum()) > values.size


def _share_of_other_hues(hues: np.ndarray) -> float:
    differences = np.abs(hues - np.median(hues, axis=0))
    return float((differences > COLOURED).any(axis=1).mean())


def _from_grey(grey: np.ndarray, lossy: bool = False) -> tuple[np.ndarray, str]:
    top = int(grey.max())
    if top <= 1:
        return _binary(grey == 1), BY_ONES if top else BY_LUMINANCE
    if top < MASK_FROM:
        raise UnclearMaskError(_dark(f"{top} of 255"))
    if _numbers_classes(grey, lossy):
        raise UnclearMaskError("it is not black and white: its dark greys number classes or instances")
    return _binary(grey >= MASK_FROM), BY_GREYS if _mostly_between(grey, top - DARK) else BY_LUMINANCE


def _numbers_classes(grey: np.ndarray, lossy: bool) -> bool:
    """Whether several dark greys fill even areas, without the many greys in between that soft edges have."""
    even = np.ones(grey.shape, bool)
    even[:, 1:] &= grey[:, 1:] == grey[:, :-1]
    even[1:] &= grey[1:] == grey[:-1]
    even[1:, 1:] &= grey[1:, 1:] == grey[:-1, :-1]
    areas = np.bincount(grey[even], minlength=256)[:COLOURED]
    levels = np.bincount(grey.ravel(), minlength=256)
    filled = np.flatnonzero(areas > AREA_SHARE * grey.size)
    if len(filled) < 2 or np.count_nonzero(levels[COLOURED:240]) >= SOFT_LEVELS:
        return False
    # A lossy file makes even areas of 1 and 2 out of black, and mostly some 254 out of white as well.
    lossy = lossy or bool(levels[255 - END : int(grey.max())].any())
    return not (lossy and filled[-1] <= END)
