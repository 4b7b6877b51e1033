"""Commands that write folders: a start that fails leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.errors import UserError
from pbe.evaluation.metrics import towers
from scripts import make_examples
from tests.commands import ablate, cache, convert, fit, study

MISTAKES: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "more objects than there are": (make_examples.main, ["--out", "new/examples", "--count", "100000"]),
    "no weights": (
        fit.main,
        ["--images=pictures", "--out=new/m.safetensors", "--tower-weights=clip=nowhere", "--components=2"],
    ),
    "no benchmark": (
        study.main, ["make", "--systems", "a=pictures", "b=pictures", "--benchmark=no", "--out=new"],
    ),
    "no model": (convert.main, ["nowhere", "new/model", "--to", "diffusers"]),
    "no ablation": (ablate.main, ["nowhere.yaml"]),
    "no cache named": (cache.main, ["toy.yaml", "output_dir=new"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_folder_is_as_it_was(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "toy.yaml").write_text("data: {train_shards: nowhere}\n")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    main, arguments = MISTAKES[mistake]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mixture_is_begun_once_the_tower_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png")

    def fail(*_: object) -> towers.Tower:
        raise UserError("these weights are damaged")

    monkeypatch.setattr(towers, "load_tower", fail)
    out = tmp_path / "new" / "m.safetensors"
    arguments = [
        "--images",
        str(tmp_path),
        "--out",
        str(out),
        "--tower-weights",
        "clip=x",
        "--components",
        "2",
    ]
    assert fit.main(arguments) == 2
    assert not out.parent.exists()
