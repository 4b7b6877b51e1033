"""The table and strip of few steps, made with a small model and a student of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pbe.checkpoints.native import save_model
from pbe.evaluation.report import BAND_GAP, GAP
from pbe.models import LatentDiffusion
from scripts.few_steps import main
from tests.models.tiny import tiny_model_config


def test_table_and_strip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_model_config()
    torch.manual_seed(0)
    teacher = LatentDiffusion(config)
    save_model(tmp_path / "teacher", teacher)
    unet = replace(config.unet, guidance_range=[1.0, 8.0], few_steps=2)
    student = LatentDiffusion(replace(config, unet=unet))
    student.load_state_dict(teacher.state_dict(), strict=False)
    save_model(tmp_path / "student", student)
    out = tmp_path / "strip.png"
    options = ["--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student"), "--steps", "1"]
    others = ["--others", f"again={tmp_path / 'student'}", "--objects", "2", "--out", str(out)]
    assert main([*options, *others]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in rows[2:]] == [
        ["| teacher, 50 PLMS steps", "102"],
        ["| student, 1 step", "1"],
        ["| again", "2"],
    ]
    with Image.open(out) as strip:
        assert strip.height == 6 * (128 + GAP) + BAND_GAP  # masked, exemplar, three systems, hidden
