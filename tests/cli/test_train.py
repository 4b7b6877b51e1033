"""The command: configuration mistakes, and processes that are killed and started again."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
from tests.programs import Program
from tests.training.conftest import _contained, autoencoder, shards, workshop  # noqa: F401 - fixtures
from tests.training.tiny import (
    Watch,
    checkpoint,
    differing,
    logged,
    send,
    tiny_config,
    watched,
    weights,
    write_config,
)


@pytest.fixture
def config_file(shards: Path, autoencoder: str, tmp_path: Path) -> Path:  # noqa: F811
    return write_config(tmp_path / "tiny.yaml", tiny_config(shards, tmp_path / "run", autoencoder))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Call the command; it must fail with one line on stderr, which is returned."""
    assert train.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_overrides_change_the_configuration(config_file: Path, capsys: pytest.CaptureFixture[str]):
    folder = config_file.parent / "elsewhere"
    arguments = [str(config_file), "trainer.max_steps=2", f"output_dir={folder}", "trainer.max_steps=1"]
    assert train.main(arguments) == 0
    assert {step for step, _, _ in logged(folder, "train/")} == {1}
    assert "1 steps, " in capsys.readouterr().out
    assert (folder / "model" / "unet.safetensors").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.max_step=5",
            "unknown key 'trainer.max_step'; the nearest valid one is 'trainer.max_steps'",
        ),
        ("optimiser.eps=1", "unknown key 'optimiser'; the nearest valid one is 'optimizer"),
        ("trainer.max_steps=many", "wrong value for 'trainer.max_steps'"),
        ("task=paint", "'task' is 'paint'; it must be one of diffusion, autoencoder"),
        ("trainer.max_steps", "is not of the form key=value"),
        ("autoencoder_from=''", "autoencoder_from is empty: name the model folder"),
        ("data.train_shards=nowhere", "nowhere"),
        ("data.validation_shards=nowhere", "nowhere"),
        ("trainer.resume=nowhere.ckpt", "trainer.resume: no checkpoint at 'nowhere.ckpt'"),
        ("init_from=nowhere", "init_from is 'nowhere', which does not exist; name a model folder"),
        ("logging.loggers=[paper]", "logging.loggers has 'paper'"),
        ("logging.loggers=csv", "'logging.loggers': it is a list, such as logging.loggers=[...], not 'csv'"),
        ("trainer.devices=zwei", "trainer.devices is 'zwei'"),
        ("trainer.precision=16-true", "must be one of 32-true, bf16-mixed, 16-mixed, bf16-true"),
        ("trainer.accelerator=tpu", "this machine has none"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(config_file, capsys, override: str, message: str):
    assert message in refused(capsys, config_file, override)


def test_a_python_without_the_packages_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "omegaconf", None)  # stands for a package that is missing
    for name in [name for name in sys.modules if name.startswith("pbe.config")]:
        monkeypatch.delitem(sys.modules, name)
    assert "the Python package 'omegaconf' is not installed for" in refused(capsys, "some.yaml")


@pytest.mark.parametrize("task", ["diffusion", "autoencoder"])
def test_compiling_without_a_compiler_is_one_line(config_file: Path, monkeypatch, capsys, task: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "/nowhere/g++ -v")
    told = refused(capsys, config_file, f"task={task}", "trainer.compile=true")
    assert "trainer.compile needs a C++ compiler, and there is no '/nowhere/g++ -v'; install g++" in told
    assert not (config_file.parent / "run" / "checkpoints").exists()


def test_a_missing_configuration_is_one_line(tmp_path, capsys):
    assert "no configuration file at" in refused(capsys, tmp_path / "none.yaml")


def test_a_dry_run_prints_the_plan_and_writes_nothing(config_file: Path, capsys: pytest.CaptureFixture[str]):
    assert train.main([str(config_file), "--dry-run"]) == 0
    assert "samples a second over 10 steps" in capsys.readouterr().out
    assert not (config_file.parent / "run").exists()


