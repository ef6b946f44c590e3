"""The SQLite file: durable transactions, numbered migrations, one process at a time.

WAL with `synchronous=FULL`: a commit that returned survives a power cut. Writers and readers
share one connection under a lock; every method blocks, so call it from a thread. A failed commit
is rolled back and raised as StorageError; whoever kept state beside the file reads it again. After
a failed fsync nothing is written any more (coordinator.disk).
"""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from coordinator.disk import Halt, database_error
from swarm.errors import DataDirLocked, StorageError

_MIGRATIONS = Path(__file__).parent / "migrations"
Value = str | int | float | bytes | None


class Database:
    """The open file `coordinator.db` in a data folder, which stays locked until `close`."""

    def __init__(self, data_dir: Path, durable_point: Callable[[str], None], halt: Halt) -> None:
        self._point = durable_point
        self._halt = halt
        self._mutex = threading.RLock()
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"cannot use the data folder {data_dir}: {error.strerror}") from error
        try:
            # The kernel drops the lock with the process, however it ends.
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_file)
            raise DataDirLocked(f"another coordinator uses {data_dir}") from error
        try:
            self._open(data_dir / "coordinator.db")
        except BaseException:
            os.close(self._lock_file)
            raise

    def _open(self, path: Path) -> None:
        with self._errors("open the database"):
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._migrate()

    def _migrate(self) -> None:
        scripts = sorted(_MIGRATIONS.glob("*.sql"))
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(scripts):
            raise StorageError(
                f"the database has schema {version}, this release knows {len(scripts)}",
                "start the newer release that wrote it",
            )
        for number, script in enumerate(scripts, start=1):
            named = re.match(r"\d+", script.name)
            if named is None or int(named[0]) != number:
                raise StorageError(f"migration {script.name} is not number {number}", "install the release again")
            if number > version:
                text = script.read_text(encoding="utf-8")
                self._point(f"before migration {number}")
                self._connection.executescript(f"BEGIN;\n{text}\nPRAGMA user_version = {number};\nCOMMIT;")
                self._point(f"after migration {number}")

    @contextmanager
    def transaction(self, name: str) -> Iterator[None]:
        """Everything inside becomes durable together, or nothing does. `name` is for durable points."""
        with self._mutex:
            self._halt.check()
            with self._errors(f"store '{name}'"):
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._point(f"before commit {name}")
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            self._point(f"after commit {name}")

    def write(self, sql: str, *values: Value) -> int:
        """One statement inside a transaction; returns how many rows it changed."""
        assert self._connection.in_transaction, "writes belong to a transaction"
        return self._connection.execute(sql, values).rowcount

    def write_many(self, sql: str, rows: Sequence[tuple[Value, ...]]) -> None:
        assert self._connection.in_transaction, "writes belong to a transaction"
        self._connection.executemany(sql, rows)

    def rows(self, sql: str, *values: Value) -> list[tuple[Value, ...]]:
        with self._mutex, self._errors("read the database"):
            return self._connection.execute(sql, values).fetchall()

    def close(self) -> None:
        with self._mutex, self._errors("close the database"):
            self._connection.close()
        os.close(self._lock_file)

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise database_error(doing, error, self._halt) from error
