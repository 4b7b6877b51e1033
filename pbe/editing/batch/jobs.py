"""What a command asks for, edit by edit, and its files, each of which is read once. No torch here."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pbe.editing.batch.records import FORMATS
from pbe.editing.images import LoadedFile, aspect_remark, decision, fit_mask, read_image, read_mask
from pbe.editing.settings import MAX_SEED, EditCommand
from pbe.errors import EditValueError, UserError
from pbe.mask_reading import BY_LUMINANCE

FILE_KEYS = ("image", "mask", "exemplar")
LONGEST_SIDE = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}  # of an image in such a file, in pixels
MAX_NAME = 200  # leaves room for the seed and the ending within the 255 bytes of a file name
MANY = 50  # from this many jobs on, reading the files takes a bar of its own
KEPT_BYTES = 2**30  # of pixels; the files of jobs beyond are checked and read again in their turn


@dataclass(frozen=True)
class Job:
    """One image to edit, once or several times.

    Attributes:
        image: path of the image.
        mask: path of the mask.
        exemplar: path of the exemplar.
        name: stem of the output files.
        seed: of the first edit; edit k has ``seed + k``.
        origin: prefix of errors: ``pairs.jsonl line 3: `` or nothing.
    """

    image: Path
    mask: Path
    exemplar: Path
    name: str
    seed: int
    origin: str = ""


@dataclass
class LoadedJob:
    """A job with its files read, the mask at the image's size; ``remarks`` on the mask have kinds as keys."""

    job: Job
    image: LoadedFile
    mask: LoadedFile
    exemplar: LoadedFile
    remarks: dict[str, str] = field(default_factory=dict)
    edits: list[Image.Image] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        height, width = self.image.pixels.shape[:2]
        return height, width


def load_job(job: Job) -> LoadedJob:
    """Read every file of a job; an error names the job."""
    try:
        image, mask = read_image(job.image), read_mask(job.mask)
        size = image.pixels.shape[:2]
        remarks = {}
        if mask.read_by != BY_LUMINANCE:
            remarks[mask.read_by] = f"mask '{job.mask}': {decision(mask.pixels, mask.read_by)}"
        if stretched := aspect_remark(mask.pixels.shape, size):
            remarks["aspect"] = f"mask '{job.mask}': {stretched}"
        mask = replace(mask, pixels=fit_mask(mask.pixels, (size[0], size[1])))
        return LoadedJob(job, image, mask, read_image(job.exemplar, "exemplar"), remarks)
    except UserError as error:
        raise UserError(f"{job.origin}{error}") from error


@dataclass
class CheckedJob:
    """A job whose files can be used, with the image's size and, where they are kept until then, the files."""

    job: Job
    size: tuple[int, int]
    loaded: LoadedJob | None

    def take(self) -> LoadedJob:
        """Return the files, and let go of them."""
        loaded, self.loaded = self.loaded, None
        return loaded or load_job(self.job)


def check_files(jobs: list[Job], *, quiet: bool = True) -> list[CheckedJob]:
    """Read the files of all jobs, and print on stderr what was decided about the masks, each kind once."""
    checked, kept = [], 0
    kinds: dict[str, list[str]] = {}
    for job in tqdm(jobs, "checking files", leave=False, disable=quiet or len(jobs) < MANY):
        loaded = load_job(job)
        for kind, remark in loaded.remarks.items():
            kinds.setdefault(kind, []).append(f"{job.origin}{remark}")
        kept += sum(getattr(loaded, key).pixels.nbytes for key in FILE_KEYS)
        checked.append(CheckedJob(job, loaded.size, loaded if kept <= KEPT_BYTES else None))
    for remarks in kinds.values():
        more = f" (and {len(remarks) - 1} more like it)" if len(remarks) > 1 else ""
        print(f"{remarks[0]}{more}", file=sys.stderr)
    return checked


def single_job(command: EditCommand) -> Job:
    """Return the job of ``--image``, ``--mask`` and ``--exemplar``, which has the image's name by default."""
    files = {key: getattr(command, key) for key in FILE_KEYS}
    if missing := [f"--{key}" for key, file in files.items() if file is None]:
        raise UserError(f"{', '.join(missing)} missing: give --image, --mask and --exemplar, or --pairs")
    paths: dict[str, Any] = {key: Path(file) for key, file in files.items()}
    name = paths["image"].stem if command.name is None else command.name
    check_name(name)
    return Job(**paths, name=name, seed=command.seed)


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
    taken = set()
    for job in jobs:
        if job.seed + num_images - 1 > MAX_SEED:
            raise UserError(f"{job.origin}seed {job.seed} is too large for {num_images} images")
        for stem in (output_stem(job, index) for index in range(num_images)):
            if stem in taken:
                raise UserError(f"{job.origin}'{stem}' is already the output of another edit; name one anew")
            taken.add(stem)
            for file in (folder / f"{stem}.png", folder / f"{stem}_grid.png"):
                if str(file) in inputs:
                    raise UserError(f"{job.origin}the output would replace its input '{file}'; change --out")


def output_folder(command: EditCommand, jobs: list[Job]) -> Path:
    """Return the folder that the edits go to, once it is sure that they can be written there."""
    if (command.out is None) == (command.output is None):
        raise UserError("give --out (a folder) or --output (the file of a single edit), and only one of them")
    if command.out is not None:
        check_outputs(jobs, command.num_images, Path(command.out))
        return Path(command.out)
    target = Path(str(command.output))
    if command.pairs is not None or command.num_images > 1:
        raise UserError("--output is the file of a single edit; --pairs and --num-images need --out")
    if target.suffix.lower() not in FORMATS:
        raise UserError(f"--output '{target}' must end in one of {', '.join(FORMATS)}")
    inputs = [getattr(job, key) for job in jobs for key in FILE_KEYS]
    if os.path.realpath(target) in [os.path.realpath(each) for each in inputs]:
        raise UserError(f"the output would replace its input '{target}'; change --output")
    return target.parent


def check_format(command: EditCommand, size: tuple[int, int]) -> None:
    """Check that an edit of an image of this size (height, width) fits into the format of ``--output``."""
    if command.output is None:
        return
    target = Path(command.output)
    if command.region == "full":
        size = (command.height or size[0], command.width or size[1])
    longest = LONGEST_SIDE.get(target.suffix.lower())
    if longest is not None and max(size) > longest:
        raise UserError(
            f"--output '{target}': the edit has {size[1]}x{size[0]} pixels, a {target.suffix} file at most "
            f"{longest} a side; take another ending"
        )
