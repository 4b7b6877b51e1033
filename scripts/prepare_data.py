"""Pack annotated pictures into shards, with an index and a report of what was kept and why.

    python scripts/prepare_data.py open-images:/data/open-images --out /data/shards/train
    python scripts/prepare_data.py coco:instances_train2017.json@train2017 --out /data/shards/coco
    python scripts/prepare_data.py csv:boxes.csv@pictures --out /data/shards/mine

SOURCE is KIND:PATH or KIND:PATH@PICTURES; several are packed together. Killed at any moment, the same
command goes on where it was; the shards are the same to the byte. docs/data.md says more.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from pbe.cli.parser import Parser, run_command
from pbe.data.packing.pack import ENGINES, PackResult, pack_all
from pbe.data.packing.plan import FRAMES, SIDES, PackSettings
from pbe.data.packing.report import HTML_NAME, make_report, write_report
from pbe.data.packing.request import PackRequest
from pbe.data.sources.annotations import FLAGS, Annotations, find_images
from pbe.data.sources.open_images import SPLITS
from pbe.data.sources.read import KINDS, SourceOptions, parse_source, read_source
from pbe.errors import UserError

SOURCE_OPTIONS = {
    "split": ("open-images", "yolo"),
    "masks": ("coco",),
    "zero_based": ("voc",),
    "relative": ("csv",),
}


def _add_source_options(parser: Parser) -> None:
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help=f"KIND:PATH[@PICTURES]; {', '.join(KINDS)}"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards and the report")
    parser.add_argument(
        "--split", help=f"of Open Images, or of a YOLO set of splits: {', '.join(SPLITS)} (train)"
    )
    parser.add_argument("--masks", action="store_true", help="coco: take segmentations; they give the boxes")
    parser.add_argument("--zero-based", action="store_true", help="voc: the first pixel is 0, not 1")
    parser.add_argument("--relative", action="store_true", help="csv: numbers are shares of width and height")


def _add_filter_options(parser: Parser, default: PackSettings) -> None:
    parser.add_argument(
        "--min-area", type=float, default=default.min_area, help="smallest share of the picture"
    )
    parser.add_argument(
        "--max-area", type=float, default=default.max_area, help="largest share of the picture"
    )
    parser.add_argument(
        "--min-side", type=float, default=default.min_side, help="shortest side of a box, pixels"
    )
    parser.add_argument(
        "--max-aspect", type=float, default=0.0, help="longest side over shortest; 0: no limit"
    )
    parser.add_argument(
        "--drop-flag", action="append", default=[], help=f"drop such boxes: {', '.join(FLAGS)}"
    )
    parser.add_argument(
        "--label", action="append", default=[], help="keep only boxes of this label; repeatable"
    )
    parser.add_argument(
        "--drop-label", action="append", default=[], help="drop boxes of this label; repeatable"
    )
    parser.add_argument(
        "--exif-frame", default=default.exif_frame, help=f"of doubtful boxes: {', '.join(FRAMES)}"
    )


def _add_packing_options(parser: Parser, default: PackSettings) -> None:
    parser.add_argument(
        "--shard-pictures", type=int, default=default.shard_pictures, help="most pictures a shard"
    )
    parser.add_argument(
        "--shard-mb", type=int, default=default.shard_bytes >> 20, help="MiB that close a shard"
    )
    parser.add_argument(
        "--max-side", type=int, default=0, help="encode longer pictures again; 0: keep every file"
    )
    parser.add_argument("--quality", type=int, default=default.quality, help="of JPEGs encoded again")
    parser.add_argument(
        "--validation-share", type=float, metavar="SHARE",
        help="hold this share of the images out, by a hash of the name; --out gets train/ and validation/",
    )  # fmt: skip
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="pack in a random order")
    parser.add_argument(
        "--no-perceptual", action="store_true", help="no hashes for near duplicates, no decoding"
    )
    parser.add_argument(
        "--check-against", type=Path, help="folder of benchmark pictures to look for in the set"
    )
    parser.add_argument("--workers", type=int, help="processes; default one a core, 0 packs in this one")
    parser.add_argument("--engine", default="local", help=f"{', '.join(ENGINES)}")
    parser.add_argument(
        "--part", default="", metavar="I/N", help="pack every N-th shard from the I-th (from 0) on"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="remove what an earlier packing left in --out"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; see ``--help``."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = PackSettings()
    _add_source_options(parser)
    _add_filter_options(parser, default)
    _add_packing_options(parser, default)
    return parser.parse_args(arguments)


def make_settings(options: argparse.Namespace) -> PackSettings:
    """Return what is kept and how it is packed."""
    return PackSettings(
        min_area=options.min_area,
        max_area=options.max_area,
        min_side=options.min_side,
        max_aspect=options.max_aspect,
        drop_flags=tuple(options.drop_flag),
        labels=tuple(options.label),
        drop_labels=tuple(options.drop_label),
        shard_pictures=options.shard_pictures,
        shard_bytes=options.shard_mb << 20,
        max_side=options.max_side,
        quality=options.quality,
        exif_frame=options.exif_frame,
        shuffle=options.shuffle,
        perceptual=not options.no_perceptual,
        validation_share=options.validation_share or 0.0,
    )


def parse_part(text: str) -> tuple[int, int]:
    """Return (i, n) of ``I/N``; (0, 1) for an empty text.

    Raises:
        UserError: it is not of this form.
    """
    if not text:
        return 0, 1
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--part '{text}' is not I/N with I from 0 to N - 1")
    if int(count) == 1:
        raise UserError("--part 0/1 is everything: leave it out")
    return int(number), int(count)


def _read(source: str, reading: SourceOptions) -> Annotations:
    found = read_source(source, reading)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    return found


def check_options(options: argparse.Namespace) -> None:
    """Check what needs no source to be read.

    Raises:
        UserError: an option makes no sense, or would be ignored.
    """
    kinds = {parse_source(source)[0] for source in options.sources}
    for name, fitting in SOURCE_OPTIONS.items():
        if getattr(options, name) and not kinds & set(fitting):
            one = " or ".join(fitting)
            raise UserError(f"--{name.replace('_', '-')} goes with a source of the kind {one} only")
    if options.engine not in ENGINES:
        raise UserError(f"--engine is '{options.engine}'; it must be one of {', '.join(ENGINES)}")
    if options.workers is not None and options.workers < 0:
        raise UserError("--workers must be 0 or more")
    if options.validation_share is not None and not 0 < options.validation_share < 1:
        raise UserError("--validation-share must lie between 0 and 1, as 0.05 does")
    if options.check_against:
        if not options.check_against.is_dir():
            raise UserError(f"--check-against '{options.check_against}' is not a folder")
        if not find_images([options.check_against])[0].height:
            raise UserError(f"--check-against '{options.check_against}' holds no images")


def make_requests(options: argparse.Namespace) -> list[PackRequest]:
    """Return what is to be packed: one set, or the two sides of a split.

    Raises:
        UserError: for an option that makes no sense.
    """
    check_options(options)
    reading = SourceOptions(options.split or "train", options.masks, options.zero_based, options.relative)
    whole = PackRequest(
        sources=lambda: [_read(source, reading) for source in options.sources],
        description=[*options.sources, str(reading)],
        settings=make_settings(options),
        out=options.out,
    )
    if options.validation_share is None:
        return [whole]
    sides = ((side, replace(whole.settings, side=side)) for side in SIDES)
    return [replace(whole, settings=settings, out=options.out / side) for side, settings in sides]


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int], Callable[[int], object]]]:
    """Give a function that starts a bar of so many pictures (-1: unknown) and returns its step."""
    with contextlib.ExitStack() as stack:

        def start(total: int) -> Callable[[int], object]:
            stack.close()  # the bar of the set before
            bar = stack.enter_context(tqdm(total=None if total < 0 else total, unit="picture", desc="pack"))
            return bar.update

        yield start


def run(options: argparse.Namespace) -> None:
    """Pack, write the report and say what came out."""
    requests = make_requests(options)
    train = requests[0].out if len(requests) > 1 else None
    notes: list[str] = []

    def finish(request: PackRequest, result: PackResult) -> None:
        others = train if request.out != train else None
        report = make_report(request, result, options.check_against, others)
        write_report(report, request.out)
        notes.extend(note_copies(report["also_in_train"]))

    part = parse_part(options.part)
    with progress_bar() as progress:
        results = pack_all(
            requests,
            engine=options.engine,
            workers=options.workers,
            part=part,
            overwrite=options.overwrite,
            progress=progress,
            finish=finish,
        )
    for request, result in zip(requests, results, strict=True):
        print(outcome(request, result, part))
    print(*notes, sep="\n", end="\n" if notes else "")


def note_copies(shared: dict[str, int] | None) -> list[str]:
    """Return a line where images of the validation set lie in the training set too, under other names."""
    if not shared or not shared["exact"] + shared["near"]:
        return []
    same, alike = (f"{shared[kind]} images of the validation set" for kind in ("exact", "near"))
    return [f"note: {same} are copies of training images, {alike} look like one; the report names them"]


def outcome(request: PackRequest, result: PackResult | None, part: Sequence[int]) -> str:
    """Return the closing line."""
    if result is not None:
        summary = result.summary
        kept = f"{summary['pictures']} of {result.plan['pictures_seen']} pictures, {summary['boxes']} boxes"
        return f"{kept} in {len(summary['shards'])} shards; report: {request.out / HTML_NAME}"
    if part[1] > 1:
        return f"part {part[0]} of {part[1]} is packed; the same command without --part completes the set"
    return f"'{request.out}' is complete already; --overwrite packs it again"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a mistake of the user's."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
