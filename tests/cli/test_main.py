"""The command ``pbe``: help, errors, paths, versions, and where command lines may be read."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

import pbe
from pbe.cli import arguments, naming, prepare, study, toy
from pbe.cli.main import COMMANDS, GROUPS, main, make_app, run_command

ROOT = Path(__file__).parent.parent.parent
ALL_HELP = """
import contextlib, io, json, sys
from pbe.cli.main import COMMANDS, GROUPS, main
said = {}
for command in ("", *GROUPS, *COMMANDS):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*command.split(), "--help"]) == 0
    said[command] = out.getvalue()
print(json.dumps([said, sorted({name.split(".")[0] for name in sys.modules})]))
"""
HEAVY = {
    "cv2",
    "matplotlib",
    "numpy",
    "omegaconf",
    "open_clip",
    "PIL",
    "polars",
    "pytorch_lightning",
    "torch",
}


def test_help_is_printed_without_the_packages_that_take_seconds() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALL_HELP], capture_output=True, text=True, check=True, cwd=ROOT
    )
    said, modules = json.loads(done.stdout)
    assert set(modules) & HEAVY == set()
    assert "Usage: pbe COMMAND" in said[""]
    for name in COMMANDS:
        assert f"│ {name.split()[0]} " in said[""]
    for command in set(said) - {"", *GROUPS}:
        assert said[command].startswith(f"Usage: pbe {command}")
        assert said[command].splitlines()[2], f"pbe {command} does not say what it does"
        for option in re.split(r"\n│[ *]+(?=--)", said[command])[1:]:  # its text says it, or its value does
            assert not ("(default" in option and "[default:" in option), f"pbe {command}: {option}"


@pytest.mark.parametrize("command", ["", "train", "evaluate"])
def test_help_takes_a_moment(command: str) -> None:
    """0.3 s on an idle machine; processor time, best of three, so that others' work counts little."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, "-m", "pbe.cli", *command.split(), "--help"]
        subprocess.run(words, capture_output=True, check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.45, spent


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{pbe.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("paint", 'Unknown command "paint"'),
        ("convert a b --dtyp fp16", "Unknown option: --dtyp. Did you mean --dtype?"),
        ("convert a b --to paint", 'Invalid value "paint" for --to. Choose from: "native", "compvis"'),
        ("toy render --out x --scenes many", 'unable to convert "many" into int'),
        ("toy render --out x", "--scenes requires an argument"),
        ("plot --out x.png", "RUN requires an argument"),
        ("evaluate --out x", "give --model, or --edits"),
        ("train nowhere.yaml", "no configuration file at 'nowhere.yaml'; those that ship are"),
        ("train configs/papr.yaml", "no configuration file at 'configs/papr.yaml'; did you mean paper?"),
        ("train toy trainer.max_step=1", "the nearest valid one is 'trainer.max_steps'"),
        ("cache toy --size --list", "cannot go together"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_interrupt_and_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.csv").touch()
    words = ["plot", str(tmp_path), "--out", str(tmp_path / "curve.png")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert main(words) == 2
    assert "the Python package 'matplotlib' is not installed for" in capsys.readouterr().err

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pbe.training.monitoring.loggers.read_curve", interrupt)
    assert main(words) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            CppCompileError(["g++", "x.cpp"], "x.cpp:1:\nx.cpp:2: error: no header\n1 error"),
            "x.cpp:2: error: no header",
        ),
        (CppCompileError(["g++"], "killed"), "C++ compile error"),
        (InvalidCxxCompiler("g++"), "Compiler: g++ is not found."),
    ],
)
def test_a_compiler_that_fails_is_one_line(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(cause: Exception) -> None:
        raise InductorError(cause, None)

    assert run_command(lambda: fail(error)) == 2
    told = capsys.readouterr().err
    assert told == f"error: the C++ compiler failed ({message}); mend it, or leave compile out\n"
    with pytest.raises(InductorError):  # a defect, whose traceback is wanted
        run_command(lambda: fail(KeyError("a node")))


def bound(words: str) -> tuple[tuple[object, ...], Any]:
    """The positional arguments and the settings of a command line."""
    _, found, _ = make_app().parse_args(words.split())
    return found.args, found.kwargs["settings"]


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    positional, settings = bound("study tabulate --key=~/key.json ~/a.json b~.json ./~")
    assert settings.key == Path("/home/me/key.json")
    assert positional == (Path("/home/me/a.json"), Path("b~.json"), Path("~"))
    positional, settings = bound("convert ~/in ~/out --config ~/c.yaml")
    assert positional == ("/home/me/in", "/home/me/out")
    assert settings.config == "/home/me/c.yaml"
    _, settings = bound("evaluate --model=~/m --out ~ --reference ~/r")
    assert (settings.source.model, settings.source.out) == ("/home/me/m", Path("/home/me"))
    assert settings.scoring.reference == Path("/home/me/r")


def test_lists_take_several_values_and_repeatable_options_one() -> None:
    _, settings = bound("evaluate --out o --edits a b --edits c=d --guidance 1 -2.5 5 --model m")
    assert settings.source.edits == ["a", "b", "c=d"]
    assert settings.sampling.guidance == [1.0, -2.5, 5.0]
    _, settings = bound(
        "evaluate --out o --guidance 1 3 --steps 2 --guidance 5 --out p --steps 3 --metrics a"
    )
    assert (settings.sampling.guidance, settings.sampling.steps) == ([5.0], 3)
    assert settings.source.out == Path("p")
    positional, settings = bound("prepare --label cat --label dog coco:a --out o coco:b")
    assert settings.label == ["cat", "dog"]
    assert positional == ("coco:a", "coco:b")
    positional, settings = bound("train toy a=1 --dry-run b=2")
    assert positional == ("toy", "a=1", "b=2")
    assert settings.dry_run


@pytest.mark.parametrize(
    "words", ["train toy --no-dry-run", "demo --empty-set", "prepare --empty-label", "toy score --no-csv"]
)
def test_only_switches_that_are_on_can_be_turned_off(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, bound, _ = make_app().parse_args(["evaluate", "--out", "o", "--no-preserve-background"])
    assert not bound.kwargs["settings"].generating.preserve_background
    assert main(words.split()) == 2
    assert f"Unknown option: {words.split()[-1]}" in capsys.readouterr().err


def test_command_lines_are_read_in_one_room() -> None:
    """So that complaints are one line, and paths may begin with a tilde."""
    libraries = {"cyclopts", "click", "typer", "tyro", "jsonargparse"}
    readers = []
    for path in (ROOT / "pbe").rglob("*.py"):
        text = path.read_text()
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
        if path.parent.name != "cli" and (imported & libraries or "ArgumentParser" in text):
            readers.append(str(path.relative_to(ROOT)))
    assert readers == []


def test_choices_and_defaults_are_those_of_the_rooms(tmp_path: Path) -> None:
    """Where a room states them too, for those who call it from Python."""
    from pbe.checkpoints.tensors import DTYPES
    from pbe.data.packing.pack import ENGINES
    from pbe.data.packing.plan import FRAMES, PackSettings
    from pbe.evaluation.benchmark.toy_run import QuickSettings
    from pbe.evaluation.study.naming import OBJECTS
    from pbe.evaluation.study.ranking import StudySettings

    assert get_args(arguments.Dtype) == tuple(DTYPES)
    hints = get_type_hints(prepare.PrepareSettings)
    assert (get_args(hints["engine"]), get_args(hints["exif_frame"])) == (tuple(ENGINES), FRAMES)
    assert prepare.pack_settings(prepare.PrepareSettings(out=tmp_path)) == PackSettings()
    made = study.MakeSettings(systems=[], benchmark=tmp_path, out=tmp_path)
    assert {each.name: getattr(made, each.name) for each in fields(StudySettings)} == vars(StudySettings())
    quick = toy.ScoreSettings()
    known = QuickSettings()
    assert (quick.objects, quick.steps, quick.solver) == (known.objects, known.steps, known.solver)
    assert quick.guidance == known.guidance_scale
    assert naming.MakeSettings(out=tmp_path).objects == OBJECTS
