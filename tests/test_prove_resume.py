"""The proof that kills change nothing sees what differs, and holds at a small size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from scripts import prove_resume


def finished(folder: Path) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "model" / "unet.safetensors").write_bytes(b"weights")
    state = {"state_dict": {"w": torch.ones(3)}, "optimizer_states": [{"state": {0: {"m": torch.zeros(3)}}}]}
    torch.save(state, folder / "checkpoints" / "last.ckpt")
    (folder / "metrics.csv").write_text(
        "step,seconds,name,value\n1,1700.00,train/loss,0.25\n1,1700.00,system/memory_gb,1.5\n2,1701.00,val/loss,0.5\n"
    )
    return folder


def change_log(run: Path, old: str, new: str) -> None:
    path = run / "metrics.csv"
    path.write_text(path.read_text().replace(old, new))


def change_moment(run: Path) -> None:
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path)
    content["optimizer_states"][0]["state"][0]["m"][1] = 1e-7
    torch.save(content, path)


CHANGES = {
    "the last digit of a loss": (lambda run: change_log(run, "0.25", "0.2500001"), "the logs differ: row 0"),
    "a missing row": (lambda run: change_log(run, "2,1701.00,val/loss,0.5\n", ""), "the logs differ: 2, 1"),
    "a weight": (lambda run: (run / "model" / "unet.safetensors").write_bytes(b"Weights"), "model/unet"),
    "a moment": (change_moment, "tensor /optimizer_states/0/state/0/m"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_every_difference_is_seen(tmp_path, change: str):
    make, said = CHANGES[change]
    one, two = finished(tmp_path / "one"), finished(tmp_path / "two")
    assert prove_resume.differences(one, two) == []
    make(two)
    (found,) = prove_resume.differences(one, two)
    assert found.startswith(said)


def test_the_time_is_no_difference(tmp_path):
    one = finished(tmp_path / "one")
    two = Path(shutil.copytree(one, tmp_path / "two"))
    change_log(two, "1.5", "2.5")
    change_log(two, "1701.00", "1801.00")
    assert prove_resume.differences(one, two) == []


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    (tmp_path / "straight").mkdir()
    assert prove_resume.main(["--out", str(tmp_path)]) == 2
    assert "holds runs already; name another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_two_kills_change_nothing(tmp_path, capfd):
    numbers = tmp_path / "numbers.json"
    assert prove_resume.main(["--steps", "45", "--kills", "2", "--json", str(numbers)]) == 0
    lives = json.loads(numbers.read_text())["lives"]
    assert len(lives) == 2
    assert all(life["resumed_from"] % 20 == 0 for life in lives)
    assert "rows of the log and all weights are equal" in capfd.readouterr().out
