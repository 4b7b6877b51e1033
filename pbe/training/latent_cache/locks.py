"""Locks of those who build a latent cache together: one a shard, and one for the list of the shards.

They are file locks, which the system takes back when their holder dies, on network file systems too.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOG = logging.getLogger(__name__)
POLL_SECONDS = 0.5
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Claim:
    """A shard that this process is making; others pass it over.

    Args:
        path: of the lock file.
        file: the same, open and locked.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self._file = path, file

    @classmethod
    def take(cls, path: Path) -> Claim | None:
        """Claim what a lock file stands for; None when another process has.

        Raises:
            OSError: the lock file cannot be made.
        """
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            # without locks a shard may be made twice, with the same bytes
            LOG.warning("'%s' knows no locks: give every builder its own part by --shard", path.parent)
        if not _is_same(file, path):  # its holder has just removed it
            file.close()
            return None
        return cls(path, file)

    def release(self) -> None:
        """Let others have it."""
        self.path.unlink(missing_ok=True)
        self._file.close()


def _is_same(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def waiting(path: Path, check: Callable[[], None]) -> Iterator[None]:
    """Claim a lock file, waiting for others to release it.

    Args:
        path: of the lock file.
        check: called while waiting; what it raises ends the wait.
    """
    while (claim := Claim.take(path)) is None:
        check()
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        claim.release()
