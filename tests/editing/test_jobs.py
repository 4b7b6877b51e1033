from __future__ import annotations

import json
from pathlib import Path

import pytest

from pbe.editing.jobs import MAX_SEED, Job, check_outputs, read_pairs, single_job
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
        (PAIR | {"seed": "3"}, "line 2: 'seed' must be a whole number"),
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
        (PAIR | {"name": None}, "line 2: 'name' must be a string"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: object, message: str):
    with pytest.raises(UserError, match=message):
        read_pairs(write(tmp_path, PAIR, line), 0)


def test_pairs_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_pairs(tmp_path / "none.jsonl", 0)
    with pytest.raises(UserError, match="holds no pairs"):
        read_pairs(write(tmp_path, "", " "), 0)
    (tmp_path / "latin").write_bytes(b'{"image": "\xe9"}')
    with pytest.raises(UserError, match="is not UTF-8"):
        read_pairs(tmp_path / "latin", 0)


def test_a_single_job_takes_the_name_of_its_picture():
    assert single_job("x/a.b.jpg", "m", "e", None, 0)[0].name == "a.b"
    with pytest.raises(UserError, match="cannot be the name"):
        single_job("a.png", "m", "e", "", 0)


def job(name: str, seed: int, image: str = "in.png") -> Job:
    return Job(Path(image), Path("m.png"), Path("e.png"), name, seed, f"line of {name} {seed}: ")


def test_outputs_must_differ(tmp_path: Path):
    check_outputs([job("a", 0), job("a", 3), job("b", 0)], 3, tmp_path)
    with pytest.raises(UserError, match="line of a 2: 'a_2' is already the output of another edit"):
        check_outputs([job("a", 0), job("a", 2)], 3, tmp_path)


def test_outputs_never_replace_inputs(tmp_path: Path):
    with pytest.raises(UserError, match="would replace its input"):
        check_outputs([job("a", 0, str(tmp_path / "a_1.png"))], 2, tmp_path)


def test_seeds_stay_within_range(tmp_path: Path):
    check_outputs([job("a", MAX_SEED)], 1, tmp_path)
    with pytest.raises(UserError, match="too large for 2 images"):
        check_outputs([job("a", MAX_SEED)], 2, tmp_path)
