"""``pbe benchmark build``: make a benchmark, or check one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from pbe.cli.arguments import Natural, Place, options
from pbe.cli.prepare import read_noted
from pbe.errors import UserError

if TYPE_CHECKING:
    from pbe.data.sources.annotations import Annotations

MAKING = frozenset({"out", "cases", "seed", "size"})
# Which options go with each of the three things to do.
OPTIONS = {
    "check": {"size"},
    "toy": MAKING | {"world"},
    "sources": MAKING | {"exemplars", "validation_share", "sources_split", "exemplars_split"},
}


@options
class BuildSettings:
    """Options of ``pbe benchmark build``."""

    check: Path | None = None
    """only check the benchmark in this folder and list what is wrong with it"""
    toy: bool = False
    """write the toy world's benchmark"""
    sources: Place | None = None
    """KIND:PATH[@IMAGES]: images to edit, as for pbe prepare"""
    exemplars: Place | None = None
    """KIND:PATH[@IMAGES]: images to take exemplars from (default: other images of --sources)"""
    validation_share: float | None = None
    """use only the images of --sources that pbe prepare holds out with this share"""
    sources_split: str | None = None
    """open-images, yolo: split to read for --sources (default: validation)"""
    exemplars_split: str | None = None
    """the same for --exemplars (default: train)"""
    out: Path | None = None
    """new folder for the benchmark"""
    cases: str | None = None
    """number of cases, or all (default: 3500 with --exemplars, else all)"""
    seed: int | None = None
    """seed of every random choice (default: 0)"""
    size: Natural | None = None
    """side of the images in pixels (default 512, with --toy 64); with --check 0 allows any"""
    world: Path | None = None
    """with --toy: the toy world's archive"""


def build(*, settings: BuildSettings = BuildSettings()) -> None:
    """Build a benchmark folder from annotated images or the toy world, or check one.

    pbe benchmark build --sources coco:val.json@val2017 --exemplars coco:train.json@train2017 --cases 3500
    --out data/test_bench
    pbe benchmark build --sources coco:mine.json@images --validation-share 0.1 --out data/my_bench
    pbe benchmark build --toy --out outputs/toy_bench
    pbe benchmark build --check data/test_bench
    """
    values = {each.name: getattr(settings, each.name) for each in fields(settings)}
    given = {name for name, value in values.items() if value is not None and value is not False}
    what = next((name for name in OPTIONS if name in given), None)
    if what is None or (what != "check" and not settings.out):
        raise UserError("give --sources and --out; or --toy and --out; or --check FOLDER")
    strange = sorted(given - OPTIONS[what] - {what})
    if strange:
        raise UserError(f"--{strange[0].replace('_', '-')} does not go with --{what}; leave it out")
    cases = None if settings.cases is None else parse_cases(settings.cases)
    if settings.check:
        check(settings)
    elif settings.toy:
        export_toy(settings, cases or 0)
    else:
        build_from_sources(settings, cases)


def parse_cases(text: str) -> int:
    """Read a number of cases; 0 stands for all."""
    if text == "all":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--cases is '{text}': it must be at least 1, or all")
    return int(text)


def check(settings: BuildSettings) -> None:
    """List what is wrong with a benchmark."""
    from pbe.evaluation.benchmark.coco_ee import SIZE, read_benchmark

    assert settings.check is not None
    size = SIZE if settings.size is None else settings.size
    count = len(read_benchmark(settings.check, pixels=True, size=size))
    print(f"{count} cases, all whole: {settings.check}")


def build_from_sources(settings: BuildSettings, cases: int | None) -> None:
    """Build a benchmark from annotated images."""
    share = settings.validation_share
    if share is not None and not 0 < share < 1:
        raise UserError("--validation-share must lie between 0 and 1, as 0.05 does")
    if settings.exemplars_split and not settings.exemplars:
        raise UserError("--exemplars-split goes with --exemplars only")
    from pbe.evaluation.benchmark import build as building
    from pbe.evaluation.benchmark.coco_ee import SIZE

    assert settings.sources is not None
    assert settings.out is not None
    if cases is None:
        cases = building.BuildSettings().cases if settings.exemplars else 0
    size = SIZE if settings.size is None else settings.size
    chosen = building.BuildSettings(cases, settings.seed or 0, size)
    sources = _read(settings.sources, settings.sources_split or "validation")
    exemplars = _read(settings.exemplars, settings.exemplars_split or "train") if settings.exemplars else None
    count = building.build_benchmark(sources, exemplars, settings.out, chosen, share or 0.0)
    print(f"{count} cases: {settings.out}")


def _read(source: str, split: str) -> Annotations:
    from pbe.data.sources import SourceOptions

    return read_noted(source, SourceOptions(split))


def export_toy(settings: BuildSettings, cases: int) -> None:
    """Write the toy benchmark as files."""
    from pbe.data.toy.scenes import DEFAULT_WORLD, ToyWorld
    from pbe.evaluation.benchmark.toy import IMAGE_SIZE, export_toy_benchmark

    assert settings.out is not None
    size = IMAGE_SIZE if settings.size is None else settings.size
    world = ToyWorld(settings.world or DEFAULT_WORLD)
    count = export_toy_benchmark(world, settings.out, settings.seed or 0, image_size=size, objects=cases)
    print(f"{count} cases: {settings.out}")
