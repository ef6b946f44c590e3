"""What a disk's refusal means, and the stop after one that leaves no certainty.

A full disk is told apart from other failures: nothing was stored, and it is tried again until there is
room. After a failed fsync nobody knows what is on the disk: the kernel may have dropped the pages and call
the next fsync a success (PostgreSQL's "fsyncgate", 2018). So the first one stops the coordinator for good:
`Halt` refuses every later write, and the process ends; the next start reads what is really there.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable

from swarm.errors import DiskFull, StorageError, SyncFailed

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SYNC_CODES = (sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC)


class Halt:
    """Whether an fsync has failed. `tripped` is called once, from the thread that saw it."""

    def __init__(self, tripped: Callable[[], None] = lambda: None) -> None:
        self._tripped = tripped
        self.error: SyncFailed | None = None

    def check(self) -> None:
        """Call before anything is written. Raises SyncFailed."""
        if self.error is not None:
            raise SyncFailed(self.error.cause)

    def trip(self, doing: str, error: Exception) -> SyncFailed:
        """The error to raise for a failed fsync; from here on nothing is written."""
        if self.error is None:
            self.error = SyncFailed(f"cannot {doing}: the disk did not confirm it: {error}")
            self._tripped()
        return SyncFailed(self.error.cause)


def file_error(doing: str, error: OSError) -> StorageError:
    """Paths stay in the log of the cause."""
    said = f"cannot {doing}: {error.strerror or error}"
    return DiskFull(said) if error.errno in _NO_ROOM else StorageError(said)


def database_error(doing: str, error: sqlite3.Error, halt: Halt) -> StorageError:
    code = getattr(error, "sqlite_errorcode", None)  # errors of the module itself have none
    if code in _SYNC_CODES:
        return halt.trip(doing, error)
    said = f"cannot {doing}: {error}"
    return DiskFull(said) if code == sqlite3.SQLITE_FULL else StorageError(said)
