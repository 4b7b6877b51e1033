"""What is read from a request and what an edit leaves behind: inputs, settings, records, archives."""

from __future__ import annotations

import base64
import functools
import io
import json
import shlex
import zipfile
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from pbe.checkpoints.diffusers.scheduler import solver_to_json
from pbe.diffusion.solvers import SolverChoice
from pbe.editing.batch.records import versions
from pbe.editing.image_files import carried, decode_image
from pbe.editing.images import aspect_remark, fit_mask, mask_from_image, pixels_of, require_masked
from pbe.editing.pipeline import PaintByExample
from pbe.editing.placement import region_box
from pbe.editing.settings import DEFAULT_STEPS, MAX_SEED, EditSettings
from pbe.errors import EditValueError, UserError
from pbe.web.service import Edit, Made
from pbe.web.settings import ServeSettings

# What browsers and cameras make; Pillow's other readers are older and some start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
NAMES = tuple(each.name for each in fields(EditSettings))
ALMOST_ALL = 0.9  # share of what the model sees, from which a mask leaves it nothing to fit the exemplar to
LEAST_CROP = 8  # pixels a side


def _choices(kind: Any) -> tuple[str, ...]:
    """Return the values of a type that is a Literal, or one of several that is."""
    literals = [each for each in (kind, *get_args(kind)) if get_origin(each) is Literal]
    return get_args(literals[0]) if literals else ()


_versions = functools.cache(versions)  # they are looked for in files
CHOICES = {each.name: found for each in fields(EditSettings) if (found := _choices(each.type))}


@dataclass(frozen=True)
class Inputs:
    """What edits are made from: pixels ``h w 3``, mask bool ``h w``, exemplars ``h w 3``; see ``carried``."""

    image: np.ndarray
    mask: np.ndarray
    exemplars: tuple[np.ndarray, ...]
    carried: dict[str, Any]
    remarks: tuple[str, ...] = ()


def open_image(content: bytes, what: str, limits: ServeSettings) -> Image.Image:
    """Return an uploaded image, decoded and upright, after its size was checked."""
    if len(content) > limits.max_megabytes * 2**20:
        raise EditValueError(f"{what}: the file has more than {limits.max_megabytes} MB; reduce it first")
    Image.init()
    formats = [each for each in FORMATS if each in Image.OPEN]
    try:
        size = Image.open(io.BytesIO(content), formats=formats).size
    except UnidentifiedImageError as error:
        raise EditValueError(f"{what}: this is not an image; give a PNG, JPEG or WebP file") from error
    except Exception as error:  # decoders raise nearly anything, a bomb's own error among it
        raise EditValueError(f"{what}: the file is damaged or too large to read") from error
    if size[0] * size[1] > limits.max_megapixels * 10**6:
        most = f"at most {limits.max_megapixels} million pixels are taken; reduce it first"
        raise EditValueError(f"{what}: {size[0]}x{size[1]} is too large; {most}")
    try:
        return decode_image(content)
    except EditValueError as error:
        raise EditValueError(f"{what}: the file {error}") from error


def read_inputs(
    image: bytes,
    mask: bytes,
    exemplars: list[bytes],
    limits: ServeSettings,
    crops: list[tuple[float, float, float, float] | None] | None = None,
) -> Inputs:
    """Decode what an edit is made from.

    Args:
        image: file to edit.
        mask: file of the mask, of any kind that ``pbe edit`` reads; fitted to the image.
        exemplars: files of exemplars.
        limits: what is too large.
        crops: part of each exemplar to take: left, top, right, bottom as shares of its sides.
    """
    _check_edits(len(exemplars), 1, limits)  # before any is decoded: small files can be large images
    source = open_image(image, "image", limits)
    pixels = pixels_of(source, "image", own_profile=True)
    drawn = open_image(mask, "mask", limits)
    try:
        region, _ = mask_from_image(drawn)
    except EditValueError as error:
        raise EditValueError(f"mask: {error}") from error
    require_masked(region, "the mask")
    stretched = aspect_remark(region.shape, pixels.shape[:2])
    region = fit_mask(region, (pixels.shape[0], pixels.shape[1]))
    shown = [pixels_of(open_image(each, "exemplar", limits), "exemplar") for each in exemplars]
    if not shown:
        raise EditValueError("an exemplar is missing: give an image of what is to be painted in")
    parts = [crop(each, box) for each, box in zip(shown, crops or [None] * len(shown), strict=True)]
    remarks = (f"the mask: {stretched}",) if stretched else ()
    return Inputs(pixels, region, tuple(parts), carried(source), remarks)