def test_resume_never_does_not_touch_a_run(config_file: Path, capsys: pytest.CaptureFixture[str]):
    assert train.main([str(config_file), "trainer.max_steps=1"]) == 0
    before = (config_file.parent / "run" / "metrics.csv").read_bytes()
    capsys.readouterr()
    assert "holds a run already" in refused(capsys, config_file, "trainer.resume=never")
    assert (config_file.parent / "run" / "metrics.csv").read_bytes() == before


def test_a_checkpoint_that_does_not_fit_is_one_line(config_file: Path, capsys: pytest.CaptureFixture[str]):
    assert train.main([str(config_file), "trainer.max_steps=1", "optimizer.ema_decay=0"]) == 0
    capsys.readouterr()
    last = config_file.parent / "run" / "checkpoints" / "last.ckpt"
    assert "was trained without a moving average" in refused(capsys, config_file)
    wider = refused(capsys, config_file, "model.unet.model_channels=40", "optimizer.ema_decay=0")
    assert "does not fit the model" in wider
    assert "misshapen: model.unet" in wider
    whole = last.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        last.write_bytes(content)
        assert "is damaged or not a checkpoint of this project" in refused(capsys, config_file)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_signals_save_and_say_how_to_go_on(config_file, capsys, monkeypatch, number: int, code: int):
    with monkeypatch.context() as patch:
        watched(patch, Watch(2, send(number)))
        assert train.main([str(config_file)]) == code
    run = config_file.parent / "run"
    told = capsys.readouterr().out
    assert "stopped at step 2; the same command continues" in told
    assert f"weights so far in {run / 'model'}" in told
    assert checkpoint(run)["global_step"] == 2
    assert (run / "model" / "unet.safetensors").is_file()
    assert train.main([str(config_file)]) == 0
    assert [step for step, _, _ in logged(run, "train/loss_simple")] == [1, 2, 3]


def start_and_signal(script: Path, file: Path, ready: Callable[[], bool], number: int) -> int:
    """Start the command, send it a signal once ``ready`` says so, and return its exit code.

    SIGTERM goes to its whole process group, workers included, as schedulers and terminals send it.
    """
    process = Program(script, file, told=file.parent)
    give_up = time.monotonic() + 240
    while not ready() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.02)
    assert ready() or process.poll() is not None, "not ready in four minutes"
    if number == signal.SIGTERM:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    status, _, errors = process.finish()
    assert number == signal.SIGKILL or "Traceback" not in errors, errors
    # a loader's worker that loses its parent may complain from within the standard library; we must not
    assert 'train.py", line' not in errors, errors
    return status


def test_killed_processes_end_like_one_that_was_not(shards, autoencoder, tmp_path, project_root):  # noqa: F811
    settings = ["trainer.max_steps=40", "trainer.validate_every=7", "trainer.checkpoint_every=5"]
    # workers of the real thing; each start is a process of its own
    config = tiny_config(shards, tmp_path / "run", autoencoder, *settings, "data.num_workers=1")
    file, last = write_config(tmp_path / "tiny.yaml", config), tmp_path / "run" / "checkpoints" / "last.ckpt"
    script = project_root / "train.py"

    assert start_and_signal(script, file, last.exists, signal.SIGKILL) == -signal.SIGKILL
    killed_at = checkpoint(tmp_path / "run")["global_step"]
    assert 5 <= killed_at < 40

    def went_on() -> bool:
        return logged(tmp_path / "run")[-1][0] > killed_at

    assert start_and_signal(script, file, went_on, signal.SIGTERM) == 143
    assert killed_at < checkpoint(tmp_path / "run")["global_step"] < 40

    assert train.main([str(file)]) == 0
    straight = ["data.num_workers=0", f"output_dir={tmp_path / 'straight'}"]
    assert train.main([str(file), *straight]) == 0
    assert differing(weights(tmp_path / "straight" / "model"), weights(tmp_path / "run" / "model")) == []
    assert logged(tmp_path / "run") == logged(tmp_path / "straight")
