"""``pbe prepare``: pack annotated images into shards."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pbe.cli.arguments import Natural, Place, Repeatable, options, parse_part
from pbe.errors import UserError

if TYPE_CHECKING:
    from pbe.data.packing.pack import PackRequest, PackResult
    from pbe.data.packing.plan import PackSettings
    from pbe.data.sources import SourceOptions
    from pbe.data.sources.annotations import Annotations

# The kinds of sources that an option is for.
SOURCE_OPTIONS = {
    "split": ("open-images", "yolo"),
    "masks": ("coco",),
    "zero_based": ("voc",),
    "relative": ("csv",),
}


@options
class PrepareSettings:
    """Options of ``pbe prepare``."""

    split: str = field(default="", metadata={"group": "Reading the sources"})
    """open-images, yolo: which split to read: train, validation or test (default: train)"""
    masks: bool = False
    """coco: read the segmentations; boxes are made from them"""
    zero_based: bool = False
    """voc: pixels are counted from 0, not 1"""
    relative: bool = False
    """csv: coordinates are shares of width and height, not pixels"""
    exif_frame: Literal["displayed", "stored"] = "displayed"
    """what boxes refer to if the sizes do not tell: the image with its EXIF orientation, or as stored"""
    min_area: float = field(default=0.02, metadata={"group": "Boxes to keep"})
    """smallest share of the image that a box may cover"""
    max_area: float = 0.8
    """largest share of the image that a box may cover"""
    min_side: float = 2.0
    """shortest side that a box may have, pixels"""
    max_aspect: float = 0.0
    """largest ratio of a box's sides; 0: no limit"""
    drop_flag: Repeatable = field(default_factory=list)
    """drop boxes with this flag, such as is_group_of or is_difficult; repeatable (docs/data.md lists them)"""
    label: Repeatable = field(default_factory=list)
    """keep only boxes of this label; repeatable"""
    drop_label: Repeatable = field(default_factory=list)
    """drop boxes of this label; repeatable"""
    out: Path = field(metadata={"group": "Shards"})
    """folder for the shards and the report"""
    shard_images: int = 2000
    """largest number of images per shard"""
    shard_mb: int = 512
    """size in MiB after which a new shard begins"""
    max_side: int = 0
    """reduce images whose longer side exceeds this many pixels; 0: keep every file"""
    quality: int = 95
    """quality of JPEGs that are encoded again"""
    validation_share: float | None = None
    """hold out this share of the images: --out gets train/ and validation/"""
    shuffle: int | None = None
    """seed: pack in a random order (default: the source's order)"""
    no_perceptual: bool = field(default=False, metadata={"group": "Copies"})
    """do not look for near duplicates, which takes decoding"""
    check_against: Path | None = None
    """folder of benchmark images to look for in the data"""
    workers: Natural | None = field(default=None, metadata={"group": "Running"})
    """number of processes (default: one per core; 0: none beside this one)"""
    engine: Literal["local", "ray"] = "local"
    """run processes here, or tasks on a Ray cluster"""
    part: str = ""
    """I/N: pack only part I (from 0) of N; several machines share the work"""
    overwrite: bool = False
    """remove what an earlier run left in --out"""


def prepare(*sources: Place, settings: PrepareSettings) -> None:
    """Pack annotated images into shards for training, with a report of what was kept and why.

    pbe prepare csv:boxes.csv@images --out data/mine --validation-share 0.05
    pbe prepare coco:instances_train2017.json@train2017 --out data/coco
    pbe prepare open-images:open-images --out data/open_images/train

    If it is stopped or killed, the same command resumes. See docs/data.md.

    Args:
        sources: KIND:PATH or KIND:PATH@IMAGES, one or several; KIND is csv, masks, coco, voc, yolo or
            open-images
    """
    if not sources:
        raise UserError("name a source, KIND:PATH (--help lists the options)")
    from pbe.data.packing.pack import pack_all
    from pbe.data.packing.report import make_report, write_report

    requests = make_requests(sources, settings)
    train = requests[0].out if len(requests) > 1 else None
    notes: list[str] = []

    def finish(request: PackRequest, result: PackResult) -> None:
        others = train if request.out != train else None
        report = make_report(request, result, settings.check_against, others)
        write_report(report, request.out)
        notes.extend(note_copies(report["also_in_train"]))

    part = parse_part(settings.part or "0/1", "--part")
    if settings.part and part[1] == 1:
        raise UserError("--part 0/1 is everything: leave it out")
    with progress_bar() as progress:
        results = pack_all(
            requests,
            engine=settings.engine,
            workers=settings.workers,
            part=part,
            overwrite=settings.overwrite,
            progress=progress,
            finish=finish,
        )
    for request, result in zip(requests, results, strict=True):
        print(outcome(request, result, part))
    print(*notes, sep="\n", end="\n" if notes else "")


