"""The human study: a blinded page, the rater's clicks in a browser where there is one, and tables by hand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.errors import UserError
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.study import ranking
from pbe.evaluation.study.ranking import (
    StudySettings,
    kendall_w,
    make_study,
    read_key,
    read_rankings,
    study_markdown,
    summarise,
)
from tests.commands import study as command

SYSTEMS = ("alpha", "beta", "gamma")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def systems(bench_files, tmp_path_factory) -> dict[str, Path]:
    """Folders of flat edits, a shade of grey for each system."""
    benchmark, top = BenchmarkFolder(bench_files), tmp_path_factory.mktemp("systems")
    for shade, name in enumerate(SYSTEMS):
        (top / name).mkdir()
        for each in benchmark.ids:
            Image.new("RGB", (32, 32), (50 + 60 * shade,) * 3).save(top / name / f"{each}.png")
    return {name: top / name for name in SYSTEMS}


def make(systems: dict[str, Path], bench: Path, out: Path, *more: str) -> int:
    pairs = [f"{name}={folder}" for name, folder in systems.items()]
    return command.main(["make", "--systems", *pairs, "--benchmark", str(bench), "--out", str(out), *more])


@pytest.fixture(scope="module")
def study(systems, bench_files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    assert make(systems, bench_files, out, "--groups", "4") == 0
    return out


def page_data(study: Path) -> dict:
    page = (study / "page" / "index.html").read_text()
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def rankings(study: Path, rater: str, order: dict[str, list[str]], groups: int = 4) -> dict:
    """A rater's file who ranks the systems alike in every group; ``order`` is by question."""
    key = json.loads((study / "key.json").read_text())
    answers = {}
    for name, group in list(key["groups"].items())[:groups]:
        edit_of = {owner: edit for edit, owner in group["edits"].items()}
        answers[name] = {q: [edit_of[system] for system in systems] for q, systems in order.items()}
    return {"format": "pbe-rankings-1", "study": key["study"], "rater": rater, "rankings": answers}


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_page_is_blinded_and_whole(study):
    page, data = (study / "page" / "index.html").read_text(), page_data(study)
    assert not any(name in page for name in SYSTEMS)
    assert not re.search(r'(?:src|href)="(?!data:)', page), "the page needs nothing beside it"
    assert len(data["groups"]) == 4
    assert [question["id"] for question in data["questions"]] == ["quality", "consistency"]
    key = read_key(study / "key.json")
    for group in data["groups"]:
        owners = key.groups[group["id"]]
        assert set(owners.values()) == set(SYSTEMS)
        assert [edit["id"] for edit in group["edits"]] == sorted(owners)


def test_what_is_published_tells_nobody_whose_an_edit_is(systems, bench_files, tmp_path, monkeypatch):
    """Who knows the systems, the seed, the images and this program still lacks the salt of the key."""
    order: list[str] = []
    write = ranking.write_image
    monkeypatch.setattr(ranking, "write_image", lambda path, it: (order.append(path.stem), write(path, it)))
    seen = []
    for name in ("one", "two"):
        order.clear()
        assert make(systems, bench_files, tmp_path / name, "--groups", "4", "--copy") == 0
        groups = page_data(tmp_path / name)["groups"]
        key = json.loads((tmp_path / name / "key.json").read_text())
        seen.append([(key["groups"][g["id"]]["case"], {edit["id"] for edit in g["edits"]}) for g in groups])
        page = (tmp_path / name / "page" / "index.html").read_text()
        assert len(key["salt"]) == 32
        assert key["salt"] not in page
        assert sorted(p.name for p in (tmp_path / name / "page").iterdir()) == ["index.html", "pictures"]
        for group in groups:
            names = {f"{group['id']}-{edit['id']}" for edit in group["edits"]}
            times = [name for name in order if name in names]
            assert len(times) == 3
            assert times == sorted(times), "the times of files follow the opaque names, not the systems"
    assert [case for case, _ in seen[0]] == [case for case, _ in seen[1]]
    assert all(not a & b for (_, a), (_, b) in zip(*seen, strict=True)), "names are of the salt"


