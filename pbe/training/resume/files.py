"""Checkpoints on disk: written whole and with a checksum, checked when they are found again."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from safetensors import SafetensorError

from pbe.config import Config, differences, flatten, to_dict
from pbe.errors import UserError
from pbe.files import HashingFile, atomic_file, sha256_of

LOG = logging.getLogger(__name__)

LAST_NAME = "last.ckpt"
FOLDER_NAME = "checkpoints"
# What torch raises on files that were cut short, flipped or never were checkpoints or weights.
UNREADABLE = (
    *(RuntimeError, EOFError, OSError, KeyError, AttributeError, TypeError, ValueError),
    *(pickle.UnpicklingError, SafetensorError),
)
CHUNK = 1 << 24  # bytes copied at a time
# What a kernel or file system says that cannot copy between two files by itself.
CANNOT_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
# Settings that may differ between two starts of a run without a report: they do not shape the training.
UNREPORTED = ("output_dir", "trainer.resume", "trainer.progress")


report = rank_zero_only(LOG.info)  # one line for the user, once for all ranks


class QuietFile(HashingFile):
    """Remembers the first error instead of raising it, and writes nothing after it.

    torch's writer does not take an exception from below well: it warns, and may end the process.
    """

    error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write."""
        self._try(super().write, data)
        return len(data)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._try(super().flush)

    def _try(self, call: Callable[..., object], *arguments: object) -> None:
        if self.error is None:
            try:
                call(*arguments)
            except OSError as error:
                self.error = error


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the older one, which it replaces only when it is whole and on the disk.

    ``error`` says why the last one could not be written. It is not raised: the other ranks of the run would
    wait for this one for ever.
    """

    def __init__(self) -> None:
        self.error: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``path`` and ``path.sha256`` (as ``sha256sum -c`` reads it)."""
        path, self.error = Path(path), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, sync=True, sole_writer=True) as raw:
                file = QuietFile(raw, hashlib.sha256())
                torch.save(checkpoint, file)  # type: ignore[arg-type]
                if file.error is not None:
                    raise file.error
                _announce(path, file.hash.hexdigest())
            _confirm(path)
        except OSError as error:
            self.error = error


def checksum_files(path: Path) -> tuple[Path, Path]:
    """Return where a checkpoint's checksum stands, and where it stands while the file is being replaced."""
    return path.with_name(f"{path.name}.sha256"), path.with_name(f"{path.name}.sha256.new")


def _announce(path: Path, digest: str) -> None:
    """Write the checksum of the file that is about to take a checkpoint's place.

    With :func:`_confirm` afterwards, the file there has one of the two checksums there at every moment.
    """
    checksum_files(path)[1].write_text(f"{digest}  {path.name}\n")


def _confirm(path: Path) -> None:
    current, upcoming = checksum_files(path)
    os.replace(upcoming, current)


def duplicate(path: Path, target: Path) -> None:
    """Copy a checkpoint and its checksum to ``target``, as a file of its own.

    A hard link would cost nothing, but what damages one name of a file damages all of them. Where the
    file system can, the kernel shares the blocks until one of the two is changed.
    """
    with path.open("rb") as source, atomic_file(target, sync=True, sole_writer=True) as copy:
        _copy(source, copy)
        digests = _listed(path)
        _announce(target, digests[0] if digests else sha256_of(path))
    _confirm(target)


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    """Copy a whole file, in the kernel where that is possible."""
    if hasattr(os, "copy_file_range"):
        try:
            while os.copy_file_range(source.fileno(), target.fileno(), CHUNK):
                pass
            return
        except OSError as error:
            if error.errno not in CANNOT_COPY:
                raise
            source.seek(0)
            target.seek(0)
            target.truncate()
    shutil.copyfileobj(source, target, CHUNK)


def remove(path: Path) -> None:
    """Delete a checkpoint and its checksum."""
    for file in (path, *checksum_files(path)):
        file.unlink(missing_ok=True)


def _listed(path: Path) -> list[str]:
    return [file.read_text().split(" ")[0] for file in checksum_files(path) if file.is_file()]


