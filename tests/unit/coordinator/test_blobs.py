"""Blobs on a real folder: resumable, checked, bounded, collected only when nobody needs them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from coordinator.blobs import BlobBounds, Blobs, Progress
from coordinator.blobstore import FolderStore
from coordinator.disk import Disk
from swarm.errors import BlobAbsent, CorruptData, FrameTooLarge, ProtocolError, StorageError
from swarm.ids import sha256

DATA = bytes(range(256)) * 4


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def blobs(tmp_path: Path, clock: Clock) -> Blobs:
    return _open(tmp_path, clock)


def _open(root: Path, clock: Clock, point: object = None) -> Blobs:
    bounds = BlobBounds(max_blob_bytes=4096, max_partials=2, grace_s=60)
    told: Any = point or (lambda name: None)
    disk = Disk(told)
    return Blobs(root / "partial", FolderStore(root / "whole", disk), bounds, clock, disk)


def test_pieces_become_a_blob(blobs: Blobs) -> None:
    digest = sha256(DATA)
    assert blobs.put_piece(digest, len(DATA), 0, b"") == Progress(0, False)
    assert blobs.size(digest) is None
    assert blobs.put_piece(digest, len(DATA), 0, DATA[:700]) == Progress(700, False)
    assert blobs.put_piece(digest, len(DATA), 700, DATA[700:]) == Progress(1024, True)
    assert blobs.read(digest) == DATA
    assert blobs.read_piece(digest, 1000, 500) == DATA[1000:]
    assert blobs.read_piece(digest, 2**64 - 1, 500) == b""
    assert blobs.put_piece(digest, len(DATA), 0, b"") == Progress(1024, True)


def test_a_piece_elsewhere_only_says_where_to_go_on(blobs: Blobs) -> None:
    digest = sha256(DATA)
    blobs.put_piece(digest, len(DATA), 0, DATA[:100])
    assert blobs.put_piece(digest, len(DATA), 0, DATA[:50]) == Progress(100, False)
    assert blobs.put_piece(digest, len(DATA), 400, DATA[400:]) == Progress(100, False)


def test_an_upload_survives_a_restart(tmp_path: Path, clock: Clock) -> None:
    digest = sha256(DATA)
    _open(tmp_path, clock).put_piece(digest, len(DATA), 0, DATA[:333])
    again = _open(tmp_path, clock)
    assert again.put_piece(digest, len(DATA), 0, b"") == Progress(333, False)
    assert again.put_piece(digest, len(DATA), 333, DATA[333:]).complete


def test_all_bytes_there_but_not_yet_published(tmp_path: Path, clock: Clock) -> None:
    digest = sha256(DATA)
    blobs = _open(tmp_path, clock)
    (tmp_path / "partial" / digest.hex()).write_bytes(DATA)
    assert blobs.put_piece(digest, len(DATA), 0, b"") == Progress(1024, True)
    assert blobs.read(digest) == DATA


def test_a_wrong_hash_deletes_the_upload(blobs: Blobs, tmp_path: Path) -> None:
    digest = sha256(b"something else")
    with pytest.raises(CorruptData):
        blobs.put_piece(digest, len(DATA), 0, DATA)
    assert os.listdir(tmp_path / "partial") == []
    assert blobs.put_piece(digest, len(DATA), 0, b"") == Progress(0, False)


def test_bounds(blobs: Blobs) -> None:
    with pytest.raises(FrameTooLarge):
        blobs.put_piece(sha256(b"1"), 4097, 0, b"")
    with pytest.raises(ProtocolError):
        blobs.put_piece(sha256(b"1"), 10, 5, b"too long")
    with pytest.raises(ProtocolError):
        blobs.put_piece(b"../../etc/passwd", 10, 0, b"1")
    for name in (b"1", b"2"):
        blobs.put_piece(sha256(name), 10, 0, name)
    with pytest.raises(StorageError, match="unfinished"):
        blobs.put_piece(sha256(b"3"), 10, 0, b"3")


def test_the_empty_blob(blobs: Blobs) -> None:
    assert blobs.put_piece(sha256(b""), 0, 0, b"") == Progress(0, True)
    assert blobs.read(blobs.put(b"")) == b""


def test_damage_is_found_and_replaced(blobs: Blobs, tmp_path: Path) -> None:
    digest = blobs.put(DATA)
    path = tmp_path / "whole" / digest.hex()
    for again in (lambda: blobs.put(DATA), lambda: blobs.put_piece(digest, len(DATA), 0, DATA)):
        path.write_bytes(b"\x01" + DATA[1:])
        for _ in range(2):
            with pytest.raises(CorruptData):
                blobs.read(digest)
        with pytest.raises(CorruptData):
            blobs.read_piece(digest, 0, 1)
        assert blobs.size(digest) is None, "as good as absent"
        assert path.exists(), "nothing is removed before there is something better"
        again()
        assert blobs.read(digest) == DATA
        assert blobs.read_piece(digest, 0, 1) == DATA[:1]


def test_what_is_absent_is_told_apart(blobs: Blobs) -> None:
    for ask in (blobs.read, lambda digest: blobs.read_piece(digest, 0, 1)):
        with pytest.raises(BlobAbsent):
            ask(sha256(b"never put"))


def test_only_old_and_unreferenced_files_are_collected(blobs: Blobs, clock: Clock) -> None:
    kept, old, used = blobs.put(b"kept"), blobs.put(b"old"), blobs.put(b"used")
    blobs.put_piece(sha256(b"half"), 4, 0, b"ha")
    clock.now_s = 59
    assert blobs.collect({kept}) == 0
    blobs.size(used)
    fresh = blobs.put(b"fresh")
    clock.now_s = 100
    assert blobs.collect({kept}) == 2  # "old" and the upload nobody went on with
    assert [blobs.size(x) is None for x in (kept, old, used, fresh)] == [False, True, False, False]


def test_what_is_no_upload_of_ours_is_left_alone(tmp_path: Path, blobs: Blobs, clock: Clock) -> None:
    blobs.put_piece(sha256(b"half"), 4, 0, b"ha")
    (foreign,) = (path.with_name("notes.txt") for path in tmp_path.glob("**/" + sha256(b"half").hex()))
    foreign.write_text("somebody else's")
    clock.now_s += 61
    assert blobs.collect(()) == 1
    assert foreign.exists()


def test_a_disk_that_refuses_leaves_what_was_committed(tmp_path: Path, clock: Clock) -> None:
    full = False

    def point(name: str) -> None:
        if full and name == "before piece fsync":
            raise OSError(28, "No space left on device")

    blobs = _open(tmp_path, clock, point)
    digest = sha256(DATA)
    blobs.put_piece(digest, len(DATA), 0, DATA[:100])
    full = True
    with pytest.raises(StorageError, match="No space left"):
        blobs.put_piece(digest, len(DATA), 100, DATA[100:])
    full = False
    assert blobs.put_piece(digest, len(DATA), 100, b"") == Progress(100, False)
    assert blobs.put_piece(digest, len(DATA), 100, DATA[100:]).complete
