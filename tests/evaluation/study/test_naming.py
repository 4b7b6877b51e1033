"""The naming test: fair questions, sheets that do not tell, and answers scored by the exact binomial."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom

from pbe.checkpoints.native import save_model
from pbe.errors import UserError
from pbe.evaluation.benchmark.generation import GenerateSettings, edit_batch
from pbe.evaluation.benchmark.toy import make_benchmark
from pbe.evaluation.report import at_side
from pbe.evaluation.study.naming import (
    LETTERS,
    TILE,
    exact_share,
    make_questions,
    naming_sheets,
    readable,
    score_answers,
    write_form,
    write_key,
)
from tests.commands import naming


def test_each_question_has_the_right_name_and_three_of_other_test_objects(world, cases):
    everything = {readable(toy.name) for toy in world.objects("test")}
    questions = make_questions(world, cases)
    assert [one.number for one in questions] == [1, 2, 3, 4, 5, 6]
    for one, case in zip(questions, cases, strict=True):
        assert one.key == case.key
        assert len(set(one.names)) == len(LETTERS) == 4
        assert set(one.names) <= everything
        assert one.names[LETTERS.index(one.right)] == readable(case.name)


def test_every_test_object_has_a_name_that_can_be_read(world):
    names = [readable(toy.name) for toy in world.objects("test")]
    assert len(set(names)) == 181
    assert not [name for name in names if name.startswith("u+")]


def test_a_question_belongs_to_seed_and_object(world, cases):
    one, other = make_questions(world, cases), make_questions(world, cases[::-1])[::-1]
    assert [(q.names, q.right) for q in one] == [(q.names, q.right) for q in other]
    assert [q.names for q in one] != [q.names for q in make_questions(world, cases, seed=1)]


def test_the_right_letter_is_drawn_evenly(world, cases):
    """Over 600 questions each letter is right about a quarter of the time."""
    rights = [one.right for seed in range(100) for one in make_questions(world, cases, seed)]
    counts = [rights.count(letter) for letter in LETTERS]
    assert sum(counts) == 600
    assert max(abs(count - 150) for count in counts) < 4 * np.sqrt(600 * 0.25 * 0.75)


def test_sheets_show_the_images_enlarged_twelve_a_page(world, cases):
    images = np.concatenate([np.stack([case.image for case in cases])] * 3)[:14]
    questions = make_questions(world, [*cases, *cases, *cases][:14])
    first, second = naming_sheets(questions, images)
    assert first.height > 2 * second.height  # three rows, and one
    shown = np.asarray(second.crop((20, 20, 20 + TILE, 20 + TILE)))
    assert np.array_equal(shown, at_side(images[12], TILE))
    assert TILE >= 256


def answer(folder: Path, answers: list[str], **changes: str) -> tuple[Path, Path]:
    """Write a key whose right letters are all b, and an answer sheet."""
    key, form = folder / "key.csv", folder / "answers.csv"
    key.write_text("number,object,right,name,shown\n" + "".join(f"{i},k,b,n,edits\n" for i in range(1, 5)))
    lines = "".join(f"{i},{letter},w,x,y,z\n" for i, letter in enumerate(answers, 1))
    form.write_text("number,answer,a,b,c,d\n" + lines)
    return form, key


def test_answers_are_counted(tmp_path: Path):
    result = score_answers(*answer(tmp_path, ["b", " B", "c", ""]))
    assert (result.right, result.count, result.blank, result.shown) == (2, 4, 1, "edits")
    assert "edits: 2 of 4 right, 1 left blank: 50 % (7 to 93, " in str(result)
    assert "chance is 25 %" in str(result)


@pytest.mark.parametrize(("right", "count"), [(29, 48), (0, 48), (48, 48), (1, 3)])
def test_the_interval_is_clopper_pearsons(right, count):
    """At each end the tail beyond what was seen holds one part in forty."""
    found = exact_share(right, count)
    assert found.value == right / count
    if right:
        assert binom.sf(right - 1, count, found.low) == pytest.approx(0.025, abs=1e-6)
    else:
        assert found.low == 0.0
    if right < count:
        assert binom.cdf(right, count, found.high) == pytest.approx(0.025, abs=1e-6)
    else:
        assert found.high == 1.0


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["b", "e", "b", "b"], "question 2: 'e' is not one of a, b, c, d"),
        (["b", "ab", "b", "b"], "question 2: 'ab' is not one of a, b, c, d"),
        (["b", "b", "b"], "question 4 is in one of them only"),
        (["b"] * 5, "question 5 is in one of them only"),
        ([], "no rows with the columns number and answer"),
    ],
)
def test_answers_that_cannot_be_scored(tmp_path: Path, answers, message):
    with pytest.raises(UserError, match=message):
        score_answers(*answer(tmp_path, answers))


def test_damaged_files_are_refused(tmp_path: Path):
    form, key = answer(tmp_path, ["b"] * 4)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        score_answers(tmp_path / "none.csv", key)
    form.write_text(form.read_text() + "4,a,w,x,y,z\n")
    with pytest.raises(UserError, match="has a question twice"):
        score_answers(form, key)
    form.write_text("number,answer\nfirst,a\n")
    with pytest.raises(UserError, match="something else than whole numbers"):
        score_answers(form, key)
    form.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="cannot be read"):
        score_answers(form, key)


def test_form_and_key_fit_each_other_and_the_form_does_not_tell(tmp_path: Path, world, cases):
    questions = make_questions(world, cases)
    write_form(tmp_path / "answers.csv", questions)
    write_key(tmp_path / "key.csv", questions, "true images")
    result = score_answers(tmp_path / "answers.csv", tmp_path / "key.csv")
    assert (result.right, result.blank, result.count) == (0, 6, 6)
    with (tmp_path / "answers.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["number", "answer", "a", "b", "c", "d"]
    assert rows[1] == ["1", "", *questions[0].names]
    assert not any(case.key in (tmp_path / "answers.csv").read_text() for case in cases)


def test_the_command_from_edits_to_the_share(tmp_path: Path, pipe, world, capsys):
    model, out = tmp_path / "model", tmp_path / "naming"
    save_model(model, pipe.model, torch.float32)
    line = ["make", "--model", str(model), "--out", str(out), "--objects", "2", "--steps", "1"]
    assert naming.main([*line, "--solver", "magic"]) == 2
    assert not out.exists(), "a failed start leaves no folder that the right command would refuse"
    assert naming.main([*line, "--solver", "ddim", "--guidance", "2"]) == 0
    sheets = out / "sheets"
    assert sorted(path.name for path in sheets.iterdir()) == ["answers.csv", "sheet_1.png"]
    cases = make_benchmark(world, seed=0, image_size=32, exemplar_size=48, objects=2)
    exemplars = [case.exemplar for case in cases]
    edits = edit_batch(pipe, cases, GenerateSettings(2.0, "ddim", 1), exemplars)
    with Image.open(sheets / "sheet_1.png") as sheet:
        shown = np.asarray(sheet.crop((20, 20, 20 + TILE, 20 + TILE)))
    assert np.array_equal(shown, at_side(edits[0], TILE))
    with (out / "key.csv").open() as file:
        rights = [row["right"] for row in csv.DictReader(file)]
    form = (sheets / "answers.csv").read_text()
    for number, right in enumerate(rights, 1):
        form = form.replace(f"{number},,", f"{number},{right},")
    (sheets / "answers.csv").write_text(form)
    capsys.readouterr()
    assert naming.main(["score", str(sheets / "answers.csv"), "--key", str(out / "key.csv")]) == 0
    assert f"edits of {model}, guidance 2: 2 of 2 right: 100 % (16 to 100" in capsys.readouterr().out
    assert naming.main(line) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err


def test_the_true_images_need_no_model(tmp_path: Path, capsys):
    assert naming.main(["make", "--true", "--out", str(tmp_path / "true"), "--objects", "2"]) == 0
    assert (tmp_path / "true" / "key.csv").read_text().count(",true images\n") == 2
    assert naming.main(["make", "--true", "--grey", "--out", str(tmp_path / "grey"), "--objects", "2"]) == 0
    with Image.open(tmp_path / "grey" / "sheets" / "sheet_1.png") as sheet:
        pixels = np.asarray(sheet)
    assert np.array_equal(pixels[..., 0], pixels[..., 1])
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    forms = [(tmp_path / kind / "sheets" / "answers.csv").read_text() for kind in ("true", "grey")]
    assert forms[0] == forms[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make", "--out", "x"], "give --model or --true, and only one of them"),
        (["make", "--true", "--out", "x", "--objects", "0"], "for --objects. It must be at least 1"),
        (["make", "--true", "--out", "x", "--objects", "182"], "there are 181"),
        (["score", "none.csv", "--key", "none.csv"], "cannot be read"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert naming.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
