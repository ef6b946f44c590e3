"""What a disk's refusal means, and the stop after one that leaves no certainty.

A full disk is told apart from other failures: nothing was stored, and it is tried again until there is
room. After a failed fsync nobody knows what is on the disk: the kernel may have dropped the pages and call
the next fsync a success (PostgreSQL's "fsyncgate", 2018). So the first one stops the coordinator for good:
`Halt` refuses every later write, and the process ends; the next start reads what is really there.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from swarm.errors import DiskFull, StorageError, SyncFailed

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SYNC_CODES = (sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC)


class Halt:
    """Whether an fsync has failed. `tripped` is called once, from the thread that saw it."""

    def __init__(self, tripped: Callable[[], object] = lambda: None) -> None:
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


class Disk:
    """Durable writes to files. `durable_point` is told of each before and after it."""

    def __init__(self, durable_point: Callable[[str], None], halt: Halt | None = None) -> None:
        self._point = durable_point
        self._halt = halt or Halt()

    def check(self) -> None:
        """Call before anything is written. Raises SyncFailed."""
        self._halt.check()

    def write(self, file: FileIO, data: bytes, what: str) -> None:
        """All of it, not yet durable. Raises OSError."""
        self._point(f"before {what} write")
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        self._point(f"after {what} write")

    def sync(self, descriptor: int, what: str) -> None:
        """Raises SyncFailed, and from then on for every write."""
        self._point(f"before {what} fsync")
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise self._halt.trip(f"store a {what}", error) from error
        self._point(f"after {what} fsync")

    def sync_folder(self, folder: Path) -> None:
        """Raises OSError, SyncFailed."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            self.sync(descriptor, "folder")
        finally:
            os.close(descriptor)

    def rename(self, path: Path, to: Path, what: str) -> None:
        """Within one file system, durable when it returns. Raises OSError, SyncFailed."""
        # Opened first: a name that is there but was never synced would count as stored.
        folder = os.open(to.parent, os.O_RDONLY)
        try:
            self._point(f"before {what} rename")
            os.rename(path, to)
            self._point(f"after {what} rename")
            self.sync(folder, "folder")
        finally:
            os.close(folder)


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