def test_a_case_that_cannot_be_read_is_told_before_the_folder_is_begun(
    systems, bench_files, tmp_path, monkeypatch
):
    read, seen = BenchmarkFolder.__getitem__, []

    def fragile(self: BenchmarkFolder, position: int) -> object:
        seen.append(position)
        if len(seen) == 3:
            raise UserError("a picture is damaged")
        return read(self, position)

    monkeypatch.setattr(BenchmarkFolder, "__getitem__", fragile)
    assert make(systems, bench_files, tmp_path / "out", "--groups", "4") == 2
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert make(systems, bench_files, tmp_path / "out", "--groups", "4") == 0


def test_images_belong_to_their_systems(study, systems, bench_files, tmp_path):
    benchmark = BenchmarkFolder(bench_files)
    make_study(systems, benchmark, tmp_path / "beside", StudySettings(groups=2, seed=1, copy=True))
    published = tmp_path / "beside" / "page"
    assert len((published / "index.html").read_text()) < 60_000
    key = json.loads((tmp_path / "beside" / "key.json").read_text())
    for group in page_data(tmp_path / "beside")["groups"]:
        for edit in group["edits"]:
            shade = np.asarray(Image.open(published / edit["src"]))[0, 0, 0]
            owner = key["groups"][group["id"]]["edits"][edit["id"]]
            assert shade == 50 + 60 * SYSTEMS.index(owner)
        position = benchmark.ids.index(key["groups"][group["id"]]["case"])
        source = np.asarray(Image.open(published / group["source"]))
        np.testing.assert_array_equal(source, benchmark[position].image)


def test_cases_that_one_system_lacks_are_left_out(systems, bench_files, tmp_path, capsys):
    fewer = shutil.copytree(systems["beta"], tmp_path / "beta")
    ids = BenchmarkFolder(bench_files).ids
    (fewer / f"{ids[0]}.png").unlink()
    (fewer / f"{ids[1]}.png").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(fewer / f"{ids[2]}.png")
    some = systems | {"beta": fewer}
    assert make(some, bench_files, tmp_path / "four", "--groups", "4") == 0
    cases = {g["case"] for g in json.loads((tmp_path / "four" / "key.json").read_text())["groups"].values()}
    assert cases == set(ids[3:])
    assert make(some, bench_files, tmp_path / "five", "--groups", "5") == 2
    assert "only 4 cases have whole edits by all systems, not 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pairs", "more", "message"),
    [
        (["a=X"], [], "2 to 9 systems, not 1"),
        (["a=X", "b"], [], "'b' does not name a system; write name=folder"),
        (["a=X", "a=Y"], [], "'a' is named twice"),
        (["a=X", "b=Y"], [], "is not a folder of edits"),
        (["a=X", "b=Y"], ["--groups", "0"], "at least one group"),
    ],
)
def test_bad_studies(bench_files, tmp_path, capsys, pairs, more, message):
    line = ["make", "--systems", *pairs, "--benchmark", str(bench_files), "--out", str(tmp_path / "o"), *more]
    assert command.main(line) == 2
    assert message in capsys.readouterr().err


def test_a_study_is_not_written_over(study, systems, bench_files, capsys):
    assert make(systems, bench_files, study, "--groups", "4") == 2
    assert "not empty" in capsys.readouterr().err


def test_tables_against_a_hand_count():
    """Two raters, three groups, three systems a b c."""
    a_first, b_first, c_first = [1, 2, 3], [2, 1, 3], [2, 3, 1]
    ranks = np.array([[a_first, a_first, b_first], [a_first, c_first, b_first]], np.float64)
    found = summarise(ranks, "abc")
    means = {name: each.value for name, each in found.mean_rank.items()}
    assert means == pytest.approx({"a": 9 / 6, "b": 11 / 6, "c": 16 / 6})
    assert {n: e.value for n, e in found.first.items()} == pytest.approx({"a": 3 / 6, "b": 2 / 6, "c": 1 / 6})
    assert found.wins["a", "b"].value == pytest.approx(4 / 6)
    assert found.wins["b", "a"].value == pytest.approx(2 / 6)
    assert found.wins["c", "b"].value == pytest.approx(1 / 6)
    # agreement: groups 1 and 3 are ranked alike (W = 1); group 2 has rank sums 3, 5, 4, so S = 2 and W = 0.25
    assert found.agreement == pytest.approx((1 + 0.25 + 1) / 3)
    assert (found.raters, found.rankings) == (2, 6)
    for estimate in (*found.mean_rank.values(), *found.first.values(), *found.wins.values()):
        assert estimate.low <= estimate.value <= estimate.high
    assert found.mean_rank["a"].low == 1.0
    text = study_markdown("quality", found)
    assert text.index("| a | 1.500") < text.index("| b | 1.833") < text.index("| c | 2.667")
    assert "Kendall's W 0.750" in text