def crop(pixels: np.ndarray, box: tuple[float, float, float, float] | None) -> np.ndarray:
    """Return the part of an image within shares (left, top, right, bottom) of its sides."""
    if box is None:
        return pixels
    height, width = pixels.shape[:2]
    left, right = (round(min(max(each, 0.0), 1.0) * width) for each in (box[0], box[2]))
    top, bottom = (round(min(max(each, 0.0), 1.0) * height) for each in (box[1], box[3]))
    if right - left < min(LEAST_CROP, width) or bottom - top < min(LEAST_CROP, height):
        raise EditValueError(f"the box on the exemplar is too small; it needs {LEAST_CROP} pixels a side")
    return np.ascontiguousarray(pixels[top:bottom, left:right])


def read_settings(
    values: dict[str, Any], limits: ServeSettings, usual_steps: int = DEFAULT_STEPS
) -> EditSettings:
    """Return checked settings from names and values; unknown names and what is beyond a limit are refused.

    Where they name no steps there are ``usual_steps``, those that the model is meant for.
    """
    given = {name: value for name, value in values.items() if value is not None and value != ""}
    if unknown := [name for name in given if name not in NAMES]:
        raise EditValueError(f"there is no setting '{unknown[0]}'; there are: {', '.join(NAMES)}")
    for name, choices in CHOICES.items():
        if name in given and given[name] not in choices:
            raise EditValueError(f"no {name} '{given[name]}'; there are: {', '.join(choices)}")
    for name, kind in (("seed", int), ("karras", bool)):
        if name in given and type(given[name]) is not kind:
            wanted = "a whole number" if kind is int else "true or false"
            raise EditValueError(f"{name} is {given[name]!r}; it must be {wanted}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = EditSettings(**given).checked(lambda name: name)
    settings = replace(settings, steps=settings.steps or usual_steps)
    for name, most in (("steps", limits.max_steps), ("num_images", limits.max_images)):
        if getattr(settings, name) > most:
            raise EditValueError(f"{name} is {getattr(settings, name)}; this server takes at most {most}")
    if (settings.height or 1) * (settings.width or 1) > limits.max_megapixels * 10**6:
        raise EditValueError(f"height and width: at most {limits.max_megapixels} million pixels are made")
    if settings.seed > MAX_SEED - limits.batch_size - limits.max_images:
        raise EditValueError(f"seed is {settings.seed}, which is too large")
    return settings


def read_record(text: str, limits: ServeSettings, usual_steps: int = DEFAULT_STEPS) -> EditSettings:
    """Return the settings in a JSON that the page or ``pbe edit`` wrote."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("this is not JSON; give the settings of an earlier edit") from error
    known = {name: content[name] for name in NAMES if name in content} if isinstance(content, dict) else {}
    if not known:
        raise UserError("no settings of an edit are in this JSON; give that of an earlier edit")
    return read_settings(known, limits, usual_steps)


def split(
    inputs: Inputs, settings: EditSettings, limits: ServeSettings, *, watched: bool = False
) -> list[Edit]:
    """Return the single edits of a request: every exemplar with every seed."""
    _check_edits(len(inputs.exemplars), settings.num_images, limits)
    one = replace(settings, num_images=1)
    return [
        Edit(inputs.image, inputs.mask, exemplar, replace(one, seed=settings.seed + index), watched)
        for exemplar in inputs.exemplars
        for index in range(settings.num_images)
    ]


def _check_edits(exemplars: int, images: int, limits: ServeSettings) -> None:
    """Refuse more edits of a request than the server makes: so many images of each exemplar."""
    if (count := exemplars * images) > limits.max_images:
        made = f"{exemplars} exemplars with {images} images each are {count} edits"
        raise EditValueError(f"{made}; this server makes at most {limits.max_images} at a time")


def mask_hint(inputs: Inputs, settings: EditSettings, image_size: int) -> str | None:
    """Return a hint where the masked region is nearly all that the model would see."""
    seen = inputs.mask
    if settings.region == "mask":
        target = (settings.height or image_size, settings.width or image_size)
        seen = seen[region_box(seen, target, settings.margin).inside(seen.shape[:2])]
    share = float(seen.mean())
    if share < ALMOST_ALL:
        return None
    what = "region around the mask" if settings.region == "mask" else "image"
    advice = "raise the margin" if settings.region == "mask" else "mask less of the image"
    return f"The mask covers {share:.0%} of the {what}, so nothing tells the model what to fit to: {advice}."


def record(edit: Edit, made: Made, pipe: PaintByExample, limits: ServeSettings) -> dict[str, Any]:
    """Return all that is needed to make an edit again, the command included."""
    # a name stands for a solver with its own settings, which the model's files may give otherwise
    plain = pipe.solver if pipe.choice == SolverChoice(pipe.solver) else None
    settings = vars(edit.settings) | {
        "solver": edit.settings.solver or plain,
        "conventions": edit.settings.conventions or pipe.conventions,
    }
    return {
        "model": limits.model_name,
        "model_solver": solver_to_json(pipe.choice),
        **settings,
        "size": list(edit.image.shape[:2]),
        "repaints": round(float(edit.mask.mean()), 6),
        "blackened": made.blackened,
        "device": str(pipe.device),
        "dtype": limits.dtype,
        "threads": torch.get_num_threads(),
        "batch_size": made.rows,
        "versions": _versions(),
        "repeat": command(settings, made.rows, limits, str(pipe.device)),
    }


def command(settings: dict[str, Any], rows: int, limits: ServeSettings, device: str) -> str:
    """Return the command that makes an edit again from the files of its archive, bit for bit.

    The number of edits that run at once shapes the last bits, and nothing else of them does: so the command
    runs as many, of which the first is the edit.
    """
    words = ["pbe", "edit", "--model", limits.model_name, "--device", device, "--dtype", limits.dtype]
    for name in ("image", "mask", "exemplar"):
        words += [f"--{name}", f"{name}.png"]
    words += ["--name", "edit", "--out", "repeated"]
    for each in fields(EditSettings):
        value = rows if each.name == "num_images" else settings[each.name]
        option = each.name.replace("_", "-")
        if each.name in ("seed", "steps") or value != each.default:
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words += [f"--{option}", *map(str, value if isinstance(value, tuple) else [value])]
    if rows > 1:
        words += ["--batch-size", str(rows)]
    return shlex.join(words)


def archive(edit: Edit, image: bytes, carried: dict[str, Any], told: dict[str, Any]) -> bytes:
    """Return a ZIP with the edit, what it was made from, and its record."""
    profile = {"icc_profile": carried["icc_profile"]} if "icc_profile" in carried else {}
    files = {
        f"edit_{edit.settings.seed}.png": image,
        "image.png": to_png(Image.fromarray(edit.image), **profile),
        "mask.png": to_png(Image.fromarray(edit.mask.astype(np.uint8) * 255)),
        "exemplar.png": to_png(Image.fromarray(edit.exemplar)),
        "settings.json": (json.dumps(told, indent=2) + "\n").encode(),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
        for name, content in files.items():
            target.writestr(name, content)
    return buffer.getvalue()


def to_png(image: Image.Image, **more: Any) -> bytes:
    """Return a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1 if max(image.size) > 1024 else 6, **more)
    return buffer.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    """Return a file as a URL that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
