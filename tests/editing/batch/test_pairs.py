"""Files of pairs in every form that people write them in."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from pbe.editing.batch.jobs import check_outputs, read_pairs
from pbe.errors import UserError

PAIR = {"image": "a.png", "mask": "m.png", "exemplar": "e.png"}


def write(folder: Path, *lines: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_pairs_are_relative_to_their_file(tmp_path: Path):
    absolute = {"image": "/x/b.png", "mask": "m.png", "exemplar": "e.png", "name": "Zoë", "seed": 9}
    jobs = read_pairs(write(tmp_path, PAIR, "", absolute), seed=4)
    assert jobs[0].image == tmp_path / "a.png"
    assert (jobs[0].name, jobs[0].seed) == ("0001_a", 4)
    assert jobs[1].image == Path("/x/b.png")
    assert (jobs[1].name, jobs[1].seed) == ("Zoë", 9)
    assert jobs[1].origin == f"{tmp_path}/pairs.jsonl line 3: "


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n" + json.dumps(PAIR).encode() + b"\r\n"
    )
    assert len(read_pairs(path, 0)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: must be a JSON object"),
        ({"image": "a.png", "mask": "m.png"}, "line 2: 'exemplar' is missing"),
        (PAIR | {"image": 3}, "line 2: 'image' must be a string"),
        (PAIR | {"mask": ""}, "line 2: 'mask' must be a string that is not empty"),
        (PAIR | {"masc": "x"}, "line 2: unknown key 'masc'; there are: image, mask, exemplar, name, seed"),
        (PAIR | {"seed": "three"}, "line 2: 'seed' must be a whole number"),
        (PAIR | {"seed": 2.5}, "line 2: 'seed' must be a whole number"),
        (PAIR | {"seed": float("nan")}, "line 2: 'seed' must be a whole number"),
        (PAIR | {"seed": 2**63}, "line 2: 'seed' must be a whole number from 0 to 9223372036854775807"),
        (PAIR | {"seed": [3]}, "line 2: 'seed' must be a whole number"),
        (PAIR | {"seed": True}, "line 2: 'seed' must be a whole number"),
        (PAIR | {"seed": -1}, "line 2: 'seed' must be a whole number"),
        (PAIR | {"name": "../up"}, "line 2: name '../up' cannot be the name of a file"),
        (PAIR | {"name": "x" * 300}, "line 2: name 'x+' cannot be the name of a file"),
        (PAIR | {"name": "\ud800"}, r"line 2: name '\\ud800' is not Unicode text"),
        (
            PAIR | {"image": "\ud800.png", "name": "a"},
            r"line 2: 'image' cannot be the path of a file: '\\ud800",
        ),
        (PAIR | {"mask": "a\0b"}, "line 2: 'mask' cannot be the path of a file"),
        (
            json.dumps(PAIR)[:-1] + f', "seed": {"9" * 5000}}}',
            "line 2: not usable JSON: a number is too long",
        ),
        ("[" * 100_000, "line 2: not"),
        (PAIR | {"name": 3}, "line 2: 'name' must be a string"),
        (PAIR | {"image": None}, "line 2: 'image' is missing"),
        (PAIR | {"image": "https://x/i.png"}, "line 2: 'image' is the URL 'https://x/i.png'; download it"),
        ('{"image": "a", "image": "b"}', "line 2: 'image' is there twice"),
        (json.dumps(PAIR) + " more", "line 2: not valid JSON .Expecting value at column 58"),
        (json.dumps(PAIR) * 2, "line 2: not valid JSON .Extra data"),
        ("# a comment", "line 2: not valid JSON"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: object, message: str):
    with pytest.raises(UserError, match=message) as raised:
        read_pairs(write(tmp_path, PAIR, line), 0)
    assert "\n" not in str(raised.value)


def test_pairs_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_pairs(tmp_path / "none.jsonl", 0)
    with pytest.raises(UserError, match="holds no pairs"):
        read_pairs(write(tmp_path, "", " "), 0)
    (tmp_path / "latin").write_bytes(b'{"image": "\xe9"}')
    with pytest.raises(UserError, match="is not UTF-8"):
        read_pairs(tmp_path / "latin", 0)


def as_csv(separator: str) -> str:
    rows = io.StringIO()
    writer = csv.writer(rows, delimiter=separator)
    writer.writerow(["Image", " mask", "exemplar", "seed", "name"])
    writer.writerow(["a.png", "m.png", "e.png", "3", "one, two"])
    writer.writerow(["a.png", "m.png", "e.png", "", ""])
    return rows.getvalue()


ENTRIES = [PAIR | {"seed": 3, "name": "one, two"}, PAIR]
FORMS = {
    "lines": "\n".join(map(json.dumps, ENTRIES)),
    "array": json.dumps(ENTRIES),
    "array over lines": json.dumps(ENTRIES, indent=2),
    "array with a comma too many": json.dumps(ENTRIES)[:-1] + ",\n]\n",
    "objects over lines": "\n".join(json.dumps(each, indent=2) for each in ENTRIES),
    "comma": as_csv(","),
    "semicolon": as_csv(";"),
    "tabulator": as_csv("\t"),
}


@pytest.mark.parametrize("indent", [None, 2])
def test_entries_of_an_array_are_named_by_their_place(tmp_path: Path, indent: int | None):
    (tmp_path / "pairs").write_text(json.dumps([PAIR, PAIR, PAIR], indent=indent))
    jobs = read_pairs(tmp_path / "pairs", 0)
    assert [job.name for job in jobs] == ["0001_a", "0002_a", "0003_a"]
    check_outputs(jobs, 1, tmp_path / "out")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_jobs(tmp_path: Path, form: str, encoding: str):
    (tmp_path / "pairs").write_bytes(FORMS[form].replace("\n", "\r\n").encode(encoding))
    first, second = read_pairs(tmp_path / "pairs", 7)
    assert (first.image, first.mask, first.exemplar) == tuple(
        tmp_path / f"{name}.png" for name in ("a", "m", "e")
    )
    assert (first.name, first.seed) == ("one, two", 3)
    assert (second.name[4:], second.seed) == ("_a", 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"image": "a"},\n{"image": 1}]', "line 2: 'mask' is missing"),
        (f"[\n{json.dumps(PAIR)},\n3]", "line 3: must be a JSON object"),
        (f"[\n{json.dumps(PAIR)},\n", "line 3: the array does not end where the file does"),
        (f"[{json.dumps(PAIR)}]\n[]", "line 1: the array does not end where the file does"),
        (f"[{json.dumps(PAIR)},\n\n{{]", "line 3: not valid JSON"),
        ("image,mask\na,b\n", "line 1: not in a form of pairs: JSON objects"),
        ("image,mask,exemplar\n\na,b\n", "line 3: 2 cells for 3 columns"),
        ("image,mask,exemplar\na,b,c\na,,c\n", "line 3: 'mask' is missing"),
        ("image,mask,exemplar,image\n", "line 1: 'image' is there twice"),
        ("image,mask,exemplar,prompt\na,b,c,d", "line 2: unknown key 'prompt'"),
        ('image,mask,exemplar\n"a,b,c\n', "line 2: not a row of CSV"),
        ("# a comment\n" + json.dumps(PAIR), "line 1: not in a form of pairs"),
        ("[]", "holds no pairs"),
        ("image,mask,exemplar\n", "holds no pairs"),
    ],
)
def test_malformed_files_name_the_line(tmp_path: Path, content: str, message: str):
    (tmp_path / "pairs").write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        read_pairs(tmp_path / "pairs", 0)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("seed", [3, 3.0, "3", "3.0", " 3 "])
def test_a_whole_seed_in_any_form(tmp_path: Path, seed: object):
    (job,) = read_pairs(write(tmp_path, PAIR | {"seed": seed}), 0)
    assert job.seed == 3
    assert type(job.seed) is int


def test_null_stands_for_what_is_left_out(tmp_path: Path):
    (job,) = read_pairs(write(tmp_path, PAIR | {"seed": None, "name": None}), 8)
    assert (job.seed, job.name) == (8, "0001_a")


def test_paths_of_windows_and_of_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.png").touch()
    (tmp_path / "odd\\name.png").touch()
    pair = {"image": "sub\\a.png", "mask": "odd\\name.png", "exemplar": "~/e [1] {x} 5%.png"}
    (job,) = read_pairs(write(tmp_path, pair), 0)
    assert (job.image, job.name) == (tmp_path / "sub/a.png", "0001_a")
    assert job.mask == tmp_path / "odd\\name.png", "a backslash of a name that exists is one"
    assert job.exemplar == tmp_path / "home/e [1] {x} 5%.png"
