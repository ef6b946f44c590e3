"""The data sets of jobs on this node's disk: fetched from the coordinator in pieces, resumed, whole or absent.

    data/<sha256>         a data set; checked against its hash whenever it is read
    data/<sha256>.part    as much of one as has arrived

A download that an outage, a cancelled assignment or the end of this process cuts goes on where it was. The newest few
data sets are kept. Never decides what to fetch.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from node.link import Link
from swarm.client.coordinator import PIECE_BYTES
from swarm.errors import CorruptData, StorageError
from swarm.ids import sha256

_KEPT = 4


class DataFiles:
    """One folder of data sets. Calls for the same one take turns."""

    def __init__(self, data_dir: Path, link: Link) -> None:
        self._folder = data_dir / "data"
        self._link = link
        self._lock = asyncio.Lock()

    async def get(self, digest: bytes, size: int) -> bytes:
        """The content of that hash. Outages are waited out.

        Raises CorruptData (the coordinator sent another content; the next call starts anew), StorageError.
        """
        async with self._lock:
            whole = self._folder / digest.hex()
            data = await asyncio.to_thread(_read, whole, digest)
            if data is not None:
                return data
            part = whole.with_suffix(".part")
            at = await asyncio.to_thread(_begin, part, size)
            while at < size:
                wanted = min(PIECE_BYTES, size - at)
                piece = await self._link.call(lambda client, at=at, n=wanted: client.get_range(digest, at, n))  # type: ignore[misc]
                await asyncio.to_thread(_append, part, piece)
                at += len(piece)
            return await asyncio.to_thread(_finish, part, whole, digest)


def _read(path: Path, digest: bytes) -> bytes | None:
    try:
        data = path.read_bytes()
        if sha256(data) == digest:
            os.utime(path)
            return data
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    return None


def _begin(part: Path, size: int) -> int:
    """How much has arrived."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        if not part.exists():
            return 0
        if part.stat().st_size > size:
            part.unlink()
            return 0
        return part.stat().st_size
    except OSError as error:
        raise StorageError(f"cannot write {part}: {error.strerror}", "free disk space there") from error


def _append(part: Path, piece: bytes) -> None:
    try:
        with part.open("ab") as file:
            file.write(piece)
    except OSError as error:
        raise StorageError(f"cannot write {part}: {error.strerror}", "free disk space there") from error


def _finish(part: Path, whole: Path, digest: bytes) -> bytes:
    try:
        data = part.read_bytes() if part.exists() else b""
        if sha256(data) != digest:
            # What a power cut left in a file may differ from what arrived: nothing of it is trusted.
            part.unlink(missing_ok=True)
            raise CorruptData(f"the data set {digest.hex()[:16]} does not have its hash", "it is fetched anew")
        if part.exists():
            part.rename(whole)
        files = sorted(whole.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in files[_KEPT:]:
            old.unlink()
    except OSError as error:
        raise StorageError(f"cannot write {whole}: {error.strerror}", "free disk space there") from error
    return data
