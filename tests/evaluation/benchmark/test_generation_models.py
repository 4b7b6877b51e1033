"""What models and machines are to the editing of a benchmark: adapters, students, SLURM's jobs."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from pbe.editing.engine import complete
from pbe.evaluation.benchmark import generation
from pbe.evaluation.benchmark.edits import model_identity
from pbe.evaluation.benchmark.generation import GenerateSettings
from pbe.models.adapters import add_adapter


def test_adapters_name_a_pipeline_by_how_strong_they_are(pipe):
    add_adapter(pipe.model, ["residual"], 2, 4.0, "mug")
    try:
        whole = model_identity(pipe)
        pipe.set_adapter_scale("mug", 0.5)
        assert model_identity(pipe) != whole
        pipe.set_adapter_scale("mug", 1.0)
        assert model_identity(pipe) == whole
    finally:
        pipe.unload_adapter()


def test_as_many_steps_as_a_model_of_few_is_asked_for(pipe):
    """Fifty is the call's default, for which such a model takes its own number."""
    sizes = dataclasses.replace(pipe.model.config.unet, few_steps=4, guidance_range=[2.0, 2.0])
    few, settings = dataclasses.replace(pipe.model.config, unet=sizes), GenerateSettings(guidance_scale=2.0)
    assert settings.call(few)["settings"].steps == 4
    fifty = dataclasses.replace(settings, steps=50).call(few)
    assert complete(fifty["settings"], SimpleNamespace(config=few)).steps == 50
    assert fifty["choice"].name == "lcm"
    assert settings.call(pipe.model.config)["settings"].steps == 50


@pytest.mark.parametrize("started", [False, True])
def test_slurm_counts_where_srun_started_several(monkeypatch, started: bool):
    """A batch script's own shell has SLURM's variables, too; waiting for other tasks there never ends."""
    variables = {"JOB_ID": "7", "JOB_NAME": "sh", "NTASKS": "2", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    if started:
        variables |= {"STEP_ID": "0", "NTASKS_PER_NODE": "2"}
    for name in (*generation.LAUNCHED, "SLURM_STEP_ID", "SLURM_STEPID", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    strategy = generation._trainer(GenerateSettings(devices="2"), groups=8).strategy
    assert strategy.cluster_environment.creates_processes_externally == started
