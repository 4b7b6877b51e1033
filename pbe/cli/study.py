"""``pbe study``: a human study of edits."""

from __future__ import annotations

from pathlib import Path

from pbe.cli.arguments import options
from pbe.errors import UserError


@options
class MakeSettings:
    """Options of ``pbe study make``."""

    systems: list[str]
    """NAME=FOLDER for each system: its folder of edits"""
    benchmark: Path
    """benchmark folder that was edited"""
    out: Path
    """new folder for page/ and its key"""
    groups: int = 30
    """number of cases to rank"""
    seed: int = 0
    """seed for choosing the cases"""
    title: str = "Which edit is better?"
    """title of the page"""
    copy: bool = False
    """put the images beside the page instead of into it"""


def make(*, settings: MakeSettings) -> None:
    """Write the page on which people rank edits of several systems, and its key.

    pbe study make --systems ours=outputs/ours theirs=results/theirs --benchmark data/bench --out study
    """
    from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
    from pbe.evaluation.study.ranking import KEY, StudySettings, make_study, parse_systems

    chosen = StudySettings(settings.groups, settings.seed, settings.title, settings.copy)
    benchmark = BenchmarkFolder(settings.benchmark)
    page = make_study(parse_systems(settings.systems), benchmark, settings.out, chosen)
    handed = page.parent if settings.copy else page
    print(f"{settings.groups} groups: give {handed} to raters and keep {settings.out / KEY} to yourself")


@options
class TabulateSettings:
    """Options of ``pbe study tabulate``."""

    key: Path
    """key.json of the study"""
    partial: bool = False
    """accept files with groups missing"""
    seed: int = 0
    """seed of the bootstrap"""


def tabulate(*rankings: Path, settings: TabulateSettings) -> None:
    """Print mean ranks, first places, wins and agreement.

    pbe study tabulate --key outputs/study/key.json rankings/*.json

    Args:
        rankings: JSON files that raters sent
    """
    if not rankings:
        raise UserError("name the files that raters sent (--help lists the options)")
    from pbe.evaluation.study.ranking import read_key, read_rankings, study_markdown, summarise

    key = read_key(settings.key)
    ranks = read_rankings(list(rankings), key, partial=settings.partial)
    for question, array in ranks.items():
        print(study_markdown(question, summarise(array, key.systems, settings.seed)))
