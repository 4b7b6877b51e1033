"""The page of measurements is made of the benchmarks' files, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.benchmarks import common
from scripts.benchmarks.performance import MARK, main, number

MACHINE = {
    **{"processor": "P", "cores": 2, "threads": 2, "memory_gib": 24, "date": "2026-01-02", "load": 0.1},
    **{"torch": "2", "diffusers": None, "pytorch-lightning": "3"},
}


def test_page_holds_every_number_once_and_keeps_what_stands_above(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"written by hand\n\n{MARK}\nold")
    tables = {"seconds": {"ours": {"median": 1.23456, "ratio": 0.5}, "theirs": {"median": 200.4}}}
    content = {"command": "python x", "machine": MACHINE, "tables": tables}
    (tmp_path / "unet.json").write_text(json.dumps(content))
    assert main(["--page", str(page), "--folder", str(tmp_path)]) == 0
    text = page.read_text()
    assert text.startswith(f"written by hand\n\n{MARK}\n")
    assert "old" not in text
    assert "P, 2 threads, 24 GiB; torch 2, pytorch-lightning 3; 2026-01-02\n" in text
    assert "| ours | 1.23 | 0.5 |" in text
    assert "| theirs | 200 |  |" in text


def test_nothing_measured_and_no_mark_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(MARK)
    assert main(["--page", str(page), "--folder", str(tmp_path)]) == 2
    assert "nothing is measured" in capsys.readouterr().err
    page.write_text("nothing")
    assert main(["--page", str(page), "--folder", str(tmp_path)]) == 2
    assert "lacks the line" in capsys.readouterr().err
    assert main(["--page", str(tmp_path / "none.md"), "--folder", str(tmp_path)]) == 2
    assert "is not a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(0.012345, "0.0123"), (12.0, "12"), (123.4, "123"), (None, ""), (float("nan"), "")]
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_turns_alternate_and_ratios_are_of_one_turn() -> None:
    order: list[str] = []
    times = common.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert order == list("ababab")
    assert [len(each) for each in times.values()] == [3, 3]
    assert common.ratio([1.0, 2.0, 30.0], [2.0, 4.0, 10.0]) == 0.5
    assert common.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}


def test_plots_fit_the_exponent(tmp_path: Path) -> None:
    exponents = common.plot(tmp_path / "x.png", {"square": {2: 4.0, 3: 9.0, 5: 25.0}}, x="", y="")
    assert exponents["square"] == pytest.approx(2.0)
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_rows_line_up_and_numbers_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    wide = "a column's long name"
    common.print_rows("title", {"one": {"count": 14_600_000, wide: 0.123456}, "two": {wide: 56573.4}})
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].split(maxsplit=2) == ["title", "count", wide]
    assert lines[1].split() == ["one", "14,600,000", "0.1235"]
    assert lines[2].split() == ["two", "56,573"]
    assert len({len(line) for line in lines}) == 1


def test_shared_options_are_those_that_a_benchmark_takes(capsys: pytest.CaptureFixture[str]) -> None:
    parser = common.make_parser("What it does.", "any", takes=("--device",))
    options = common.read_options(parser, ["--device", "cuda"])
    assert set(vars(options)) == {"device", "json"}
    with pytest.raises(SystemExit, match="2"):
        common.read_options(parser, ["--repeats", "3"])
    assert "unrecognized arguments: --repeats" in capsys.readouterr().err
