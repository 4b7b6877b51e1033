"""The CSV log: appended, cut back to a checkpoint, and read although its last row is half-written."""

from __future__ import annotations

import csv
import errno
import logging
import os
from pathlib import Path

import pytest

import pbe.training.monitoring.loggers as loggers_module
from pbe.config import Config, LoggingConfig
from pbe.errors import UserError
from pbe.training.monitoring.loggers import CsvLog, keep_run_id, make_loggers, read_curve, read_rows
from tests.training.tiny import logged, run, tiny_config


@pytest.fixture
def log(tmp_path: Path) -> CsvLog:
    log = CsvLog(tmp_path)
    for step in (0, 10, 20, 30):
        log.log_metrics({"train/loss": 1.0 / (step + 1), "epoch": 3.0}, step)
    log.log_metrics({"val/loss": 0.25, "val/psnr": 20.0}, 20)
    return log


def steps(log: CsvLog, name: str = "train/loss") -> list[int]:
    return [step for step, _ in read_curve(log.path, name)]


def test_a_row_a_value_under_one_header(log: CsvLog):
    with log.path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "seconds", "name", "value"]
    assert [(row[0], row[2]) for row in rows[1:]] == [
        ("0", "train/loss"),
        ("10", "train/loss"),
        ("20", "train/loss"),
        ("30", "train/loss"),
        ("20", "val/loss"),
        ("20", "val/psnr"),
    ]


def test_values_keep_every_digit(log: CsvLog):
    log.log_metrics({"exact": 1.0 / 3.0}, 40)
    assert read_curve(log.path, "exact") == [(40, 1.0 / 3.0)]


def test_a_second_logger_goes_on_below(log: CsvLog):
    CsvLog(log.path.parent).log_metrics({"train/loss": 0.01}, 40)
    assert steps(log) == [0, 10, 20, 30, 40]


def test_cut_keeps_the_step_itself_and_drops_what_is_later(log: CsvLog):
    log.cut(20)
    assert steps(log) == [0, 10, 20]
    assert steps(log, "val/loss") == [20]
    log.log_metrics({"train/loss": 0.5}, 30)
    assert read_curve(log.path, "train/loss")[-1] == (30, 0.5)


def test_cut_for_a_fresh_start_drops_everything(log: CsvLog):
    log.cut(-1)
    assert read_rows(log.path) == []
    log.log_metrics({"train/loss": 2.0}, 0)
    assert read_curve(log.path, "train/loss") == [(0, 2.0)]


def test_cut_before_anything_is_logged_does_nothing(tmp_path: Path):
    CsvLog(tmp_path).cut(5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", ["40", "40,17953", "40,1795368731.98,train/lo"])
def test_a_half_written_last_row_is_left_out_and_cut_away(log: CsvLog, torn: str):
    with log.path.open("a") as file:
        file.write(torn)
    assert steps(log) == [0, 10, 20, 30]
    log.cut(30)
    log.log_metrics({"train/loss": 0.1}, 40)
    assert steps(log) == [0, 10, 20, 30, 40]


def test_has_tells_what_is_written(log: CsvLog, tmp_path: Path):
    assert log.has(20, "val/loss")
    assert not log.has(10, "val/loss")
    assert not log.has(2, "val/loss")
    assert not CsvLog(tmp_path / "nowhere").has(0, "val/loss")


def test_an_unknown_logger_is_one_clear_line(tmp_path: Path):
    config = Config(logging=LoggingConfig(loggers=["csv", "tensorbored"]))
    with pytest.raises(UserError, match="'tensorbored'; there are: csv, wandb, tensorboard"):
        make_loggers(config, tmp_path)


def test_the_id_of_a_run_stays_with_its_folder(tmp_path: Path):
    folders = [tmp_path / "a", tmp_path / "b"]
    ids = []
    for folder in [*folders, *folders]:
        folder.mkdir(exist_ok=True)
        (logger,) = made = make_loggers(Config(logging=LoggingConfig(loggers=["wandb"])), folder)
        keep_run_id(folder, made)
        ids.append(logger.version)
    assert ids[0] != ids[1]
    assert ids[2:] == ids[:2]


def test_a_missing_tensorboard_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(*args: object, **kwargs: object) -> None:
        raise ModuleNotFoundError("neither tensorboard nor tensorboardX")

    monkeypatch.setattr(loggers_module, "TensorBoardLogger", missing)
    with pytest.raises(UserError, match="needs: pip install tensorboard"):
        make_loggers(Config(logging=LoggingConfig(loggers=["tensorboard"])), tmp_path)


class FullDisk:
    """Takes so many bytes of a write, and then none."""

    def __init__(self, room: int) -> None:
        self.room, self.write = room, os.write

    def __call__(self, file: int, content: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.write(file, content[: self.room])
        self.room -= taken
        return taken


@pytest.mark.parametrize("room", [0, 7])
def test_a_full_disk_is_told_once_and_the_rows_come_when_there_is_room(log, monkeypatch, caplog, room: int):
    before = log.path.read_bytes()
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "pbe"):
        patch.setattr(loggers_module.os, "write", FullDisk(room))
        for step in (40, 50):
            log.log_metrics({"train/loss": 1.0 / 3.0}, step)
            assert log.path.read_bytes() == before, "half a row would read as another number"
    (told,) = caplog.messages
    assert "No space left on device; training goes on" in told
    log.log_metrics({"train/loss": 0.5}, 60)
    assert read_curve(log.path, "train/loss")[-3:] == [(40, 1.0 / 3.0), (50, 1.0 / 3.0), (60, 0.5)]


def test_a_full_disk_ends_no_run(shards, autoencoder, tmp_path, monkeypatch, caplog):
    write = os.write

    def full_at_step_two(file: int, content: bytes) -> int:
        if content.startswith(b"2,") and b"\n3," not in content:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content)

    settings = [autoencoder, "trainer.max_steps=4"]
    run(tiny_config(shards, tmp_path / "a", *settings))
    monkeypatch.setattr(loggers_module.os, "write", full_at_step_two)
    with caplog.at_level(logging.ERROR, "pbe"):
        assert run(tiny_config(shards, tmp_path / "b", *settings)).steps == 4
    assert len([message for message in caplog.messages if "metrics.csv" in message]) == 1
    assert logged(tmp_path / "b") == logged(tmp_path / "a")
