"""An evaluation on a benchmark's folder: generate or take edits, score them, write scores and page."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pbe.editing.batch.records import versions, write_json
from pbe.errors import UserError
from pbe.evaluation.benchmark import page
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.benchmark.edits import SETTINGS, EditFolder, read_settings, read_times, timed
from pbe.evaluation.benchmark.generation import GenerateSettings, at_scales, generate, is_first_process
from pbe.evaluation.benchmark.page import PageSettings, ScoredEdits
from pbe.evaluation.metrics.scoring import ScoreSettings, check_tools, score
from pbe.files import make_folder, write_output
from pbe.html import render_page, write_html

TITLE = "Evaluation of edits"


@dataclass
class BenchmarkRun:
    """One evaluation: sets of edits of one benchmark with their scores, in the folder ``out``.

    Sets are compared with the true images, or with the real ones of the folder ``reference``. ``seconds`` is
    the wall time by stage, of generating over all runs that made the images.
    """

    benchmark: BenchmarkFolder
    out: Path
    settings: ScoreSettings
    reference: Path | None = None
    page: PageSettings = field(default_factory=PageSettings)
    edits: list[tuple[str, EditFolder]] = field(default_factory=list)
    scored: list[ScoredEdits] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"generate": 0.0, "score": 0.0})

    def check(self) -> None:
        """Try everything that is needed after the edits are made, before any time is spent on making them."""
        make_folder(self.out)
        names = check_tools(self.settings, self.reference)
        if self.page.rank_by and self.page.rank_by not in names:
            raise UserError(f"edits cannot be ranked by '{self.page.rank_by}'; there are: {', '.join(names)}")

    def generate(self, model: str | Path, scales: Sequence[float], settings: GenerateSettings) -> bool:
        """Generate the edits of a model at each guidance scale, into ``edits/guidance_*`` of the folder.

        They come before all sets that were taken. Returns False in all processes but the first, which are to
        end here.
        """
        labels = [f"guidance {scale:g}" for scale in scales]
        folders = [self.out / "edits" / f"guidance_{scale:g}" for scale in scales]
        every = at_scales(settings, scales)
        for label in labels:
            self._refuse_twice(label)
        for folder, one in zip(folders, every, strict=True):
            with timed(folder, note=is_first_process()):
                generate(model, self.benchmark, folder, one)
        if not is_first_process():
            return False
        times = read_times(self.out / "edits")
        self.seconds["generate"] = sum(times.get(folder.name, 0.0) for folder in folders)
        others, self.edits = self.edits, []
        for label, folder in zip(labels, folders, strict=True):
            self.take(folder, label)
        self.edits += others
        return True

    def _refuse_twice(self, label: str) -> None:
        if label in [each for each, _ in self.edits]:
            raise UserError(f"two sets of edits are called '{label}'; name them as in NAME=DIR")

    def take(self, folder: Path, label: str) -> None:
        """Take a folder of finished edits."""
        self._refuse_twice(label)
        noted = read_settings(folder).get("benchmark", self.benchmark.sha256)
        if noted != self.benchmark.sha256 and noted != self.benchmark.whole_sha256:
            raise UserError(f"'{folder}' holds edits of another benchmark, says its {SETTINGS}")
        self.edits.append((label, EditFolder(folder, self.benchmark)))

    def score(self) -> None:
        """Score all sets of edits."""
        started = time.perf_counter()
        for label, edits in self.edits:
            with tqdm(total=len(edits), desc=f"score {label}", unit="edit") as bar:
                made = score(
                    self.benchmark,
                    edits,
                    self.settings,
                    self.reference,
                    lambda done, _total, bar=bar: bar.update(done - bar.n),  # type: ignore[misc]
                    edits.why_not,
                )
            page.ranking_score(made, self.page.rank_by)
            self.scored.append(ScoredEdits(label, made))
            if line := page.exclusions(edits):
                print(f"left out: {line}", file=sys.stderr)
        self.seconds["score"] = time.perf_counter() - started

    def write(self) -> str:
        """Write ``scores.json``, ``scores.md`` and ``index.html``; return the tables as Markdown."""
        made = page.score_tables(self.scored, coco_ee=self._coco_ee())
        made += page.paired_tables(self.scored, self.settings.bootstrap)
        write_json(self.out / "scores.json", self.to_dict())
        write_output(self.out / "scores.md", page.markdown_page(TITLE, made, self.scored))
        sets = list(zip(self.scored, (edits for _, edits in self.edits), strict=True))
        html = render_page(
            page.TEMPLATE,
            title=TITLE,
            lead=page.describe(self.benchmark),
            tables=made,
            sections=[page.show_edits(scored, edits, self.page) for scored, edits in sets],
            cards=page.cards_of(self.scored),
            facts=self._facts(),
            warnings=[line for _, edits in sets if (line := page.exclusions(edits))],
        )
        write_html(html, self.out / "index.html")
        return page.markdown_page(TITLE, made)

    def _facts(self) -> list[tuple[str, str]]:
        facts = [("benchmark, SHA-256", self.benchmark.sha256)]
        for label, edits in self.edits:
            noted = read_settings(edits.folder).get("settings", {})
            how = ", ".join(f"{name} {value}" for name, value in noted.items())
            facts.append((label, f"{edits.folder}{f': {how}' if how else ''}"))
        return [*facts, *versions().items()]

    def to_dict(self) -> dict[str, Any]:
        """Return what ``scores.json`` holds."""
        sets = [
            {
                "label": label,
                "folder": str(edits.folder),
                "origin": read_settings(edits.folder),
                "left_out": edits.left_out,
                "files_of_no_case": edits.extra,
                "scores": [one.to_dict() for one in scored.scores],
            }
            for (label, edits), scored in zip(self.edits, self.scored, strict=True)
        ]
        return {
            "format": "pbe-scores-1",
            "benchmark": {
                "folder": str(self.benchmark.folder),
                "sha256": self.benchmark.sha256,
                "cases": len(self.benchmark),
                "ids": self.benchmark.ids,
            },
            "edits": sets,
            "published": self._published(),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "versions": versions(),
        }

    def _coco_ee(self) -> bool:
        return page.is_coco_ee([int(each) for each in self.benchmark.ids])

    def _published(self) -> dict[str, Any] | None:
        """Return the paper's numbers for scores of COCOEE; None of any other benchmark."""
        if not self._coco_ee():
            return None
        by_score = zip(*(run.scores for run in self.scored), strict=True)
        numbers = {each[0].name: number for each in by_score if (number := page.published_number(each))}
        return {"method": page.OURS, "numbers": numbers, "note": page.PUBLISHED_NOTE}
