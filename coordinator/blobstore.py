"""Where complete blobs lie: a folder of this machine, or any store that `fsspec` reaches by URL.

In: blobs by name (the hex of their SHA-256), as bytes or as a finished local file. Out: the same, whole or absent.
What "written" promises differs:

    folder   temporary file → fsync → rename → fsync of the folder: survives a power cut at any moment
    object   the store's own put, which shows an object whole or not at all and is durable when it returns
             (S3, Google Cloud Storage, Azure); its size is read back after every write, so a store that kept
             less is found at once. Contents are checked by their hash whenever a blob is read.

Names are content hashes: a second writer can only write the same bytes. Every method blocks; errors of a disk are
OSError, those of an object store BlobStoreAway, but for FileNotFoundError.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from coordinator.disk import Disk, file_error
from swarm.errors import BlobStoreAway, DataDirLocked, InputError, StorageError, SyncFailed
from swarm.model.parts import write_whole

_OWNER = "owner"
"""The object that says whose blobs these are."""
_PLACE = "place"
_TEMPORARY = ".tmp"
BLOB_NAME = re.compile("[0-9a-f]{64}")
"""What else lies beside the blobs is somebody else's."""
_READ_BYTES = 1024 * 1024
RANGE_BYTES = 8 * 1024**2
"""Of an object, in memory at once while it is hashed."""


