"""The commands of docs/reproduce.md and docs/evaluation.md are accepted by the programs they call."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pbe.cli.main import make_app
from pbe.config import load_config

ROOT = Path(__file__).resolve().parent.parent
TOP = {"train.py": "train", "sample.py": "edit"}  # the subcommands that the two at the top are
PAGES = ("reproduce", "evaluation")


def commands(page: str) -> list[list[str]]:
    """The words of every command of a page that calls ``pbe`` or a file of ours, from that on."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    inline = re.findall(
        r"`((?:python|pbe [^`]*--[a-z-]+) [^`]+)`",
        re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL),
    )
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + [each.replace("\n", " ") for each in inline]
    found = []
    for line in lines:
        line = line.replace("-m pbe.cli ", "pbe ")
        ours = re.search(r"(?:^|\s)((?:(?:scripts/)?\w+\.py|pbe)(?:\s.*)?)$", line)
        if ours and not line.startswith("#") and "--help" not in line:
            script, *rest = shlex.split(ours.group(1), comments=True)
            found.append(["pbe", TOP[script], *rest] if script in TOP else [script, *rest])
    return found


def accept(words: list[str]) -> None:
    """Parse a command as its program does; raises what the program would say."""
    script, *arguments = words
    if script == "pbe":
        _, bound, _ = make_app().parse_args(arguments, print_error=False, exit_on_error=False)
        if arguments[0] in ("train", "inspect", "cache"):
            load_config(ROOT / bound.args[0], list(bound.args[1:]))
        return
    module: Any = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    assert isinstance(module.parse(arguments), argparse.Namespace)


@pytest.mark.parametrize("words", [words for page in PAGES for words in commands(page)], ids=" ".join)
def test_commands_are_accepted(words: list[str]) -> None:
    accept(words)


def test_the_pages_have_the_steps() -> None:
    steps = [words[words[0] == "pbe"] for words in commands("reproduce")]
    places = [steps.index(step) for step in ("prepare", "convert", "train", "evaluate")]
    assert places == sorted(places)
    assert steps.count("train") == 3, "asking first, 8 GPUs, 64 GPUs"


def test_bad_commands_are_noticed() -> None:
    for words in (
        ["pbe", "train", "configs/paper.yaml", "trainer.max_step=3"],
        ["pbe", "evaluate", "--model", "m", "--out", "o", "--beauty"],
    ):
        with pytest.raises(Exception, match=r"max_step|beauty"):
            accept(words)


def test_both_trainings_take_the_same_samples_a_step() -> None:
    batches = set()
    trainings = [words for words in commands("reproduce") if words[:2] == ["pbe", "train"]]
    for _, _, file, *overrides in (words for words in trainings if "--dry-run" not in words):
        config = load_config(ROOT / file, overrides)
        trainer = config.trainer
        batches.add(config.data.batch_size * int(trainer.devices) * trainer.num_nodes * trainer.accumulate)
        assert trainer.max_steps == round(40 * 1_700_000 / 256)
    assert batches == {256}


def test_sums_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "reproduce.md").read_text()
    lines = (ROOT / "docs" / "downloads.sha256").read_text().splitlines()
    for line in lines:
        digest, name = line.split("  ")
        assert re.fullmatch("[0-9a-f]{64}", digest)
        assert digest in page
        assert Path(name).name in page
