"""The command that edits: it ends when it is told to, and keeps what it has made."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from pbe.evaluation.benchmark import generation
from tests.commands import evaluate


def test_a_signal_ends_edits_and_what_is_made_stays(pipe, bench_files, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "pictures"
    command = ["--edits-only", "--model", tmp_path / "model", "--benchmark", bench_files, "--out", out]
    command += ["--guidance", 1.0, "--solver", "ddim", "--steps", 1, "--batch-size", 1, "--devices", 1]
    command = [*map(str, command), "--device", "cpu"]
    write, written = generation.write_image, []

    def write_and_be_told_to_end(path: Path, picture: object) -> None:
        written.append(write(path, picture))  # type: ignore[arg-type]
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(generation, "write_image", write_and_be_told_to_end)
    before = signal.getsignal(signal.SIGINT)
    assert evaluate.main(command) == 130
    assert signal.getsignal(signal.SIGINT) == before
    assert len(list(out.glob("*.png"))) == 2
    assert evaluate.main(command) == 0  # and resumes
    assert len(written) == len(list(out.glob("*.png"))) == 7
    assert evaluate.main([*command, "--guidance", "1", "2"]) == 2
