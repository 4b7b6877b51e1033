"""Tables, config differences and the page of an ablation, from scores that are made up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from pbe.data.toy.scenes import ToyWorld
from pbe.errors import UserError
from pbe.evaluation.ablation import measuring
from pbe.evaluation.ablation.config import STAGE_FOLDERS, Ablation, load_ablation
from pbe.evaluation.ablation.measuring import FROM_OUTSIDE
from pbe.evaluation.ablation.plan import Plan, make_plan
from pbe.evaluation.ablation.report import escape, latex, markdown, number, score_table, write_report
from pbe.evaluation.ablation.results import compare, estimate_of, gather
from pbe.evaluation.ablation.stages import write_json
from pbe.evaluation.benchmark.toy import export_toy_benchmark
from pbe.evaluation.metrics.base import Score, ScoreCard, not_run
from pbe.evaluation.metrics.bootstrap import Estimate
from pbe.evaluation.report import Table

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
CASES = 6


def made_up(name: str, family: str, values: np.ndarray, better: str = "lower") -> Score:
    return Score(name, family, float(values.mean()), 0.0, 1.0, ScoreCard(), values, better)  # type: ignore[arg-type]


@pytest.fixture
def ablation(tmp_path: Path) -> tuple[Ablation, Plan]:
    """Two rows that differ in one switch, whose stages stand but for the report."""
    content = {
        "base": str(CONFIGS / "toy.yaml"), "workspace": str(tmp_path / "work"), "seeds": [1, 2],
        "cumulative": True, "scenes": {"train": 8, "validation": 2},
        "shared": {"autoencoder_from": str(CONFIGS.parent / "data" / "toy" / "model")},
        "rows": [
            {"name": "a", "title": "row_a & <b>more</b>"},
            {"name": "b", "overrides": {"data.sample.augment.enabled": False}, "sampling": {"steps": 9}},
        ],
        "comparisons": [["a", "b"]],
        "evaluation": {"objects": CASES, "plot_x": "row", "plot_y": "seam", "strip_cases": 3},
    }  # fmt: skip
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    loaded = load_ablation(path)
    plan = make_plan(loaded)
    export_toy_benchmark(ToyWorld(), plan.benchmark, objects=CASES)
    for cell in plan.cells:
        shift = 1.0 if cell.row.name == "b" else 0.0
        cases = np.arange(CASES) * 0.1
        scores = [
            made_up("seam", "clean", cases + shift),
            made_up("copy-paste", "clean", cases + (0.01 if cell.seed == 1 else -0.01) * shift),
            made_up("psnr-outside", "clean", np.full(CASES, math.inf), "higher"),
            Score("toy-fd", "toy", 5.0 + shift, 4.8 + shift, 5.2 + shift, ScoreCard(), None, "lower"),
            not_run("fid", "clean", "lower", "Inception weights are not here"),
        ]
        cell.scores.folder.mkdir(parents=True)
        write_json(cell.scores.folder / "scores.json", [one.to_dict() for one in scores])
        pictures = cell.edits.folder / "pictures"
        pictures.mkdir(parents=True)
        for file in sorted(plan.benchmark.rglob("*_GT.png")):
            cv2.imwrite(str(pictures / file.name.replace("_GT", "")), cv2.imread(str(file)))
    return loaded, plan


def test_orders_are_told_where_they_are_decided(ablation: tuple[Ablation, Plan]) -> None:
    found = {one.metric: one for one in gather(*ablation).differences}
    assert (found["seam"].verdict, found["seam"].value) == ("higher", pytest.approx(1.0))
    assert found["copy-paste"].verdict == "undecided"  # the seeds disagree
    assert found["psnr-outside"].verdict == "undecided"  # equal
    assert (found["toy-fd"].verdict, found["toy-fd"].paired) == ("higher", False)
    assert "fid" not in found


def test_the_report_is_whole(ablation: tuple[Ablation, Plan]) -> None:
    page = write_report(*ablation)
    folder = page.parent
    text, html = (folder / "tables.md").read_text(), page.read_text()
    clean, toy = (text.index(title) for title in ("### The field", "### Scores of the toy world"))
    assert clean < text.index("seam ↓") < toy < text.index("toy-fd ↓")  # families apart
    assert "| b | 1.250 (" in text
    assert "exact" in text
    assert "| undecided |" in text
    assert "b is higher" in text
    assert "Not run: fid (not run: Inception weights are not here)." in text
    assert "- `data.sample.augment.enabled`: true → false" in text
    assert "- `sampling.steps`: 50 → 9" in text
    assert "learning_rate" not in text  # nothing but what is changed
    assert r"row\_a \& \textless{}b\textgreater{}more" in (folder / "tables.tex").read_text()
    assert "row_a &amp; &lt;b&gt;more&lt;/b&gt;" in html
    assert "<b>more" not in html
    assert html.count("data:image/png;base64,") == 2
    assert "http" not in html
    strip = cv2.imread(str(folder / "strip.png"))
    assert strip is not None
    results = json.loads((folder / "results.json").read_text())
    assert results["rows"][1]["scores"]["seam"]["value"] == pytest.approx(1.25)
    assert results["differences"][2]["verdict"] == "undecided"
    json.dumps(results, allow_nan=False)


def test_geometric_means_are_compared_by_logarithms() -> None:
    cases = np.array([1.0, 10.0, 100.0])
    first = Score("seam", "clean", 10.0, 1.0, 100.0, ScoreCard(), cases, "lower")
    second = replace(first, value=20.0, per_case=2.0 * cases)
    scores = {("a", "seam"): [first], ("b", "seam"): [second]}
    found = compare("seam", ("a", "b"), scores, 100, 0.95)
    assert (found.verdict, found.log, found.paired) == ("higher", True, True)
    assert found.value == pytest.approx(math.log(2.0))
    assert estimate_of([second], 100, 0.95).value == pytest.approx(20.0)


def test_rows_that_were_scored_otherwise_are_not_compared(ablation: tuple[Ablation, Plan]) -> None:
    file = ablation[1].cells[0].scores.folder / "scores.json"
    file.write_text(json.dumps(json.loads(file.read_text())[1:]))
    with pytest.raises(UserError, match="not scored alike"):
        gather(*ablation)


@pytest.mark.parametrize("text", [None, "", "[1]", "{}{", '[{"name": "seam"}]', '{"name": 1}'])
def test_scores_that_are_damaged_are_one_line(ablation: tuple[Ablation, Plan], text: str | None) -> None:
    file = ablation[1].cells[0].scores.folder / "scores.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=f"'{file}' is missing or damaged; delete the folder"):
        gather(*ablation)


def test_a_workspace_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for workspace in ("file", "file/work"):
        content = {"base": str(CONFIGS / "toy.yaml"), "workspace": str(tmp_path / workspace)}
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({**content, "rows": [{"name": "a"}]}))
        with pytest.raises(UserError, match=r"workspace .* cannot be made: '.*file' is a file"):
            make_plan(load_ablation(path))


def test_stages_lie_in_the_folders_that_no_ablation_can_be_named_after(
    ablation: tuple[Ablation, Plan],
) -> None:
    folders = {stage.folder.parent.name for stage in ablation[1].stages}
    assert folders <= set(STAGE_FOLDERS)
    assert {"trainings", "edits", "scores", "benchmarks"} <= folders


def test_scores_that_do_not_exist_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    content = {
        "base": str(CONFIGS / "toy.yaml"),
        "workspace": str(tmp_path / "work"),
        "rows": [{"name": "a"}],
    }
    for evaluation, message in (
        ({"metrics": ["seem"]}, "seem"),
        ({"metrics": ["seam"], "plot_y": "colour-inside"}, "'colour-inside', but only seam"),
        ({"metrics": ["seam"], "plot_y": "row"}, "'plot_y' is 'row', but only seam"),
        ({"metrics": ["seam"], "plot_x": "kid"}, "'plot_x' is 'kid'; it must be row, or .*seam"),
    ):
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({**content, "evaluation": evaluation}))
        with pytest.raises(UserError, match=message):
            make_plan(load_ablation(path))
    assert not (tmp_path / "work").exists()


def scores_of(folder: Path, **evaluation: object) -> tuple[str, dict[str, Any]]:
    content = {
        "base": str(CONFIGS / "toy.yaml"), "workspace": str(folder / "work"), "rows": [{"name": "a"}],
        "shared": {"autoencoder_from": str(CONFIGS.parent / "data" / "toy" / "model")},
        "scenes": {"train": 8, "validation": 2}, "evaluation": {"metrics": ["seam"], **evaluation},
    }  # fmt: skip
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    stage = make_plan(load_ablation(path)).cells[0].scores
    return stage.fingerprint, stage.settings


def test_what_scores_need_from_outside_belongs_to_their_mark(tmp_path: Path) -> None:
    plain, job = scores_of(tmp_path)
    assert not set(FROM_OUTSIDE) & set(job)
    assert scores_of(tmp_path, tower_weights={}, mixture="", reference="")[0] == plain
    weights, pictures = tmp_path / "weights.pt", tmp_path / "pictures"
    pictures.mkdir()
    marks = {plain, scores_of(tmp_path, tower_weights={"clip": "openai"})[0]}
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        (pictures / "a.png").write_bytes(content)
        for given in ({"tower_weights": {"dino": str(weights)}}, {"reference": str(pictures)}):
            mark, job = scores_of(tmp_path, **given)
            assert job.items() >= given.items()
            marks.add(mark)
    assert len(marks) == 6
    for given, message in (
        ({"tower_weights": {"clip": str(tmp_path / "none.pt")}}, "for clip; there is no such file"),
        ({"tower_weights": {"dino": "openai"}}, "'openai' for dino; there is no such file"),
        ({"tower_weights": {"clap": str(weights)}}, "no tower 'clap'"),
        ({"mixture": str(tmp_path / "none")}, "no mixture"),
        ({"mixture": str(weights)}, "cannot be read as a mixture"),
        ({"reference": str(tmp_path / "none")}, "is not a folder of images"),
    ):
        with pytest.raises(UserError, match=message):
            scores_of(tmp_path, **given)


def test_what_scores_need_from_outside_reaches_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(measuring, "score", lambda *given, **rest: seen.extend(given[2:]) or [])
    monkeypatch.setattr(measuring, "BenchmarkFolder", lambda folder: SimpleNamespace(ids=[]))
    monkeypatch.setattr(measuring, "read_edits", lambda folder, cases: SimpleNamespace(why_not=None))
    job = {
        "benchmark": "b", "edits": "e", "own_edits": "", "metrics": ["seam"], "exemplar_auc": False,
        "resamples": 7, "level": 0.9,
    }  # fmt: skip
    given = {"tower_weights": {"clip": "file"}, "mixture": "m", "reference": "r"}
    measuring.score_edits(job | given, tmp_path)
    measuring.score_edits(job, tmp_path)
    assert (seen[0].weights, seen[0].mixture, seen[1]) == ({"clip": "file"}, Path("m"), Path("r"))
    assert (seen[2].weights, seen[2].mixture, seen[2].device, seen[3]) == ({}, None, "cpu", None)


def test_markdown_and_latex_escape_what_they_would_read() -> None:
    table = Table(["a|b", "50 %"], [["x_1", "↑ {}"]], "a note & more")
    assert markdown(table) == "| a\\|b | 50 % |\n| --- | --- |\n| x_1 | ↑ {} |\n\na note & more\n"
    made = latex(table)
    assert r"a\textbar{}b & 50 \% \\" in made
    assert r"x\_1 & $\uparrow$ \{\} \\" in made
    column = r"p{\dimexpr\linewidth/2-2\tabcolsep\relax}"
    assert made.startswith(
        "\n".join(
            [
                r"% needs \usepackage{longtable,booktabs}",
                r"\begingroup\footnotesize\setlength{\tabcolsep}{3pt}",
                rf"\begin{{longtable}}{{{column}{column}}}",
                r"\toprule",
            ]
        )
    )
    assert made.endswith("\\end{longtable}\n\\noindent a note \\& more\\par\n\\endgroup\n")
    assert made.index(r"\midrule") < made.index(r"\endhead") < made.index(r"x\_1")
    assert escape("<|>") == r"\textless{}\textbar{}\textgreater{}"
    assert escape("[1]*") == "{[}1]{*}"  # after a line's end they would be an option of it
    assert escape("\\~^#$") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}\#\$"


def test_latex_turns_the_table_of_scores() -> None:
    values = {(row, name): Estimate(1.0, 0.5, 2.0) for row in ("a", "b") for name in ("seam", "kid")}
    table = score_table([("a", "row a"), ("b", "row b")], [("seam", "lower"), ("kid", "lower")], values, "")
    assert markdown(table).startswith("|  | seam ↓ | kid ↓ |\n")
    lines = latex(table, turned=True).splitlines()
    cell = "1.000 (0.500 to 2.000)"
    assert " & row a & row b \\\\" in lines
    assert rf"kid $\downarrow$ & {cell} & {cell} \\" in lines


def test_numbers() -> None:
    values = (1.23456, 123.456, math.inf, math.nan)
    assert [number(value) for value in values] == ["1.235", "123.5", "exact", "not run"]
