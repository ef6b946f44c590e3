"""Content-addressed files: uploads in resumable pieces, reads by hash, removal of what nobody needs.

A blob is named by its SHA-256 and nothing else, so no name from outside becomes a path. It is
written whole or not at all: temporary file → fsync → rename → fsync of the folder. An upload's
committed offset is what is durably in its partial file. Every method blocks (call it from a
thread) and is safe to call from several; disk errors are StorageError, content that does not
match its hash is CorruptData and is removed. After a failed fsync nothing is written any more
(coordinator.disk).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from coordinator.disk import Halt, file_error
from swarm.errors import CorruptData, FrameTooLarge, ProtocolError, StorageError, SyncFailed

_HASH_BYTES = 32
_READ_BYTES = 1024 * 1024
_STRIPES = 64
_TEMPORARY = ".tmp"
_CHECK_S = 600.0


@dataclass(frozen=True)
class Progress:
    committed: int
    complete: bool


@dataclass(frozen=True)
class BlobBounds:
    max_blob_bytes: int
    max_partials: int
    grace_s: float
    """An unreferenced blob or partial upload is removed only so long after its last use."""


class Blobs:
    """One folder of blobs. `now` is a monotonic clock; `durable_point` is told of every durable write."""

    def __init__(
        self,
        root: Path,
        bounds: BlobBounds,
        now: Callable[[], float],
        durable_point: Callable[[str], None],
        halt: Halt | None = None,
    ) -> None:
        self._whole = root / "whole"
        self._partial = root / "partial"
        self._bounds = bounds
        self._now = now
        self._point = durable_point
        self._halt = halt or Halt()
        # One lock for several blobs: bounded, and two different blobs rarely meet.
        self._locks = [threading.Lock() for _ in range(_STRIPES)]
        self._used: dict[str, float] = {}
        self._checked: dict[str, float] = {}
        """When a blob's content was last compared with its name."""
        with _disk("open the blob folder"):
            for folder in (self._whole, self._partial):
                folder.mkdir(parents=True, exist_ok=True)
                for left_over in folder.glob(f"*{_TEMPORARY}"):
                    left_over.unlink()
                # How long ago a file was last used is not stored: it counts as used now.
                self._used.update(dict.fromkeys(os.listdir(folder), now()))
                # A file that was renamed just before a crash counts as stored: its name must be, too.
                self._sync_folder(folder)

    def put(self, data: bytes) -> bytes:
        """Store a blob of our own; returns its hash."""
        sha256 = hashlib.sha256(data).digest()
        name = self._name(sha256)
        with self._locked(name), _disk("write a blob"):
            if (self._whole / name).exists():
                return sha256
            self._halt.check()
            temporary = self._whole / f"{name}{_TEMPORARY}"
            try:
                with open(temporary, "wb", buffering=0) as file:
                    self._write_all(file, data, "blob")
                    self._sync(file.fileno(), "blob")
            except (OSError, SyncFailed):
                temporary.unlink(missing_ok=True)  # a full disk has no room for halves
                raise
            self._publish(temporary, name)
        return sha256

    def put_piece(self, sha256: bytes, size: int, offset: int, data: bytes) -> Progress:
        """Append a piece if it starts at the committed offset; otherwise only say where to go on.

        Raises FrameTooLarge: over the cap; ProtocolError: beyond the declared size;
        CorruptData: the whole does not have the promised hash (start again).
        """
        name = self._name(sha256)
        if size > self._bounds.max_blob_bytes:
            raise FrameTooLarge(f"a blob of {size} bytes is over the cap of {self._bounds.max_blob_bytes}")
        if offset + len(data) > size:
            raise ProtocolError(f"a piece ends at byte {offset + len(data)} of a blob of {size}")
        with self._locked(name), _disk("store an upload"):
            whole, partial = self._whole / name, self._partial / name
            if whole.exists():
                return Progress(whole.stat().st_size, True)
            self._halt.check()
            committed = partial.stat().st_size if partial.exists() else None
            if committed is not None and committed > size:
                partial.unlink()
                committed = None
            if offset == (committed or 0) and (data or not size):
                committed = self._append(partial, committed, data)
            elif committed == size:
                # All bytes came before a crash, which kept them from being published.
                with open(partial, "ab") as file:
                    self._sync(file.fileno(), "piece")
            if committed is None or committed < size:
                return Progress(committed or 0, False)
            if _hash_file(partial) != sha256:
                partial.unlink()
                raise CorruptData(f"the upload {name[:12]} does not have the promised hash", "upload it again")
            self._publish(partial, name)
            return Progress(size, True)

    def size(self, sha256: bytes) -> int | None:
        """Bytes of a complete blob, None if there is none. Counts as use."""
        name = self._name(sha256)
        with self._locked(name), _disk("look up a blob"):
            path = self._whole / name
            return path.stat().st_size if path.exists() else None

    def read(self, sha256: bytes) -> bytes:
        """The whole content, checked. Raises StorageError: absent; CorruptData: damaged, now removed."""
        name = self._name(sha256)
        with self._locked(name), _disk(f"read blob {name[:12]}"):
            path = self._whole / name
            data = path.read_bytes()
            if hashlib.sha256(data).digest() != sha256:
                self._remove_damaged(path)
            return data

    def read_piece(self, sha256: bytes, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`, of a blob whose hash was right ten minutes ago at most.

        The reader checks the whole. Raises StorageError: absent; CorruptData: damaged, now removed.
        """
        name = self._name(sha256)
        with self._locked(name), _disk(f"read blob {name[:12]}"):
            path, checked_s = self._whole / name, self._checked.get(name)
            if checked_s is None or self._now() - checked_s > _CHECK_S:
                if _hash_file(path) != sha256:
                    self._remove_damaged(path)
                self._checked[name] = self._now()
            with open(path, "rb") as file:
                file.seek(min(offset, self._bounds.max_blob_bytes))
                return file.read(length)

    def _remove_damaged(self, path: Path) -> None:
        path.unlink()
        raise CorruptData(f"blob {path.name[:12]} on disk does not have the hash it is named by")

    def collect(self, referenced: Collection[bytes]) -> int:
        """Remove what is neither referenced nor recently used; returns how many files."""
        kept = {sha256.hex() for sha256 in referenced}
        removed = 0
        with _disk("list the blobs"):
            candidates = [(f, name) for f in (self._whole, self._partial) for name in os.listdir(f)]
        for folder, name in candidates:
            with self._locks[_stripe(name)], _disk(f"remove blob {name[:12]}"):
                # Under its lock: whoever is about to refer to a blob has used it just now.
                idle_s = self._now() - self._used.setdefault(name, self._now())
                if name not in kept and idle_s >= self._bounds.grace_s and (folder / name).exists():
                    (folder / name).unlink()
                    self._used.pop(name, None)
                    self._checked.pop(name, None)
                    removed += 1
        return removed

    def _append(self, partial: Path, committed: int | None, data: bytes) -> int:
        """Make the piece durable; returns the new committed offset. None: the upload begins."""
        if committed is None and len(os.listdir(self._partial)) >= self._bounds.max_partials:
            raise StorageError("too many uploads are unfinished", "wait until some are complete")
        with open(partial, "ab", buffering=0) as file:
            try:
                self._write_all(file, data, "piece")
                self._sync(file.fileno(), "piece")
            except (OSError, SyncFailed):
                # What is in the file counts as committed, so nothing half-written may stay.
                os.ftruncate(file.fileno(), committed or 0)
                raise
        self._used[partial.name] = self._now()
        if committed is None:
            self._sync_folder(self._partial)
        return (committed or 0) + len(data)

    def _publish(self, path: Path, name: str) -> None:
        self._point("before blob rename")
        os.rename(path, self._whole / name)
        self._used[name] = self._now()
        self._point("after blob rename")
        self._sync_folder(self._whole)

    def _write_all(self, file: FileIO, data: bytes, what: str) -> None:
        self._point(f"before {what} write")
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        self._point(f"after {what} write")

    def _sync(self, descriptor: int, what: str) -> None:
        self._point(f"before {what} fsync")
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise self._halt.trip(f"store a {what}", error) from error
        self._point(f"after {what} fsync")

    def _sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            self._sync(descriptor, "folder")
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with self._locks[_stripe(name)]:
            if name in self._used:
                self._used[name] = self._now()
            yield

    @staticmethod
    def _name(sha256: bytes) -> str:
        if len(sha256) != _HASH_BYTES:
            raise ProtocolError(f"a blob is named by {_HASH_BYTES} bytes, not {len(sha256)}")
        return sha256.hex()


def _stripe(name: str) -> int:
    return int(name[:2], 16) % _STRIPES


def _hash_file(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.digest()


@contextmanager
def _disk(doing: str) -> Iterator[None]:
    """Disk errors become StorageError, DiskFull; the path stays in the log of the cause."""
    try:
        yield
    except OSError as error:
        raise file_error(doing, error) from error
