"""Two processes train as one does: the same losses, and either goes on where the other stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
import torch

from pbe.errors import UserError
from pbe.training.monitoring.loggers import read_curve
from pbe.training.tasks.encoding import batch_drop
from tests.programs import Program, run_ranks
from tests.training.test_finetuning import make_base
from tests.training.tiny import run, tiny_config, weights, write_config

# a large epsilon: Adam divides by the gradient's size and would blow up rounding where it is near zero
SETTINGS = ("optimizer.eps=1e-3", "trainer.validate_every=2", "trainer.validation_samples=5")
NAMES = (
    "train/loss",
    "train/loss_simple",
    "train/gradient_norm",
    "val/loss",
    "val/loss_t500",
    "val/loss_band",
)


def with_two(folder: Path, strategy: str, *more: str) -> list[str]:
    """Return the arguments that train the configuration beside ``folder`` with two processes."""
    return [str(folder.with_suffix(".yaml")), "trainer.devices=2", f"trainer.strategy={strategy}", *more]


def same_curves(folder: Path, least: int, tolerance: float = 1e-5, names: tuple[str, ...] = NAMES) -> None:
    """Check that the runs ``one`` and ``two`` of a folder have logged the same, relative to it."""
    for name in names:
        one, two = (read_curve(folder / kind / "metrics.csv", name) for kind in ("one", "two"))
        assert [step for step, _ in two] == [step for step, _ in one], name
        assert len(one) >= least
        assert dict(two) == pytest.approx(dict(one), rel=tolerance), name


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between the weights of two models."""
    assert first.keys() == second.keys()
    return max(float((first[k] - second[k]).abs().max()) for k in first if first[k].is_floating_point())


def test_two_processes_are_one_with_the_same_global_batch(shards, autoencoder, tmp_path, project_root):
    config = tiny_config(shards, tmp_path / "two", autoencoder, *SETTINGS, "trainer.max_steps=2")
    write_config(tmp_path / "two.yaml", config)
    command = with_two(tmp_path / "two", "ddp", "data.batch_size=2")
    status, said, errors = Program(project_root / "train.py", *command, told=tmp_path).finish()
    assert status == 0, errors
    assert said.count("2 steps, ") == 1, "one process speaks for both"
    one = [autoencoder, *SETTINGS, "trainer.max_steps=4", "data.batch_size=4"]
    straight = run(tiny_config(shards, tmp_path / "one", *one))
    # the second half by one process: the epoch and the order of its global batches go on
    again = run(tiny_config(shards, tmp_path / "two", *one))
    same_curves(tmp_path, least=3)
    assert furthest(weights(straight.model_dir), weights(again.model_dir)) < 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_sharded_training_is_one_process_too_and_goes_on_from_and_to_it(
    shards, autoencoder, tmp_path, project_root, optimizer: str
):
    """FSDP2: an unsharded run, continued sharded and with micro-batches, continued unsharded."""
    settings = [autoencoder, *SETTINGS, "logging.grid_every=4", "objective.drop_mode=per_batch"]
    settings.append(f"optimizer.name={optimizer}")
    one = [*settings, "data.batch_size=4"]
    straight = run(tiny_config(shards, tmp_path / "one", *one, "trainer.max_steps=6"))
    run(tiny_config(shards, tmp_path / "two", *one, "trainer.max_steps=2"))
    write_config(
        tmp_path / "two.yaml", tiny_config(shards, tmp_path / "two", *settings, "trainer.max_steps=4")
    )
    command = with_two(tmp_path / "two", "fsdp2", "data.batch_size=1", "trainer.accumulate=2")
    said = run_ranks(project_root / "train.py", *command, told=tmp_path)
    assert "".join(said).count("4 steps, ") == 1, "one process speaks for both"
    middle, sizes = weights(tmp_path / "two" / "model"), weights(straight.model_dir)
    assert {k: v.shape for k, v in middle.items()} == {k: v.shape for k, v in sizes.items()}, "all of it"
    again = run(tiny_config(shards, tmp_path / "two", *one, "trainer.max_steps=6"))
    tolerance = 1e-5 if optimizer == "adamw" else 5e-3  # Muon orthogonalises in bfloat16
    same_curves(tmp_path, 4, tolerance)
    assert furthest(sizes, weights(again.model_dir)) < tolerance
    grids = [cv2.imread(str(tmp_path / kind / "grids" / "step0000004.png")) for kind in ("one", "two")]
    assert int(cv2.absdiff(*grids).max()) <= 2


@pytest.mark.parametrize("method", ["consistency", pytest.param("trajectory", marks=pytest.mark.slow)])
def test_sharded_distillation_is_one_process_too(shards, workshop, tmp_path, project_root, method: str):
    """The moving average that ``consistency`` follows is put into all weights, those of no block as well."""
    settings = [make_base(workshop, tmp_path / "base", 0), *SETTINGS, "task=distillation"]
    settings += ["distillation.steps=2", "distillation.teacher_steps=4", f"distillation.method={method}"]
    settings += ["trainer.max_steps=5", "optimizer.ema_decay=0.99"]
    run(tiny_config(shards, tmp_path / "one", *settings, "data.batch_size=4"))
    write_config(tmp_path / "two.yaml", tiny_config(shards, tmp_path / "two", *settings))
    command = with_two(tmp_path / "two", "fsdp2", "data.batch_size=2")
    run_ranks(project_root / "train.py", *command, told=tmp_path)
    same_curves(tmp_path, 2, 1e-4, ("train/loss", "train/gradient_norm", "val/loss"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave no process group and none of its environment behind."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["per_sample", "per_batch"])
def test_ddp_finds_no_unused_parameter(alone, shards, autoencoder, tmp_path, mode: str):
    """DDP ends a run in the step after one that left a parameter out, with any number of processes."""
    dropping = (f"objective.drop_mode={mode}", "objective.drop_probability=0.5")
    config = tiny_config(shards, tmp_path, autoencoder, "trainer.strategy=ddp", *dropping)
    drops = [batch_drop(config.seed, step) < 0.5 for step in range(3)]
    assert any(drops)
    assert not all(drops)
    assert run(config).steps == 3


def test_sharding_an_autoencoder_is_refused(alone, shards, tmp_path):
    config = tiny_config(shards, tmp_path, "task=autoencoder", "trainer.strategy=fsdp2")
    with pytest.raises(UserError, match="task=autoencoder cannot be sharded"):
        run(config)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Lightning's plain fsdp wants a GPU")
def test_plain_fsdp_trains_on_a_gpu(alone, shards, autoencoder, tmp_path):
    settings = ("trainer.strategy=fsdp", "trainer.accelerator=gpu")
    assert run(tiny_config(shards, tmp_path, autoencoder, *settings)).steps == 3
