"""Loggers: a CSV log that survives restarts, and Weights & Biases."""

from __future__ import annotations

import csv
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from pbe.config import Config, to_dict
from pbe.errors import UserError

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


def make_loggers(config: Config, folder: Path) -> list[Logger]:
    """Build the loggers that the configuration names; offline W&B writes into ``folder``."""
    made: list[Logger] = []
    for name in config.logging.loggers:
        if name == "csv":
            made.append(CsvLog(folder))
        elif name == "wandb":
            made.append(_wandb(config, folder))
        else:
            raise UserError(f"logging.loggers has '{name}'; there are: csv, wandb")
    return made


def close_loggers(loggers: Iterable[Logger]) -> None:
    """End W&B's run; the next training of this process would go on writing into it otherwise."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _wandb(config: Config, folder: Path) -> WandbLogger:
    options = config.logging
    return WandbLogger(
        project=options.wandb_project,
        name=options.run_name or folder.name,
        save_dir=folder,
        mode=options.wandb_mode,
        config=to_dict(config),
    )
