"""Loggers: a CSV log that survives restarts, Weights & Biases, and TensorBoard."""

from __future__ import annotations

import csv
import errno
import io
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from pbe.config import Config, to_dict
from pbe.errors import UserError
from pbe.files import atomic_write

LOG = logging.getLogger(__name__)

ID_NAME = "wandb_id"
HEADER = ("step", "seconds", "name", "value")


class CsvLog(Logger):
    """One row a value in ``metrics.csv``: step, Unix time, name, value. A resumed run appends to it.

    Rows that cannot be written (disk full) are kept and tried again with the next ones; training goes on.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self._waiting, self._complained = "", False

    @property
    def name(self) -> str:
        """Name of the log."""
        return "csv"

    @property
    def version(self) -> str:
        """Nothing: there is one log a run."""
        return ""

    @property
    def experiment(self) -> Path:
        """Path of the file."""
        return self.path

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration lies beside the log as YAML."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row for each metric."""
        values = {name: repr(float(value)) for name, value in metrics.items() if name != "epoch"}
        self._waiting += _lines((step, f"{time.time():.2f}", *row) for row in values.items())
        try:
            head = "" if self.path.exists() else _lines([HEADER])
            append_whole(self.path, head + self._waiting)
        except OSError as error:
            if not self._complained:
                LOG.error(
                    "could not write '%s': %s; training goes on, and the rows are kept until there is room",
                    self.path, error.strerror or error,
                )  # fmt: skip
            self._complained = True
            return
        self._waiting, self._complained = "", False

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Drop the rows after ``step``: a run that continues from a checkpoint writes them again.

        Steps only ever grow in a log, so its end is cut off, which needs no room.
        """
        if not self.path.exists():
            return
        kept = _lines([HEADER, *(row for row in read_rows(self.path) if int(row[0]) <= step)]).encode()
        if self.path.read_bytes().startswith(kept):
            os.truncate(self.path, len(kept))
            return
        atomic_write(self.path, kept)

    def has(self, step: int, name: str) -> bool:
        """Return whether a metric of a step is written already."""
        return self.path.exists() and any(
            row[0] == str(step) and row[2] == name for row in read_rows(self.path)
        )


def _lines(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def append_whole(path: Path, text: str) -> None:
    """Append text to a file, all of it or (an OSError) nothing: half a number would read as another one."""
    content = text.encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(file).st_size
        try:
            if os.write(file, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):  # a device or pipe cannot be cut
                os.ftruncate(file, before)
            raise
    finally:
        os.close(file)


def read_rows(path: Path) -> list[list[str]]:
    """Return the rows of a metrics file without its header; a half-written last row is left out."""
    with path.open(newline="") as file:
        return [row for row in list(csv.reader(file))[1:] if len(row) == len(HEADER)]


def read_curve(path: Path, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of one metric of a ``metrics.csv``."""
    return [(int(row[0]), float(row[3])) for row in read_rows(path) if row[2] == name]


def make_loggers(config: Config, folder: Path, step: int = -1) -> list[Logger]:
    """Build the loggers that the configuration names, all of them writing into ``folder``.

    ``step`` is that of the checkpoint that the run resumes from, -1 for a start: TensorBoard drops what was
    logged after it, which a restarted run logs again.
    """
    makers: dict[str, Callable[[], Logger]] = {
        "csv": lambda: CsvLog(folder),
        "wandb": lambda: _wandb(config, folder),
        "tensorboard": lambda: TensorBoardLogger(folder, name="tensorboard", version="", purge_step=step + 1),
    }
    if unknown := [name for name in config.logging.loggers if name not in makers]:
        raise UserError(f"logging.loggers has '{unknown[0]}'; there are: {', '.join(makers)}")
    made = []
    for name in dict.fromkeys(config.logging.loggers):
        try:
            made.append(makers[name]())
        except ModuleNotFoundError as error:
            raise UserError(f"logging.loggers has '{name}', which needs: pip install {name}") from error
    return made


def close_loggers(loggers: Iterable[Logger]) -> None:
    """End W&B's run; otherwise the next training of this process would write into it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:  # asking would begin one
            logger.experiment.finish()


def _run_id(folder: Path) -> str:
    """Return the id of the W&B run that the folder knows, or a new one."""
    path = folder / ID_NAME
    if getattr(rank_zero_only, "rank", 0):  # only the first process talks to W&B
        return ""
    return (path.read_text().strip() if path.is_file() else "") or secrets.token_hex(4)


def keep_run_id(folder: Path, loggers: Iterable[Logger]) -> None:
    """Note the id of the W&B run, so that a resumed run in the same folder continues it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            (folder / ID_NAME).write_text(f"{logger.version}\n")


def _wandb(config: Config, folder: Path) -> WandbLogger:
    """Return a logger that is silent where nothing is sent; only ``online`` asks for an account."""
    options = config.logging
    if options.wandb_mode != "online":
        os.environ.setdefault("WANDB_SILENT", "true")  # its settings come too late for its first lines
    logger = WandbLogger(
        project=options.wandb_project,
        name=options.run_name or folder.name,
        id=_run_id(folder) or None,
        resume="allow",
        save_dir=folder,
        mode=options.wandb_mode,
        config=to_dict(config),
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning passes it always, and W&B warns whatever it is
    return logger