def test_intervals_vanish_only_where_all_agree_and_know_both_raters_and_groups():
    same = np.broadcast_to([1.0, 2.0], (3, 4, 2))
    assert summarise(same, "ab").mean_rank["a"].low == summarise(same, "ab").mean_rank["a"].high == 1.0
    by_rater = np.array([[[1, 2]] * 4, [[2, 1]] * 4], np.float64)
    by_group = np.array([[[1, 2], [2, 1]]] * 4, np.float64)
    for ranks in (by_rater, by_group):
        estimate = summarise(ranks, "ab").mean_rank["a"]
        assert (estimate.low, estimate.value, estimate.high) == (1.0, 1.5, 2.0)


def test_missing_groups_count_for_nothing():
    ranks = np.array([[[1, 2], [1, 2]], [[2, 1], [np.nan, np.nan]]])
    found = summarise(ranks, "ab")
    assert found.mean_rank["a"].value == pytest.approx(4 / 3)
    assert found.wins["a", "b"].value == pytest.approx(2 / 3)
    assert found.agreement == 0.0, "only the first group has two raters, who disagree"
    assert summarise(ranks[:1], "ab").agreement is None


def test_kendalls_coefficient():
    assert kendall_w(np.array([[1, 2, 3, 4]] * 5)) == 1.0
    assert kendall_w(np.array([[1, 2, 3], [3, 2, 1]])) == 0.0


def test_tabulate_prints_a_table_for_each_question(study, tmp_path, capsys):
    order = {"quality": ["alpha", "beta", "gamma"], "consistency": ["gamma", "alpha", "beta"]}
    files = [written(tmp_path / f"{r}.json", rankings(study, r, order)) for r in ("one", "two")]
    assert command.main(["tabulate", "--key", str(study / "key.json"), *map(str, files)]) == 0
    said = capsys.readouterr().out
    quality, consistency = said.split("## ")[1:]
    assert quality.startswith("quality")
    assert "| alpha | 1.000 (1.000 to 1.000) | 1.000 (1.000 to 1.000) | – | 1.000" in quality
    assert "| gamma | 1.000 (1.000 to 1.000)" in consistency
    assert "2 raters, 8 rankings; Kendall's W 1.000" in consistency


