"""An ablation as a whole: trained, edited, scored and shown; killed on the way; and its sampling sweep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pbe.cli.main import make_app
from pbe.config import load_config, to_dict
from pbe.evaluation.ablation.config import load_ablation
from pbe.evaluation.ablation.plan import make_plan
from tests.training.conftest import _contained, autoencoder, shards, workshop  # noqa: F401 - fixtures
from tests.training.tiny import tiny_config, write_config

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, "-m", "pbe.cli", "ablate"]


def write_ablation(folder: Path, data: Path, setting: str, workspace: str, seeds: tuple[int, ...]) -> Path:
    config = tiny_config(data, folder / "run", setting, f"cache.folder={folder / 'cache'}")
    write_config(folder / "base.yaml", config)
    content = {
        "base": "base.yaml",
        "workspace": str(folder / workspace),
        "seeds": list(seeds),
        "cumulative": True,
        "shared": {"trainer.max_steps": 4, "cache.variants": 1, "model.exemplar_encoder.pooled_stages": True},
        "prior": {"overrides": {"objective.drop_probability": 1.0, "trainer.max_steps": 2}},
        "sampling": {"steps": 2},
        "rows": [
            {"name": "all", "title": "all_tokens", "overrides": {"model.exemplar_encoder.tokens": "all"}},
            {"name": "one", "start": "prior", "overrides": {"model.exemplar_encoder.tokens": "class"}},
            {"name": "guided", "sampling": {"guidance_scale": 3.0}},
        ],
        "comparisons": [["all", "one"], ["one", "guided"]],
        "evaluation": {
            "objects": 3, "metrics": ["seam", "colour-inside", "psnr-outside"], "resamples": 200,
            "exemplar_auc": True, "own_exemplars": True,
            "plot_x": "row", "plot_y": "seam", "strip_cases": 2,
        },
    }  # fmt: skip
    path = folder / f"{workspace}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(path: Path, *more: str) -> list[str]:
    return [*COMMAND, str(path), "--jobs", "2", *more]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def ablate(path: Path, *more: str) -> str:
    done = subprocess.run(command(path, *more), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def pictures(path: Path) -> dict[str, bytes]:
    plan = make_plan(load_ablation(path))
    return {
        f"{cell.row.name}-{cell.seed}-{file.name}": file.read_bytes()
        for cell in plan.cells
        for file in sorted((cell.edits.folder / "pictures").glob("*.png"))
    }


def test_rows_share_what_they_can_and_nothing_else(shards, autoencoder, tmp_path):  # noqa: F811
    plan = make_plan(load_ablation(write_ablation(tmp_path, shards, autoencoder, "work", (3, 4))))
    kinds = [stage.kind for stage in plan.stages]
    # prior, and two rows with two seeds: the guided row is the same training
    assert kinds.count("training") == 5
    assert (kinds.count("edits"), kinds.count("scores")) == (12, 6)  # half of the edits from own exemplars
    assert (kinds.count("benchmark"), kinds.count("own benchmark")) == (1, 1)
    made = {stage.fingerprint: stage for stage in plan.stages}
    for cell in plan.cells:
        edits, own = (made[need] for need in cell.scores.needs)
        assert (edits, own) == (cell.edits, cell.own_edits)
        differing = {one for one in zip(edits.command, own.command, strict=True) if one[0] != one[1]}
        folders = (str(edits.folder / "pictures"), str(own.folder / "pictures"))
        assert differing == {(str(plan.benchmark), str(plan.own_benchmark)), folders}
        assert cell.scores.settings["own_edits"] == folders[1]
    one, guided = (plan.of(name)[0] for name in ("one", "guided"))
    assert one.training == guided.training
    assert one.edits.fingerprint != guided.edits.fingerprint
    places = [stage.fingerprint for stage in plan.stages]
    for place, stage in enumerate(plan.stages):
        assert set(stage.needs) <= set(places[:place])
    # where a run lies and how it is watched shapes nothing, everything else does
    base = {stage.name: stage.fingerprint for stage in plan.stages if stage.kind == "training"}
    for change, same in (
        ("trainer.checkpoint_every=7", True),
        ("logging.every=3", True),
        ("data.num_workers=1", True),
        ("optimizer.learning_rate=0.5", False),
        ("data.sample.extend_fraction=0.1", False),
    ):
        config = tiny_config(shards, tmp_path / "run", autoencoder, f"cache.folder={tmp_path}", change)
        write_config(tmp_path / "base.yaml", config)
        other = make_plan(load_ablation(tmp_path / "work.yaml"))
        found = {stage.name: stage.fingerprint for stage in other.stages if stage.kind == "training"}
        assert (found == base) is same, change
        assert to_dict(other.cells[0].config)["seed"] == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_ablation_killed_on_the_way_ends_in_the_same_results(shards, autoencoder, tmp_path):  # noqa: F811
    whole = write_ablation(tmp_path, shards, autoencoder, "whole", (3,))
    assert "stages to do" in ablate(whole, "--dry-run")
    assert not (tmp_path / "whole").exists()
    assert "results: " in ablate(whole)
    folder = tmp_path / "whole" / "whole"
    results = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["all", "one", "guided"]
    assert {one["verdict"] for one in results["differences"]} <= {"higher", "lower", "undecided"}
    assert ["sampling.guidance_scale", "1", "3"] in results["rows"][2]["changes"]
    page, table = (folder / "index.html").read_text(), (folder / "tables.md").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert "| all_tokens |" in table
    assert r"all\_tokens" in (folder / "tables.tex").read_text()

    cut = write_ablation(tmp_path, shards, autoencoder, "cut", (3,))
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command(cut), stdout=subprocess.PIPE, text=True, env=environment())
        assert process.stdout is not None
        for line in process.stdout:
            if "train all" in line and "done" not in line:
                break
        time.sleep(8.0)  # well inside the process of that training, or behind it
        process.send_signal(number)
        assert process.wait() == (143 if number == signal.SIGTERM else -signal.SIGKILL)
        time.sleep(5.0)  # what was killed takes its children along
    ablate(cut)
    assert pictures(cut) == pictures(whole)
    again = json.loads((tmp_path / "cut" / "cut" / "results.json").read_text())
    assert [row["scores"] for row in again["rows"]] == [row["scores"] for row in results["rows"]]
    # and once more: nothing is left to do
    assert "stages are done already" in ablate(cut)

    sweep = tmp_path / "sweep.yaml"
    rows = [{"name": f"s{scale}", "sampling": {"guidance_scale": scale}} for scale in (1.0, 2.0)]
    sweep.write_text(yaml.safe_dump({"extends": {"file": "cut.yaml", "row": "one"}, "rows": rows}))
    told = ablate(sweep)
    assert "train" not in told
    assert "edit with s2.0" in told


def test_commands_are_those_of_the_project(shards, autoencoder, tmp_path):  # noqa: F811
    """Each is taken by its own parser, and the training's configuration is read as it was planned."""
    path = write_ablation(tmp_path, shards, autoencoder, "work", (3,))
    content = yaml.safe_load(path.read_text()) | {"scenes": {"train": 4, "validation": 2}}
    path.write_text(yaml.safe_dump(content))
    plan = make_plan(load_ablation(path))
    lines = [list(stage.command) for stage in plan.stages if stage.command[:2] == ("-m", "pbe.cli")]
    assert {" ".join(line[2:4]).split(" -")[0].split(" /")[0] for line in lines} == {
        *("toy render", "cache", "train", "evaluate"),
    }
    for line in lines:
        make_app().parse_args(line[2:], print_error=False, exit_on_error=False)
    for cell in plan.cells:
        cell.training.prepare()
        assert cell.training.command[3:] == (str(cell.training.folder / "stage.yaml"),)
        assert load_config(cell.training.command[3]) == cell.config
        assert Path(cell.config.output_dir) == cell.training.folder
