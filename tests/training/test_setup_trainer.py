"""What does not fit this machine is one line, and SLURM's variables count where srun is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment

from pbe.config import TrainerConfig
from pbe.errors import UserError
from pbe.training.resume.signals import StopSignals
from pbe.training.setup import _devices, check_machine, cluster, make_trainer, strategy_names
from tests.training.tiny import tiny_config

OPTIONS = TrainerConfig(accelerator="cpu", devices="1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accelerator": "tpu"}, "trainer.accelerator is 'tpu', but this machine has none"),
        ({"accelerator": "quantum"}, "it must be one of auto, gpu, cpu"),
        ({"devices": "zwei"}, "trainer.devices is 'zwei'; it must be auto, a number from 1"),
        ({"devices": "0"}, "trainer.devices is '0'"),
        ({"devices": ""}, "trainer.devices is ''"),
        ({"devices": "-2"}, "trainer.devices is '-2'"),
        ({"devices": "1.5"}, "trainer.devices is '1.5'"),
        ({"devices": "²"}, "trainer.devices is '²'"),
        ({"devices": "00"}, "trainer.devices is '00'"),
        (
            {"devices": "-1"},
            "trainer.devices is '-1'; on the CPU it is a number of processes, here from 1 to",
        ),
        ({"devices": "[0, 1]"}, "trainer.devices is '[0, 1]'; on the CPU"),
        ({"devices": "3,"}, "trainer.devices is '3,'; on the CPU"),
        ({"devices": "99999999"}, "trainer.devices is '99999999'; on the CPU"),  # would start that many
        ({"strategy": "dpp"}, "the nearest is 'ddp'"),
        ({"strategy": ""}, "trainer.strategy is ''"),
        ({"strategy": "ddp_spawn"}, "trainer.strategy is 'ddp_spawn'"),
        ({"strategy": "fsdp2", "precision": "16-mixed"}, "use bf16-mixed"),
    ],
)
def test_what_is_not_there_is_named(change: dict[str, str], words: str):
    with pytest.raises(UserError) as caught:
        check_machine(replace(OPTIONS, **change))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("devices", ["auto", "1", "2", "4"])
def test_devices_are_all_or_some(devices: str):
    check_machine(replace(OPTIONS, devices=devices))


def test_devices_are_given_to_lightning_as_it_takes_them():
    assert [_devices(text) for text in ("auto", "2", "-1", "0,1", "[3]")] == ["auto", 2, -1, [0, 1], [3]]


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2", "model_parallel", "fsdp"])
def test_strategies_of_this_project_are_among_the_names(strategy: str):
    assert strategy in strategy_names()


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.strategy=fsdp",),
        ("trainer.strategy=deepspeed",),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path, overrides: tuple[str, ...]):
    config = tiny_config(tmp_path, tmp_path / "run", *overrides, "logging.loggers=[]")
    with pytest.raises(UserError, match="do not work together here") as caught:
        make_trainer(config, tmp_path / "run", StopSignals(), callbacks=[])
    assert "\n" not in str(caught.value)


ALLOCATION = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "sh", "SLURM_NNODES": "1"}
TASK = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STARTED = ALLOCATION | TASK | {"SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "8"}


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("SLURM_STEP_ID", "SLURM_STEPID", *STARTED):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({}, type(None)),
        (ALLOCATION, LightningEnvironment),  # a shell of an allocation
        (ALLOCATION | TASK, LightningEnvironment),  # a batch script without srun
        (STARTED | {"SLURM_NTASKS": "1"}, LightningEnvironment),
        (STARTED | {"SLURM_JOB_NAME": "bash"}, LightningEnvironment),
        (STARTED, SLURMEnvironment),
    ],
)
def test_slurm_is_believed_where_srun_started_several(slurm, variables: dict[str, str], kind: type):
    for name, value in variables.items():
        slurm.setenv(name, value)
    found = cluster()
    assert isinstance(found, kind)
    if isinstance(found, SLURMEnvironment):
        assert not found.auto_requeue


def test_tasks_without_a_node_are_one_line(slurm):
    for name, value in STARTED.items():
        slurm.setenv(name, value)
    slurm.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(UserError, match=r"SLURM's variables do not fit: .*--ntasks-per-node=8"):
        cluster()