class BlobStore(Protocol):
    """Complete blobs by name."""

    def names(self) -> list[str]: ...

    def size(self, name: str) -> int | None:
        """Bytes of a blob, None if there is none."""

    def put(self, name: str, data: bytes) -> None: ...

    def take(self, name: str, path: Path) -> None:
        """Keep a finished local file, which is gone afterwards."""

    def read(self, name: str) -> bytes: ...

    def read_piece(self, name: str, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`."""

    def sha256(self, name: str) -> bytes:
        """Of the content as it lies there."""

    def remove(self, name: str) -> None:
        """Nothing happens if there is no such blob."""


class FolderStore:
    """A local folder."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._folder = folder
        self._disk = disk
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(f"*{_TEMPORARY}"):
            if BLOB_NAME.fullmatch(left_over.stem):
                left_over.unlink()
        # A file that was renamed just before a crash counts as stored: its name must be, too.
        disk.sync_folder(folder)

    def names(self) -> list[str]:
        return [name for name in os.listdir(self._folder) if BLOB_NAME.fullmatch(name)]

    def size(self, name: str) -> int | None:
        path = self._folder / name
        return path.stat().st_size if path.exists() else None

    def put(self, name: str, data: bytes) -> None:
        temporary = self._folder / f"{name}{_TEMPORARY}"
        try:
            with open(temporary, "wb", buffering=0) as file:
                self._disk.write(file, data, "blob")
                self._disk.sync(file.fileno(), "blob")
        except (OSError, SyncFailed):
            temporary.unlink(missing_ok=True)  # a full disk has no room for halves
            raise
        self.take(name, temporary)

    def take(self, name: str, path: Path) -> None:
        try:
            self._disk.rename(path, self._folder / name, "blob")
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self.put(name, path.read_bytes())  # the folder lies on another disk
            path.unlink()

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def read_piece(self, name: str, offset: int, length: int) -> bytes:
        with open(self._folder / name, "rb") as file:
            file.seek(offset)
            return file.read(length)

    def sha256(self, name: str) -> bytes:
        return hash_file(self._folder / name)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)


class ObjectStore:
    """A place in an `fsspec` file system, which belongs to one coordinator."""

    def __init__(self, fs: Any, root: str, owner: str) -> None:
        """`owner`: the coordinator's peer id, kept beside the blobs so that no other one collects them.

        Raises DataDirLocked (another coordinator's), BlobStoreAway (the place cannot be written and read).
        """
        self._fs = fs
        self._root = root.rstrip("/")
        with _answering():
            fs.makedirs(self._root, exist_ok=True)
        if self.size(_OWNER) is None:
            self.put(_OWNER, owner.encode())
        found = self.read(_OWNER).decode(errors="replace")
        if found != owner:
            raise DataDirLocked(
                f"the blobs at {root} belong to coordinator {found:.64}", "give every coordinator a place of its own"
            )

    def names(self) -> list[str]:
        with _answering():
            self._fs.invalidate_cache()
            listed = self._fs.ls(self._root, detail=False)
        names = (path.rstrip("/").rpartition("/")[2] for path in listed)
        return [name for name in names if BLOB_NAME.fullmatch(name)]

    def size(self, name: str) -> int | None:
        with _answering():
            self._fs.invalidate_cache()
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def put(self, name: str, data: bytes) -> None:
        with _answering():
            self._fs.pipe_file(self._path(name), data)
        self._check(name, len(data))

    def take(self, name: str, path: Path) -> None:
        size = path.stat().st_size
        with _answering():
            self._fs.put_file(str(path), self._path(name))
        self._check(name, size)
        path.unlink()

    def read(self, name: str) -> bytes:
        with _answering():
            return bytes(self._fs.cat_file(self._path(name)))

    def read_piece(self, name: str, offset: int, length: int) -> bytes:
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(f"there is no blob {name[:12]}")
        if offset >= size:  # stores answer a range behind the end with an error
            return b""
        with _answering():
            return bytes(self._fs.cat_file(self._path(name), start=offset, end=min(offset + length, size)))

    def sha256(self, name: str) -> bytes:
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(f"there is no blob {name[:12]}")
        digest = hashlib.sha256()
        for start in range(0, size, RANGE_BYTES):
            with _answering():
                digest.update(self._fs.cat_file(self._path(name), start=start, end=min(start + RANGE_BYTES, size)))
        return digest.digest()

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError), _answering():
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _check(self, name: str, size: int) -> None:
        found = self.size(name)
        if found != size:
            raise BlobStoreAway(f"the blob store holds {found} of {size} bytes of blob {name[:12]}")


def check_url(url: str) -> None:
    """Raises InputError for a place that no driver reaches (an unknown scheme, a package that is missing), or that
    does not outlive the process."""
    if url.startswith("memory://"):
        raise InputError("blobs at memory:// are lost when this process ends", "give a folder, or a bucket's URL")
    _driver(url)


def canonical(place: str) -> str:
    """A folder by its whole path, so that it is the same from anywhere; URLs and "" as they are."""
    if not place or _is_url(place):
        return place
    return str(Path(place.removeprefix("file://")).expanduser().resolve())


def check_place(root: Path, place: str) -> None:
    """Raises InputError if this coordinator's blob folder notes another place for its complete blobs (its jobs would be
    without their data), StorageError. `place`: canonical."""
    note = root / _PLACE
    try:
        known = note.read_text() if note.exists() else "" if (root / "whole").exists() else None
    except OSError as error:
        raise StorageError(f"cannot read {note}: {error.strerror or error}") from error
    if known is not None and known != place:
        raise InputError(
            f"this coordinator's blobs lie in {known or 'its data folder'}, not in {place or 'its data folder'}",
            f"start it with --blobs {known}" if known else "start it without --blobs, or with another --data-dir",
        )


def note_place(root: Path, place: str) -> None:
    """Once the store there has been opened. Raises StorageError."""
    if place and not (root / _PLACE).exists():
        write_whole(root / _PLACE, place.encode())


def open_store(place: str, default: Path, owner: str, disk: Disk) -> BlobStore:
    """The store at `place`: empty for the folder `default`, another folder, or a URL.

    Raises InputError (as `check_url`), DataDirLocked, StorageError (cannot be reached, or refuses).
    """
    if not _is_url(place):
        folder = Path(canonical(place)) if place else default
        try:
            store = FolderStore(folder, disk)
            if place:
                _own(folder, owner)
            return store
        except OSError as error:
            raise file_error("open the blob folder", error) from error
    _driver(place)
    from fsspec.core import url_to_fs

    try:
        with _answering():
            # Listings are asked for anew: another process may be ahead of what this one remembers.
            fs, root = url_to_fs(place, use_listings_cache=False, skip_instance_cache=True)
        return ObjectStore(fs, root, owner)
    except (BlobStoreAway, FileNotFoundError) as error:
        if isinstance(error.__cause__, PermissionError):
            raise StorageError(
                f"the blob store at {place} refuses access: {error.__cause__}",
                "give this process credentials that may list, read, write and delete there",
            ) from error
        raise StorageError(
            f"the blob store at {place} cannot be used: {error.__cause__ or error}",
            "check the URL, the bucket and the network",
        ) from error


def _own(folder: Path, owner: str) -> None:
    """Raises DataDirLocked: another coordinator's, which would collect this one's blobs; OSError."""
    note = folder / _OWNER
    if not note.exists():
        write_whole(note, owner.encode())
    found = note.read_text(errors="replace")
    if found != owner:
        raise DataDirLocked(
            f"the blobs at {folder} belong to coordinator {found:.64}", "give every coordinator a folder of its own"
        )


def _driver(place: str) -> None:
    """Import what a URL needs. Raises InputError."""
    if not _is_url(place):
        return
    import fsspec
    from fsspec.registry import known_implementations

    scheme = place.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        advice = str(known_implementations.get(scheme, {}).get("err", error))
        raise InputError(f"blobs at {scheme}:// need a package that is not installed", advice) from error
    except ValueError as error:
        raise InputError(
            f"no blob store is reached by {scheme}://", "give a folder, or a URL such as s3://bucket/folder"
        ) from error


def _is_url(place: str) -> bool:
    return "://" in place and not place.startswith("file://")


@contextmanager
def _answering() -> Iterator[None]:
    """Drivers raise what their own client libraries raise: all but an absent object says that the store failed."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise BlobStoreAway(f"the blob store does not answer or refuses: {type(error).__name__}: {error}") from error


def hash_file(path: Path) -> bytes:
    """SHA-256 of a local file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.digest()
