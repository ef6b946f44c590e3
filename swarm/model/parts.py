"""Tensors that came over a network, as safetensors files: one a part, resumed, whole or absent.

In: which tensors a part holds, and a way to read each stretch of their bytes from any offset on.
Out: `<part>.safetensors` in a folder. What has arrived is kept in `<part>.part` when a connection
breaks or the process ends, and the next `fill` goes on there. A stretch with a known hash is
verified before anything after it is written; the file gets its name once all of it is on disk. Two processes
that want the same part take turns. Never decides where bytes come from.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from swarm.errors import CorruptData, PeerLost, ProtocolError, StorageError
from swarm.model.sources import Located, TensorEntry, item_bits, read_header

_READ_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Stretch:
    """Bytes that follow each other in a part's file and come in one go."""

    label: str
    size: int
    read: Callable[[int], Iterator[bytes]]
    """The bytes from an offset within the stretch on; may end early or raise, and is asked again then."""
    sha256: bytes | None = None


@dataclass(frozen=True)
class Layout:
    """How a part's file is laid out: the same for the same tensors, so that a later process can go on."""

    head: bytes
    """Length and header, as the file begins."""
    order: tuple[str, ...]
    offsets: Mapping[str, int]
    """First byte of each tensor within the file."""


def lay_out(tensors: Mapping[str, TensorEntry]) -> Layout:
    """Widest items first, as readers want them aligned; in the order of the source within a width."""
    order = sorted(
        tensors, key=lambda n: (-item_bits(tensors[n].dtype), tensors[n].file, tensors[n].offset, tensors[n].size, n)
    )
    table, starts, at = {}, {}, 0
    for name in order:
        entry = tensors[name]
        table[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + entry.size]}
        starts[name] = at
        at += entry.size
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header
    return Layout(head, tuple(order), {name: len(head) + start for name, start in starts.items()})


class PartStore:
    """A folder of parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, dict[str, TensorEntry]] = {}

    def path(self, part: str) -> Path:
        """Where a part lies once it is whole. Any string is a part's name; none leads out of the folder."""
        readable = re.sub(r"[^A-Za-z0-9_.-]", "_", part)[:80]
        return self.folder / f"part-{readable}-{hashlib.sha256(part.encode()).hexdigest()[:8]}.safetensors"

    def local(self, part: str, name: str) -> Located | None:
        """Where a tensor of a part lies; None while the part is not whole. Raises CorruptData."""
        path = self.path(part)
        if part not in self._found:
            if not path.is_file():
                return None
            self._found[part] = read_header(path)
        entry = self._found[part].get(name)
        return Located(path, entry.offset, entry.size) if entry else None

    def fill(self, part: str, layout: Layout, stretches: Sequence[Stretch]) -> None:
        """Make a part whole. `stretches` cover the layout's tensors in order.

        Raises what reading raises, CorruptData (a hash), ProtocolError (too many bytes), PeerLost (too
        few), StorageError. What arrived and is not disproved is kept.
        """
        path = self.path(part)
        unfinished = path.with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with unfinished.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if path.is_file():  # another process had it meanwhile
                    unfinished.unlink(missing_ok=True)
                    return
                at = _begin(file, layout.head)
                for stretch in stretches:
                    _fetch(file, at, stretch)
                    at += stretch.size
                file.truncate(at)
                file.flush()
                os.fsync(file.fileno())
                unfinished.rename(path)
                _sync_folder(self.folder)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}", "free disk space there") from error


def _begin(file: BinaryIO, head: bytes) -> int:
    file.seek(0)
    if file.read(len(head)) != head:
        file.truncate(0)
        file.write(head)
        file.flush()
    return len(head)


def _fetch(file: BinaryIO, at: int, stretch: Stretch) -> None:
    """Complete the stretch that begins at byte `at`, trusting what is there only as far as its hash goes."""
    present = min(max(os.fstat(file.fileno()).st_size - at, 0), stretch.size)
    digest = hashlib.sha256()
    if stretch.sha256 is not None:
        for data in read_span(file, at, present):
            digest.update(data)
        if present == stretch.size:
            if digest.digest() == stretch.sha256:
                return
            file.truncate(at)
            present, digest = 0, hashlib.sha256()
    elif present == stretch.size:
        return
    for data in stretch.read(present):
        if present + len(data) > stretch.size:
            raise ProtocolError(f"more bytes came for {stretch.label} than it has")
        file.write(data)  # opened for appending: always at the end
        file.flush()
        digest.update(data)
        present += len(data)
    if present < stretch.size:
        raise PeerLost(f"the transfer of {stretch.label} ended after {present} of {stretch.size} bytes")
    if stretch.sha256 is not None and digest.digest() != stretch.sha256:
        file.truncate(at)
        raise CorruptData(f"the content of {stretch.label} is not what its hash says")


def read_span(file: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    """The bytes [start, start + size) of a file, or fewer if it ends."""
    file.seek(start)
    while size > 0 and (data := file.read(min(size, _READ_BYTES))):
        size -= len(data)
        yield data


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", "free disk space there") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
