"""Content-addressed files: uploads in resumable pieces, reads by hash, removal of what nobody needs.

A blob is named by its SHA-256 and nothing else, so no name from outside becomes a path. It is
written whole or not at all, to wherever complete blobs lie (`coordinator.blobstore`). Uploads under way always
lie on the local disk: an upload's committed offset is what is durably in its partial file. Every method
blocks (call it from a thread) and is safe to call from several; errors of the disk are StorageError, those of a
store elsewhere BlobStoreAway, content that does not match its hash is CorruptData: it is as good as absent from then
on, until it is written again in its place. After a failed fsync nothing is written any more (`coordinator.disk`).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from coordinator.blobstore import BLOB_NAME, BlobStore, hash_file
from coordinator.disk import Disk, file_error
from swarm.errors import BlobAbsent, CorruptData, FrameTooLarge, ProtocolError, StorageError, SyncFailed

_HASH_BYTES = 32
STRIPES = 64
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
    """Complete blobs in a store, and the folder of uploads under way. `now` is a monotonic clock."""

    def __init__(
        self,
        uploads: Path,
        store: BlobStore,
        bounds: BlobBounds,
        now: Callable[[], float],
        disk: Disk,
    ) -> None:
        self._store = store
        self._partial = uploads
        self._bounds = bounds
        self._now = now
        self._disk = disk
        # One lock for several blobs: bounded, and two different blobs rarely meet.
        self._locks = [threading.Lock() for _ in range(STRIPES)]
        self._used: dict[str, float] = {}
        self._checked: dict[str, float] = {}
        """When a blob's content was last compared with its name."""
        self._damaged: set[str] = set()
        """Found to have another content than their name says."""
        with _disk("open the blob store"):
            uploads.mkdir(parents=True, exist_ok=True)
            # How long ago a file was last used is not stored: it counts as used now.
            self._used.update(dict.fromkeys([*os.listdir(uploads), *store.names()], now()))
            disk.sync_folder(uploads)

    def put(self, data: bytes) -> bytes:
        """Store a blob of our own; returns its hash."""
        sha256 = hashlib.sha256(data).digest()
        name = self._name(sha256)
        with self._locked(name), _disk("write a blob"):
            if self._whole_size(name) != len(data):
                self._disk.check()
                self._store.put(name, data)
                self._is_written(name)
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
        if data and not offset and self._too_many_uploads():
            self._drop_stale_uploads()
        with self._locked(name), _disk("store an upload"):
            partial = self._partial / name
            if self._whole_size(name) == size:
                return Progress(size, True)
            self._disk.check()
            committed = partial.stat().st_size if partial.exists() else None
            if committed is not None and committed > size:
                partial.unlink()
                committed = None
            if offset == (committed or 0) and (data or not size):
                committed = self._append(partial, committed, data)
            elif committed == size:
                # All bytes came before a crash, which kept them from being published.
                with open(partial, "ab") as file:
                    self._disk.sync(file.fileno(), "piece")
            if committed is None or committed < size:
                return Progress(committed or 0, False)
            if hash_file(partial) != sha256:
                partial.unlink()
                raise CorruptData(f"the upload {name[:12]} does not have the promised hash", "upload it again")
            self._store.take(name, partial)
            self._is_written(name)
            return Progress(size, True)

    def size(self, sha256: bytes) -> int | None:
        """Bytes of a complete blob, None if there is none or it is damaged. Counts as use."""
        name = self._name(sha256)
        with self._locked(name), _disk("look up a blob"):
            return self._whole_size(name)

    def read(self, sha256: bytes) -> bytes:
        """The whole content, checked. Raises BlobAbsent, CorruptData, StorageError."""
        name = self._name(sha256)
        with self._reading(name):
            data = self._store.read(name)
            if hashlib.sha256(data).digest() != sha256:
                self._refuse_damaged(name)
            return data

    def read_piece(self, sha256: bytes, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`, of a blob whose hash was right ten minutes ago at most.

        The reader checks the whole. Raises BlobAbsent, CorruptData, StorageError.
        """
        name = self._name(sha256)
        with self._reading(name):
            checked_s = self._checked.get(name)
            if checked_s is None or self._now() - checked_s > _CHECK_S:
                if self._store.sha256(name) != sha256:
                    self._refuse_damaged(name)
                self._checked[name] = self._now()
            return self._store.read_piece(name, min(offset, self._bounds.max_blob_bytes), length)

    def collect(self, referenced: Collection[bytes]) -> int:
        """Remove what is neither referenced nor recently used; returns how many files."""
        kept = {sha256.hex() for sha256 in referenced}
        with _disk("list the blobs"):
            names = self._store.names()
        removed = sum(self._remove_unused(name, self._drop_blob) for name in names if name not in kept)
        return removed + self._drop_stale_uploads()

    def _drop_stale_uploads(self) -> int:
        """No row refers to an upload: its time alone decides. Call without a lock held."""
        with _disk("list the uploads"):
            names = [name for name in os.listdir(self._partial) if BLOB_NAME.fullmatch(name)]
        return sum(self._remove_unused(name, self._drop_upload) for name in names)

    def _remove_unused(self, name: str, remove: Callable[[str], None]) -> bool:
        with self._lock(name), _disk(f"remove blob {name[:12]}"):
            # Under its lock: whoever is about to refer to a blob has used it just now.
            idle_s = self._now() - self._used.setdefault(name, self._now())
            if idle_s < self._bounds.grace_s:
                return False
            remove(name)
            self._used.pop(name, None)
            self._checked.pop(name, None)
            return True

    def _whole_size(self, name: str) -> int | None:
        return None if name in self._damaged else self._store.size(name)

    def _is_written(self, name: str) -> None:
        self._used[name] = self._now()
        self._checked.pop(name, None)
        self._damaged.discard(name)

    def _refuse_damaged(self, name: str) -> NoReturn:
        # It stays until it is replaced: what was only read wrongly is whole again after a restart.
        self._damaged.add(name)
        raise CorruptData(
            f"blob {name[:12]} does not have the hash it is named by",
            "it is uploaded or made again where that is possible; look at the disk and its log",
        )

    def _too_many_uploads(self) -> bool:
        with _disk("list the uploads"):
            return len(os.listdir(self._partial)) >= self._bounds.max_partials

    def _drop_blob(self, name: str) -> None:
        self._store.remove(name)
        self._damaged.discard(name)

    def _drop_upload(self, name: str) -> None:
        (self._partial / name).unlink(missing_ok=True)

    def _append(self, partial: Path, committed: int | None, data: bytes) -> int:
        """Make the piece durable; returns the new committed offset. None: the upload begins."""
        if committed is None and self._too_many_uploads():
            raise StorageError("too many uploads are unfinished", "wait until some are complete")
        with open(partial, "ab", buffering=0) as file:
            try:
                self._disk.write(file, data, "piece")
                self._disk.sync(file.fileno(), "piece")
            except (OSError, SyncFailed):
                # What is in the file counts as committed, so nothing half-written may stay.
                os.ftruncate(file.fileno(), committed or 0)
                raise
        self._used[partial.name] = self._now()
        if committed is None:
            self._disk.sync_folder(self._partial)
        return (committed or 0) + len(data)

    def _lock(self, name: str) -> threading.Lock:
        return self._locks[stripe(bytes.fromhex(name))]

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with self._lock(name):
            if name in self._used:
                self._used[name] = self._now()
            yield

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        with self._locked(name), _disk(f"read blob {name[:12]}"):
            if name in self._damaged:
                self._refuse_damaged(name)
            try:
                yield
            except FileNotFoundError as error:
                raise BlobAbsent(f"there is no blob {name[:12]} here") from error

    @staticmethod
    def _name(sha256: bytes) -> str:
        if len(sha256) != _HASH_BYTES:
            raise ProtocolError(f"a blob is named by {_HASH_BYTES} bytes, not {len(sha256)}")
        return sha256.hex()


def stripe(sha256: bytes) -> int:
    """Which lock a blob has."""
    return sha256[0] % STRIPES if sha256 else 0


@contextmanager
def _disk(doing: str) -> Iterator[None]:
    """Errors of the disk become StorageError, DiskFull; the path stays in the log of the cause."""
    try:
        yield
    except OSError as error:
        raise file_error(doing, error) from error
