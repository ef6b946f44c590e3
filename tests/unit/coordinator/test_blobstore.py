"""Blobs in a store behind a URL: the same promises, a store that fails, and places that cannot be used."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from coordinator.blobs import BlobBounds, Blobs, Progress
from coordinator.blobstore import (
    RANGE_BYTES,
    FolderStore,
    ObjectStore,
    canonical,
    check_place,
    check_url,
    note_place,
    open_store,
)
from coordinator.disk import Disk
from swarm.errors import BlobAbsent, CorruptData, DataDirLocked, InputError, StorageError
from swarm.ids import sha256

DATA = bytes(range(256)) * 4
BOUNDS = BlobBounds(max_blob_bytes=4096, max_partials=2, grace_s=60)


DISK = Disk(lambda point: None)


class Failing(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store in memory that loses its network, refuses, or keeps only half of what it is given."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    wrong = ""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if self.wrong == "network":
            raise RuntimeError("EndpointConnectionError: no route to the bucket")
        if self.wrong == "access":
            raise PermissionError("AccessDenied")
        super().pipe_file(path, value[: len(value) // 2] if self.wrong == "half" else value, mode)

    def put_file(self, local: str, path: str, **options: Any) -> None:
        self.pipe_file(path, Path(local).read_bytes())


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    fsspec.register_implementation("failing", Failing, clobber=True)
    yield
    for kind in (Failing, MemoryFileSystem):
        kind.store.clear()
    Failing.wrong = ""


@pytest.fixture(params=["memory", "local"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "memory":
        store = open_store("memory://bucket/job", tmp_path, "me", DISK)
    else:  # another driver of fsspec, on real files
        store = ObjectStore(DirFileSystem(str(tmp_path), LocalFileSystem()), "bucket", "me")
    return Blobs(tmp_path / "uploads", store, BOUNDS, lambda: now_s[0], DISK)


now_s = [0.0]


def test_pieces_become_an_object(blobs: Blobs) -> None:
    digest = sha256(DATA)
    assert blobs.put_piece(digest, len(DATA), 0, DATA[:700]) == Progress(700, False)
    assert blobs.size(digest) is None
    assert blobs.put_piece(digest, len(DATA), 700, DATA[700:]) == Progress(1024, True)
    assert blobs.read(digest) == DATA
    assert blobs.read_piece(digest, 1000, 500) == DATA[1000:]
    assert blobs.read_piece(digest, 4096, 500) == b""
    assert blobs.put_piece(digest, len(DATA), 0, b"") == Progress(1024, True)
    assert blobs.read(blobs.put(b"")) == b""


def test_what_is_absent_is_told_apart(blobs: Blobs) -> None:
    for ask in (blobs.read, lambda digest: blobs.read_piece(digest, 0, 1)):
        with pytest.raises(BlobAbsent):
            ask(sha256(b"never put"))


def test_only_old_and_unreferenced_objects_are_collected(blobs: Blobs) -> None:
    now_s[0] = 0.0
    kept, old = blobs.put(b"kept"), blobs.put(b"old")
    now_s[0] = 100.0
    assert blobs.collect({kept}) == 1
    assert (blobs.size(kept), blobs.size(old)) == (4, None)


def test_a_damaged_object_is_found_and_replaced(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path, open_store("memory://bucket", tmp_path, "me", DISK), BOUNDS, lambda: 0.0, DISK)
    digest = blobs.put(DATA)
    MemoryFileSystem().pipe_file(f"/bucket/{digest.hex()}", b"\x01" + DATA[1:])
    with pytest.raises(CorruptData):
        blobs.read(digest)
    assert blobs.read(blobs.put(DATA)) == DATA


class Ranged(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store in memory that notes how much each answer held."""

    protocol = "ranged"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    answers: ClassVar[list[int]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data = bytes(super().cat_file(path, start, end))
        self.answers.append(len(data))
        return data


def test_an_object_is_hashed_in_ranges() -> None:
    store = ObjectStore(Ranged(), "bucket", "me")
    for size in (0, 1, RANGE_BYTES, 2 * RANGE_BYTES + 5):
        data = random.Random(size).randbytes(size)
        name = sha256(data).hex()
        store.put(name, data)
        Ranged.answers.clear()
        assert store.sha256(name).hex() == name
        assert max(Ranged.answers, default=0) <= RANGE_BYTES
        assert sum(Ranged.answers) == size
    Ranged.store.clear()


@pytest.mark.parametrize("wrong", ["network", "access", "half"])
def test_a_store_that_fails_acknowledges_nothing_and_the_upload_goes_on(tmp_path: Path, wrong: str) -> None:
    blobs = Blobs(tmp_path, open_store("failing://bucket", tmp_path, "me", DISK), BOUNDS, lambda: 0.0, DISK)
    digest = sha256(DATA)
    Failing.wrong = wrong
    with pytest.raises(StorageError):
        blobs.put(b"an update")
    with pytest.raises(StorageError):
        blobs.put_piece(digest, len(DATA), 0, DATA)
    # Half an object under the right name is no blob: it is written again.
    Failing.wrong = ""
    assert blobs.put_piece(digest, len(DATA), len(DATA), b"") == Progress(len(DATA), True)
    assert blobs.read(digest) == DATA
    assert blobs.read(blobs.put(b"an update")) == b"an update"


def test_a_place_belongs_to_one_coordinator(tmp_path: Path) -> None:
    open_store("memory://bucket", tmp_path, "me", DISK)
    open_store("memory://bucket", tmp_path, "me", DISK)
    with pytest.raises(DataDirLocked, match="belong to coordinator me"):
        open_store("memory://bucket", tmp_path, "somebody else", DISK)


@pytest.mark.parametrize(("wrong", "fix"), [("network", "network"), ("access", "credentials")])
def test_a_place_that_cannot_be_written_is_known_at_the_start(tmp_path: Path, wrong: str, fix: str) -> None:
    Failing.wrong = wrong
    with pytest.raises(StorageError) as caught:
        open_store("failing://bucket", tmp_path, "me", DISK)
    assert fix in caught.value.fix


def test_urls_that_lead_nowhere_are_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match="no blob store is reached by gopher://"):
        check_url("gopher://bucket")
    fsspec.register_implementation(
        "absent", "no_such_package.Store", clobber=True, errtxt="pip install no-such-package"
    )
    with pytest.raises(InputError) as caught:
        check_url("absent://bucket")
    assert caught.value.fix == "pip install no-such-package"
    with pytest.raises(InputError, match="are lost"):
        check_url("memory://bucket")
    check_url("")
    check_url("/some/folder")