def damage(path: Path) -> str:
    """Return what is wrong with a checkpoint, nothing when it is whole.

    One without a checksum (of an older version of this project) only has to be readable.
    """
    try:
        if (listed := _listed(path)) and sha256_of(path) not in listed:
            return "its checksum does not match"
        read_checkpoint(path)
    except UserError:
        return "it cannot be read"
    except OSError as error:
        return str(error.strerror or error)
    return ""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return step, weights, moving average and configuration of a checkpoint, by memory map."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        kept = {key: content[key] for key in ("global_step", "state_dict")}
        return kept | {key: content.get(key) for key in ("ema", "config", "base")}
    except UNREADABLE as error:
        raise UserError(
            f"'{path}' is damaged or not a checkpoint of this project; delete it or name another"
        ) from error


def step_of(checkpoint: Path | None) -> int:
    """Return the optimizer step of a checkpoint, -1 for none."""
    return -1 if checkpoint is None else int(read_checkpoint(checkpoint)["global_step"])


def find_checkpoint(config: Config) -> Path | None:
    """Return the checkpoint to resume from, or None for a start.

    ``auto`` takes the newest one of the run that is whole and says which ones are not; a path is a
    checkpoint, or a run whose newest whole one is meant.
    """
    own, resume = Path(config.output_dir) / FOLDER_NAME, config.trainer.resume
    if resume == "auto":
        return newest_intact(own)
    if resume == "never":
        if candidates(own):
            raise UserError(
                f"'{config.output_dir}' holds a run already; name another output_dir or resume it"
            )
        return None
    named = Path(resume)
    if named.is_dir():
        found = newest_intact(named / FOLDER_NAME) or newest_intact(named)
        if found is None:
            raise UserError(f"trainer.resume: no checkpoint in '{named}'")
        return found
    if not named.is_file():
        raise UserError(f"trainer.resume: no checkpoint at '{named}'")
    if problem := damage(named):
        raise UserError(f"'{named}' is damaged or not a checkpoint of this project ({problem}); name another")
    return named


def candidates(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the one that was written last first."""
    periodic = sorted(folder.glob("step=*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return [path for path in (folder / LAST_NAME, *reversed(periodic)) if path.is_file()]


def newest_intact(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole, or None where there are none at all."""
    problems: dict[int, str] = {}  # by inode: older versions gave one file several names
    for path in candidates(folder):
        inode = path.stat().st_ino
        if inode in problems:
            continue
        if not (problem := damage(path)):
            for problem in problems.values():
                report(f"{problem}; resuming from '{path.name}' (step {step_of(path)})")
            return path
        problems[inode] = f"'{path}' is damaged or not a checkpoint of this project ({problem})"
    if problems:
        raise UserError(
            f"{'; '.join(problems.values())}, and no other one is intact; "
            "delete the checkpoints to start again, or name one in trainer.resume"
        )
    return None


def changed_settings(stored: dict[str, Any], config: Config) -> list[str]:
    """Return ``key old -> new`` of every setting that differs from those a checkpoint was made with."""
    # a setting that is newer than the checkpoint had its default then
    old = flatten(to_dict(Config())) | flatten(stored)
    changed = sorted(differences(old, flatten(to_dict(config))).items())
    return [f"{key} {before} -> {now}" for key, (before, now) in changed if not key.startswith(UNREPORTED)]


def recount_batches(checkpoint: dict[str, Any], samples: int, global_batch: int, accumulate: int) -> None:
    """Count the batches of Lightning's checkpoint in those of the run that resumes from it, in place.

    Lightning counts micro-batches, in an epoch for the end of steps, in all for validations. With another
    ``trainer.accumulate`` or batch those counts would make short steps, and validations in between.
    ``samples`` of the current epoch are done, 0 between two epochs; the global batch of a micro-batch and the
    micro-batches of a step are those of now.
    """
    before = checkpoint.get("config", {}).get("trainer", {}).get("accumulate", accumulate)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if before != accumulate:
        _shift(progress["total"], checkpoint["global_step"] * accumulate)
    if samples and progress["current"]["processed"] * global_batch != samples:
        batches = samples // global_batch
        _shift(progress["current"], batches - batches % accumulate)


def _shift(counters: dict[str, int], processed: int) -> None:
    """Set the processed batches; the others keep their distance (a checkpoint falls inside a batch)."""
    change = processed - counters["processed"]
    counters.update({name: count + change for name, count in counters.items()})