def pack_settings(settings: PrepareSettings) -> PackSettings:
    """Return what is kept and how it is packed."""
    from pbe.data.packing.plan import PackSettings

    return PackSettings(
        min_area=settings.min_area,
        max_area=settings.max_area,
        min_side=settings.min_side,
        max_aspect=settings.max_aspect,
        drop_flags=tuple(settings.drop_flag),
        labels=tuple(settings.label),
        drop_labels=tuple(settings.drop_label),
        shard_pictures=settings.shard_images,
        shard_bytes=settings.shard_mb << 20,
        max_side=settings.max_side,
        quality=settings.quality,
        exif_frame=settings.exif_frame,
        shuffle=settings.shuffle,
        perceptual=not settings.no_perceptual,
        validation_share=settings.validation_share or 0.0,
    )


def check_settings(sources: Sequence[str], settings: PrepareSettings) -> None:
    """Check what needs no source to be read."""
    from pbe.data.sources import parse_source
    from pbe.data.sources.annotations import find_images

    kinds = {parse_source(source)[0] for source in sources}
    for name, fitting in SOURCE_OPTIONS.items():
        if getattr(settings, name) and not kinds & set(fitting):
            one = " or ".join(fitting)
            raise UserError(f"--{name.replace('_', '-')} goes with a source of the kind {one} only")
    if settings.validation_share is not None and not 0 < settings.validation_share < 1:
        raise UserError("--validation-share must lie between 0 and 1, as 0.05 does")
    if settings.check_against:
        if not settings.check_against.is_dir():
            raise UserError(f"--check-against '{settings.check_against}' is not a folder")
        if not find_images([settings.check_against])[0].height:
            raise UserError(f"--check-against '{settings.check_against}' holds no images")


def make_requests(sources: Sequence[str], settings: PrepareSettings) -> list[PackRequest]:
    """Return what is to be packed: one set, or the two sides of a split."""
    from pbe.data.packing.pack import PackRequest
    from pbe.data.packing.plan import SIDES
    from pbe.data.sources import SourceOptions

    check_settings(sources, settings)
    reading = SourceOptions(settings.split or "train", settings.masks, settings.zero_based, settings.relative)
    whole = PackRequest(
        sources=lambda: [read_noted(source, reading) for source in sources],
        description=[*sources, str(reading)],
        settings=pack_settings(settings),
        out=settings.out,
    )
    if settings.validation_share is None:
        return [whole]
    sides = ((side, replace(whole.settings, side=side)) for side in SIDES)
    return [replace(whole, settings=each, out=settings.out / side) for side, each in sides]


def read_noted(source: str, reading: SourceOptions) -> Annotations:
    """Read a source, and print on stderr what was noticed about it."""
    from pbe.data.sources import read_source

    found = read_source(source, reading)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    return found


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int], Callable[[int], object]]]:
    """Give a function that starts a bar of so many images (-1: unknown) and returns its step."""
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:

        def start(total: int) -> Callable[[int], object]:
            stack.close()  # the bar of the set before
            bar = stack.enter_context(tqdm(total=None if total < 0 else total, unit="image", desc="pack"))
            return bar.update

        yield start


def note_copies(shared: dict[str, int] | None) -> list[str]:
    """Return a line where images of the validation set lie in the training set too, under other names."""
    if not shared or not shared["exact"] + shared["near"]:
        return []
    same, alike = (f"{shared[kind]} images of the validation set" for kind in ("exact", "near"))
    return [f"note: {same} are copies of training images, {alike} look like one; the report names them"]


def outcome(request: PackRequest, result: PackResult | None, part: Sequence[int]) -> str:
    """Return the closing line."""
    from pbe.data.packing.report import HTML_NAME

    if result is not None:
        summary = result.summary
        kept = f"{summary['pictures']} of {result.plan['pictures_seen']} images, {summary['boxes']} boxes"
        return f"{kept} in {len(summary['shards'])} shards; report: {request.out / HTML_NAME}"
    if part[1] > 1:
        return f"part {part[0]} of {part[1]} is packed; the same command without --part completes the set"
    return f"'{request.out}' is complete already; --overwrite packs it again"
