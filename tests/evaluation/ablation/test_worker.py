"""The process of a stage: it ends when it is told to, and keeps what it has made."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pbe.evaluation.ablation.worker import make_edits
from pbe.evaluation.benchmark import generation


def test_a_signal_ends_edits_and_what_is_made_stays(pipe, bench_files, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "model")
    settings = {
        "guidance_scale": 1.0, "solver": "ddim", "steps": 1, "seed": 0, "batch_size": 1, "accelerator": "cpu",
    }  # fmt: skip
    job = {"model": str(tmp_path / "model"), "benchmark": str(bench_files), "settings": settings}
    write, written = generation.write_image, []

    def write_and_be_told_to_end(path: Path, picture: object) -> None:
        written.append(write(path, picture))  # type: ignore[arg-type]
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(generation, "write_image", write_and_be_told_to_end)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        make_edits(job, tmp_path)
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    assert make_edits(job, tmp_path) == 0  # and goes on
    assert len(written) == len(list((tmp_path / "pictures").glob("*.png"))) == 7
