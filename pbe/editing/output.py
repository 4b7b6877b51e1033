"""Pipeline output, and its invisible watermark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from pbe.editing.images import to_bytes
from pbe.errors import EditTypeError, EditValueError, UserError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class EditOutput:
    """Result of a call of the pipeline.

    Attributes:
        images: ``output_type`` ``pil``: a list of RGB images; ``np``: float32 ``(b, h, w, 3)``; ``pt``:
            float32 ``(b, 3, h, w)``, both in [0, 1] and of the source image's size; ``latent``: the sampled
            latents, float32 ``(b, z, h, w)`` on the model's device, before they are decoded.
        nsfw_content_detected: for each image, whether the safety checker blackened it; None without a checker
            and for latents, which it cannot check.
        edited_at: height and width at which the model worked, before padding.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None
    edited_at: tuple[int, int] = (0, 0)

    def keys(self) -> list[str]:
        """Return the names of the attributes, by which ``output[name]`` gives them."""
        return [each.name for each in fields(self)]

    def values(self) -> list[Any]:
        """Return the attributes in the order of :meth:`keys`."""
        return [getattr(self, key) for key in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Return the attributes with their names."""
        return list(zip(self.keys(), self.values(), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        """Return an attribute by its name, or the default where there is none of that name."""
        return getattr(self, key) if key in self else default

    def __contains__(self, key: object) -> bool:
        """Say whether there is an attribute of that name."""
        return key in self.keys()

    def __getitem__(self, key: Any) -> Any:
        """Return an attribute by its name, or an entry of :meth:`to_tuple` by its place."""
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"no '{key}'; there are: {', '.join(self.keys())}")
        return getattr(self, key)

    def to_tuple(self) -> tuple[Any, list[bool] | None]:
        """Return ``(images, nsfw_content_detected)``."""
        return self.images, self.nsfw_content_detected


def as_output(edits: Sequence[np.ndarray], output_type: str, carried: Sequence[dict[str, Any]] = ()) -> Any:
    """Return edits, float32 ``h w 3`` in [0, 1] each, as ``pil``, ``np`` or ``pt``.

    With PIL images goes what is carried for each image: colour profile and resolution.
    """
    if output_type == "pil":
        images = [Image.fromarray(to_bytes(edit)) for edit in edits]
        for index, image in enumerate(images if carried else []):
            image.info.update(carried[index * len(carried) // len(images)])
        return images
    batch = np.stack(edits)
    if output_type == "np":
        return batch
    return rearrange(torch.from_numpy(batch), "b h w c -> b c h w").contiguous()


def to_images(painted: Tensor) -> np.ndarray:
    """Return ``(b, 3, h, w)`` about [-1, 1] as float32 ``b h w 3`` clipped to [0, 1]."""
    return rearrange((painted / 2.0 + 0.5).clamp(0.0, 1.0), "b c h w -> b h w c").cpu().numpy()


TEXT = "PaintByExample"
METHOD = "dwtDctSvd"  # the package's default, dwtDct, reads back wrongly from half of the images tried
SMALLEST = 256 * 256
INSTALL = "pip install PyWavelets && pip install --no-deps invisible-watermark"


def add_watermark(image: np.ndarray, text: str = TEXT) -> np.ndarray:
    """Hide a text (ASCII, 8 bits a character) in the frequencies of an image; only a decoder reads it.

    It is read by ``imwatermark.WatermarkDecoder("bytes", 8 * len(text)).decode(bgr, "dwtDctSvd")``. The mark
    does not survive a resize, and may read back with errors from flat or very noisy images. The image is
    uint8 ``h w 3``, RGB, of at least 256x256 pixels in area, and so is the result, a new array.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise EditTypeError(f"watermark: {image.dtype} {image.shape}; it must be uint8 (h, w, 3)")
    if image.shape[0] * image.shape[1] < SMALLEST:
        size = f"{image.shape[1]}x{image.shape[0]}"
        raise EditValueError(f"watermark: {size} is too small; it needs an area of 256x256 pixels")
    if not text or not text.isascii():
        raise EditValueError(f"watermark: '{text}' cannot be hidden; it must be ASCII and not empty")
    try:
        encoder = import_module("imwatermark").WatermarkEncoder()
    except ImportError as error:
        raise UserError(f"a watermark needs the package invisible-watermark ({error}): {INSTALL}") from error
    encoder.set_watermark("bytes", text.encode("ascii"))
    marked = encoder.encode(np.ascontiguousarray(image[:, :, ::-1]), METHOD)  # the package takes BGR
    return np.ascontiguousarray(marked[:, :, ::-1])
