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
from pathlib import Path

from tqdm import tqdm

from pbe.cli import Parser, run_command
from pbe.data.packing import ENGINES, PackRequest, PackResult, pack
from pbe.data.packing_plan import FRAMES, PackSettings
from pbe.data.report import HTML_NAME, make_report, write_report
from pbe.data.sources.open_images import SPLITS
from pbe.data.sources.reading import KINDS, SourceOptions, parse_source, read_source
from pbe.data.sources.records import FLAGS, Annotations
from pbe.errors import UserError


def _add_source_options(parser: Parser) -> None:
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help=f"KIND:PATH[@PICTURES]; {', '.join(KINDS)}"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards and the report")
    parser.add_argument("--split", default="train", help=f"of Open Images: {', '.join(SPLITS)}")
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


def make_request(options: argparse.Namespace) -> PackRequest:
    """Return what is to be packed, and check every option.

    Raises:
        UserError: for an option that makes no sense.
    """
    for source in options.sources:
        parse_source(source)
    if options.engine not in ENGINES:
        raise UserError(f"--engine is '{options.engine}'; it must be one of {', '.join(ENGINES)}")
    if options.workers is not None and options.workers < 0:
        raise UserError("--workers must be 0 or more")
    if options.check_against and not options.check_against.is_dir():
        raise UserError(f"--check-against '{options.check_against}' is not a folder")
    reading = SourceOptions(options.split, options.masks, options.zero_based, options.relative)
    return PackRequest(
        sources=lambda: [_read(source, reading) for source in options.sources],
        description=[*options.sources, str(reading)],
        settings=make_settings(options),
        out=options.out,
    )


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int], Callable[[int], object]]]:
    """Give a function that starts a bar of so many pictures (-1: unknown) and returns its step."""
    with contextlib.ExitStack() as stack:

        def start(total: int) -> Callable[[int], object]:
            bar = stack.enter_context(tqdm(total=None if total < 0 else total, unit="picture", desc="pack"))
            return bar.update

        yield start


def run(options: argparse.Namespace) -> None:
    """Pack, write the report and say what came out."""
    request = make_request(options)

    def finish(result: PackResult) -> None:
        write_report(make_report(request, result, options.check_against), request.out)

    part = parse_part(options.part)
    with progress_bar() as progress:
        result = pack(
            request,
            engine=options.engine,
            workers=options.workers,
            part=part,
            overwrite=options.overwrite,
            progress=progress,
            finish=finish,
        )
    print(outcome(request, result, part))


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
