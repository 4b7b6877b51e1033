"""What an edit leaves behind: the image, a grid to look at, and a JSON with every setting to repeat it."""

from __future__ import annotations

import io
import json
import platform
import re
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pbe.checkpoints.native import shared_files
from pbe.editing.images import grey_out
from pbe.errors import UserError
from pbe.files import sha256_of, write_output

CELL = 512  # longest side of a grid's cell, pixels
COLUMNS = 7
GAP = 4
DIGEST = re.compile("[0-9a-f]{64}")
MODEL_SUFFIXES = (".json", ".yaml", ".yml", ".safetensors", ".ckpt", ".pt", ".pth", ".bin")
JPEG: tuple[str, dict[str, Any]] = ("JPEG", {"quality": 95, "subsampling": 0})
TIFF: tuple[str, dict[str, Any]] = ("TIFF", {"compression": "tiff_lzw"})
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"lossless": True}),
    ".tif": TIFF,
    ".tiff": TIFF,
    ".jpg": JPEG,
    ".jpeg": JPEG,
}
PACKAGES = ("pbe", "torch", "numpy", "pillow", "open_clip_torch", "timm", "safetensors")


def make_grid(
    source: np.ndarray, mask: np.ndarray, exemplar: np.ndarray, edits: Sequence[Image.Image]
) -> Image.Image:
    """Lay source, masked source (mask grey), exemplar and edits side by side, seven a row.

    Args:
        source: uint8 ``h w 3``.
        mask: bool ``h w``.
        exemplar: uint8 ``h w 3``, shown with its own aspect.
        edits: images of the source's size.
    """
    cells = [Image.fromarray(array) for array in (source, grey_out(source, mask), exemplar)] + list(edits)
    height, width = source.shape[:2]
    scale = min(1.0, CELL / max(height, width))
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    columns = min(len(cells), COLUMNS)
    rows = -(-len(cells) // columns)
    grid = Image.new("RGB", (columns * (cell[0] + GAP) - GAP, rows * (cell[1] + GAP) - GAP), "white")
    for index, image in enumerate(cells):
        fitted = ImageOps.pad(image, cell, color="white") if image.size != cell else image
        grid.paste(fitted, (index % columns * (cell[0] + GAP), index // columns * (cell[1] + GAP)))
    return grid


def write_image(path: Path, image: Image.Image) -> None:
    """Write an image atomically, in the format of its ending: without loss, but for JPEG.

    The colour profile and the resolution in the image's ``info`` are written too, where the format holds
    them (WebP has no place for a resolution).
    """
    buffer = io.BytesIO()
    kind, settings = FORMATS[path.suffix.lower()]
    carried = {key: image.info[key] for key in ("icc_profile", "dpi") if image.info.get(key)}
    try:
        image.save(buffer, kind, **settings, **carried)
    except (OSError, ValueError) as error:  # WebP ends at 16383 pixels, JPEG at 65535
        size = f"{image.width}x{image.height}"
        raise UserError(f"cannot write '{path}', {size}, as {kind}: {str(error) or 'too large'}") from error
    write_output(path, buffer.getvalue())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # What is not UTF-8 in a path is a lone surrogate in Python, and its backslash form is JSON's own.
    write_output(path, text.encode(errors="backslashreplace"))


def model_digests(place: Path) -> dict[str, str]:
    """Return the SHA-256 of a model's file, or of each file of its folder, by path from the folder.

    Networks that it shares with another folder are among them.
    """
    if place.is_file():
        return {place.name: _digest(place)}
    files = [file for file in place.rglob("*") if file.is_file() and not file.name.startswith(".")]
    kept = sorted(file for file in files if file.suffix in MODEL_SUFFIXES)
    named = {file.relative_to(place).as_posix(): file for file in kept} | shared_files(place)
    return {name: _digest(file) for name, file in named.items()}


def _digest(path: Path) -> str:
    stored = path.resolve().name
    if path.is_symlink() and DIGEST.fullmatch(stored):
        return stored  # the Hub's cache names large files by their SHA-256
    return sha256_of(path)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape an edit."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # running from a checkout that is not installed
            found[package] = "not installed"
    return found


def repeat_command(options: dict[str, Any]) -> str:
    """Return the shell command with ``--option value`` pairs; True is a bare flag, a tuple several words."""
    words = ["python", "sample.py"]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, tuple):
            words += [f"--{name}", *map(str, value)]
        elif str(value).startswith("-"):  # a file of such a name would be taken for an option
            words.append(f"--{name}={value}")
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)
