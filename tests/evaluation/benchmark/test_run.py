"""scripts/evaluate.py on a benchmark's folder: generated and finished edits, tables and page."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.errors import UserError
from pbe.evaluation.benchmark import page as published, run as benchmark_run
from pbe.evaluation.benchmark.edits import TIMES, read_times, timed
from pbe.evaluation.benchmark.page import ScoredEdits, fit, markdown_page, picks, ranking_score, score_tables
from pbe.evaluation.metrics.base import Score, ScoreCard, not_run
from tests.commands import evaluate as command

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
    assert first["origin"]["settings"]["guidance_scale"] == 1.0
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
        (["--model", "M", "--edits", "nowhere"], "is not a folder of edits"),
        (["--edits", "=E"], "a folder or NAME=DIR, not '=E'"),
        (["--edits", "E", "--guidance", "5", "5"], "--guidance is for models"),
        (["--edits", "E", "--no-preserve-background"], "--preserve-background is for models"),
        (["--edits", "E", "--conventions", "original"], "--conventions is for models"),
        (["--edits", "E", "--steps", "7"], "--steps is for models"),
        (["--model", "M", "--objects", "3"], "--objects is for the toy world"),
        (["--model", "M", "--cases", "8"], "has 7 cases, so not the first 8"),
        (["--model", "M", "--cases", "-1"], "for --cases. It must be at least 0"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--edits", "nowhere"], "is not a folder of edits"),
        (["--model", "M", "--metrics", "beauty"], "no metric 'beauty'"),
        (["--model", "M", "--guidance", "2", "2"], "each once"),
        (["--model", "M", "--device", "cuda:1"], "--device is auto, cpu or cuda"),
        (["--model", "M", "--show", "0"], "for --show. It must be at least 1"),
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
    for option in (["--metrics", "seam"], ["--reference", "R"], ["--devices", "2"], ["--cases", "2"]):
        assert command.main(["--model", "M", "--out", str(tmp_path / "out"), *option]) == 2
        assert f"{option[0]} needs --benchmark" in capsys.readouterr().err


def test_edits_of_another_benchmark_or_ranked_by_nothing_are_refused(
    evaluated, bench_files, tmp_path, capsys
):
    theirs = shutil.copytree(evaluated / "edits" / "guidance_1", tmp_path / "theirs")
    line = arguments(bench_files, tmp_path / "out", "--edits", theirs)
    assert command.main([*line, "--rank-by", "beauty"]) == 2
    assert "ranked by 'beauty'; there are: psnr-outside, seam, colour-inside" in capsys.readouterr().err
    noted = json.loads((theirs / "settings.json").read_text()) | {"benchmark": "0" * 64}
    (theirs / "settings.json").write_text(json.dumps(noted))
    assert command.main(line) == 2
    assert "edits of another benchmark" in capsys.readouterr().err


def test_a_foreign_settings_file_says_nothing(evaluated, bench_files, tmp_path):
    theirs = Path(shutil.copytree(evaluated / "edits" / "guidance_1", tmp_path / "theirs"))
    foreign = {"label": "ours", "benchmark": "coco", "settings": ["x"], "missing": 3}
    for number, text in enumerate((json.dumps(foreign), "[1]", "{", "[" * 100_000)):
        (theirs / "settings.json").write_text(text)
        assert command.main(arguments(bench_files, tmp_path / "out", "--edits", theirs)) == 0, number
        (found,) = read(tmp_path / "out")["edits"]
        assert (found["label"], found["left_out"], found["origin"]) == ("theirs", {}, {})
        assert (theirs / "settings.json").read_text() == text


def test_what_scoring_lacks_is_noticed_before_anything_is_generated(
    model, bench_files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(benchmark_run, "generate", lambda *_: pytest.fail("generated"))
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    (tmp_path / "file").touch()
    for options, message in (
        (["--reference", "/nowhere/at/all"], "the reference '/nowhere/at/all' is not a folder"),
        (["--rank-by", "nonsense"], "edits cannot be ranked by 'nonsense'; there are: psnr-outside"),
        (["--mixture", "nowhere"], "no mixture 'nowhere'"),
        (["--metrics", "clip-fid", "--tower-weights", "clip=nowhere"], "no file 'nowhere'"),
        (["--metrics", "clip-fid", "--tower-weights", f"clip={tmp_path}/weights.pt"], "cannot be read"),
        (["--out", str(tmp_path / "file")], "cannot make the folder"),
    ):
        line = arguments(bench_files, tmp_path / "out", "--model", model, *options)
        assert command.main(line) == 2, options
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["scores.json", "scores.md", "index.html"])
def test_a_file_that_cannot_be_written_is_one_line(evaluated, bench_files, tmp_path, capsys, name):
    (tmp_path / "out" / name / "in the way").mkdir(parents=True)
    theirs = evaluated / "edits" / "guidance_1"
    assert command.main(arguments(bench_files, tmp_path / "out", "--edits", theirs)) == 2
    assert f"error: cannot write '{tmp_path / 'out' / name}'" in capsys.readouterr().err


def test_the_folder_of_an_evaluation_is_not_that_of_its_edits(evaluated, bench_files, tmp_path, capsys):
    assert command.main(arguments(bench_files, tmp_path / "out", "--edits", evaluated)) == 2
    assert f"did you mean '{evaluated}/edits/guidance_1'?" in capsys.readouterr().err


def test_models_and_finished_edits_stand_in_one_table_with_paired_differences(
    evaluated, model, bench_files, tmp_path, capsys
):
    out, edits = tmp_path / "out", evaluated / "edits"
    shutil.copytree(edits / "guidance_3", out / "edits" / "guidance_3")
    sets = ("--edits", f"a={edits / 'guidance_1'}", "--edits", edits / "guidance_3", edits / "guidance_1")
    line = arguments(bench_files, out, "--model", model, "--guidance", 3, "--devices", 1, *EDIT, *sets)
    assert command.main([*line, f"guidance_1={edits / 'guidance_3'}"]) == 2
    assert "two sets of edits are called 'guidance_1'" in capsys.readouterr().err
    assert command.main(line) == 0
    found = read(out)["edits"]
    assert [each["label"] for each in found] == ["guidance 3", "a", "guidance_3", "guidance_1"]
    table = (out / "scores.md").read_text()
    assert "| score | better | images | guidance 3 | a | guidance_3 | guidance_1 |" in table
    assert "## Paired differences: the field's usual scores" in table
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| seam | lower | 7 | ")]
    assert len(rows) == 2, "scores and differences"
    ours, theirs = (np.array(found[index]["scores"][1]["per_case"]) for index in (0, 1))
    assert float(rows[1][3].split()[0]) == pytest.approx(np.mean(theirs - ours), rel=1e-3)
    assert rows[1][4] == "0 (0 to 0)", "the same edits"
    assert "| psnr-outside | higher | 0 | – | – | – |" in table, "all of them are perfect"


def test_the_first_cases_alone(evaluated, bench_files, tmp_path):
    out, theirs = tmp_path / "out", evaluated / "edits" / "guidance_3"
    assert command.main(arguments(bench_files, out, "--edits", theirs, "--cases", 3)) == 0
    found, whole = read(out), read(evaluated)
    assert found["benchmark"]["ids"] == whole["benchmark"]["ids"][:3]
    assert found["benchmark"]["sha256"] != whole["benchmark"]["sha256"]
    (edits,) = found["edits"]
    assert (edits["files_of_no_case"], edits["left_out"]) == ([], {})
    seams = [each["scores"][1]["per_case"] for each in (edits, whole["edits"][1])]
    assert seams[0] == seams[1][:3]
    assert "The first 3 cases of" in (out / "index.html").read_text()


def test_times_of_all_runs_that_made_images_are_added(tmp_path):
    folder = tmp_path / "guidance_5"
    folder.mkdir()
    with timed(folder):
        pass
    assert read_times(tmp_path) == {}
    with pytest.raises(KeyError), timed(folder):  # noqa: PT012
        (folder / "1.png").touch()
        raise KeyError
    (first,) = read_times(tmp_path).values()
    with timed(folder):
        time.sleep(0.05)
    assert read_times(tmp_path) == {"guidance_5": first}, "nothing was made"
    with timed(folder, note=False):
        (folder / "2.png").touch()
    with timed(folder):
        time.sleep(0.05)
        (folder / "3.png").touch()
    assert first + 0.04 <= read_times(tmp_path)["guidance_5"] < first + 60
    for path in folder.iterdir():
        path.unlink()
    (tmp_path / TIMES).write_text('{"guidance_5": 1000, "x": null}')
    with timed(folder):
        (folder / "1.png").touch()
    assert read_times(tmp_path)["guidance_5"] < 1000, "those pictures are gone"


def test_images_of_the_page_are_small():
    wide = np.zeros((300, 1024, 3), np.uint8)
    assert fit(wide).shape == (75, 256, 3)
    assert fit(wide[:, :256]).shape == (256, 218, 3)
    small = np.random.default_rng(0).integers(0, 256, (256, 200, 3), np.uint8)
    assert fit(small) is small


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
    tables = score_tables([ScoredEdits("mine", scores), ScoredEdits("theirs", scores)], coco_ee=True)
    assert [len(table.rows) for table in tables] == [2, 5, 1]
    paper, reported, clean = tables
    assert paper.head == ["score", "better", "images", "mine", "theirs", published.OURS]
    assert paper.rows[0][-1] == "77.80 (published)"
    assert paper.rows[1] == ["clip-fid", "lower", "–", "not run", "not run", "3.18 (published)"]
    assert "needs weights" in paper.note
    assert clean.head == ["score", "better", "images", "mine", "theirs"]
    fewer = [*scores[:2], made("seam", "clean", [1.0, 2.0])]
    clean = score_tables([ScoredEdits("mine", scores), ScoredEdits("theirs", fewer)], coco_ee=True)[2]
    assert clean.rows[0][2] == "1 / 2"
    ours = reported.rows[-1]
    assert ours == [published.OURS, "3.18 (published)", "77.80 (published)", "84.97 (unverified)"]
    marked = [cell for row in reported.rows[:-1] for cell in row[1:]]
    assert all(cell.endswith("(unverified)") for cell in marked)
    text = markdown_page("T", tables, [ScoredEdits("mine", scores)])
    assert text.count("\n## ") == 4
    assert "- **seam**, mine. images: 1; left out: nothing; notes: a <note>" in text
    assert "**clip-fid**" not in text


def test_published_numbers_stand_beside_coco_ee_alone(evaluated, bench_files, tmp_path):
    scores = [made("qs", "paper", [60.0]), made("seam", "clean", [1.0])]
    tables = score_tables([ScoredEdits("mine", scores)], coco_ee=False)
    assert [table.head for table in tables] == [["score", "better", "images", "mine"]] * 2
    assert "published" not in markdown_page("T", tables)
    # A whole evaluation on other cases, with a score of the paper's family.
    out, theirs = tmp_path / "out", evaluated / "edits" / "guidance_3"
    line = ["--benchmark", bench_files, "--out", out, "--edits", theirs, "--metrics", "region-clip", "seam"]
    assert command.main([str(word) for word in line]) == 0
    assert read(out)["published"] is None
    for name in ("index.html", "scores.md"):
        text = (out / name).read_text()
        assert "region-clip" in text
        assert published.OURS not in text
        assert "What the paper reports" not in text


def test_the_released_list_is_known_by_its_ids():
    """3500 cases, of which 1638 lie above COCO's largest id and 1302 have seven digits or more."""
    released = [*range(1, 1863), *range(600_000, 600_336), *range(1_000_000, 1_001_302)]
    assert published.is_coco_ee(released)
    assert not published.is_coco_ee(released[:-1]), "the first cases alone are another benchmark"
    assert not published.is_coco_ee(range(3500)), "so many cases of COCO are not those"


def test_scores_of_another_tower_stand_beside_no_published_number():
    theirs = made("clip-fid", "paper", [1.0], "lower")
    for tower, cell in (("ViT-B-32-quickgelu", "3.18 (published)"), ("ViT-L-14", "–")):
        card = dataclasses.replace(theirs.card, feature_model=tower)
        run = ScoredEdits("mine", [dataclasses.replace(theirs, card=card)])
        paper = score_tables([run], coco_ee=True)[0]
        assert paper.rows[0][-1] == cell
        assert ("clip-fid by ViT-L-14: not the paper's ViT-B-32-quickgelu" in paper.note) == (cell == "–")


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
