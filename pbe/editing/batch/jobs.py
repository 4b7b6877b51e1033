"""What a command line asks for, edit by edit, and the checks of its files. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pbe.editing.images import aspect_remark, decision, fit_mask, read_mask, read_picture
from pbe.errors import EditValueError, UserError
from pbe.mask_reading import BY_LUMINANCE

FILE_KEYS = ("image", "mask", "exemplar")
MAX_SEED = 2**63 - 1
LONGEST = 65535  # of sizes, margins and feathers in pixels; more is a slip of the keyboard
MARGIN = 0.5  # around the mask when only its surroundings are edited: a share of its longer side
PICTURE_SUFFIXES = (".png", ".webp", ".tif", ".tiff", ".jpg", ".jpeg")
MAX_NAME = 200  # leaves room for the seed and the ending within the 255 bytes of a file name


@dataclass(frozen=True)
class Job:
    """One picture to edit, once or several times.

    Attributes:
        image: path of the picture.
        mask: path of the mask.
        exemplar: path of the exemplar.
        name: stem of the output files.
        seed: of the first edit; edit k has ``seed + k``.
        origin: prefix of complaints: ``pairs.jsonl line 3: `` or nothing.
    """

    image: Path
    mask: Path
    exemplar: Path
    name: str
    seed: int
    origin: str = ""


def single_job(image: str, mask: str, exemplar: str, name: str | None, seed: int) -> list[Job]:
    """Return the one job of a command line; the name defaults to the picture's stem."""
    job = Job(Path(image), Path(mask), Path(exemplar), name if name is not None else Path(image).stem, seed)
    check_name(job.name)
    return [job]


def check_name(name: str) -> None:
    """Refuse a name that output files cannot have."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise EditValueError(f"name {name!a} is not Unicode text; give another name") from error
    shown = f"name {name[:300]!r} cannot be the name of a file"
    if length > MAX_NAME:
        raise EditValueError(f"{shown}: it has {length} of at most {MAX_NAME} bytes; give another")
    if not name or name.startswith(".") or any(sign in name for sign in "/\\\0\n\r"):
        reason = "it is empty, starts with a dot or holds a slash, a backslash or a line break"
        raise EditValueError(f"{shown}: {reason}; give another")


def output_stem(job: Job, index: int) -> str:
    """Return the file stem of a job's edit number ``index``: ``<name>_<seed + index>``."""
    return f"{job.name}_{job.seed + index}"


def check_outputs(jobs: list[Job], num_images: int, folder: Path) -> None:
    """Check that no two edits share an output file, and that none lands on an input."""
    inputs = {os.path.realpath(path) for job in jobs for path in (job.image, job.mask, job.exemplar)}
    folder = Path(os.path.realpath(folder))
    taken: dict[str, Job] = {}
    for job in jobs:
        if job.seed + num_images - 1 > MAX_SEED:
            raise UserError(f"{job.origin}seed {job.seed} is too large for {num_images} images")
        for stem in (output_stem(job, index) for index in range(num_images)):
            if stem in taken:
                raise UserError(f"{job.origin}'{stem}' is already the output of another edit; name one anew")
            taken[stem] = job
            for file in (folder / f"{stem}.png", folder / f"{stem}_grid.png"):
                if str(file) in inputs:
                    raise UserError(f"{job.origin}the output would replace its input '{file}'; change --out")


@dataclass(frozen=True)
class Checked:
    """What checking a job's files found.

    Attributes:
        size: height and width of the image.
        remarks: what was decided about the mask, by the kind of the remark.
    """

    size: tuple[int, int]
    remarks: dict[str, str]


def check_files(jobs: list[Job]) -> Iterator[Checked]:
    """Read every file of every job, and yield what each job's files are."""
    for job in jobs:
        try:
            height, width = read_picture(job.image).pixels.shape[:2]
            mask = read_mask(job.mask)
            fit_mask(mask.pixels, (height, width))
            read_picture(job.exemplar, "exemplar")
        except UserError as error:
            raise UserError(f"{job.origin}{error}") from error
        remarks = {}
        if mask.read_by != BY_LUMINANCE:
            remarks[mask.read_by] = f"mask '{job.mask}': {decision(mask.pixels, mask.read_by)}"
        if stretched := aspect_remark(mask.pixels.shape, (height, width)):
            remarks["aspect"] = f"mask '{job.mask}': {stretched}"
        yield Checked((height, width), remarks)