def test_bad_files_are_one_line_each(study, tmp_path, capsys):
    order = {"quality": list(SYSTEMS), "consistency": list(SYSTEMS)}
    good = rankings(study, "one", order)
    group = next(iter(good["rankings"]))
    twice = {**good, "rater": "two"}
    twice = json.loads(json.dumps(twice))
    twice["rankings"][group]["quality"][0] = twice["rankings"][group]["quality"][1]
    bad = {
        "is truncated or not JSON: max": "[" * 100_000,
        "it has no rater": {**good, "rater": None},
        "is truncated or not JSON": json.dumps(good)[:100],
        "is not a file of rankings": {"format": "other"},
        "is not a file of rankings: ": [1, 2],
        "belongs to another study": {**good, "study": "0000"},
        f"group {group}, quality: not every edit is ranked once": twice,
        f"group {group}, quality: not": {**good, "rankings": {group: {"quality": "abc"}}},
        f"group {group}, ": {**good, "rankings": {group: 3}},
        "groups that the study does not have": {**good, "rankings": {"99": {}}},
        "lacks 4 of 8 rankings; --partial": rankings(study, "two", order, groups=2),
    }
    fine = written(tmp_path / "fine.json", good)
    key = str(study / "key.json")
    for message, content in bad.items():
        path = written(tmp_path / "bad.json", content)
        assert command.main(["tabulate", "--key", key, str(path)]) == 2, message
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert command.main(["tabulate", "--key", key, str(path), str(fine), "--partial"]) == 0
    assert "2 raters, 6 rankings" in capsys.readouterr().out
    for line, message in (
        ([key, str(fine), str(fine)], "both of the rater 'one'"),
        ([key, str(tmp_path / "gone.json")], "cannot be read"),
        ([str(fine), str(fine)], "is not a key of a study"),
    ):
        assert command.main(["tabulate", "--key", *line]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": []}, "it lacks questions, groups or systems"),
        ({"groups": {}}, "it lacks questions, groups or systems"),
        (
            {"groups": {"01": {"edits": {"a": "alpha", "b": "beta", "c": "delta"}}}},
            "group 01 lacks an edit",
        ),
        ({"systems": 3}, "is a damaged key of a study"),
        ({"groups": {"01": 3}}, "is a damaged key of a study"),
    ],
)
def test_damaged_keys_are_one_line_each(study, tmp_path, capsys, change, message):
    good = json.loads((study / "key.json").read_text())
    order = {"quality": list(SYSTEMS), "consistency": list(SYSTEMS)}
    fine = written(tmp_path / "fine.json", rankings(study, "one", order))
    bad = written(tmp_path / "key.json", good | change)
    assert command.main(["tabulate", "--key", str(bad), str(fine)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


CLICKS = """<script>
localStorage.clear();
$("rater").value = "tester";
$("form").requestSubmit();
const hit = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
const digits = (text) => { for (const key of text) hit(key); };
const log = { first: tasks.map((task) => task.edits.map((edit) => edit.id)) };
digits("2"); log.blocked = $("next").disabled; hit("Enter"); log.stayed = state.at;
hit("Backspace"); log.undone = ranking(tasks[0]).length;
$("edits").children[2].click(); digits("1"); log.filled = ranking(tasks[0]).slice();
log.label = $("edits").children[1].getAttribute("aria-label");
$("edits").children[0].click(); log.freed = ranking(tasks[0]).slice(); digits("1");
hit("Enter"); digits("12");
hit("ArrowLeft"); log.back = state.at; hit("ArrowRight"); log.forth = state.at;
log.partial = result().complete;
$("form").requestSubmit(); log.resumed = [state.at, ranking(tasks[1]).length];
$("next").click();
for (let i = 2; i < tasks.length; i++) { digits("32"); hit("Enter"); }
log.ended = !$("end").hidden; log.result = result();
log.files = ["Ян", "Юй", "a b", "a_b", "tester"].map((name) => { state.rater = name; return fileName(); });
$("rater").value = "other"; $("form").requestSubmit();
log.other = tasks.map((task) => task.edits.map((edit) => edit.id));
document.title = "done"; document.body.textContent = "LOG" + JSON.stringify(log) + "END";
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_clicks_and_keys_in_a_browser(study, tmp_path):
    page = tmp_path / "clicked.html"
    page.write_text((study / "page" / "index.html").read_text().replace("</body>", CLICKS))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [str(BROWSER), *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r"LOG(\{.*\})END", done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    log = json.loads(found.group(1))
    first = log["first"][0]
    assert log["first"][0] == log["first"][1], "both questions show a group in one order"
    assert (log["blocked"], log["stayed"], log["undone"]) == (True, 0, 0)
    assert log["filled"] == [first[2], first[0], first[1]], "the last one is ranked by itself"
    assert log["label"] == "Edit 2, rank 3"
    assert log["freed"] == [first[2]]
    assert (log["back"], log["forth"], log["partial"]) == (0, 1, False)
    assert log["resumed"] == [1, 3], "what was chosen is kept"
    assert log["ended"]
    path = written(tmp_path / "tester.json", log["result"])
    assert log["result"]["complete"]
    ranks = read_rankings([path], read_key(study / "key.json"))
    assert set(ranks) == {"quality", "consistency"}
    assert all(np.isfinite(array).all() for array in ranks.values())
    assert log["other"] != log["first"], "another rater sees another order"
    assert len(set(log["files"])) == 5, "raters' files do not overwrite each other"
    assert re.search(r"-Ян-[0-9a-f]{8}\.json$", log["files"][0])
