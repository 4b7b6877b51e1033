"""Stands for the command of a stage: counts its runs, works in steps that it keeps, and can wait or fail."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import yaml


def main() -> int:
    folder, stopped = Path(sys.argv[1]), []
    job = yaml.safe_load((folder / "stage.yaml").read_text())
    signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    made = folder / "made.txt"
    with (folder / "runs.txt").open("a") as runs:
        runs.write("run\n")
    inputs = [Path(name).read_text() for name in job.get("reads", [])]
    while len(made.read_text().split() if made.exists() else []) < job["steps"]:
        if stopped:
            time.sleep(job.get("linger", 0.0))
            (folder / "stopped.txt").write_text("cleanly")
            return 130
        if made.exists() and "until" in job and not Path(job["until"]).exists():
            time.sleep(0.02)
            continue
        time.sleep(job.get("pause", 0.0))
        with made.open("a") as file:
            file.write(f"{job['value']} ")
    if job.get("fails"):
        print("error: it cannot be done", flush=True)
        return 2
    if not job.get("forgets"):
        (folder / "result.txt").write_text(f"{job['value']}({','.join(inputs)}){made.read_text()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
