"""Loggers: a CSV log that survives restarts, Weights & Biases, and TensorBoard."""

from __future__ import annotations

import csv
import secrets
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from pbe.config import Config, to_dict
from pbe.errors import UserError

ID_NAME = "wandb_id"
HEADER = ("step", "seconds", "name", "value")


class CsvLog(Logger):
    """One row a value in ``metrics.csv``: step, Unix time, name, value. A restart goes on below.

    Args:
        folder: where ``metrics.csv`` lies.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"

    @property
    def name(self) -> str:
        """Name of the log."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one log a run."""
        return ""

    @property
    def experiment(self) -> Path:
        """Path of the file."""
        return self.path

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration lies beside the log as YAML."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row for each metric."""
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(HEADER)
            for name, value in metrics.items():
                if name != "epoch":
                    writer.writerow((step, f"{time.time():.2f}", name, repr(float(value))))

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Drop the rows after ``step``: a run that continues from a checkpoint writes them again."""
        if not self.path.exists():
            return
        rows = read_rows(self.path)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            writer.writerows(row for row in rows if int(row[0]) <= step)
        temporary.replace(self.path)

    def has(self, step: int, name: str) -> bool:
        """Say whether a metric of a step is written already."""
        return self.path.exists() and any(
            row[0] == str(step) and row[2] == name for row in read_rows(self.path)
        )


def read_rows(path: Path) -> list[list[str]]:
    """Return the rows of a metrics file without its header; a half-written last row is left out."""
    with path.open(newline="") as file:
        return [row for row in list(csv.reader(file))[1:] if len(row) == len(HEADER)]


def read_curve(path: Path, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of one metric of a ``metrics.csv``."""
    return [(int(row[0]), float(row[3])) for row in read_rows(path) if row[2] == name]


def make_loggers(config: Config, folder: Path, step: int = -1) -> list[Logger]:
    """Build the loggers that the configuration names, all of them writing into ``folder``.

    Args:
        config: the experiment.
        folder: of the run.
        step: of the checkpoint that it goes on from, -1 for a start.

    Raises:
        UserError: an unknown name, or TensorBoard where it is not installed.
    """
    made: list[Logger] = []
    for name in config.logging.loggers:
        if name == "csv":
            made.append(CsvLog(folder))
        elif name == "wandb":
            made.append(_wandb(config, folder))
        elif name == "tensorboard":
            made.append(_tensorboard(folder, step))
        else:
            raise UserError(f"logging.loggers has '{name}'; there are: csv, wandb, tensorboard")
    return made


def close_loggers(loggers: Iterable[Logger]) -> None:
    """End W&B's run; the next training of this process would go on writing into it otherwise."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _run_id(folder: Path) -> str:
    """Return the id of the run, made once and kept in its folder: a restart goes on with the same W&B run."""
    path = folder / ID_NAME
    if getattr(rank_zero_only, "rank", 0):  # only the first process talks to W&B
        return ""
    if not path.is_file() or not path.read_text().strip():
        path.write_text(f"{secrets.token_hex(4)}\n")
    return path.read_text().strip()


def _tensorboard(folder: Path, step: int) -> TensorBoardLogger:
    """Return a logger that drops what was logged after ``step``, which a restarted run logs again."""
    try:
        return TensorBoardLogger(folder, name="tensorboard", version="", purge_step=step + 1)
    except ModuleNotFoundError as error:
        raise UserError("logging.loggers has 'tensorboard', which needs: pip install tensorboard") from error


def _wandb(config: Config, folder: Path) -> WandbLogger:
    options = config.logging
    return WandbLogger(
        project=options.wandb_project,
        name=options.run_name or folder.name,
        id=_run_id(folder) or None,
        resume="allow",
        save_dir=folder,
        mode=options.wandb_mode,
        config=to_dict(config),
    )