def test_a_folder_by_name_or_file_url_is_as_durable_as_the_default(tmp_path: Path) -> None:
    for place in ("", str(tmp_path / "one"), (tmp_path / "two").as_uri()):
        assert isinstance(open_store(place, tmp_path / "default", "me", DISK), FolderStore)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["default", "one", "two"]


def test_a_coordinator_is_not_started_away_from_its_blobs(tmp_path: Path) -> None:
    check_place(tmp_path / "new", "s3://mistyped")  # nothing is noted before a store there was opened
    check_place(tmp_path / "new", "s3://bucket")
    note_place(tmp_path / "new", "s3://bucket")
    check_place(tmp_path / "new", "s3://bucket")
    with pytest.raises(InputError, match="s3://bucket"):
        check_place(tmp_path / "new", "")
    check_place(tmp_path / "old", "")
    open_store("", tmp_path / "old" / "whole", "me", DISK)
    with pytest.raises(InputError, match="its data folder"):
        check_place(tmp_path / "old", "s3://bucket")


def test_a_folder_is_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert canonical("blobs/") == canonical((tmp_path / "blobs").as_uri()) == str(tmp_path / "blobs")
    assert (canonical(""), canonical("s3://bucket/x")) == ("", "s3://bucket/x")


def test_a_folder_on_another_disk_takes_uploads(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert os.stat(other).st_dev != tmp_path.stat().st_dev
        blobs = Blobs(tmp_path / "up", open_store(other, tmp_path, "me", DISK), BOUNDS, lambda: 0.0, DISK)
        assert blobs.put_piece(sha256(DATA), len(DATA), 0, DATA) == Progress(len(DATA), True)
        assert blobs.read(sha256(DATA)) == DATA
        assert list((tmp_path / "up").iterdir()) == []


def test_what_else_lies_in_a_folder_is_left_alone(tmp_path: Path) -> None:
    place, now_s = tmp_path / "shared", [0.0]
    place.mkdir()
    for name in ("notes.tmp", "backup.tar", "README", "lost+found"):
        (place / name).touch()
    blobs = Blobs(tmp_path / "up", open_store(str(place), tmp_path, "me", DISK), BOUNDS, lambda: now_s[0], DISK)
    blobs.put(DATA)
    now_s[0] = 1000.0
    assert blobs.collect([]) == 1
    assert sorted(path.name for path in place.iterdir()) == ["README", "backup.tar", "lost+found", "notes.tmp", "owner"]
    with pytest.raises(DataDirLocked, match="belong to coordinator me"):
        open_store(str(place), tmp_path, "somebody else", DISK)
