"""Colour profiles: they go along with an edit, or are applied where they cannot."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from pbe.editing.image_files import first_line
from pbe.editing.problems import say_once

GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})
LEAST_DPI, MOST_DPI = 2, 65535  # a TIFF without a unit says 1; a JPEG can say no more


@dataclass(frozen=True)
class Profile:
    """A colour profile that fits its image.

    Attributes:
        content: the ICC profile.
        space: what it describes: ``RGB``, ``GRAY`` or ``CMYK``.
    """

    content: bytes
    space: str

    def to_srgb(self, image: Image.Image) -> Image.Image:
        """Convert an image of mode RGB, L or CMYK, whichever the profile describes, to RGB in sRGB."""
        converted = _to_srgb(image, ImageCms.ImageCmsProfile(io.BytesIO(self.content)))
        if self.space == "RGB":  # sRGB under another name: what the rounding changes is no change of colour
            change = np.asarray(converted).astype(np.int16) - np.asarray(image)
            if np.abs(change).max() <= 1:
                return image
        return converted


def profile_of(image: Image.Image, what: str = "image") -> Profile | None:
    """Return the colour profile that an image holds; one that cannot be used is told about.

    Args:
        image: of any mode.
        what: how the remark calls it.
    """
    content = image.info.get("icc_profile")
    if not content or image.mode == "LAB":  # L*a*b* needs none
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(content))
        space = source.profile.xcolor_space.strip()
        if space not in _spaces(image.mode):
            say_once(f"{what}: its colour profile, of {space} colours, does not fit and is left out")
            return None
        ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), {"GRAY": "L"}.get(space, space), "RGB"
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        say_once(f"{what}: its colour profile is damaged and left out ({first_line(error)})")
        return None
    return Profile(content, space)


def _spaces(mode: str) -> tuple[str, ...]:
    """Return the kinds of profile that make sense for a mode."""
    if mode == "CMYK":
        return ("CMYK",)
    return ("GRAY", "RGB") if mode in GREY_MODES else ("RGB",)


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image of mode LAB (CIE L*a*b*, D50) to RGB in sRGB."""
    return _to_srgb(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))


def _to_srgb(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # it is None only where the image is changed in place
    return converted


def carried(image: Image.Image, what: str = "image") -> dict[str, Any]:
    """Return what goes along with the edit of an image, by the names of Pillow's ``info``.

    Args:
        image: of any mode.
        what: how a remark calls it.

    Returns:
        ``icc_profile``, where the edit's numbers mean colours by it, and ``dpi``; each if there is one.
    """
    profile, dpi = profile_of(image, what), _dpi(image.info.get("dpi"))
    found = {} if profile is None or profile.space != "RGB" else {"icc_profile": profile.content}
    return found if dpi is None else found | {"dpi": dpi}


def _dpi(value: Any) -> tuple[float, float] | None:
    try:
        across, down = (float(side) for side in value)
    except (TypeError, ValueError, ArithmeticError):
        return None
    usable = all(math.isfinite(side) and LEAST_DPI <= side <= MOST_DPI for side in (across, down))
    return (across, down) if usable else None
