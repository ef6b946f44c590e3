"""A process's folder: made on first start, locked while the process lives.

The lock is an flock on a file, which the kernel drops with the process however it ends, so no
stale lock is ever left behind.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

import platformdirs

from swarm.errors import DataDirLocked, StorageError


def default_data_dir(role: str) -> Path:
    """Where a role keeps its files unless told: the platform's data folder."""
    return Path(platformdirs.user_data_dir("volunteer-swarm")) / role


class DataDir:
    """Context manager over a folder that one process uses at a time.

    Entering raises DataDirLocked (another process has it) or StorageError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self._handle = -1

    def __enter__(self) -> DataDir:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # O_CLOEXEC (Python's default) keeps the daemon child from inheriting the lock.
            self._handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(f"cannot use the data folder {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._handle)
            raise DataDirLocked(f"another process uses the data folder {self.path}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)
