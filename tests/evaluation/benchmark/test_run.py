"""scripts/evaluate.py on a benchmark's folder: generated and finished edits, tables and page."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.errors import UserError
from pbe.evaluation.benchmark import published, run as benchmark_run
from pbe.evaluation.benchmark.page import picks, ranking_score
from pbe.evaluation.benchmark.tables import ScoredEdits, markdown, score_tables
from pbe.evaluation.metrics.results import Score, ScoreCard, not_run
from scripts import evaluate as command

METRICS = ["psnr-outside", "seam", "colour-inside"]
EDIT = ["--solver", "ddim", "--steps", "2", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


def arguments(bench: Path, out: Path, *more: object) -> list[str]:
    return ["--benchmark", str(bench), "--out", str(out), "--metrics", *METRICS, *map(str, more)]


@pytest.fixture(scope="module")
def evaluated(model, bench_files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    guided = ("--guidance", 1, 3, "--devices", 1)
    assert command.main(arguments(bench_files, out, "--model", model, *guided, *EDIT)) == 0
    return out


def read(out: Path) -> dict:
    return json.loads((out / "scores.json").read_text())


def test_scores_table_and_page_are_written(evaluated, bench_files):
    found = read(evaluated)
    assert found["benchmark"]["cases"] == 7
    assert [each["label"] for each in found["edits"]] == ["guidance 1", "guidance 3"]
    first, second = found["edits"]
    assert [each["name"] for each in first["scores"]] == METRICS
    assert first["settings"]["guidance_scale"] == 1.0
    assert first["scores"][0]["value"] == "inf", "the background is kept to the bit"
    assert first["scores"][1]["value"] != second["scores"][1]["value"]
    assert first["scores"][1]["card"]["pictures"] == 7
    table = (evaluated / "scores.md").read_text()
    assert "| seam | lower | 7 | " in table
    page = (evaluated / "index.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page), "the page holds its pictures"
    assert {"Best", "Worst", "Random"} == set(re.findall(r"<h3>(\w+)</h3>", page))
    assert page.count("<details>") == 2 * len(METRICS)


def test_started_again_makes_the_same_scores_without_the_model(evaluated, model, bench_files, monkeypatch):
    before = read(evaluated)
    monkeypatch.setattr(
        benchmark_run.generate.__globals__["PaintByExample"], "from_pretrained", lambda *_, **__: 1 / 0
    )
    more = ("--model", model, "--guidance", 1, 3, "--devices", 1)
    assert command.main(arguments(bench_files, evaluated, *more, *EDIT)) == 0
    assert read(evaluated)["edits"] == before["edits"]


def test_finished_edits_of_another_system(evaluated, bench_files, tmp_path, capsys):
    theirs, ids = tmp_path / "theirs", read(evaluated)["benchmark"]["ids"]
    shutil.copytree(evaluated / "edits" / "guidance_3", theirs)
    whole = tmp_path / "whole"
    assert command.main(arguments(bench_files, whole, "--edits", theirs)) == 0
    assert read(whole)["edits"][0]["scores"] == read(evaluated)["edits"][1]["scores"]
    (theirs / "settings.json").unlink()
    (theirs / f"{ids[0]}.png").unlink()
    (theirs / f"{ids[1]}.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(theirs / f"{ids[2]}.png")
    Image.new("RGB", (8, 8)).save(theirs / "grid.png")
    out = tmp_path / "out"
    assert command.main(arguments(bench_files, out, "--edits", theirs, "--show", 2)) == 0
    found = read(out)["edits"][0]
    card = found["scores"][1]["card"]
    assert card["pictures"] == 4
    reasons = ["missing", "damaged", "of another size than its case"]
    assert card["excluded"] == dict.fromkeys(reasons, 1)
    assert found["left_out"] == dict(zip(ids[:3], reasons, strict=True))
    assert found["files_of_no_case"] == ["grid.png"]
    page, said = (out / "index.html").read_text(), capsys.readouterr().err
    for case, reason in found["left_out"].items():
        assert f"1 of 7 edits is {reason}, such as {case}" in page
        assert f"1 of 7 edits is {reason}, such as {case}" in said
    shown = {int(each) for each in re.findall(r"<figcaption>(\d+)(?:: [\d.]+)?</figcaption>", page)}
    assert shown, "the captions name the cases"
    assert shown <= {3, 4, 5, 6}, "nothing is shown that was left out"
    assert "left out</dt><dd>1 missing, 1 damaged, 1 of another size than its case" in page
    assert "| seam | lower | 4 | " in (out / "scores.md").read_text()


def test_edits_that_are_all_of_no_use_are_named_for_what_they_are(bench_files, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for number in range(7):
        (theirs / f"{number}.png").touch()
    assert command.main(arguments(bench_files, tmp_path / "out", "--edits", theirs)) == 2
    assert "no edit can be scored: 7 damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --model, or --edits"),
        (["--model", "M", "--edits", "E"], "give --model, or --edits"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--edits", "nowhere"], "no folder of edits"),
        (["--model", "M", "--metrics", "beauty"], "no metric 'beauty'"),
        (["--model", "M", "--guidance", "2", "2"], "each once"),
        (["--model", "M", "--device", "cuda:1"], "--device is auto, cpu or cuda"),
        (["--model", "M", "--show", "0"], "--show at least 1"),
        (["--model", "M", "--steps", "0"], "steps is 0"),
        (["--model", "M", "--tower-weights", "clip"], "--tower-weights takes tower=value"),
        (["--model", "M", "--tower-weights", "clip=a", "clip=b"], "names 'clip' twice"),
        (["--model", "M", "--towers", "magic=a"], "no tower 'magic'"),
    ],
)
def test_bad_options_are_one_line(bench_files, tmp_path, capsys, options, message):
    line = ["--benchmark", str(bench_files), "--out", str(tmp_path / "out"), *options]
    assert command.main(line) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert command.main(["--edits", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "--edits needs --benchmark" in capsys.readouterr().err


def test_edits_of_another_benchmark_or_ranked_by_nothing_are_refused(
    evaluated, bench_files, tmp_path, capsys
):
    theirs = shutil.copytree(evaluated / "edits" / "guidance_1", tmp_path / "theirs")
    line = arguments(bench_files, tmp_path / "out", "--edits", theirs)
    assert command.main([*line, "--rank-by", "beauty"]) == 2
    assert "ranked by 'beauty'; there are: seam, colour-inside" in capsys.readouterr().err
    noted = json.loads((theirs / "settings.json").read_text()) | {"benchmark": "0" * 64}
    (theirs / "settings.json").write_text(json.dumps(noted))
    assert command.main(line) == 2
    assert "edits of another benchmark" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_of_ddp_speak_with_one_voice(evaluated, model, bench_files, tmp_path, project_root):
    more = ("--model", model, "--guidance", 1, 3, "--devices", 2, "--strategy", "ddp", *EDIT)
    line = [sys.executable, "scripts/evaluate.py", *arguments(bench_files, tmp_path / "out", *more)]
    done = subprocess.run(line, cwd=project_root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("generated in") == 1
    for one, two in zip(read(evaluated)["edits"], read(tmp_path / "out")["edits"], strict=True):
        assert one["scores"] == two["scores"]
    for path in (evaluated / "edits").rglob("*.png"):
        other = tmp_path / "out" / "edits" / path.relative_to(evaluated / "edits")
        assert other.read_bytes() == path.read_bytes()


def made(name: str, family: str, values: list[float], better: str = "higher") -> Score:
    per_case = np.array(values)
    card = ScoreCard(pictures=len(values), notes="a <note>")
    return Score(name, family, float(np.nanmean(per_case)), 0.1, 0.9, card, per_case, better)  # type: ignore[arg-type]


def test_families_stand_in_tables_of_their_own_with_marked_numbers():
    scores = [
        made("qs", "paper", [60.0]),
        not_run("clip-fid", "paper", "lower", "needs weights"),
        made("seam", "clean", [1.0]),
    ]
    tables = score_tables([ScoredEdits("mine", scores), ScoredEdits("theirs", scores)])
    assert [len(table.rows) for table in tables] == [2, 5, 1]
    paper, reported, clean = tables
    assert paper.head == ["score", "better", "pictures", "mine", "theirs", published.OURS]
    assert paper.rows[0][-1] == "77.80 (published)"
    assert paper.rows[1] == ["clip-fid", "lower", "–", "not run", "not run", "3.18 (published)"]
    assert "needs weights" in paper.note
    assert clean.head == ["score", "better", "pictures", "mine", "theirs"]
    fewer = [*scores[:2], made("seam", "clean", [1.0, 2.0])]
    clean = score_tables([ScoredEdits("mine", scores), ScoredEdits("theirs", fewer)])[2]
    assert clean.rows[0][2] == "1 / 2"
    ours = reported.rows[-1]
    assert ours == [published.OURS, "3.18 (published)", "77.80 (published)", "84.97 (unverified)"]
    marked = [cell for row in reported.rows[:-1] for cell in row[1:]]
    assert all(cell.endswith("(unverified)") for cell in marked)
    text = markdown("T", tables, [ScoredEdits("mine", scores)])
    assert text.count("\n## ") == 4
    assert "- **seam**, mine. pictures: 1; left out: nothing; notes: a <note>" in text
    assert "**clip-fid**" not in text


def test_best_and_worst_follow_the_scores_direction():
    high = made("region", "clean", [0.5, np.nan, 0.9, 0.1, 0.7])
    chosen = picks(high, [0, 1, 2, 3, 4], 2, seed=0)
    assert (chosen["Best"], chosen["Worst"]) == ([2, 4], [3, 0])
    low = dataclasses.replace(high, better="lower")
    assert picks(low, [0, 1, 2, 4], 2, seed=0)["Best"] == [0, 4]
    assert len(picks(None, [3, 4], 5, seed=0)["Random"]) == 2
    assert set(picks(None, [3, 4], 5, seed=0)) == {"Random"}


def test_edits_are_ranked_by_a_score_that_tells_them_apart():
    same, seam = made("region-a", "clean", [1.0, 1.0]), made("seam", "clean", [1.0, 2.0])
    assert ranking_score([same, made("colour", "clean", [1.0, 2.0]), seam]) is seam
    assert ranking_score([same]) is None
    assert ranking_score([same, seam], "region-a") is same
    with pytest.raises(UserError, match=r"by 'x'; there are: region-a$"):
        ranking_score([same, not_run("lpips", "clean", "lower", "no weights")], "x")
