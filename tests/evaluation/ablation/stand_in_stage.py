"""Stands for the process of a stage: counts its runs, works in steps that it keeps, and can fail."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from pbe.evaluation.ablation.stages import Stage


def main() -> int:
    content = json.loads(Path(sys.argv[1]).read_text())
    content.pop("resumed")
    content["folder"], content["needs"] = Path(content["folder"]), tuple(content["needs"])
    stage, stopped = Stage(**content), []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    job, made = stage.job, stage.folder / "made.txt"
    with (stage.folder / "runs.txt").open("a") as runs:
        runs.write("run\n")
    inputs = [Path(name).read_text() for name in job.get("reads", [])]
    while len(made.read_text().split() if made.exists() else []) < job["steps"]:
        if stopped:
            (stage.folder / "stopped.txt").write_text("cleanly")
            return 143
        time.sleep(job.get("pause", 0.0))
        with made.open("a") as file:
            file.write(f"{job['value']} ")
    if job.get("fails"):
        print("error: it cannot be done", flush=True)
        return 2
    (stage.folder / "result.txt").write_text(f"{stage.name}({','.join(inputs)}){made.read_text()}")
    if not job.get("forgets"):
        stage.finish(0.5, False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
